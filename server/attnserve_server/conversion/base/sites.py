"""The types that describe an attention site in a graph: what a finder found, and what runs of the graph taught.

A finder returns `FoundSite`s, whose `attention` is one of five cases:

    Scores         the operator computes the weights inside; a tap computes them again from query and key
    Probabilities  the graph has the weights as a value; a tap reads it
    Linear         the weights are only implied by two feature maps; a tap computes them from these
    Recurrent      an operator with a state implies the weights; a tap runs it on unit vectors as values
    Untappable     no tap gives the weights; it holds the reason

`Learnt` holds the axes of `Probabilities`, and their windows, which runs of the graph show. It names values and refers
to none, so that it holds for every copy of the graph. This module reads and changes no graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from attnserve_server.conversion.base.quantizers import Levels, Quantized, Quantizer
from attnserve_server.model.bands import BandSpec


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns of a value, from `start` to before `stop` of its last axis."""

    value: ir.Value
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotation of the first 2 * R numbers of each head by the angles of its position; R is the width of the tables.

    Row t has the position t plus the first number of `first` (None: 0). With `ends`, (B,), each sequence's last row
    has the position that it states. With `interleaved`, neighbours form a pair; else a number of the first half and its
    counterpart in the second. Source: Su et al. 2021, eq. 34.
    """

    cos: ir.Value
    sin: ir.Value
    interleaved: bool = False
    first: ir.Value | None = None
    ends: ir.Value | None = None


@dataclass(frozen=True, slots=True)
class Operand:
    """A value that holds heads: (B, H, T, D), or, when `packed`, (B, T, H * D).

    The operator may compute the operand from the value. It then does so in this order: it multiplies the value by
    `weights`, a matrix that several operands share (with `quantized`, both are integers); it takes `columns` (start,
    stop) of the last axis, or one `part` of (B, T, H, parts, D); it adds `bias`, (H * D,); it applies `rotary`.

    `order`, where it is set, lists the axes of the value that are B, H, T and D. It has no H where there is one head
    without an axis.
    """

    value: ir.Value
    heads: int
    packed: bool
    weights: ir.Value | None = None
    quantized: Quantized | None = None
    columns: tuple[int, int] | None = None
    part: int | None = None
    bias: Columns | None = None
    rotary: Rotary | None = None
    order: tuple[int, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether the operator uses the value as it is."""
        return not (self.weights or self.columns or self.part is not None or self.bias or self.rotary)


@dataclass(frozen=True, slots=True)
class Mask:
    """A mask or bias that broadcasts to (B, H, L, S) from the right.

    A boolean mask keeps keys where it is true. Any other is added to the scores after softcap, and hides a key where
    it is not above `masked_up_to` (None: half the lowest number of its type).
    """

    value: ir.Value
    rank: int
    boolean: bool
    masked_up_to: float | None = None


@dataclass(frozen=True, slots=True)
class KeyPadding:
    """Integers that mark the keys that count; `filter_value` is added to the scores of the others.

    By rank: 1, the first B numbers are the ends of each row's keys (exclusive), and of 2 * B numbers the second half
    are starts; 2, (B, S), above 0 for keys that count; 3, (B, L, S) likewise; 4, (B, 1, M, M), of which the first L
    rows and S columns are used.
    """

    value: ir.Value
    rank: int
    filter_value: float


@dataclass(frozen=True, slots=True)
class Scores:
    """Attention inside one operator: weights = softmax(softcap(query @ key^T * scale) + masks) over the keys.

    Heads of the query are grouped in order over the heads of the key. `value` and `output` let a check compare
    weights @ value with the operator's own output.

    `causal`: query i sees keys up to i, both counted from the first; `window`: of those the last so many (0: all);
    `ahead`: query i sees keys up to i + ahead (None: all). `band` states both ends in closed form, where there are
    two. `key_ends`, B numbers of int32 in any shape, such as (B,) or (B, 1): keys up to and with that position count,
    and so do, under a window, queries. `key_counts`, (B,): keys before that position count. With it or `behind_past`,
    the last query stands at the last of these keys, or of all: `causal`, `window` and `ahead` count queries from there.

    `zeroed`: a row in which every key is masked is 0. Where it is False, masks are only added, and softmax makes such
    a row; the frontier of `causal` then leaves out the last query, which matters only where keys outnumber queries.
    `sink`: a score beside those of the keys, one for each head, (H,), or one for all. It takes a share of the softmax,
    so that rows of the keys' weights sum to less than 1.

    Source: ONNX operators, Attention-23; for the others, onnxruntime's own CPU kernels.
    """

    query: Operand
    key: Operand
    value: Operand
    output: Operand
    head_dim: int
    scale: float
    softcap: float = 0.0
    causal: bool = False
    window: int = 0
    ahead: int | None = None
    band: BandSpec | None = None
    masks: tuple[Mask | KeyPadding, ...] = ()
    key_ends: ir.Value | None = None
    behind_past: bool = False
    key_counts: ir.Value | None = None
    zeroed: bool = True
    sink: ir.Value | float | None = None


