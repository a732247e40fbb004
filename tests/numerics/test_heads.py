"""Checkpoints with a head: the exported scores against transformers' own eager answer, on padded batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.check.findings import CheckRequest
from attnserve_server.conversion.check.recheck import check_bundle
from attnserve_server.conversion.convert import ExportRequest, export_bundle
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.model.repository import Bundle
from head_checkpoints import checkpoint
from rich.console import Console

pytestmark = pytest.mark.torch

# float32: the order of sums differs from torch's.
OUTPUT_TOLERANCE = 1e-5
LENGTHS = (7, 3, 5)


def exported(source: Path, repository: Path, steps: Steps | None = None, **changes: Any) -> Bundle:
    request = ExportRequest(source=str(source), name="tiny", repository=repository, exporter="torchscript", **changes)
    return export_bundle(request, steps)


def eager_scores(source: Path, loader: str, outputs: tuple[str, ...]) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Return the ids of each sequence, and the scores of the sequence alone."""
    import torch  # noqa: PLC0415 - heavy
    import transformers  # noqa: PLC0415

    model = getattr(transformers, loader).from_pretrained(source, attn_implementation="eager").eval()
    random = np.random.default_rng(3)
    found = []
    for length in LENGTHS:
        ids = random.integers(5, 40, length)
        with torch.inference_mode():
            answer = model(
                input_ids=torch.from_numpy(ids[None]), attention_mask=torch.ones(1, length, dtype=torch.long)
            )
        found.append((ids, {name: answer[name][0].numpy() for name in outputs}))
    return found


def run(bundle: Bundle, rows: list[np.ndarray], outputs: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Run the sequences as one padded batch."""
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    mask = np.zeros_like(ids)
    for row, own in enumerate(rows):
        ids[row, : len(own)], mask[row, : len(own)] = own, 1
    feeds = {"input_ids": ids, "attention_mask": mask}
    feeds |= {spec.name: np.zeros_like(ids) for spec in bundle.manifest.inputs if spec.name == "token_type_ids"}
    return GraphRunner(bundle.model_path).run(feeds, list(outputs))


@pytest.mark.parametrize(
    ("family", "head", "loader", "changes", "kind"),
    [
        (
            "Bert",
            "ForSequenceClassification",
            "AutoModelForSequenceClassification",
            {"num_labels": 3},
            "sequence_labels",
        ),
        ("DebertaV2", "ForSequenceClassification", "AutoModelForSequenceClassification", {}, "sequence_labels"),
        ("DistilBert", "ForTokenClassification", "AutoModelForTokenClassification", {"num_labels": 5}, "token_labels"),
        ("Roberta", "ForQuestionAnswering", "AutoModelForQuestionAnswering", {}, "spans"),
        ("Bert", "ForMaskedLM", "AutoModelForMaskedLM", {}, "masked_tokens"),
    ],
)
def test_scores_of_a_padded_batch_equal_those_of_each_sequence_alone(
    family: str, head: str, loader: str, changes: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    source = checkpoint(tmp_path / "source", family, head, **changes)
    bundle = exported(source, tmp_path / "models")
    spec = bundle.manifest.head
    assert spec is not None
    assert spec.kind == kind
    assert bundle.manifest.axis("seq").paddable
    expected = eager_scores(source, loader, spec.outputs)
    found = run(bundle, [ids for ids, _ in expected], spec.outputs)
    for row, (ids, scores) in enumerate(expected):
        for name, own in scores.items():
            rows = found[name][row][: len(ids)] if spec.axis_first else found[name][row]
            np.testing.assert_allclose(rows, own, rtol=0, atol=OUTPUT_TOLERANCE)
    assert all(site.available for site in bundle.manifest.sites)


def test_labels_and_activation_are_those_of_the_configuration(tmp_path: Path) -> None:
    names = {0: "negative", 1: "neutral", 2: "positive"}
    source = checkpoint(
        tmp_path / "source",
        "Bert",
        "ForSequenceClassification",
        id2label=names,
        label2id={label: number for number, label in names.items()},
        problem_type="multi_label_classification",
    )
    manifest = exported(source, tmp_path / "models").manifest
    assert manifest.head is not None
    assert manifest.head.labels == ("negative", "neutral", "positive")
    assert manifest.head.activation == "sigmoid"
    assert [spec.name for spec in manifest.outputs if not spec.on_request] == ["logits"]
    assert [spec.name for spec in manifest.outputs if spec.on_request] == ["last_hidden_state"]
    check = check_bundle(CheckRequest(path=tmp_path / "models" / "tiny" / "1", against=str(source)))
    assert check.passed


def test_no_head_exports_hidden_states_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoint(tmp_path / "source", "Bert", "ForSequenceClassification")
    manifest = exported(source, tmp_path / "models", Steps(Console(stderr=True)), head=False).manifest
    assert manifest.head is None
    assert [(spec.name, spec.on_request) for spec in manifest.outputs] == [("last_hidden_state", False)]
    assert "without its head" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "head"), [("GPT2", "LMHeadModel"), ("Bart", "ForSequenceClassification"), ("Bert", "ForPreTraining")]
)
def test_a_head_that_cannot_be_labelled_is_left_out_with_a_warning(
    family: str, head: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint(tmp_path / "source", family, head)
    manifest = exported(source, tmp_path / "models", Steps(Console(stderr=True, width=400))).manifest
    assert manifest.head is None
    assert f"{family}{head} is converted as {family}Model: without its head" in capsys.readouterr().err


def test_a_head_whose_weights_are_missing_is_left_out_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.numpy import load_file, save_file  # noqa: PLC0415 - installed with transformers

    source = checkpoint(tmp_path / "source", "Bert", "ForSequenceClassification")
    weights = source / "model.safetensors"
    kept = {name: value for name, value in load_file(weights).items() if not name.startswith("classifier")}
    save_file(kept, weights, metadata={"format": "pt"})
    manifest = exported(source, tmp_path / "models", Steps(Console(stderr=True, width=400))).manifest
    assert manifest.head is None
    assert "BertForSequenceClassification is converted as BertModel: without its head" in capsys.readouterr().err


def test_head_of_an_int8_export_keeps_its_labels(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", "Bert", "ForTokenClassification", num_labels=5)
    manifest = exported(source, tmp_path / "models", precision="int8").manifest
    assert manifest.head is not None
    assert manifest.head.outputs == ("logits",)
    assert manifest.precision == "int8"
