"""Checkpoints with a head: the exported scores against transformers' own eager answer, on padded batches.

A head turns hidden states into scores of labels, spans or tokens. `checkpoint` writes tiny checkpoints. Needs torch and
transformers.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnserve_client import Client, LabelSelection
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.check.findings import CheckRequest
from attnserve_server.conversion.check.recheck import check_bundle
from attnserve_server.conversion.convert import ExportRequest, export_bundle
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.conversion.sources.source import TorchModel
from attnserve_server.conversion.sources.torch_source import load_model
from attnserve_server.model.repository import Bundle, Repository
from head_checkpoints import checkpoint
from rich.console import Console
from serving import serve

pytestmark = pytest.mark.torch

# float32: the order of sums differs from torch's.
OUTPUT_TOLERANCE = 1e-5
LENGTHS = (7, 3, 5)
TEXTS = ("The loud dog barked.", "Cats looked at the dogs and a mat.")


def exported(source: Path, repository: Path, **changes: Any) -> Bundle:
    options = {"name": "tiny", "exporter": "torchscript", "fuse": False, **changes}
    request = ExportRequest(source=str(source), repository=repository, **options)
    return export_bundle(request)


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


NAMED = {0: "negative", 1: "neutral", 2: "positive"}
MODELS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "sentiment": ("Bert", "ForSequenceClassification", "sequence_labels", {"id2label": NAMED}),
    "deberta": ("DebertaV2", "ForSequenceClassification", "sequence_labels", {"problem_type": "regression"}),
    "names": ("DistilBert", "ForTokenClassification", "token_labels", {"num_labels": 5}),
    "reader": ("Roberta", "ForQuestionAnswering", "spans", {}),
    "writer": ("Bert", "ForMaskedLM", "masked_tokens", {}),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of `MODELS`, and their bundles in `models`."""
    folder = tmp_path_factory.mktemp("heads")
    for name, (family, head, _, changes) in MODELS.items():
        exported(checkpoint(folder / name, family, head, **changes), folder / "models", name=name)
    return folder


