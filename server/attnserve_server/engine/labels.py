"""Labels of one sequence from the outputs of its model's head: activation, greatest scores, and spans in the text.

Scores are computed in float64 from the sequence's own cropped outputs, so that no other row of the batch takes part.
The manifest must have a head, and the sequence a selection of labels; validation has checked both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from attnserve_server.domain.values import (
    Array,
    AxisUnits,
    Label,
    LabeledSpan,
    Labels,
    LabelSelection,
    PreparedSequence,
)
from attnserve_server.model.heads import Activation, HeadSpec
from attnserve_server.model.manifest import InputRole, Manifest

MAX_ANSWER_TOKENS: Final = 15
"""Greatest length of an answer. Source: the question-answering pipeline of transformers 4, `max_answer_len`."""

Scores = npt.NDArray[np.float64]


def labels_of(outputs: Mapping[str, Array], sequence: PreparedSequence, manifest: Manifest) -> Labels:
    """Return the selected labels of one sequence.

    Args:
        outputs: of the sequence, cropped to its own lengths: float (labels,), (L, labels), (L, vocabulary), or two of
            (L,) for spans.
        sequence: with a selection of labels, and the units of the head's axis.
        manifest: of the model, which has a head.

    Returns:
        The labels, greatest score first; of equal scores, those of the lower index first.
    """
    head, selection = manifest.head, sequence.labels
    assert head is not None
    assert selection is not None
    if head.kind == "sequence_labels":
        return Labels(labels=_greatest(_scores(outputs[head.outputs[0]], head.activation), selection))
    axis = axis_of(head, manifest)
    units = sequence.units[axis]
    if head.kind == "spans":
        return Labels(spans=_answers(outputs, head, sequence, units, manifest))
    logits = outputs[head.outputs[0]]
    if head.kind == "token_labels":
        places = _words(units) if selection.words else _tokens(units)
    else:
        places = ((place, place) for place in masked_positions(sequence.tensors, axis, manifest))
    spans = []
    for first, last in places:
        labels = _greatest(_scores(logits[first], head.activation), selection)
        if labels:
            spans.append(_span(units, first, last, labels, labels[0].score, words=selection.words))
    return Labels(spans=tuple(spans))


def axis_of(head: HeadSpec, manifest: Manifest) -> str:
    """Return the symbol of the axis of tokens that a head labels; empty for one that labels sequences."""
    return str(manifest.output(head.outputs[0]).shape[0]) if head.axis_first else ""


def masked_positions(tensors: Mapping[str, Array], axis: str, manifest: Manifest) -> list[int]:
    """Return the positions along an axis that hold the head's mask token; none without a head or token ids."""
    ids, head = manifest.input_of_role(InputRole.TOKEN_IDS, axis), manifest.head
    if ids is None or head is None:
        return []
    found: list[int] = np.flatnonzero(tensors[ids.name] == head.mask_id).tolist()
    return found


def _scores(logits: Array, activation: Activation) -> Scores:
    """Return the scores of labels, (..., N), from outputs of the same shape."""
    values = logits.astype(np.float64)
    if activation == "identity":
        return values
    if activation == "sigmoid":
        # Of the absolute value, so that the exponential never overflows.
        small = np.exp(-np.abs(values))
        return np.where(values >= 0, 1.0, small) / (1.0 + small)
    raised = np.exp(values - values.max(axis=-1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=-1, keepdims=True))


def _greatest(scores: Scores, selection: LabelSelection) -> tuple[Label, ...]:
    """Return the labels of the greatest scores, (N,), that the selection keeps."""
    count = min(selection.top_k, len(scores))
    least = np.partition(scores, -count)[-count]
    candidates = np.flatnonzero(scores >= least)
    order = candidates[np.argsort(-scores[candidates], kind="stable")][:count]
    return tuple(Label(int(at), float(scores[at])) for at in order if _kept(scores[at], selection))


def _kept(score: float, selection: LabelSelection) -> bool:
    return selection.min_score is None or score >= selection.min_score