@dataclass(frozen=True, slots=True)
class Probabilities:
    """Attention in single operators, of which one value has the weights, after softmax and the guards that follow it.

    Attributes:
        weights: the weights, in a layout that only runs of the graph show (`Layout`).
        key_axis: the axis of `weights`, counted from the end, that softmax runs over.
        product: the node that multiplies `weights` with `value`.
        position: which operand of `product` the weights are, 0 or 1.
        value: the other operand, in floating point.
        output: the result of `product`, in floating point.
        query_axes: the axes of `weights`, counted from the end, that `value` does not share: queries, and query heads
            that share a key head.
        scores: the nodes that multiply queries and keys.
        whole: whether rows sum to 1, because no node between softmax and product takes any weight away.
        of_weights: the quantizer of `weights`, where the graph has them in integers; likewise `of_value`, `of_output`.
            Rounded weights need not sum to 1.
        levels: of the quantizer behind the product; None where there is none, or its scale is not constant.
    """

    weights: ir.Value
    key_axis: int
    product: ir.Node
    position: int
    value: ir.Value
    output: ir.Value
    query_axes: tuple[int, ...]
    scores: tuple[ir.Node, ...]
    whole: bool = True
    of_weights: Quantizer | None = None
    of_value: Quantizer | None = None
    of_output: Quantizer | None = None
    levels: Levels | None = None


@dataclass(frozen=True, slots=True)
class Features:
    """A feature map of queries or keys. `order`: which axes of the value are B, H, T and the features.

    `order` has no H where there is a single head, which has no axis.
    """

    value: ir.Value
    order: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Linear:
    """Linear attention, which implies weights: products of features, each row divided by its sum over the keys.

    `value` and `output` let a check compare weights @ value with the graph's own output.
    """

    query: Features
    key: Features
    value: Operand
    output: Operand


@dataclass(frozen=True, slots=True)
class Recurrent:
    """An operator that is linear in its value: for unit vectors, it returns its weights, of any sign and sum."""

    node: ir.Node
    value: Operand
    output: Operand


@dataclass(frozen=True, slots=True)
class Untappable:
    """Attention that no tap can be added to. `reason` completes "site ... gives no weights: ..."."""

    reason: str


Tappable = Scores | Probabilities | Linear | Recurrent
"""Attention that a tap can be added to."""


def value_and_output(attention: Tappable) -> tuple[ir.Value, ir.Value]:
    """Return the value that weights multiply and the site's own result: a check compares weights @ value with it."""
    if isinstance(attention, Probabilities):
        return attention.value, attention.output
    return attention.value.value, attention.output.value


@dataclass(frozen=True, slots=True)
class FoundSite:
    """A site as its finder found it. `heads` and `kv_heads` are 0 where only a run of the graph shows them."""

    node: ir.Node
    operator: str
    heads: int
    kv_heads: int
    head_dim: int
    attention: Tappable | Untappable
    form: Literal["dense", "windowed", "linear"] = "dense"
    causal: bool = False

    @property
    def tappable(self) -> bool:
        """Whether a tap can give its weights."""
        return not isinstance(self.attention, Untappable)

    @property
    def unavailable_reason(self) -> str:
        """Why no tap can give its weights; empty where one can."""
        return self.attention.reason if isinstance(self.attention, Untappable) else ""

    @property
    def rows_sum_to_one(self) -> bool:
        """Whether rows of weights sum to 1 (or are 0), apart from float32's rounding.

        False where no softmax makes them, a node behind it takes weight away, or the graph holds them in float16.
        """
        match self.attention:
            case Scores(sink=sink):
                return sink is None
            case Probabilities(weights=weights, whole=whole):
                return whole and weights.dtype is ir.DataType.FLOAT
        return not isinstance(self.attention, Recurrent)


@dataclass(frozen=True, slots=True)
class Factor:
    """One meaning of an axis: what it counts, and how many there are (None: the inputs decide).

    A folded axis has several factors, the slowest first: (batch, head) is batch-major. `window` counts windows, or
    chunks, that queries are cut into; the queries of all windows, in order, are the site's queries.
    """

    role: Literal["batch", "head", "window", "query", "key", "one"]
    size: int | None = None


WeightAxes = tuple[tuple[Factor, ...], ...]
"""The factors of each axis of a value that holds a site's weights."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What the axes of a site's own weights are.

    Attributes:
        axes: the factors of each axis of `Probabilities.weights`.
        kv_heads: the heads that the value has for itself.
        head_dim: numbers of each head.
        ambiguous: whether the axes that seem to be heads may be windows, since the queries follow no axis of the
            inputs (`queries`), or the keys do not either (`all`).
    """

    axes: WeightAxes
    kv_heads: int
    head_dim: int
    ambiguous: Literal["", "queries", "all"] = ""

    @property
    def heads(self) -> int:
        """Heads of the query."""
        return heads_in(self.axes)

    @property
    def windowed(self) -> bool:
        """Whether queries are cut into windows."""
        return any(factor.role == "window" for factors in self.axes for factor in factors)


def heads_in(axes: WeightAxes) -> int:
    """How many heads the axes of weights hold."""
    return math.prod(factor.size or 1 for factors in axes for factor in factors if factor.role == "head")


@dataclass(frozen=True, slots=True)
class Windows:
    """Which query each row of a windowed site's own weights belongs to, and which key each column is.

    Attributes:
        band: the key of each column, in closed form.
        anchor: the name of a value (B, L, C); L is the number of queries. Rows beyond are padding.
        key: the axis symbol of the keys, or their fixed number.
        order: the row of each query among the rows of all windows, where rows stand in another order; else empty.
        causal: whether no run showed a query that looks past itself.
    """

    band: BandSpec
    anchor: str
    key: str | int
    order: tuple[int, ...] = ()
    causal: bool = False


@dataclass(frozen=True, slots=True)
class Learnt:
    """What runs of the graph taught about a site with `Probabilities`. `windows` is None where it has none."""

    layout: Layout
    windows: Windows | None = None
