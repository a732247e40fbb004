"""Labels on the wire: their selection in a request, the greatest size of their answer, and the answer itself.

Scores are computed in `engine.labels`. Only requests to models with a head enter this module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Final

from attnserve.v1 import attention_pb2, inference_service_pb2, labels_pb2

from attnserve_server.domain.errors import InvalidRequest, Violations
from attnserve_server.domain.values import AxisUnits, Label, Labels, LabelSelection
from attnserve_server.engine.labels import axis_of, masked_positions
from attnserve_server.model.heads import HeadSpec
from attnserve_server.model.manifest import Manifest
from attnserve_server.transport.inputs import Inputs

MAX_TOP_K: Final = 1024
"""Greatest `top_k`: each label of an answer is one message, so that their number bounds the cost of encoding."""
LABEL_BYTES: Final = 16
"""Bytes that one label counts with in a prediction, beside its name."""
SPAN_BYTES: Final = 32
"""Bytes that one part of the text counts with in a prediction, beside its text and labels."""

_KINDS: Final = {
    "sequence_labels": labels_pb2.HEAD_KIND_SEQUENCE_LABELS,
    "token_labels": labels_pb2.HEAD_KIND_TOKEN_LABELS,
    "spans": labels_pb2.HEAD_KIND_SPANS,
    "masked_tokens": labels_pb2.HEAD_KIND_MASKED_TOKENS,
}
_ACTIVATIONS: Final = {
    "softmax": labels_pb2.LABEL_ACTIVATION_SOFTMAX,
    "sigmoid": labels_pb2.LABEL_ACTIVATION_SIGMOID,
    "identity": labels_pb2.LABEL_ACTIVATION_IDENTITY,
}
_WORDS: Final = {
    attention_pb2.ATTENTION_UNIT_UNSPECIFIED: False,
    attention_pb2.ATTENTION_UNIT_TOKEN: False,
    attention_pb2.ATTENTION_UNIT_WORD: True,
}


def selection_of(message: inference_service_pb2.InferRequest, manifest: Manifest) -> LabelSelection | None:
    """Decode the labels that a request selects, explicitly or by default; None if it selects none.

    Raises:
        InvalidRequest: The model has no head, or a value is out of range.
    """
    head, sent = manifest.head, message.labels
    if not message.HasField("labels"):
        return None if head is None or message.HasField("outputs") else LabelSelection(head.top_k)
    violations = Violations()
    if head is None:
        violations.add("labels", f"model {manifest.name!r} has no head that gives labels: leave labels unset")
    if sent.top_k > MAX_TOP_K:
        violations.add("labels.top_k", f"{sent.top_k} exceeds {MAX_TOP_K}; request the output for more scores")
    if math.isnan(sent.min_score):
        violations.add("labels.min_score", "NaN is no score")
    if sent.unit not in _WORDS:
        allowed = ", ".join(map(str, sorted(_WORDS)))
        violations.add("labels.unit", f"{sent.unit} is not one of {allowed}")
    violations.raise_any()
    assert head is not None
    # Whole sequences and masked positions have no units to choose.
    words = _WORDS[sent.unit] and head.kind in {"token_labels", "spans"}
    return LabelSelection(sent.top_k or head.top_k, sent.min_score or None, words)


def with_texts(
    selection: LabelSelection, sequence: inference_service_pb2.Sequence, manifest: Manifest
) -> LabelSelection:
    """Return the selection with the caller's texts, if answers are cut from them."""
    assert manifest.head is not None
    if manifest.head.kind != "spans" or sequence.WhichOneof("input") != "text":
        return selection
    texts = (sequence.text.text, sequence.text.text_pair)
    return LabelSelection(selection.top_k, selection.min_score, selection.words, texts)


def check_words(selection: LabelSelection, units: AxisUnits, index: int) -> None:
    """Check that the words of a sequence are known, if the selection needs them.

    Raises:
        InvalidRequest: They are not known.
    """
    if selection.words and not units.word_ids:
        problem = f"the words of sequences[{index}] are not known: use TOKEN, or send text"
        raise InvalidRequest.of("labels.unit", problem)


def predicted_bytes(
    selection: LabelSelection, inputs: Inputs, units: AxisUnits | None, manifest: Manifest, longest_token: int
) -> int:
    """Return the greatest size of the labels of one sequence, in bytes.

    Args:
        selection: with the caller's texts if answers are cut from them.
        inputs: of the sequence.
        units: of the axis that the head labels; None for a head that labels sequences.
        manifest: of the model.
        longest_token: bytes of the longest token of the vocabulary.
    """
    head = manifest.head
    assert head is not None
    longest = max((len(label.encode()) for label in head.labels), default=longest_token)
    if units is None:
        return min(selection.top_k, len(head.labels)) * (LABEL_BYTES + longest)
    if head.kind == "spans":
        return selection.top_k * (SPAN_BYTES + max((len(text.encode()) for text in selection.texts), default=0))
    if head.kind == "masked_tokens":
        places = len(masked_positions(inputs.tensors, axis_of(head, manifest), manifest))
        return places * (SPAN_BYTES + longest + selection.top_k * (LABEL_BYTES + longest))
    texts = units.words if selection.words else units.texts
    places = len(units.words) if selection.words else units.length
    labels = min(selection.top_k, len(head.labels)) * (LABEL_BYTES + longest)
    return places * (SPAN_BYTES + labels) + sum(len(text.encode()) for text in texts)


def labels_message(labels: Labels, head: HeadSpec, name_of: Callable[[int], str]) -> labels_pb2.Labels:
    """Encode the labels of one sequence; `name_of` returns the text of a token id, for labels of the vocabulary."""

    def messages(found: Iterable[Label]) -> list[labels_pb2.Label]:
        return [
            labels_pb2.Label(
                index=each.index,
                text=head.labels[each.index] if head.labels else name_of(each.index),
                score=each.score,
            )
            for each in found
        ]

    return labels_pb2.Labels(
        kind=_KINDS[head.kind],
        labels=messages(labels.labels),
        spans=[
            labels_pb2.LabeledSpan(
                text=span.text,
                start=span.start,
                end=span.end,
                segment=span.segment,
                first_token=span.first,
                last_token=span.last,
                labels=messages(span.labels),
                score=span.score,
            )
            for span in labels.spans
        ],
    )


def head_message(head: HeadSpec, mask_token: str) -> labels_pb2.Head:
    """Encode the head of a model; `mask_token`: the token that a text spells for a masked position."""
    return labels_pb2.Head(
        kind=_KINDS[head.kind],
        outputs=head.outputs,
        labels=head.labels,
        activation=_ACTIVATIONS[head.activation],
        top_k=head.top_k,
        mask_token=mask_token,
    )
