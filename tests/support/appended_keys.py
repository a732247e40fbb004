"""Attention with keys that belong to no position, as torch's MultiheadAttention has them: zeros and learned biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from limited_graphs import WIDTH, Writer
from onnx import TensorProto

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Appended:
    """One head over `x` (B, T, 8), of which `mask` (B, T) keeps some; the keys without a position are always kept.

    `zeros` and `biases`: how many keys and values of zeros, and of learned numbers, there are. `before`: True puts them
    before the others, False behind. `sharp` multiplies the scores, after which softmax is all but one-hot. No field is
    checked; a wrong one fails, if at all, where the graph is made or run.
    """

    zeros: int = 1
    biases: int = 0
    before: bool = False
    sharp: float = 1.0

    @property
    def count(self) -> int:
        """Keys without a position."""
        return self.zeros + self.biases

    def extra(self) -> Array:
        """Keys without a position, (count, 8); their values are the same numbers."""
        learned = np.random.default_rng(4).normal(size=(self.biases, WIDTH))
        return np.concatenate([learned, np.zeros((self.zeros, WIDTH))]).astype(np.float32)

    def model(self) -> onnx.ModelProto:
        """The graph, with its output (B, T, 8)."""
        made = Writer()
        batch = made.extent("x", 0)
        extra = made.op("Expand", made.const(self.extra()[None]), made.op("Concat", batch, made.ints(1, 1), axis=0))
        kept = made.op(
            "Expand", made.const(np.ones((1, self.count)), np.int64), made.op("Concat", batch, made.ints(1), axis=0)
        )
        keys, mask = (
            made.op("Concat", *((more, own) if self.before else (own, more)), axis=1)
            for own, more in (("x", extra), ("mask", kept))
        )
        query = made.op("Mul", "x", made.const(self.sharp))
        inputs: dict[str, tuple[int, list[str | int | None]]] = {
            "x": (TensorProto.FLOAT, ["batch", "seq", WIDTH]),
            "mask": (TensorProto.INT64, ["batch", "seq"]),
        }
        return made.model(made.attend(query, keys, bias=made.bias(mask)), inputs)

    def reference(self, x: Array) -> Array:
        """Weights (B, T, keys) in float64 where nothing is masked, from the definition (Vaswani et al. 2017, eq. 1)."""
        own = x.astype(np.float64)
        extra = np.broadcast_to(self.extra().astype(np.float64), (len(x), self.count, WIDTH))
        keys = np.concatenate([extra, own] if self.before else [own, extra], axis=1)
        scores = self.sharp * own @ keys.swapaxes(1, 2)
        exponentials = np.exp(scores - scores.max(-1, keepdims=True))
        result: Array = exponentials / exponentials.sum(-1, keepdims=True)
        return result
