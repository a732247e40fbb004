"""The cost of a reduced precision: on sentences where a model takes text, else on random inputs.

Quality is the cosine of outputs and the share of equal strongest keys, against the graph before it was reduced. A mean
cosine below the limit raises CheckFailed; a missed target is a warning.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from attnserve_server.conversion.base.errors import CheckFailed
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from attnserve_server.conversion.inputs.signature import Signature
from attnserve_server.conversion.precision.comparison import Subject, cosine, paired_sites
from attnserve_server.conversion.precision.quality import judge_quality, measure
from attnserve_server.conversion.precision.sentences import Material, material_of, sentences
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.model.report import QualityReport
from attnserve_server.model.tokenizer import TextTokenizer
from onnx import helper, numpy_helper
from onnx_files import WIDTH, encoder, saved
from tiny_bundle import VOCABULARY, tiny_graph, tiny_manifest, tiny_tokenizer


def subject(folder: Path, factor: float = 1.0) -> Subject:
    """The tiny model, its embeddings scaled."""
    model = tiny_graph()
    (table,) = [tensor for tensor in model.graph.initializer if tensor.name == "table"]
    table.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(table) * np.float32(factor), "table"))
    path = saved(model, folder / f"{factor}.onnx")
    return Subject(RuntimeSession.load(path, provider="CPUExecutionProvider"), tiny_manifest())


def sampler() -> Sampler:
    return Sampler(Signature(tiny_manifest().inputs, ("seq",)), len(VOCABULARY))


def projected() -> onnx.ModelProto:
    """The encoder with a MatMul behind it that can be rounded."""
    model = encoder()
    weights = np.random.default_rng(2).normal(0, 0.2, (WIDTH, WIDTH)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weights, "weights"))
    model.graph.node.append(helper.make_node("MatMul", ["hidden", "weights"], ["projected"], name="/out/MatMul"))
    model.graph.output[0].name = "projected"
    return model


def report(**changes: object) -> QualityReport:
    fields = {"against": "x", "inputs": "y", "sequences": 1, "output": "z", "cosine_mean": 1.0, "cosine_worst": 1.0}
    return QualityReport.model_validate({**fields, **changes})


def test_sentences_are_many_distinct_and_of_varied_length() -> None:
    lines = sentences()
    words = [len(line.split()) for line in lines]
    assert len(set(lines)) == len(lines) >= 300
    assert (min(words), max(words)) == (3, 119)
    assert len(set(words)) > 40
    # The sentences follow no template: hardly two begin with the same three words.
    starts = [" ".join(re.findall(r"\w+", line.lower())[:3]) for line in lines]
    assert len(set(starts)) > 0.95 * len(starts)


def test_model_agrees_with_itself_in_everything(tmp_path: Path) -> None:
    one = subject(tmp_path)
    material = material_of(one.manifest, TextTokenizer(tiny_tokenizer(), "seq"), sampler())
    quality = measure(one, one, material, "itself")
    assert (quality.inputs, quality.output, quality.against) == (
        f"{len(sentences())} English sentences",
        "embedding",
        "itself",
    )
    assert quality.cosine_worst == pytest.approx(1.0)
    assert quality.top1_agreement == 1.0
    assert quality.speed_ratio is not None
    assert quality.speed_ratio > 0


def test_attention_rows_are_counted_without_padding(tmp_path: Path) -> None:
    one = subject(tmp_path)
    ids = [np.array([2, 5, 3]), np.array([2, 5, 6, 7, 8, 9, 3])]
    sequences = tuple({"input_ids": own, "attention_mask": np.ones_like(own)} for own in ids)
    quality = measure(one, one, Material("two", sequences), "itself")
    layers, heads = 2, 2
    assert quality.attention_rows == layers * heads * (3 + 7)


def test_other_weights_lower_the_cosine_and_change_the_strongest_keys(tmp_path: Path) -> None:
    one, other = subject(tmp_path), subject(tmp_path, factor=-3.0)
    quality = measure(other, one, material_of(one.manifest, None, sampler()), "another")
    assert quality.inputs == "32 random inputs"
    assert quality.cosine_mean < 0.9
    assert quality.top1_agreement is not None
    assert quality.top1_agreement < 0.95


LOWEST = float(np.finfo(np.float32).min)


@pytest.mark.parametrize(
    ("own", "true", "expected"),
    [
        ([1.0, -np.inf, 2.0], [1.0, -np.inf, 2.0], 1.0),
        ([1.0, -np.inf, 2.0], [1.0, LOWEST, 2.0], 1.0),
        ([1.0, -np.inf, 2.0], [-1.0, -np.inf, -2.0], -1.0),
        ([1.0, np.inf, 2.0], [1.0, -np.inf, 2.0], 0.0),
        ([1.0, -np.inf, 2.0], [1.0, 0.0, 2.0], 0.0),
        ([1.0, 0.0, 2.0], [1.0, -np.inf, 2.0], 0.0),
        ([1.0, np.nan, 2.0], [1.0, 0.0, 2.0], 0.0),
        ([-np.inf, -np.inf], [-np.inf, -np.inf], 1.0),
    ],
)
def test_infinities_count_where_only_one_output_has_them(own: list[float], true: list[float], expected: float) -> None:
    assert cosine(np.array(own, np.float32), np.array(true, np.float32)) == pytest.approx(expected)


def test_sites_are_matched_only_where_both_graphs_have_as_many() -> None:
    manifest = tiny_manifest()
    fewer = manifest.model_copy(update={"sites": manifest.sites[:1]})
    assert paired_sites(manifest, manifest) == [(0, 0), (1, 1)]
    assert paired_sites(manifest, fewer) == []


def test_text_is_cut_to_the_models_greatest_length() -> None:
    manifest = tiny_manifest()
    material = material_of(manifest, TextTokenizer(tiny_tokenizer(), "seq"), sampler())
    assert max(len(sequence["input_ids"]) for sequence in material.sequences) == manifest.axis("seq").max_length
    assert all(sequence["attention_mask"].all() for sequence in material.sequences)


def test_model_with_a_low_cosine_is_refused() -> None:
    with pytest.raises(CheckFailed, match=r"in int8 the mean cosine of z with x is 0\.500, less than 0\.9; no bundle"):
        judge_quality(report(cosine_mean=0.5), "int8", Steps.silent())


class Recorded(Steps):
    """Steps that keep their warnings."""

    def __init__(self) -> None:
        super().__init__()
        self.warnings: list[str] = []

    def warn(self, what: str) -> None:
        self.warnings.append(what)


def test_missed_targets_are_warnings() -> None:
    steps = Recorded()
    judge_quality(report(cosine_mean=0.98, top1_agreement=0.94), "int8", steps)
    assert steps.warnings == [
        "int8: the mean cosine 0.9800 is below 0.99",
        "int8: 94.0% of attention rows keep their strongest key, fewer than 95%",
    ]
    judge_quality(report(cosine_mean=0.99, top1_agreement=0.95), "int8", steps)
    assert len(steps.warnings) == 2


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_prepared_bundle_has_a_quality_report(precision: str, tmp_path: Path) -> None:
    file = saved(projected(), tmp_path / "ranker.onnx")
    request = PrepareRequest(file=file, name="ranker", repository=tmp_path / "models", precision=precision)  # type: ignore[arg-type]
    manifest = prepare_bundle(request).manifest
    assert manifest.precision == precision
    quality = manifest.check.quality
    assert quality is not None
    assert (quality.inputs, quality.against) == ("32 random inputs", "the same graph in fp32")
    assert quality.cosine_worst > 0.99
    assert quality.top1_agreement is not None
    assert quality.top1_agreement > 0.95
    assert manifest.golden is not None
    assert manifest.golden.output_tolerance == {"fp16": 2e-2, "int8": 1e-1}[precision]


def test_unreduced_source_has_no_quality_report(tmp_path: Path) -> None:
    file = saved(projected(), tmp_path / "ranker.onnx")
    manifest = prepare_bundle(PrepareRequest(file=file, name="ranker", repository=tmp_path / "models")).manifest
    assert manifest.check.quality is None
