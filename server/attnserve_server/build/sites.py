"""What a site finder says about a site: the values that its weights are computed from. Finds and changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir


@dataclass(frozen=True, slots=True)
class Operand:
    """A value that carries heads: (B, H, T, D), or, when `packed`, (B, T, H * D)."""

    value: ir.Value
    heads: int
    packed: bool


@dataclass(frozen=True, slots=True)
class Mask:
    """A mask or bias that broadcasts to (B, H, L, S) from the right.

    A boolean one keeps where it is true; any other is added to the scores after softcap.
    """

    value: ir.Value
    rank: int
    boolean: bool


@dataclass(frozen=True, slots=True)
class Scores:
    """How a site's scores come about: softcap(query @ key^T * scale) + masks, then softmax over the keys.

    Heads of the query are grouped in order over the heads of the key. `causal`: query i sees keys up to i, counted
    from the first of both. Source: ONNX operators, Attention-23.
    """

    query: Operand
    key: Operand
    head_dim: int
    scale: float
    softcap: float = 0.0
    causal: bool = False
    masks: tuple[Mask, ...] = ()


@dataclass(frozen=True, slots=True)
class Factor:
    """One meaning of an axis: what it counts, and how many there are (None: as many as the inputs make it).

    A folded axis has several, the slowest first: (batch, head) is batch-major. `window` counts windows, or chunks, that
    queries are cut into; the queries of all windows, in order, are the site's queries.
    """

    role: Literal["batch", "head", "window", "query", "key", "one"]
    extent: int | None = None


@dataclass(frozen=True, slots=True)
class Probabilities:
    """The weights of a site as the graph itself has them, after softmax and whatever guards follow it.

    `key_axis` is the axis of `value` that softmax runs over. What its other axes are (batch, heads, queries, or several
    of them folded into one) is learnt by running the graph; `axes` is empty before.
    """

    value: ir.Value
    key_axis: int
    axes: tuple[tuple[Factor, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class FoundSite:
    """A site in a graph.

    Its weights come from `scores`, where its operator keeps them to itself, or from `probabilities`, where the graph
    has them; both are None where the site cannot be tapped, and `unavailable_reason` says why. `value` and `output`,
    where the graph has them, let a check compare weights @ value with what the graph itself computes.
    """

    node: ir.Node
    operator: str
    heads: int
    kv_heads: int
    head_dim: int
    form: Literal["dense", "windowed", "linear"] = "dense"
    causal: bool = False
    scores: Scores | None = None
    probabilities: Probabilities | None = None
    value: Operand | None = None
    output: Operand | None = None
    unavailable_reason: str = ""

    @property
    def tappable(self) -> bool:
        """Whether its weights can be had."""
        return self.scores is not None or self.probabilities is not None
