"""Labels of one sequence: the activations at their extremes, ties, words, and passages without a second text.

Labels are made from the scores of a model's head: class names for the sequence or its tokens, or answers that are spans
of a text. Scores are made by hand; no model runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from attnserve_server.domain.values import AxisUnits, LabelSelection, PreparedSequence
from attnserve_server.engine.labels import labels_of
from attnserve_server.model.heads import HeadSpec
from attnserve_server.model.manifest import InputRole, InputSpec, Manifest
from labelled_models import labelled_manifest

TAGS = ("O", "B", "I")
UNITS = AxisUnits(
    axis="seq",
    length=5,
    texts=("[CLS]", "do", "##gs", "sat", "[SEP]"),
    starts=(0, 0, 2, 5, 0),
    ends=(0, 2, 4, 8, 0),
    special=(True, False, False, False, True),
    segments=(0,) * 5,
    word_ids=(-1, 0, 0, 1, -1),
    words=("dogs", "sat"),
    word_spans=((0, 0, 4), (0, 5, 8)),
)
TAGGER = HeadSpec(kind="token_labels", outputs=("logits",), labels=TAGS)
READER = HeadSpec(kind="spans", outputs=("start", "end"))


def sequence(selection: LabelSelection, units: AxisUnits = UNITS, **tensors: Any) -> PreparedSequence:
    return PreparedSequence(
        tensors=tensors, lengths={"seq": units.length}, outputs=(), labels=selection, units={"seq": units}
    )


def classified(logits: list[float], activation: str, **selected: Any) -> list[tuple[int, float]]:
    names = tuple(f"class {at}" for at in range(len(logits)))
    head = HeadSpec(kind="sequence_labels", outputs=("logits",), labels=names, activation=activation)  # type: ignore[arg-type]
    manifest = labelled_manifest("m", head, {"logits": (len(logits),)})
    found = labels_of({"logits": np.array(logits, np.float16)}, sequence(LabelSelection(**selected)), manifest)
    return [(label.index, label.score) for label in found.labels]


def tagger() -> Manifest:
    return labelled_manifest("m", TAGGER, {"logits": ("seq", 3)})


def reader() -> Manifest:
    return labelled_manifest("m", READER, {"start": ("seq",), "end": ("seq",)})


def test_equal_scores_keep_the_lower_index() -> None:
    assert [at for at, _ in classified([1, 2, 2, 2], "identity", top_k=2)] == [1, 2]


def test_scores_of_great_logits_are_finite() -> None:
    assert classified([6e4, -6e4], "softmax", top_k=2) == [(0, 1.0), (1, 0.0)]
    assert classified([6e4, -6e4], "sigmoid", top_k=2) == [(0, 1.0), (1, 0.0)]


def test_min_score_applies_to_each_label() -> None:
    assert classified([0, 2, -2], "sigmoid", top_k=3, min_score=0.5) == [
        (1, pytest.approx(0.8807970779778823)),
        (0, 0.5),
    ]
    assert len(classified([0, 2, -2], "identity", top_k=3, min_score=None)) == 3


def test_a_word_has_the_labels_of_its_first_token() -> None:
    logits = np.zeros((5, 3), np.float32)
    logits[1, 1], logits[2, 2], logits[3, 0] = 3, 9, 3
    found = labels_of({"logits": logits}, sequence(LabelSelection(1, words=True)), tagger())
    assert [(span.text, span.start, span.end, span.first, span.last) for span in found.spans] == [
        ("dogs", 0, 4, 1, 2),
        ("sat", 5, 8, 3, 3),
    ]
    assert [span.labels[0].index for span in found.spans] == [1, 0]


def test_units_without_a_label_of_enough_score_are_left_out() -> None:
    logits = np.zeros((5, 3), np.float32)
    logits[3, 2] = 5
    found = labels_of({"logits": logits}, sequence(LabelSelection(3, min_score=0.5)), tagger())
    assert [span.text for span in found.spans] == ["sat"]


def test_token_ids_without_a_tokenizer_have_positions_only() -> None:
    units = AxisUnits(axis="seq", length=2)
    found = labels_of({"logits": np.eye(2, 3, dtype=np.float32)}, sequence(LabelSelection(1), units), tagger())
    assert [(span.text, span.start, span.end, span.first) for span in found.spans] == [("", 0, 0, 0), ("", 0, 0, 1)]


def answers(
    start: list[float], end: list[float], units: AxisUnits = UNITS, **selected: Any
) -> list[tuple[int, int, str]]:
    selection = LabelSelection(**{"top_k": 1, "texts": ("dogs sat", ""), **selected})
    outputs = {"start": np.array(start, np.float32), "end": np.array(end, np.float32)}
    found = labels_of(outputs, sequence(selection, units), reader())
    return [(span.first, span.last, span.text) for span in found.spans]


def test_an_answer_of_words_extends_to_whole_words_and_comes_once() -> None:
    start, end = [9, 1, 5, 0, 9], [9, 4, 5, 4, 9]
    assert answers(start, end) == [(2, 2, "gs")]
    assert answers(start, end, words=True) == [(1, 2, "dogs")]
    assert answers(start, end, words=True, top_k=9) == [(1, 2, "dogs"), (1, 3, "dogs sat"), (3, 3, "sat")]


def test_an_answer_does_not_reach_over_a_special_token() -> None:
    units = AxisUnits(axis="seq", length=3, special=(False, True, False))
    assert answers([9, 0, 0], [0, 0, 9], units, texts=(), top_k=9) == [(0, 0, ""), (2, 2, "")]


def test_the_tokens_of_type_1_are_the_passage_of_token_ids() -> None:
    manifest = reader()
    types = InputSpec(name="types", dtype="int64", shape=("seq",), role=InputRole.TOKEN_TYPE_IDS, fill=0)
    manifest = manifest.model_copy(update={"inputs": (*manifest.inputs, types)})
    units = AxisUnits(axis="seq", length=3)
    prepared = sequence(LabelSelection(1), units, types=np.array([0, 1, 1]))
    outputs = {name: np.array([9, 1, 0], np.float32) for name in ("start", "end")}
    (best,) = labels_of(outputs, prepared, manifest).spans
    assert (best.first, best.last) == (1, 1)


def test_a_text_of_special_tokens_alone_has_no_answer() -> None:
    assert answers([1, 1], [1, 1], AxisUnits(axis="seq", length=2, special=(True, True))) == []
