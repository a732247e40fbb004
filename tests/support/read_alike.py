"""Compares requests that two readers have read."""

from __future__ import annotations

import numpy as np
from attnserve_server.transport.validation import ValidRequest


def same(one: ValidRequest, other: ValidRequest) -> bool:
    """Whether two requests were read alike, tensors included."""
    for first, second in zip(one.sequences, other.sequences, strict=True):
        assert first.tensors.keys() == second.tensors.keys()
        for name, tensor in first.tensors.items():
            assert tensor.dtype == second.tensors[name].dtype
            np.testing.assert_array_equal(tensor, second.tensors[name])
        for field in ("lengths", "outputs", "attention", "labels", "units", "response_bytes", "is_whole_request",
                      "unpadded", "past", "tokens", "bytes"):  # fmt: skip
            assert getattr(first, field) == getattr(second, field), field
    return (one.outputs, one.effective, one.priority, one.predicted_bytes) == (
        other.outputs,
        other.effective,
        other.priority,
        other.predicted_bytes,
    )
