"""What part of the attention a caller asks for. `attention/resolve.py` checks it against a model's sites."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class HeadReduction(StrEnum):
    """How the chosen heads of a site are joined."""

    EACH = "each"
    MEAN = "mean"
    MAX = "max"


class LayerReduction(StrEnum):
    """How the chosen sites are joined."""

    EACH = "each"
    MEAN = "mean"
    ROLLOUT = "rollout"


class AttentionUnit(StrEnum):
    """What one row and one column of a map stand for."""

    TOKEN = "token"  # noqa: S105 - a word of text, no secret
    WORD = "word"


class SpecialTokens(StrEnum):
    """What happens to special tokens."""

    KEEP = "keep"
    DROP = "drop"


class WeightDtype(StrEnum):
    """How weights are written in the answer."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    UINT8 = "uint8"

    @property
    def item_bytes(self) -> int:
        """Bytes of one weight."""
        return {WeightDtype.FLOAT32: 4, WeightDtype.FLOAT16: 2, WeightDtype.UINT8: 1}[self]


@dataclass(frozen=True, slots=True)
class AttentionSelection:
    """A selection as the caller sent it; empty tuples and None mean the default, as the contract states it."""

    sites: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    head_reduction: HeadReduction | None = None
    layer_reduction: LayerReduction = LayerReduction.EACH
    queries: tuple[int, ...] = ()
    unit: AttentionUnit = AttentionUnit.TOKEN
    special_tokens: SpecialTokens = SpecialTokens.KEEP
    top_k: int = 0
    min_weight: float = 0.0
    dtype: WeightDtype = WeightDtype.FLOAT32


@dataclass(frozen=True, slots=True)
class EffectiveSelection:
    """A selection checked against a model: sites and heads by non-negative index, no defaults left open.

    `layers` are positions in the model's list of sites, without doubles, ascending. `heads` holds the chosen heads of
    each of those sites. `queries` stays as the caller sent it: sequences differ in length.
    """

    layers: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    head_reduction: HeadReduction
    layer_reduction: LayerReduction
    queries: tuple[int, ...]
    unit: AttentionUnit
    special_tokens: SpecialTokens
    top_k: int
    min_weight: float
    dtype: WeightDtype
    all_heads: bool = True
    """Whether the caller left `heads` empty, so that the echo may too."""

    @property
    def sparse(self) -> bool:
        """Whether links come back and not whole maps."""
        return self.top_k > 0 or self.min_weight > 0
