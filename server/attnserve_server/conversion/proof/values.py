"""Abstract values: what holds of one value of the graph in the two runs that are compared. Applies no operator.

A `Value` states what holds for every length, every content of the sequence and every content of its batch neighbours.
The statement has two parts. `standing` compares the sequence's own part of the value between the run alone and the run
in a batch (or padded). The other fields bound the elements, so that later nodes can show that padding has no effect.

An example: masked attention of BERT with the sequence length varied. H heads, D numbers in each, S positions of which n
are the sequence's own ("real") and the rest is padding. B is plain here.

    value                        layout        real keys (lit)       padded keys
    attention_mask (B, S)        B, S*         1                     0
    (1 - mask) * -1e4 (B,1,1,S)  B, 1, 1, S*   0                     -1e4
    scores (B, H, S, S)          B, H, S*, S*  any number            any number
    scores + mask                B, H, S*, S*  any number            the same, `lowered` by 1e4
    Softmax                      B, H, S*, S*  from 0 to 1           0, because hidden
    MatMul with values           B, H, S*, D   equal: the sum over S* adds 0 times a finite number for each padded key

`*` marks a varying axis, one whose size differs between the two runs; a plain axis has the same size in both. An axis
has one *factor*, or several where Reshape joined axes. Only varying factors are numbered, from 0, over the whole
layout: the keys of a mask are factor 0; the queries of scores are factor 0, and their keys factor 1. The fields of a
value, in the order in which the example needs them:

- A *region* is a set of elements. `("pad", f, f)`: padded along varying factor f, real along all others: padded keys
  are ("pad", 0, 0) of a mask, and ("pad", 1, 1) of scores. `("above", q, k)`: real along both, at a later position
  along k than along q. A causal mask hides the second kind.
- An `Entry` bounds the elements of a region. `lowered` keeps "a score, minus this number" apart from the score's
  bounds, because most scores have none.
- `lit` bounds the elements that masks leave visible. Every row has at least one of these, if requests meet the needs of
  `masks`. A mask that runs `along` the keys alone must allow one key ("some"). Masks that are combined, or combined
  with a frontier (`structured`), must allow all.
- `sizes`, and `index`, `offset`, `outer` and `below`, follow integers that are computed from shapes: an element is
  `sum(index[f] * position along f) + offset + outer * (a plain number) + (a plain number below `below`)`. Such numbers
  may differ between the runs and still be right as shapes and indices. `Context.as_data` decides whether they are equal
  as data.
- `columns` are the parts of an index that Concat joined along the last axis, in the form in which GatherND reads it.
- `items` marks the rows that a tap's input lists. A tap is the nodes that return attention weights of these rows.

Nothing here raises, except that `Value.axes` asserts that the axes are known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from types import MappingProxyType
from typing import Final

from attnserve_server.conversion.proof.intervals import ANY, Interval
from attnserve_server.conversion.proof.layout import Layout, Places, varying
from attnserve_server.conversion.proof.sizes import Size
from attnserve_server.domain.values import Array
from attnserve_server.model.manifest import BATCH

EXACTLY_HIDDEN = -1e30
"""A number this low, added to a score, leaves no weight in float32. (Source: `numpy.finfo(float32).min` is -3.4e38; a
score would have to exceed 1e30 to stay visible.)"""
HALF_HIDDEN = -6e4
"""As `EXACTLY_HIDDEN`, for float16, whose lowest number is -65504."""


class Standing(IntEnum):
    """How the sequence's own part of a value compares between the two runs. A greater standing is worse."""

    EQUAL = 0
    ASSUMED = 1
    """Equal if a finite mask hides the elements that it lowers."""
    UNKNOWN = 2
    DIFFERENT = 3


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a value is not equal: the node that decides it, and the reason in plain words."""

    node: str
    operator: str
    reason: str


_ALL: Final = Interval()
"""A placeholder: the entry's own interval."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What holds of the elements of a region.

    Args:
        interval: The elements, before `lowered` is subtracted.
        lowered: The number that a mask subtracts from each element. 0: none.
        lit: The elements of the region that masks leave visible, where the region holds whole rows (padded queries).
            Default: all.
    """

    interval: Interval = ANY
    lowered: float = 0.0
    lit: Interval = _ALL

    def __post_init__(self) -> None:
        if self.lit is _ALL:
            object.__setattr__(self, "lit", self.interval)

    @property
    def only(self) -> float | None:
        """The number that every element of the region equals, or None where it is not known."""
        return self.interval.only if not self.lowered else None

    @property
    def high(self) -> float:
        """The upper bound of the elements, with `lowered` subtracted."""
        return self.interval.high - self.lowered


Region = tuple[str, int, int]
"""`("pad", f, f)`: padded along varying factor f, real along all others. `("above", q, k)`: real along both factors, at
a later position along k than along q."""


@dataclass(frozen=True, slots=True)
class Value:
    """What holds of one value of the graph, in both runs.

    Args:
        layout: Its axes. None: not known.
        standing: How the sequence's own part compares between the two runs.
        cause: The node that makes it differ, where it is not equal.
        span: The interval of all elements, hidden and padded ones included.
        lit: The interval of the elements that masks leave visible. Every row has at least one, if requests meet the
            needs.
        regions: What holds of the elements of each region.
        masks: The inputs whose needs `lit` depends on.
        along: The varying factors that these masks run along.
        structured: The varying factors of a causal frontier or a window, on whose diagonal `lit` holds.
        constant: The array of a constant.
        sizes: Each element, in row-major order, as a function of symbols. None within it: an element that is not known.
        floating: True if `sizes` are floating-point numbers in the graph, so that a quotient is not rounded down.
        index: The step of one position, for each varying factor whose positions are counted.
        offset: The summand of such an index.
        outer: The factor of a plain number that is added to the index.
        symbols: The symbols that elements depend on, where `sizes`, `index` or `offset` are no longer known.
        below: The bound of a plain number, from 0 on, that is added to the index.
        columns: The parts of an index, one for each element of its last axis.
        raw: The name of the input of token ids that the value is, element by element. Or, for values computed from one
            other value: `top of NAME` (its k-th greatest elements), `nan of NAME` (IsNaN), `below top of NAME` (a
            comparison).
        items: For indices of the rows that a tap selects: `rows`; `times:H`, H times these; `outer:H` and `inner:H`,
            indices in an axis of rows and H heads, with rows outermost or innermost.
        norm: The greatest Euclidean length of vectors along `norm_axis`. Infinite: not known.
        norm_axis: The axis of these vectors.
        count: For a number of allowed positions minus `count`: it is at most the sequence's own length minus `count`.
        valid: True if each element of the sequence's own part is the index of one of these positions.
    """

    layout: Layout | None
    standing: Standing = Standing.EQUAL
    cause: Cause | None = None
    span: Interval = ANY
    lit: Interval = ANY
    regions: Mapping[Region, Entry] = field(default_factory=lambda: MappingProxyType({}))
    masks: frozenset[str] = frozenset()
    along: frozenset[int] = frozenset()
    structured: frozenset[int] = frozenset()
    constant: Array | None = None
    sizes: tuple[Size | None, ...] | None = None
    floating: bool = False
    index: Mapping[int, Size] | None = None
    offset: Size | None = None
    outer: Size | None = None
    symbols: frozenset[str] = frozenset()
    below: Size | None = None
    columns: tuple[Value, ...] | None = None
    raw: str = ""
    items: str = ""
    norm: float = math.inf
    norm_axis: int = -1
    count: int | None = None
    valid: bool = False

    @property
    def counts(self) -> int | None:
        """The step of the index, where the value counts positions of one varying factor alone, from 0 on.

        Otherwise None.
        """
        if self.index is None or len(self.index) != 1 or self.outer is not None or self.below is not None:
            return None
        (by,) = self.index.values()
        return by.number

    @property
    def axes(self) -> Layout:
        """Its axes, which must be known."""
        assert self.layout is not None
        return self.layout

    @property
    def varies(self) -> bool:
        """True if any of its axes varies, or its axes are not known."""
        return self.layout is None or bool(varying(self.layout))

    def pad(self, factor: int) -> Entry:
        """What holds of the padding along a varying factor."""
        return self.regions.get(("pad", factor, factor), Entry(self.span, lit=self.lit))

    @property
    def dependence(self) -> frozenset[str]:
        """The symbols that its numbers depend on. As data, such numbers may differ between the two runs."""
        known = [*(self.sizes or ()), self.offset, self.outer, *(self.index or {}).values()]
        found = self.symbols.union(*(size.symbols for size in known if size is not None))
        if self.index or self.items:
            found |= {BATCH}  # along the batch, an index is the place of a row
        return found.union(*(column.dependence for column in self.columns or ()))

    def moved(self, layout: Layout, places: Places) -> Value:
        """Return the same elements on other axes. Facts about varying factors that are not in `places` are dropped."""
        regions = {
            (kind, places[one], places[other]): entry
            for (kind, one, other), entry in self.regions.items()
            if one in places and other in places
        }
        index = None
        if self.index is not None and all(factor in places for factor in self.index):
            index = {places[factor]: by for factor, by in self.index.items()}
        lost = self.index is not None and index is None
        drops = lost or self.sizes is not None or self.columns is not None
        return replace(
            self,
            layout=layout,
            symbols=self.dependence if drops else self.symbols,
            offset=None if lost else self.offset,
            outer=None if lost else self.outer,
            below=None if lost else self.below,
            regions=regions,
            index=index,
            along=frozenset(places[factor] for factor in self.along if factor in places),
            structured=frozenset(places[factor] for factor in self.structured if factor in places),
            columns=None,
            norm=math.inf,
            constant=None,
            sizes=None,
        )

    def bare(self) -> Value:
        """Return the value without the facts that hold only for the same content, element by element."""
        return replace(
            self,
            symbols=self.dependence,
            constant=None,
            sizes=None,
            index=None,
            offset=None,
            outer=None,
            below=None,
            columns=None,
            raw="",
            items="",
            count=None,
            valid=False,
        )


def worst(values: list[Value]) -> tuple[Standing, Cause | None]:
    """Return the worst standing of several values, and its cause."""
    found = max(values, key=lambda value: value.standing, default=None)
    return (Standing.EQUAL, None) if found is None else (found.standing, found.cause)
