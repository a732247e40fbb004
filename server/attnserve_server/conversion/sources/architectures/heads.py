"""The heads of text models that a conversion keeps: how to load them, their outputs, and what they label.

A head is recognised by the class that a configuration names. Any other head is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnserve_server.model.heads import DEFAULT_TOP_K, Activation, HeadKind, HeadSpec


@dataclass(frozen=True, slots=True)
class Head:
    """A kind of head. `loader`: the class of transformers that loads models with it; `outputs`: of those models."""

    loader: str
    kind: HeadKind
    outputs: tuple[str, ...] = ("logits",)


HEADS: Mapping[str, Head] = {
    "ForSequenceClassification": Head("AutoModelForSequenceClassification", "sequence_labels"),
    "ForTokenClassification": Head("AutoModelForTokenClassification", "token_labels"),
    "ForQuestionAnswering": Head("AutoModelForQuestionAnswering", "spans", ("start_logits", "end_logits")),
    "ForMaskedLM": Head("AutoModelForMaskedLM", "masked_tokens"),
}
"""Heads by the end of the name of a class."""


def head_of(architecture: str) -> Head | None:
    """Return the head of a class, such as `BertForSequenceClassification`; None for a class without a known head."""
    return next((head for end, head in HEADS.items() if architecture.endswith(end)), None)


def spec_of(head: Head, config: Any, mask_id: int | None, activation: Activation | None) -> HeadSpec | None:
    """Return how the server labels the outputs of a model with this head.

    Args:
        head: of the model.
        config: of the model; transformers fills in `LABEL_0` and so on where it names no labels.
        mask_id: the id of the tokenizer's mask token; None without one.
        activation: that of a reranker's scores; None: the one that transformers uses.

    Returns:
        None for a head over the vocabulary without a mask token: no position is masked then.
    """
    if head.kind == "masked_tokens" and mask_id is None:
        return None
    named = {int(number): str(label) for number, label in (config.id2label or {}).items()}
    labels = tuple(named.get(number, f"LABEL_{number}") for number in range(int(config.num_labels)))
    return HeadSpec(
        kind=head.kind,
        outputs=head.outputs,
        labels=labels if head.kind in {"sequence_labels", "token_labels"} else (),
        activation=(activation or _activation(config, len(labels))) if head.kind == "sequence_labels" else "softmax",
        top_k=DEFAULT_TOP_K[head.kind],
        mask_id=mask_id if head.kind == "masked_tokens" else None,
    )


def _activation(config: Any, labels: int) -> Activation:
    """Return the activation of a sequence's labels.

    Source: `TextClassificationPipeline.postprocess` of transformers; a single label without a problem type is a score
    between 0 and 1.
    """
    problem = getattr(config, "problem_type", None)
    if problem == "regression":
        return "identity"
    return "sigmoid" if problem == "multi_label_classification" or labels == 1 else "softmax"