@pytest.fixture(scope="module")
def client(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with serve(work / "models", tmp_path_factory.mktemp("server")) as server, Client(server.target) as opened:
        yield opened


@pytest.mark.parametrize("name", MODELS)
def test_scores_of_a_padded_batch_equal_those_of_each_sequence_alone(name: str, work: Path) -> None:
    _, head, kind, _ = MODELS[name]
    bundle = Repository(work / "models").bundle(name)
    spec = bundle.manifest.head
    assert spec is not None
    assert spec.kind == kind
    assert bundle.manifest.axis("seq").paddable
    expected = eager_scores(work / name, f"AutoModel{head}", spec.outputs)
    found = run(bundle, [ids for ids, _ in expected], spec.outputs)
    for row, (ids, scores) in enumerate(expected):
        for output, own in scores.items():
            rows = found[output][row][: len(ids)] if spec.axis_first else found[output][row]
            np.testing.assert_allclose(rows, own, rtol=0, atol=OUTPUT_TOLERANCE)
    assert all(site.available for site in bundle.manifest.sites)


def pipeline_of(task: str, source: Path, **options: Any) -> Any:
    """Return a pipeline of transformers, which is a second reference beside the eager scores."""
    import transformers  # noqa: PLC0415 - heavy

    return transformers.pipeline(task, model=str(source), tokenizer=str(source), device="cpu", **options)


@pytest.mark.parametrize("name", ["sentiment", "deberta"])
def test_labels_of_texts_and_pairs_equal_those_of_the_pipeline(name: str, client: Client, work: Path) -> None:
    classify = pipeline_of("text-classification", work / name, top_k=None)
    for given in (TEXTS[0], (TEXTS[0], TEXTS[1])):
        texts = {"text": given} if isinstance(given, str) else {"text": given[0], "text_pair": given[1]}
        (expected,) = classify([texts])
        result = client.infer(name, given)
        assert result.labels is not None
        assert [label.text for label in result.labels.labels] == [each["label"] for each in expected]
        found = [label.score for label in result.labels.labels]
        np.testing.assert_allclose(found, [each["score"] for each in expected], atol=OUTPUT_TOLERANCE)


def test_labels_of_tokens_and_words_equal_those_of_the_pipeline(client: Client, work: Path) -> None:
    tags = pipeline_of("token-classification", work / "names", ignore_labels=[])
    text = "Loudly barking dogs sat. \N{GRINNING FACE} Cats looked."
    result = client.infer("names", text, labels=LabelSelection(unit="token"))
    assert result.labels is not None
    expected = tags(text)
    assert len(result.labels.spans) == len(expected) > 9
    for span, each in zip(result.labels.spans, expected, strict=True):
        assert (span.start, span.end, span.first_token) == (each["start"], each["end"], each["index"])
        assert span.text in {each["word"], "[UNK]"}
        assert span.labels[0].text == each["entity"]
        assert span.score == pytest.approx(each["score"], abs=OUTPUT_TOLERANCE)
    words = client.infer("names", text, labels=LabelSelection(unit="word"))
    assert words.labels is not None
    firsts = [each for each in expected if not each["word"].startswith("##")]
    assert [span.text for span in words.labels.spans] == [
        "Loudly",
        "barking",
        "dogs",
        "sat",
        ".",
        "\N{GRINNING FACE}",
        "Cats",
        "looked",
        ".",
    ]
    for span, each in zip(words.labels.spans, firsts, strict=True):
        assert span.labels[0].text == each["entity"]
        assert text[span.start : span.end] == span.text


def test_tokens_for_a_mask_equal_those_of_the_pipeline(client: Client, work: Path) -> None:
    fill = pipeline_of("fill-mask", work / "writer", top_k=4)
    text = "The [MASK] sat on a [MASK]."
    result = client.infer("writer", text, labels=LabelSelection(top_k=4))
    assert list(result.outputs) == []
    assert result.labels is not None
    assert [text[span.start : span.end] for span in result.labels.spans] == ["[MASK]", "[MASK]"]
    for span, expected in zip(result.labels.spans, fill(text), strict=True):
        assert [label.text for label in span.labels] == [each["token_str"] for each in expected]
        np.testing.assert_allclose(
            [label.score for label in span.labels], [each["score"] for each in expected], atol=OUTPUT_TOLERANCE
        )


def test_answers_lie_in_the_passage_and_are_its_words(client: Client, work: Path) -> None:
    import torch  # noqa: PLC0415 - heavy
    import transformers  # noqa: PLC0415

    question, passage = TEXTS
    tokens = transformers.AutoTokenizer.from_pretrained(work / "reader")(question, passage, return_tensors="pt")
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(work / "reader").eval()
    with torch.inference_mode():
        answer = model(**tokens)
    inside = np.array([at == 1 for at in tokens.sequence_ids()])
    start, end = (
        np.where(inside, np.exp(scores[0].numpy().astype(np.float64)), 0)
        for scores in (answer.start_logits, answer.end_logits)
    )
    table = np.triu(np.outer(start / start.sum(), end / end.sum()))
    first, last = np.unravel_index(table.argmax(), table.shape)
    result = client.infer("reader", TEXTS)
    assert result.labels is not None
    (best,) = result.labels.spans
    assert (best.first_token, best.last_token, best.segment) == (first, last, 1)
    assert best.score == pytest.approx(table.max(), abs=OUTPUT_TOLERANCE)
    assert best.text == passage[best.start : best.end]
    words = client.infer("reader", TEXTS, labels=LabelSelection(unit="word"))
    assert words.labels is not None
    assert set(words.labels.spans[0].text.replace(".", " .").split()) <= set(passage.replace(".", " .").split())


def test_labels_and_outputs_are_those_of_the_configuration(work: Path) -> None:
    manifest = Repository(work / "models").bundle("sentiment").manifest
    assert manifest.head is not None
    assert manifest.head.labels == tuple(NAMED.values())
    assert manifest.head.activation == "softmax"
    assert {spec.name: spec.on_request for spec in manifest.outputs} == {"logits": False, "last_hidden_state": True}
    check = check_bundle(CheckRequest(path=work / "models" / "sentiment" / "1", against=str(work / "sentiment")))
    assert check.passed


def test_head_of_an_int8_export_keeps_its_labels(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", "Bert", "ForTokenClassification", num_labels=5)
    manifest = exported(source, tmp_path / "models", precision="int8").manifest
    assert manifest.head is not None
    assert manifest.head.outputs == ("logits",)
    assert manifest.precision == "int8"


def loaded(source: Path, **options: Any) -> tuple[TorchModel, str]:
    """Return a model, and the warnings of loading it."""
    text = io.StringIO()
    model = load_model(str(source), steps=Steps(Console(file=text, width=400)), **options)
    return model, text.getvalue()


def test_no_head_leaves_the_head_out_without_a_warning(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", "Bert", "ForSequenceClassification")
    model, warnings = loaded(source, head=False)
    assert (model.architecture, model.task.head) == ("BertModel", None)
    assert "without its head" not in warnings


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("GPT2", "LMHeadModel"),
        ("Bart", "ForSequenceClassification"),
        ("Bert", "ForPreTraining"),
        ("Longformer", "ForQuestionAnswering"),
    ],
)
def test_a_head_that_cannot_be_labelled_is_left_out_with_a_warning(family: str, head: str, tmp_path: Path) -> None:
    model, warnings = loaded(checkpoint(tmp_path / "source", family, head))
    assert model.task.head is None
    assert f"{family}{head} is converted as {family}Model: without its head" in warnings


def test_a_head_whose_weights_are_missing_is_left_out_with_a_warning(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file  # noqa: PLC0415 - installed with transformers

    source = checkpoint(tmp_path / "source", "Bert", "ForSequenceClassification")
    weights = source / "model.safetensors"
    kept = {name: value for name, value in load_file(weights).items() if not name.startswith("classifier")}
    save_file(kept, weights, metadata={"format": "pt"})
    model, warnings = loaded(source)
    assert model.task.head is None
    assert "BertForSequenceClassification is converted as BertModel: without its head" in warnings


def test_a_head_that_cannot_be_traced_is_refused_with_a_remedy(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", "GPT2", "ForSequenceClassification", pad_token_id=None)
    model, _ = loaded(source)
    with pytest.raises(BuildRefused, match="--no-head exports the model without its head"):
        model.to_graph("torchscript", 17)
