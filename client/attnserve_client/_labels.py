"""The labels of a model's head: their selection in a request, their decoding, and their form in results."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from attnserve.v1 import attention_pb2, labels_pb2

from attnserve_client._selection import check_fields
from attnserve_client.errors import InvalidRequest

HEAD_KINDS: Final[dict[int, str]] = {
    labels_pb2.HEAD_KIND_SEQUENCE_LABELS: "sequence_labels",
    labels_pb2.HEAD_KIND_TOKEN_LABELS: "token_labels",
    labels_pb2.HEAD_KIND_SPANS: "spans",
    labels_pb2.HEAD_KIND_MASKED_TOKENS: "masked_tokens",
}
_ACTIVATIONS: Final[dict[int, str]] = {
    labels_pb2.LABEL_ACTIVATION_SOFTMAX: "softmax",
    labels_pb2.LABEL_ACTIVATION_SIGMOID: "sigmoid",
    labels_pb2.LABEL_ACTIVATION_IDENTITY: "identity",
}
_UNITS: Final[dict[str, attention_pb2.AttentionUnit.ValueType]] = {
    "token": attention_pb2.ATTENTION_UNIT_TOKEN,
    "word": attention_pb2.ATTENTION_UNIT_WORD,
}
_SHOWN: Final = 3
"""Labels or spans in a repr."""


@dataclass(frozen=True, slots=True)
class LabelSelection:
    """A selection of labels. The defaults select what the model's head gives by default.

    Attributes:
        top_k: Number of labels of the sequence, of each unit or masked position, or of answers; 0 for the head's own.
        min_score: Least score of a label or an answer; 0 for all.
        unit: What token classification labels and what answers consist of, `"token"` or `"word"`; None for tokens. A
            word has the labels of its first token.
    """

    top_k: int = 0
    min_score: float = 0.0
    unit: Literal["token", "word"] | None = None

    def to_wire(self) -> labels_pb2.LabelSelection:
        """Return the message for this selection.

        Raises:
            InvalidRequest: `unit` is unknown, or `top_k` does not fit its field.
            TypeError: `top_k` is no integer, or `min_score` is no number.
        """
        try:
            top_k = operator.index(self.top_k)
        except TypeError:
            raise TypeError(f"labels.top_k is {self.top_k!r}; it must be an integer") from None
        if not 0 <= top_k < 2**32:
            raise InvalidRequest.of("labels.top_k", f"{top_k} is not from 0 to {2**32 - 1}")
        if self.unit is not None and self.unit not in _UNITS:
            raise InvalidRequest.of("labels.unit", f"{self.unit!r} is not one of {', '.join(_UNITS)}")
        unit = attention_pb2.ATTENTION_UNIT_UNSPECIFIED if self.unit is None else _UNITS[self.unit]
        return labels_pb2.LabelSelection(top_k=top_k, min_score=self.min_score, unit=unit)


@dataclass(frozen=True, slots=True)
class Label:
    """One label.

    Attributes:
        text: Its name, or a token of the vocabulary.
        score: Its score after the head's activation.
        index: Its index in the head's labels, or the id of a token.
    """

    text: str
    score: float
    index: int

    def __repr__(self) -> str:
        """Return text and score, for example `positive 0.98`."""
        return f"{self.text or self.index} {self.score:.4g}"


@dataclass(frozen=True, slots=True)
class LabeledSpan:
    """A token, word, masked position or answer.

    Attributes:
        text: The token as in the vocabulary, or the word or answer as written in the text.
        start: Position of its first character in the input text, in Unicode code points.
        end: Position after its last character.
        segment: The text that it belongs to: 0, or 1 for the second text of a pair.
        first_token: Position of its first token on the axis of the text, special tokens counted.
        last_token: Position of its last token.
        labels: Its labels, greatest score first; empty for an answer.
        score: Score of the answer, or of its first label.
    """

    text: str
    start: int
    end: int
    segment: int
    first_token: int
    last_token: int
    labels: tuple[Label, ...]
    score: float

    def __repr__(self) -> str:
        """Return text and best label, for example `Zürich: LOC 0.98`."""
        return f"{self.text or self.first_token}: {self.labels[0] if self.labels else format(self.score, '.4g')}"


@dataclass(frozen=True, slots=True, repr=False)
class Labels:
    """The labels of one sequence: iterating yields the labels of the whole sequence, or else the labelled parts.

    Attributes:
        kind: `sequence_labels`, `token_labels`, `spans` (answers), `masked_tokens`, or `unknown`.
        labels: Labels of the whole sequence, greatest score first; empty for any other kind.
        spans: Labelled parts of the text in their order; answers by their score, greatest first.
    """

    kind: str
    labels: tuple[Label, ...] = ()
    spans: tuple[LabeledSpan, ...] = ()

    def __len__(self) -> int:
        """Return the number of labels or of labelled parts."""
        return len(self.labels or self.spans)

    def __iter__(self) -> Iterator[Label | LabeledSpan]:
        """Yield the labels or the labelled parts."""
        return iter(self.labels or self.spans)

    def __getitem__(self, index: int) -> Label | LabeledSpan:
        """Return one label or labelled part; 0 is the best label, the first part, or the best answer."""
        return (self.labels or self.spans)[index]

    def __repr__(self) -> str:
        """Return the first labels, for example `Labels(positive 0.98, negative 0.02)`."""
        shown = ", ".join(repr(each) for each in (self.labels or self.spans)[:_SHOWN])
        return f"Labels({shown}{', ...' if len(self) > _SHOWN else ''})"

    def __str__(self) -> str:
        """Return all labels in one line, for example `positive 0.98, negative 0.02`."""
        return ", ".join(repr(each) for each in self)

    def to_dict(self) -> dict[str, Any]:
        """Return the labels in plain types for JSON."""
        return {
            "kind": self.kind,
            "labels": [_plain(label) for label in self.labels],
            "spans": [
                {
                    "text": span.text,
                    "start": span.start,
                    "end": span.end,
                    "segment": span.segment,
                    "first_token": span.first_token,
                    "last_token": span.last_token,
                    "labels": [_plain(label) for label in span.labels],
                    "score": span.score,
                }
                for span in self.spans
            ],
        }


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a model, from whose outputs the server computes labels.

    Attributes:
        kind: What it labels: `sequence_labels`, `token_labels`, `spans`, `masked_tokens`, or `unknown`.
        outputs: Names of the outputs that the labels are computed from.
        labels: Names of its labels; empty for answers and for tokens of the vocabulary.
        activation: `softmax`, `sigmoid`, `identity`, or `unknown`.
        top_k: Number of labels if a request names none.
        mask_token: The token that a text spells for a masked position; empty if there is none.
    """

    kind: str
    outputs: tuple[str, ...]
    labels: tuple[str, ...]
    activation: str
    top_k: int
    mask_token: str = ""


