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
class FoundSite:
    """A site in a graph.

    `scores` is None where the site cannot be tapped, and `unavailable_reason` says why. `value` and `output`, where the
    graph has them, let a check compare weights @ value with what the graph itself computes.
    """

    node: ir.Node
    operator: str
    heads: int
    kv_heads: int
    head_dim: int
    form: Literal["dense", "windowed", "linear"] = "dense"
    causal: bool = False
    scores: Scores | None = None
    value: Operand | None = None
    output: Operand | None = None
    unavailable_reason: str = ""
