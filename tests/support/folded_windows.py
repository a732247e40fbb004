"""Attention within windows of a sequence of fixed length, folded as graphs fold them, and plain heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from limited_graphs import WIDTH, Writer

Array = np.ndarray[Any, np.dtype[Any]]

LENGTH = 16
SIDE = 4
"""Rows and columns of the grid that the positions are, where windows are square."""


@dataclass(frozen=True, slots=True)
class Folded:
    """One layer over x (B, 16, 8). The weights' axes in front of queries and keys are written as in einsum.

    `layout`: "b" batch, "w" windows, "h" heads; letters that stand together are one axis, "bw h" is (B * W, H).
    `windows`: "runs" of 4 positions, "strided" (every fourth), "squares" of 2 x 2 in the grid, or "" for none;
    another raises KeyError.
    `projected`: whether queries, keys and values are projections of x; else all are x.
    `behind`: whether a dense layer precedes it, so that every position depends on all inputs.
    """

    layout: str = "bw"
    windows: str = "runs"
    heads: int = 1
    projected: bool = True
    behind: bool = False

    @property
    def window_of(self) -> Array:
        """The window of each position, (16,)."""
        at = np.arange(LENGTH)
        named = {
            "runs": at // 4,
            "strided": at % 4,
            "squares": at // SIDE // 2 * 2 + at % SIDE // 2,
            "": np.zeros(LENGTH, int),
        }
        return named[self.windows]

    def matrices(self) -> dict[str, Array]:
        """Projections of queries, keys and values."""
        rng = np.random.default_rng(1)
        made = {part: rng.normal(0, 0.7, (WIDTH, WIDTH)).astype(np.float32) for part in "qkv"}
        return made if self.projected else dict.fromkeys("qkv", np.eye(WIDTH, dtype=np.float32))

    def model(self) -> onnx.ModelProto:
        """The graph, with its output (B, 16, 8)."""
        made = Writer()
        hidden = made.op("Add", "x", made.attend("x")) if self.behind else "x"
        parts = {part: made.op("MatMul", hidden, made.const(matrix)) for part, matrix in self.matrices().items()}
        if not self.projected:
            parts = dict.fromkeys("qkv", hidden)
        q, k, v = (self._fold(made, parts[part]) for part in "qkv")
        rank = len(self.layout.split()) + 2
        output = made.attend(q, k, v, perm=(*range(rank - 2), rank - 1, rank - 2))
        return made.of_features(self._unfold(made, output), ["batch", LENGTH, WIDTH])

    def reference(self, x: Array) -> Array:
        """Weights (B, H, 16, 16) in float64, from the definition (Vaswani et al. 2017, eq. 1), without its scale."""
        hidden = x.astype(np.float64)
        if self.behind:
            hidden = hidden + _softmax(hidden @ hidden.swapaxes(1, 2)) @ hidden
        q, k = (
            (hidden @ self.matrices()[part].astype(np.float64))
            .reshape(*x.shape[:2], self.heads, -1)
            .transpose(0, 2, 1, 3)
            for part in "qk"
        )
        same = self.window_of[:, None] == self.window_of[None, :]
        return _softmax(np.where(same, q @ k.swapaxes(2, 3), -np.inf))

    def _letters(self) -> tuple[str, dict[str, int]]:
        """Return the axes of x after its positions and channels are split, and the size of each."""
        places = {"runs": "wt", "strided": "tw", "squares": "rick", "": "t"}[self.windows]
        extents = {"w": 4, "t": 4 if self.windows else LENGTH, "h": self.heads, "d": WIDTH // self.heads}
        return f"b{places}hd", {**extents, **dict.fromkeys("rick", 2)}

    def _wanted(self) -> str:
        """The axes before they are folded: a square window is r and c, its positions are i and k."""
        front = self.layout.replace(" ", "")
        return front.replace("w", "rc") + "ikd" if self.windows == "squares" else front + "td"

    def _fold(self, made: Writer, value: str) -> str:
        letters, extents = self._letters()
        wanted = self._wanted() if "h" in self.layout else self._wanted().replace("d", "hd")
        apart = made.op("Reshape", value, made.ints(-1, *(extents[letter] for letter in letters[1:])))
        turned = made.op("Transpose", apart, perm=[letters.index(letter) for letter in wanted])
        count = {"b": 1, "w": 4, "h": self.heads}
        front = [int(np.prod([count[letter] for letter in axis])) for axis in self.layout.split()]
        front = [-1 if "b" in axis else size for axis, size in zip(self.layout.split(), front, strict=True)]
        last = WIDTH // self.heads if "h" in self.layout else WIDTH
        return made.op("Reshape", turned, made.ints(*front, extents["t"], last))

    def _unfold(self, made: Writer, value: str) -> str:
        letters, extents = self._letters()
        wanted = self._wanted() if "h" in self.layout else self._wanted().replace("d", "hd")
        apart = made.op("Reshape", value, made.ints(*(-1 if each == "b" else extents[each] for each in wanted)))
        turned = made.op("Transpose", apart, perm=[wanted.index(letter) for letter in letters])
        return made.op("Reshape", turned, made.ints(-1, LENGTH, WIDTH))


def _softmax(scores: Array) -> Array:
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    result: Array = exponentials / exponentials.sum(-1, keepdims=True)
    return result


def padded_to_windows() -> onnx.ModelProto:
    """A sequence of any length, padded in the graph to windows of 4, which are folded into the batch."""
    made = Writer()
    length = made.extent("x", 1)
    whole = made.op("Mul", made.op("Div", made.op("Add", length, made.ints(3)), made.ints(4)), made.ints(4))
    ends = made.op("Concat", made.ints(0, 0, 0, 0), made.op("Sub", whole, length), made.ints(0), axis=0)
    windows = made.op("Reshape", made.op("Pad", "x", ends), made.ints(-1, 4, WIDTH))
    shape = made.op("Concat", made.extent("x", 0), whole, made.ints(WIDTH), axis=0)
    output = made.op("Reshape", made.attend(windows), shape)
    return made.of_features(made.op("Slice", output, made.ints(0), length, made.ints(1)))


def grid_of_pixels(*, heads: int = 1, windowed: bool = True) -> onnx.ModelProto:
    """x (B, 4, 4, 8), never laid out as one sequence: square windows folded into the batch, or plain heads."""
    made = Writer()
    parts = [made.op("MatMul", "x", made.table(WIDTH)) for _ in "qkv"]
    if windowed:
        apart = [made.op("Reshape", part, made.ints(0, 2, 2, 2, 2, WIDTH)) for part in parts]
        turned = [made.op("Transpose", part, perm=[0, 1, 3, 2, 4, 5]) for part in apart]
        q, k, v = (made.op("Reshape", part, made.ints(-1, 4, WIDTH)) for part in turned)
        output = made.attend(q, k, v)
    else:
        apart = [made.op("Reshape", part, made.ints(0, LENGTH, heads, -1)) for part in parts]
        q, k, v = (made.op("Transpose", part, perm=[0, 2, 1, 3]) for part in apart)
        output = made.op("Transpose", made.attend(q, k, v, perm=(0, 1, 3, 2)), perm=[0, 2, 1, 3])
    return made.of_features(made.op("Reshape", output, made.ints(-1, LENGTH, WIDTH)), ["batch", 4, 4, WIDTH])