LabelChoice: TypeAlias = LabelSelection | Mapping[str, Any] | bool | None
"""What a call takes as its selection of labels."""


def selection_of(labels: LabelChoice) -> labels_pb2.LabelSelection | None:
    """Return the message for a selection; True selects the defaults, None leaves the choice to the server.

    Raises:
        TypeError: `labels` is False, or has another type.
        InvalidRequest: A field is unknown, or a value does not fit its field.
    """
    if labels is None:
        return None
    if labels is True:
        return labels_pb2.LabelSelection()
    if isinstance(labels, Mapping):
        check_fields("labels", labels, LabelSelection)
        labels = LabelSelection(**labels)
    if isinstance(labels, LabelSelection):
        return labels.to_wire()
    kind = type(labels).__name__
    problem = f"labels must be a LabelSelection, a dict of its fields, True or None, not {kind}"
    raise TypeError(f"{problem}; name the outputs to get no labels")


def labels_of(message: labels_pb2.Labels) -> Labels:
    """Return the labels in a message."""
    return Labels(
        kind=HEAD_KINDS.get(message.kind, "unknown"),
        labels=tuple(_label(each) for each in message.labels),
        spans=tuple(
            LabeledSpan(
                text=span.text,
                start=span.start,
                end=span.end,
                segment=span.segment,
                first_token=span.first_token,
                last_token=span.last_token,
                labels=tuple(_label(each) for each in span.labels),
                score=span.score,
            )
            for span in message.spans
        ),
    )


def head_of(message: labels_pb2.Head) -> Head:
    """Return the head in a message."""
    return Head(
        kind=HEAD_KINDS.get(message.kind, "unknown"),
        outputs=tuple(message.outputs),
        labels=tuple(message.labels),
        activation=_ACTIVATIONS.get(message.activation, "unknown"),
        top_k=message.top_k,
        mask_token=message.mask_token,
    )


def _label(message: labels_pb2.Label) -> Label:
    return Label(message.text, message.score, message.index)


def _plain(label: Label) -> dict[str, Any]:
    return {"text": label.text, "score": label.score, "index": label.index}
