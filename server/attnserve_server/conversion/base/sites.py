"""What a site finder says about a site: the values that its weights are computed from. Finds and changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from attnserve_server.model.bands import BandSpec


@dataclass(frozen=True, slots=True)
class Columns:
    """Some columns of a value, from `start` to before `stop` of its last axis."""

    value: ir.Value
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Quantized:
    """How integers stand for numbers: (value - zero) * scale for a projection's input and for its weights.

    Scales and zeros of the weights may be one for all, or one for each column; a zero that is None is 0.
    """

    input_scale: ir.Value
    weight_scale: ir.Value
    input_zero: ir.Value | None = None
    weight_zero: ir.Value | None = None


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotation of each head's first 2 * R numbers by the angles of its position, R being the width of the tables.

    The position of row t is `first` (a value whose first number counts; None: 0) plus t. `interleaved`: neighbours make
    a pair; else the first half with the second. Source: Su et al. 2021, eq. 34.
    """

    cos: ir.Value
    sin: ir.Value
    interleaved: bool = False
    first: ir.Value | None = None


@dataclass(frozen=True, slots=True)
class Operand:
    """A value that carries heads: (B, H, T, D), or, when `packed`, (B, T, H * D).

    What the operator itself does to the value before it is that, in this order: multiplies it with `weights`, a matrix
    that serves several operands (integers, as the value is, where there is `quantized`); takes `columns` of its last
    axis (start, stop), or of (B, T, H, parts, D) one `part`; adds `bias`, (H * D,); rotates it.

    `order`, where it is set: which axes of the value are B, H (not there where there is one head), T and D.
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
        """Whether the value is the operand as it stands."""
        return not (self.weights or self.columns or self.part is not None or self.bias or self.rotary)


@dataclass(frozen=True, slots=True)
class Mask:
    """A mask or bias that broadcasts to (B, H, L, S) from the right.

    A boolean one keeps where it is true; any other is added to the scores after softcap, and masks where it is not
    above `masked_up_to` (None: half the lowest number of its type).
    """

    value: ir.Value
    rank: int
    boolean: bool
    masked_up_to: float | None = None


@dataclass(frozen=True, slots=True)
class KeyPadding:
    """Integers that say which keys count; `filter_value` is added to the scores of the others.

    By rank: 1, the first B are ends of each row's keys (exclusive), and of 2 * B numbers the second half are starts;
    2, (B, S), above 0 for keys that count; 3, (B, L, S) likewise; 4, (B, 1, M, M), of which the first L rows and S
    columns are used.
    """

    value: ir.Value
    rank: int
    filter_value: float


@dataclass(frozen=True, slots=True)
class Scores:
    """How a site's scores come about: softcap(query @ key^T * scale) + masks, then softmax over the keys.

    Heads of the query are grouped in order over the heads of the key. `causal`: query i sees keys up to i, counted
    from the first of both; `window`: of those the last so many (0: all); `ahead`: query i sees keys up to i + ahead
    (None: all). `key_ends`, B numbers of int32 in any shape, such as (B,) or (B, 1): keys up to and with that position
    count, and so do, under a window, queries.

    `zeroed`: a row in which every key is masked is 0. Where it is False, masks are merely added, and such a row is what
    softmax makes of it; and the frontier of `causal` leaves out the last query, as onnxruntime's kernel does (which
    matters only where keys outnumber queries).

    `sink`: a score beside those of the keys, one for each head, (H,), or one for all. It takes a share of the softmax,
    and rows of the weights of the keys sum to less than 1.

    Source: ONNX operators, Attention-23; for the others, onnxruntime's own CPU kernels.
    """

    query: Operand
    key: Operand
    head_dim: int
    scale: float
    softcap: float = 0.0
    causal: bool = False
    window: int = 0
    ahead: int | None = None
    masks: tuple[Mask | KeyPadding, ...] = ()
    key_ends: ir.Value | None = None
    zeroed: bool = True
    sink: ir.Value | float | None = None


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

    `key_axis` is the axis of `value`, counted from the end, that softmax runs over. What its other axes are (batch,
    heads, queries, or several of them folded into one) is learnt by running the graph; `axes` is empty before.

    `product` multiplies them with the site's value; they are its operand at `position`. `query_axes` are those axes of
    `value`, counted from the end, that the product does not share with the site's value: queries, and query heads that
    share a key head. `scores` are the nodes that multiply queries and keys. `whole`: rows sum to 1, since nothing
    between softmax and product takes any weight away. `ambiguous`: what counts as heads may be windows, since
    the queries follow no axis of the inputs (`queries`), or the keys do not either (`all`).
    """

    value: ir.Value
    key_axis: int
    axes: tuple[tuple[Factor, ...], ...] = ()
    product: ir.Node | None = None
    position: int = 0
    query_axes: tuple[int, ...] = ()
    scores: tuple[ir.Node, ...] = ()
    whole: bool = True
    ambiguous: Literal["", "queries", "all"] = ""


@dataclass(frozen=True, slots=True)
class Windows:
    """What a site's windows are of the sequences: learnt by running the graph, once its weights' axes are.

    Where the weights come from `scores`, the operator says it, and `band` is all there is to know: rows are whole.
    `order`: which of the rows of all windows, in order, is each query's, where they stand in another order than the
    queries; else rows are the queries' own, and end with the second axis of the value named `anchor`. `key` is the axis
    symbol of the keys, or how many there always are. `causal`: no query was seen to look past itself.
    """

    band: BandSpec
    anchor: str = ""
    key: str | int = ""
    order: tuple[int, ...] = ()
    causal: bool = False


@dataclass(frozen=True, slots=True)
class Features:
    """What a feature map makes of queries or keys. `order`: which axes of the value are B, H, T and the features.

    Three places where there is a single head, which has no axis.
    """

    value: ir.Value
    order: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Linear:
    """The weights that linear attention implies: products of features, each row divided by its sum over the keys."""

    query: Features
    key: Features


@dataclass(frozen=True, slots=True)
class FoundSite:
    """A site in a graph.

    Its weights come from `scores`, where its operator keeps them to itself, from `probabilities`, where the graph has
    them, or from `linear`, where nothing has them and they are merely implied; all are None where the site cannot be
    tapped, and `unavailable_reason` says why. `value` and `output`, where the graph has them, let a check compare
    weights @ value with what the graph itself computes. `heads` and `kv_heads` are 0 where only running the graph
    tells them.
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
    linear: Linear | None = None
    windows: Windows | None = None
    value: Operand | None = None
    output: Operand | None = None
    unavailable_reason: str = ""

    @property
    def tappable(self) -> bool:
        """Whether its weights can be had."""
        return self.scores is not None or self.probabilities is not None or self.linear is not None

    @property
    def rows_sum_to_one(self) -> bool:
        """Whether rows of weights sum to 1 (or are 0), but for float32's rounding.

        Nothing in softmax or behind it takes any weight away, nor is any less precise.
        """
        if self.scores is not None:
            return self.scores.sink is None
        own = self.probabilities
        return own is None or (own.whole and own.value.dtype is ir.DataType.FLOAT)
