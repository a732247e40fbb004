"""`inspect`: the description of bundles and ONNX files, as tables and as JSON.

A bundle is the folder of one converted model. Refused input, such as a bundle with a changed file, exits with 2.
"""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import typer
from attention_graphs import Case
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from attnserve_server.conversion.inspect import described_axis, inspect_model
from attnserve_server.model.certificate import Clause, MaskNeed, PathStep, Verdict
from attnserve_server.model.manifest import AxisSpec, DerivedLength
from attnserve_server.model.repository import write_bundle
from cache_graphs import CachedDecoder
from commands import call, conversion_app
from made_by_hand import SURVIVED, certificate
from onnx_files import encoder, saved
from tiny_bundle import tiny_manifest, write_tiny_files
from two_sided_graphs import words_over_patches
from windowed_graphs import Windowed

pytestmark = pytest.mark.slow

MEAN = PathStep(node="/mean", operator="ReduceMean", words="averages over all positions")
REFUTED = Clause(
    axis="seq",
    verdict=Verdict.REFUTED,
    reason="a mean over padded positions",
    path=(MEAN,),
    targets={"hidden": Verdict.REFUTED, "attention.layer0": Verdict.PROVED},
)


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    return conversion_app()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return saved(encoder(), tmp_path / "ranker.onnx")


@pytest.fixture
def certified(tmp_path: Path) -> Path:
    """A bundle with a hand-made certificate."""
    need = MaskNeed(input="attention_mask", need="some", allowed_value=1)
    attacked = Clause(axis="batch", verdict=Verdict.UNKNOWN, reason="Foo is not known", attack=SURVIVED)
    made = certificate(clauses=(attacked, REFUTED), masks=(need,)).model_copy(update={"noise": {"hidden": 2e-7}})
    manifest = tiny_manifest().model_copy(update={"certificate": made})
    (tmp_path / "files").mkdir()
    return write_bundle(tmp_path / "models", manifest, write_tiny_files(tmp_path / "files")).path


def test_batching_shows_the_path_behind_each_verdict(app: typer.Typer, certified: Path) -> None:
    needed = "a position in each row of attention_mask allowed equal to 1"
    assert call(app, "inspect", certified, "--batching").stdout.splitlines() == [
        "tiny/1",
        "batch neighbours: unknown, rows share runs under tested",
        "  why: Foo is not known",
        "  attack: 20 probes in 1.0 s, worst 0.1 of the allowed difference",
        "padding along seq: refuted, padded under no policy",
        "  why: a mean over padded positions, at ReduceMean '/mean'",
        "  path from the padded position:",
        "    /mean (ReduceMean): averages over all positions",
        "  hidden: refuted",
        "  attention.layer0: proved",
        f"padded only with {needed}; other sequences run with equal lengths",
        "noise among batch shapes, identical neighbours: at most 2e-07, at hidden",
    ]


def test_json_includes_the_certificate(app: typer.Typer, certified: Path) -> None:
    described = json.loads(call(app, "inspect", certified, "--batching", "--json").stdout)
    batch, seq = described["batching"]["clauses"]
    assert (batch["axis"], batch["under"]) == ("batch", {"proved": False, "tested": True, "off": False})
    assert seq["path"] == [{"node": "/mean", "operator": "ReduceMean", "words": "averages over all positions"}]
    assert described["batching"]["masks"][0]["input"] == "attention_mask"
    assert [axis["paddable"] for axis in described["axes"]] == [False]


def test_batching_refuses_an_onnx_file_and_names_certify_for_format_1(
    app: typer.Typer, file: Path, tmp_path: Path
) -> None:
    refused = call(app, "inspect", file, "--batching")
    assert refused.exit_code == 2
    assert "error: ranker.onnx is an ONNX file, not a bundle" in refused.stderr
    (tmp_path / "files").mkdir()
    old = tiny_manifest().model_copy(update={"format": 1, "certificate": None})
    path = write_bundle(tmp_path / "models", old, write_tiny_files(tmp_path / "files")).path
    assert "check BUNDLE --certify" in call(app, "inspect", path, "--batching").stdout
    assert json.loads(call(app, "inspect", path, "--json").stdout)["batching"]["format"] == 1


def test_onnx_file_is_shown_with_its_axes_and_sites(app: typer.Typer, tmp_path: Path) -> None:
    model = Case(heads=4, kv_heads=2, attributes={"is_causal": 1}).model()
    result = call(app, "inspect", saved(model, tmp_path / "bare.onnx"))
    assert result.exit_code == 0
    for words in ("axis symbols: batch, query_len, key_len", "batch x 4 x query_len x 8", "attention_0", "4 over 2"):
        assert words in result.stdout
    assert "causal, dense" in result.stdout
    assert "query_len, key_len" in result.stdout


def test_cross_attention_is_recognised_by_its_axes(tmp_path: Path) -> None:
    (cross,) = inspect_model(saved(Case().model(), tmp_path / "cross.onnx")).sites
    assert (cross.kind, cross.query_axis, cross.key_axis) == ("cross", "query_len", "key_len")
    model = encoder(length=None)
    (unnamed,) = inspect_model(saved(model, tmp_path / "unnamed.onnx")).sites
    assert (unnamed.kind, unnamed.query_axis, unnamed.key_axis) == ("self", "", "")