def _tokens(units: AxisUnits) -> Iterator[tuple[int, int]]:
    """Yield the first and the last position of each token that is not special."""
    for place in range(units.length):
        if not (units.special and units.special[place]):
            yield place, place


def _words(units: AxisUnits) -> Iterator[tuple[int, int]]:
    """Yield the first and the last position of each word."""
    ends: dict[int, tuple[int, int]] = {}
    for place, word in enumerate(units.word_ids):
        if word >= 0:
            ends[word] = (ends.get(word, (place, place))[0], place)
    yield from ends.values()


def _span(
    units: AxisUnits, first: int, last: int, labels: tuple[Label, ...], score: float, *, words: bool
) -> LabeledSpan:
    """Return a token or a word with its labels."""
    word = units.word_ids[first] if words and units.word_ids else -1
    if word >= 0:
        text = units.words[word]
        segment, start, end = units.word_spans[word] if units.word_spans else (0, 0, 0)
    else:
        text = units.texts[first] if units.texts else ""
        segment = units.segments[first] if units.segments else 0
        start, end = (units.starts[first], units.ends[first]) if units.starts else (0, 0)
    return LabeledSpan(text, start, end, segment, first, last, labels, score)


def _answers(
    outputs: Mapping[str, Array], head: HeadSpec, sequence: PreparedSequence, units: AxisUnits, manifest: Manifest
) -> tuple[LabeledSpan, ...]:
    """Return the best answers, each once.

    The score of an answer from token i to token j is softmax(start)[i] * softmax(end)[j], both over the tokens of the
    passage. Source: Devlin et al. 2019, "BERT", section 4.2, with probabilities for logits.
    """
    selection = sequence.labels
    assert selection is not None
    passage = _passage(sequence, units, manifest)
    if not passage.any():
        return ()
    starts, ends = (
        _scores(np.where(passage, outputs[name].astype(np.float64), -np.inf), "softmax") for name in head.outputs
    )
    breaks = np.cumsum(~passage)  # an answer does not reach over a position outside the passage
    pairs = np.zeros((units.length, MAX_ANSWER_TOKENS))
    for more in range(min(MAX_ANSWER_TOKENS, units.length)):
        rows = slice(units.length - more)
        pairs[rows, more] = starts[rows] * ends[more:] * (breaks[rows] == breaks[more:])
    words = {place: span for span in _words(units) for place in range(span[0], span[1] + 1)} if selection.words else {}
    found: dict[tuple[int, int], LabeledSpan] = {}
    for flat in np.argsort(-pairs, axis=None, kind="stable"):
        first, more = divmod(int(flat), MAX_ANSWER_TOKENS)
        score = float(pairs[first, more])
        if len(found) == selection.top_k or score == 0.0 or not _kept(score, selection):
            break
        last = first + more
        first, last = words.get(first, (first, last))[0], words.get(last, (first, last))[1]
        if (first, last) not in found:
            found[first, last] = _answer(units, first, last, selection, score)
    return tuple(found.values())


def _passage(sequence: PreparedSequence, units: AxisUnits, manifest: Manifest) -> npt.NDArray[np.bool_]:
    """Return which positions an answer may have, (L,): the second text, or all of the text without a second one."""
    inside = ~np.array(units.special or (False,) * units.length, dtype=np.bool_)
    second = np.array(units.segments or (0,) * units.length) == 1
    types = manifest.input_of_role(InputRole.TOKEN_TYPE_IDS, units.axis)
    if not units.segments and types is not None:
        second = sequence.tensors[types.name] == 1
    return np.asarray(inside & second if second.any() else inside)


def _answer(units: AxisUnits, first: int, last: int, selection: LabelSelection, score: float) -> LabeledSpan:
    """Return the part of the text from a first to a last position."""
    opening = _span(units, first, first, (), score, words=selection.words)
    closing = _span(units, last, last, (), score, words=selection.words)
    text = selection.texts[opening.segment][opening.start : closing.end] if selection.texts else ""
    return LabeledSpan(text, opening.start, closing.end, opening.segment, first, last, (), score)
