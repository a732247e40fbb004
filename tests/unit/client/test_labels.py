"""Labels in results, in the command's output and in pages; their selection in requests.

Labels are the class names, each with a score, that a model's head gives. The fixture `server` is a fake server with a
head. A selection of another type raises TypeError, and a value that does not fit InvalidRequest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
from attnserve.v1 import labels_pb2
from attnserve_client import AttentionSelection, Client, InvalidRequest, LabelSelection
from attnserve_client._labels import labels_of, selection_of
from attnserve_client.cli._app import app
from attnserve_client.testing import FakeServer
from typer.testing import CliRunner

CLASSES = ("negative", "<b>positive</b>")


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    with FakeServer(labels=CLASSES) as started:
        yield started


def test_labels_are_the_softmax_of_the_logits(server: FakeServer) -> None:
    with Client(server.target) as client:
        result = client.infer("fake", "a text")
    assert result.labels is not None
    raised = np.exp(result.outputs["logits"].astype(np.float64))
    for label in result.labels.labels:
        assert label.text == CLASSES[label.index]
        assert label.score == pytest.approx(raised[label.index] / raised.sum(), abs=1e-6)  # sent as float32
    assert result.labels[0] == result.labels.labels[0]


def test_repr_is_short() -> None:
    message = labels_pb2.Labels(kind=labels_pb2.HEAD_KIND_SEQUENCE_LABELS)
    message.labels.extend(labels_pb2.Label(index=at, text=f"class {at}", score=0.5 - at / 10) for at in range(5))
    assert repr(labels_of(message)) == "Labels(class 0 0.5, class 1 0.4, class 2 0.3, ...)"
    spans = labels_pb2.Labels(kind=labels_pb2.HEAD_KIND_TOKEN_LABELS)
    spans.spans.add(text="Zürich", start=2, end=8, labels=[labels_pb2.Label(text="PLACE", score=0.75)], score=0.75)
    assert repr(labels_of(spans)) == "Labels(Zürich: PLACE 0.75)"
    answers = labels_pb2.Labels(kind=labels_pb2.HEAD_KIND_SPANS)
    answers.spans.add(text="in 1905", score=0.5)
    assert str(labels_of(answers)) == "in 1905: 0.5"


def test_the_page_has_the_labels_as_text(server: FakeServer) -> None:
    with Client(server.target) as client:
        result = client.infer("fake", "a text", attention=AttentionSelection(layers=[-1]))
    page = result.attention[0].to_html()
    assert "Labels: " in page
    assert "&lt;b&gt;positive&lt;/b&gt;" in page
    assert "<b>positive" not in page


def test_a_model_without_a_head_refuses_labels_and_gives_none(shared_server: FakeServer) -> None:
    with Client(shared_server.target) as client:
        assert client.infer("fake", "a text").labels is None
        assert client.model("fake").head is None
        with pytest.raises(InvalidRequest) as refused:
            client.infer("fake", "a text", labels=True)
    assert refused.value.violations[0].field == "labels"


def test_top_k_and_min_score_are_sent(server: FakeServer) -> None:
    with Client(server.target) as client:
        result = client.infer("fake", "a text", outputs=[], labels=LabelSelection(top_k=1, min_score=0.25))
    assert result.labels is not None
    assert len(result.labels) == 1
    sent = server.requests[-1].labels
    assert (sent.top_k, sent.min_score) == (1, 0.25)


@pytest.mark.parametrize(
    ("selection", "field"),
    [(LabelSelection(top_k=-1), "labels.top_k"), (LabelSelection(unit="page"), "labels.unit")],  # type: ignore[arg-type]
)
def test_a_value_that_does_not_fit_is_refused_before_it_is_sent(selection: LabelSelection, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        selection.to_wire()
    assert refused.value.violations[0].field == field


@pytest.mark.parametrize("labels", [False, "all", 3])
def test_a_selection_of_another_type_is_a_type_error(labels: object) -> None:
    with pytest.raises(TypeError, match="labels must be a LabelSelection, a dict of its fields, True or None"):
        selection_of(labels)  # type: ignore[arg-type]


def run(*arguments: str) -> str:
    """Return what the command prints."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout


def test_infer_prints_a_table_of_labels(server: FakeServer) -> None:
    printed = run("infer", "fake", "a text", "--server", server.target)
    assert "label" in printed
    assert all(label in printed for label in CLASSES)


def test_infer_prints_labels_as_json(server: FakeServer) -> None:
    (result,) = json.loads(run("infer", "fake", "a text", "--top-labels", "1", "--json", "--server", server.target))[
        "results"
    ]
    assert result["labels"]["kind"] == "sequence_labels"
    assert len(result["labels"]["labels"]) == 1


def test_explain_prints_labels_beside_the_attention(server: FakeServer) -> None:
    printed = run("explain", "fake", "a text", "--server", server.target)
    assert CLASSES[0] in printed
    assert "strongest links" in printed


def test_models_prints_the_head(server: FakeServer) -> None:
    assert "head   sequence_labels, softmax of logits: negative" in run("models", "fake", "--server", server.target)