def test_site_without_weights_is_shown_with_its_reason(app: typer.Typer, tmp_path: Path) -> None:
    model = Case(kv_heads=4).model()
    model.graph.node[0].input.extend(["", "past"])
    # A past of a fixed length is never empty, so that it stays.
    model.graph.input.append(onnx.helper.make_tensor_value_info("past", onnx.TensorProto.FLOAT, ["batch", 4, 3, 8]))
    path = saved(model, tmp_path / "cached.onnx")
    said = json.loads(call(app, "inspect", path, "--json").stdout)
    assert said["sites"][0]["available"] is False
    assert "past_key" in said["sites"][0]["unavailable_reason"]
    assert "no: it takes past_key" in call(app, "inspect", path).stdout


def test_tables_and_json_show_the_same_facts_of_a_bundle(app: typer.Typer, file: Path, tmp_path: Path) -> None:
    call(app, "prepare", file, "--name", "ranker", "--repository", tmp_path / "models")
    folder = tmp_path / "models" / "ranker" / "1"
    facts = json.loads(call(app, "inspect", folder, "--json").stdout)
    assert facts == json.loads(inspect_model(folder).model_dump_json())
    assert facts["axis_symbols"] == ["batch", "seq"]
    assert facts["sites"][0] | {"available": True, "query_axis": "seq", "heads": 4} == facts["sites"][0]
    shown = call(app, "inspect", folder).stdout
    assert (facts["source"], facts["precision"], facts["max_batch_size"]) == ("ranker.onnx", "fp32", 32)
    assert facts["text_axes"] == []
    whole = "made from ranker.onnx; fp32, takes no text, batches of up to 32"
    for words in (
        "ranker/1",
        whole,
        facts["digest"],
        "block.0.attention",
        "self, dense",
        "seq, seq",
        "batch x seq x 16",
    ):
        assert words in shown


def test_windowed_site_is_shown_with_the_width_of_its_band(app: typer.Typer, tmp_path: Path) -> None:
    windowed = Windowed(block=4, before=1, after=1)
    call(app, "prepare", saved(windowed.model(), tmp_path / "long.onnx"), "--name", "long", "--repository", tmp_path)
    folder = tmp_path / "long" / "1"
    [site] = inspect_model(folder).sites
    assert (site.form, site.band, site.band_width) == ("windowed", "blocks", windowed.width)
    assert f"band of {windowed.width}" in call(app, "inspect", folder).stdout


def test_model_without_attention_is_reported(app: typer.Typer, tmp_path: Path) -> None:
    path = saved(encoder(attend=False), tmp_path / "plain.onnx")
    assert "no attention sites" in call(app, "inspect", path).stdout


def test_bundle_with_a_changed_file_is_refused(app: typer.Typer, file: Path, tmp_path: Path) -> None:
    call(app, "prepare", file, "--name", "ranker", "--repository", tmp_path / "models")
    model = tmp_path / "models" / "ranker" / "1" / "model.onnx"
    model.write_bytes(model.read_bytes() + b"\0")
    result = call(app, "inspect", model.parent)
    assert result.exit_code == 2
    assert "error: bundle ranker/1: model.onnx: sha256" in result.stderr


def test_axes_of_a_bundle_are_described(app: typer.Typer, tmp_path: Path) -> None:
    file = saved(words_over_patches(50, leading=1), tmp_path / "clip.onnx")
    call(app, "prepare", file, "--name", "clip", "--repository", tmp_path / "models")
    folder = tmp_path / "models" / "clip" / "1"
    assert [(axis.symbol, axis.how) for axis in inspect_model(folder).axes] == [
        ("seq", ""),
        ("fixed_7", "fixed, 2 x 3 patches behind 1"),
    ]
    assert "fixed, 2 x 3 patches behind 1" in call(app, "inspect", folder).stdout


@pytest.mark.parametrize(
    ("stride", "offset", "words"),
    [(4, 3, "(seq + 3) / 4"), (1, 1, "seq + 1"), (2, 0, "seq / 2"), (2, -1, "(seq - 1) / 2")],
)
def test_derived_axis_is_shown_as_its_formula(stride: int, offset: int, words: str) -> None:
    form = DerivedLength(source="seq", stride=stride, offset=offset)
    axis = AxisSpec(symbol="pooled", max_length=9, paddable=True, derived=form)
    assert described_axis(axis).how == words


def test_a_decoder_with_a_cache_is_described_as_it_is_served(app: typer.Typer, tmp_path: Path) -> None:
    file = saved(CachedDecoder(layers=1).model(), tmp_path / "decoder.onnx")
    described = inspect_model(file)
    assert [tensor.name for tensor in described.inputs] == ["input_ids", "attention_mask", "position_ids"]
    assert [site.available for site in described.sites] == [True]
    bundle = prepare_bundle(PrepareRequest(file=file, name="decoder", repository=tmp_path / "models", max_length=16))
    outputs = {tensor.name: tensor.on_request for tensor in inspect_model(bundle.path).outputs}
    assert outputs == {"logits": False, "present.0.key": True, "present.0.value": True}
    assert call(app, "inspect", bundle.path).stdout.count("output, on request") == 2
