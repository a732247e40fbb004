"""The head of the fake model: its description, and labels from its logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from attnserve.v1 import labels_pb2

Array = npt.NDArray[Any]
_TOP_K = 5


def head_of(names: tuple[str, ...]) -> labels_pb2.Head | None:
    """Return the head that gives these labels; None without labels."""
    if not names:
        return None
    return labels_pb2.Head(
        kind=labels_pb2.HEAD_KIND_SEQUENCE_LABELS,
        outputs=["logits"],
        labels=names,
        activation=labels_pb2.LABEL_ACTIVATION_SOFTMAX,
        top_k=min(_TOP_K, len(names)),
    )


def labels_of(logits: Array, selection: labels_pb2.LabelSelection, names: tuple[str, ...]) -> labels_pb2.Labels:
    """Return the labels of greatest softmax of the logits (labels,), as the selection keeps them.

    Raises:
        IndexError: There are fewer names than logits.
    """
    raised = np.exp(logits.astype(np.float64) - logits.max())
    scores = raised / raised.sum()
    best = np.argsort(-scores, kind="stable")[: selection.top_k or _TOP_K]
    return labels_pb2.Labels(
        kind=labels_pb2.HEAD_KIND_SEQUENCE_LABELS,
        labels=[
            labels_pb2.Label(index=int(at), text=names[at], score=scores[at])
            for at in best
            if not selection.min_score or scores[at] >= selection.min_score
        ],
    )
