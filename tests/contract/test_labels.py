"""Labels of models with a head, through a real server: scores from the definition in float64, spans in the text.

A head is the part of a manifest by which the server makes labels of an output's scores. `write_labelled` writes a
bundle of the tiny model with a head whose scores are a row of `table` for each token.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from attnserve_client import AsyncClient, AttentionSelection, InvalidRequest, LabelSelection
from attnserve_server.app import Application
from attnserve_server.config import Settings
from attnserve_server.model.heads import HeadSpec
from labelled_models import table, write_labelled
from tiny_bundle import VOCABULARY

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXT = "the cat sat on a mat"
OTHER = "a dog and the cat looked at the mat"
CLASSES = ("negative", "neutral", "positive")
TAGS = ("O", "ANIMAL", "PLACE", "VERB")
# float32 outputs of the graph, sums of at most eleven numbers.
TOLERANCE = 1e-5

MODELS = {
    "classifier": (HeadSpec(kind="sequence_labels", outputs=("logits",), labels=CLASSES), {"logits": (3, "sum")}),
    "topics": (
        HeadSpec(kind="sequence_labels", outputs=("logits",), labels=CLASSES, activation="sigmoid"),
        {"logits": (3, "sum")},
    ),
    "ranker": (
        HeadSpec(kind="sequence_labels", outputs=("logits",), labels=("LABEL_0",), activation="identity"),
        {"logits": (1, "sum")},
    ),
    "tagger": (HeadSpec(kind="token_labels", outputs=("logits",), labels=TAGS, top_k=1), {"logits": (4, "each")}),
    "reader": (
        HeadSpec(kind="spans", outputs=("start_logits", "end_logits"), top_k=1),
        {"start_logits": (1, "flat"), "end_logits": (1, "flat")},
    ),
    "writer": (
        HeadSpec(kind="masked_tokens", outputs=("logits",), mask_id=1),
        {"logits": (len(VOCABULARY), "each")},
    ),
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("labelled")
    for name, (head, outputs) in MODELS.items():
        write_labelled(root, tmp_path_factory.mktemp(name), name, head, outputs)
    return root


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(repository: Path) -> AsyncIterator[AsyncClient]:
    application = Application(Settings(repository=repository, grpc_port=0, http_port=0, instances=1))
    await application.start()
    async with AsyncClient(f"127.0.0.1:{application.grpc_port}") as opened:
        yield opened
    await application.aclose()


def ids_of(text: str) -> list[int]:
    return [VOCABULARY.index(token) for token in ("[CLS]", *text.split(), "[SEP]")]


def softmax(scores: np.ndarray) -> np.ndarray:
    raised = np.exp(scores.astype(np.float64))
    return raised / raised.sum(axis=-1, keepdims=True)


async def test_labels_come_with_default_outputs_and_equal_the_softmax_of_the_logits(client: AsyncClient) -> None:
    results = await client.infer("classifier", [TEXT, OTHER])
    for text, result in zip((TEXT, OTHER), results, strict=True):
        expected = softmax(table("logits", 3)[ids_of(text)].sum(axis=0))
        assert result.labels is not None
        assert [label.text for label in result.labels.labels] == [CLASSES[at] for at in np.argsort(-expected)]
        for label in result.labels.labels:
            assert label.score == pytest.approx(expected[label.index], abs=TOLERANCE)
        np.testing.assert_allclose(softmax(result.outputs["logits"]), expected, atol=TOLERANCE)


async def test_a_label_does_not_depend_on_its_batch(client: AsyncClient) -> None:
    alone = await client.infer("classifier", TEXT)
    together = await client.infer("classifier", [TEXT, OTHER, "a"])
    assert alone.labels is not None
    assert together[0].labels is not None
    for one, other in zip(alone.labels.labels, together[0].labels.labels, strict=True):
        assert one.index == other.index
        assert one.score == pytest.approx(other.score, abs=1e-6)  # float32 sums over a padded axis


async def test_sigmoid_and_identity_score_each_label_by_itself(client: AsyncClient) -> None:
    logits = table("logits", 3)[ids_of(TEXT)].sum(axis=0).astype(np.float64)
    topics = await client.infer("topics", TEXT)
    assert topics.labels is not None
    found = {label.index: label.score for label in topics.labels.labels}
    np.testing.assert_allclose([found[at] for at in range(3)], 1 / (1 + np.exp(-logits)), atol=TOLERANCE)
    ranker = await client.infer("ranker", TEXT)
    assert ranker.labels is not None
    raw = table("logits", 1)[ids_of(TEXT)].sum()
    assert ranker.labels.labels[0].score == pytest.approx(raw, abs=1e-4)  # a float32 sum of numbers up to 10


async def test_explicit_outputs_leave_labels_out_unless_they_are_selected(client: AsyncClient) -> None:
    assert (await client.infer("classifier", TEXT, outputs=["embedding"])).labels is None
    only = await client.infer("classifier", TEXT, outputs=[], labels=LabelSelection(top_k=1))
    assert only.outputs == {}
    assert only.labels is not None
    assert len(only.labels) == 1


async def test_min_score_leaves_out_lower_labels(client: AsyncClient) -> None:
    scores = softmax(table("logits", 3)[ids_of(TEXT)].sum(axis=0))
    least = float(np.sort(scores)[1])
    found = await client.infer("classifier", TEXT, labels=LabelSelection(min_score=least - TOLERANCE))
    assert found.labels is not None
    assert len(found.labels) == 2


async def test_labels_and_attention_come_in_one_answer(client: AsyncClient) -> None:
    result = await client.infer("classifier", TEXT, attention=AttentionSelection(layers=[-1], unit="word"))
    assert result.attention[0].labels == result.labels
    assert CLASSES[0] in result.attention[0].to_html()


async def test_each_token_and_word_has_its_best_label_and_its_span(client: AsyncClient) -> None:
    expected = softmax(table("logits", 4)[ids_of(TEXT)])
    for unit in ("token", "word"):
        result = await client.infer("tagger", TEXT, labels=LabelSelection(unit=unit))
        assert result.labels is not None
        spans = result.labels.spans
        assert [span.text for span in spans] == TEXT.split()
        assert [TEXT[span.start : span.end] for span in spans] == TEXT.split()
        for place, span in enumerate(spans, start=1):
            assert (span.first_token, span.last_token) == (place, place)
            assert span.labels[0].text == TAGS[expected[place].argmax()]
            assert span.score == pytest.approx(expected[place].max(), abs=TOLERANCE)


async def test_answers_are_the_best_pairs_of_start_and_end_in_the_passage(client: AsyncClient) -> None:
    question, passage = "a dog", "the cat sat on a mat and the dog looked"
    ids = [*ids_of(question), *ids_of(passage)[1:]]
    inside = np.zeros(len(ids), bool)
    inside[len(question.split()) + 2 : -1] = True
    start, end = (
        softmax(np.where(inside, table(name, 1)[ids][:, 0], -np.inf)) for name in ("start_logits", "end_logits")
    )
    pairs = [(start[i] * end[j], i, j) for i in range(len(ids)) for j in range(i, min(i + 15, len(ids)))]
    best = sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2]))[:3]
    result = await client.infer("reader", (question, passage), labels=LabelSelection(top_k=3))
    assert result.labels is not None
    words = passage.split()
    for span, (score, i, j) in zip(result.labels.spans, best, strict=True):
        assert (span.first_token, span.last_token, span.segment) == (i, j, 1)
        assert span.text == passage[span.start : span.end]
        assert span.text == " ".join(words[i - 4 : j - 3])
        assert span.score == pytest.approx(score, abs=TOLERANCE)


async def test_masked_positions_have_the_best_tokens_of_the_vocabulary(client: AsyncClient) -> None:
    ids = ids_of("the cat [UNK] on [UNK]")  # this model's mask token is [UNK]
    result = await client.infer("writer", {"input_ids": np.array(ids)}, outputs=[], labels=LabelSelection(top_k=2))
    assert result.labels is not None
    expected = softmax(table("logits", len(VOCABULARY))[1])
    best = np.argsort(-expected)[:2]
    assert [span.first_token for span in result.labels.spans] == [3, 5]
    for span in result.labels.spans:
        assert [label.text for label in span.labels] == [VOCABULARY[at] for at in best]
        np.testing.assert_allclose([label.score for label in span.labels], expected[best], atol=TOLERANCE)


@pytest.mark.parametrize(("model", "count"), [("classifier", 1), ("tagger", 1), ("reader", 3), ("writer", 2)])
async def test_predicted_bytes_bound_the_labels(client: AsyncClient, model: str, count: int) -> None:
    one = (TEXT, "the [UNK] mat") if model == "reader" else {"input_ids": np.array(ids_of("the [UNK] a"))}
    selection = LabelSelection(top_k=count)
    predicted = await client.infer(model, one, outputs=[], labels=selection, validate_only=True)
    result = await client.infer(model, one, outputs=[], labels=selection)
    assert result.labels is not None
    texts = sum(len(each.text) for span in result.labels.spans for each in (span, *span.labels))
    labels = len(result.labels.labels) + sum(len(span.labels) for span in result.labels.spans)
    assert 4 * labels + texts < predicted.predicted_bytes == result.predicted_bytes < 2000


@pytest.mark.parametrize(
    ("selection", "field", "problem"),
    [
        (LabelSelection(top_k=1025), "labels.top_k", "1025 exceeds 1024"),
        (LabelSelection(min_score=float("nan")), "labels.min_score", "NaN is no score"),
    ],
)
async def test_invalid_selection_is_refused(
    client: AsyncClient, selection: LabelSelection, field: str, problem: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await client.infer("classifier", TEXT, labels=selection)
    (violation,) = refused.value.violations
    assert violation.field == field
    assert violation.description.startswith(problem)


async def test_the_description_names_the_head(client: AsyncClient) -> None:
    head = (await client.model("topics")).head
    assert head is not None
    assert (head.kind, head.outputs, head.labels, head.activation) == (
        "sequence_labels",
        ("logits",),
        CLASSES,
        "sigmoid",
    )
