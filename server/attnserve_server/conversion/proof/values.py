"""What is known of one value of the graph, in the two runs that are compared. Applies no operator.

A `Value` states what holds for every length, every content of the sequence and every content of its batch neighbours.
The statement has two parts. `standing` compares the sequence's own part of the value between the run alone and the run
in a batch (or padded). The other fields bound the elements, so that later nodes can show that padding has no effect.

An example: masked attention of BERT with the sequence length varied. H heads, D numbers in each, S positions of which n
are the sequence's own ("real") and the rest is padding. B is plain here.

    value                        layout        real keys (lit)       padded keys (region ("pad", 0, 0))
    attention_mask (B, S)        B, S*         1                     0
    (1 - mask) * -1e4 (B,1,1,S)  B, 1, 1, S*   0                     -1e4
    scores (B, H, S, S)          B, H, S*, S*  any number            any number
    scores + mask                B, H, S*, S*  any number            the same, `lowered` by 1e4
    Softmax                      B, H, S*, S*  from 0 to 1           0, because hidden
    MatMul with values           B, H, S*, D   equal: the sum over S* adds 0 times a finite number for each padded key

`*` marks a varying axis. The fields of a value say, in the order in which the example needs them:

- A *region* is a set of elements. `("pad", f, f)`: padded along varying factor f (factors are counted over the whole
  layout), real along all others. `("above", q, k)`: real along both, at a later position along k than along q, which is
  what a causal mask hides.
- An `Entry` bounds the elements of a region. `lowered` keeps "a score, minus this much" apart from the score's bounds,
  since scores mostly have none.
- `lit` bounds the elements that masks leave. Every row has at least one of these, as long as requests keep to the needs
  of `masks`: a mask that runs `along` the keys alone must allow one key ("some"); masks that are combined, or combined
  with a frontier (`structured`), must allow all.
- `sizes`, and `index`, `offset`, `outer` and `below`, follow whole numbers that are made of shapes: an element is
  `sum(index[f] * position along f) + offset + outer * (a plain number) + (a plain number below `below`)`. Such numbers
  may differ between the runs and still be right as shapes and indices. `Context.as_data` settles what they are as data.
- `columns` are the parts of an index that Concat joined along the last axis, as GatherND reads it.
- `items` marks the rows that a tap's input lists.
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
"""Added to a score, a number this low leaves nothing of it in float32 (Source: `numpy.finfo(float32).min` is -3.4e38;
a score would have to pass 1e30 to be seen)."""
HALF_HIDDEN = -6e4
"""As `EXACTLY_HIDDEN`, of float16, whose lowest number is -65504."""


class Standing(IntEnum):
    """How the sequence's own part of a value compares between the two runs; the greater the worse."""

    EQUAL = 0
    ASSUMED = 1
    """Equal if a finite mask hides what it is meant to hide."""
    UNKNOWN = 2
    DIFFERENT = 3


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a value is not equal: the node that decides it, and the reason in plain words."""

    node: str
    operator: str
    reason: str


_ALL: Final = Interval()
"""Stands for the interval of the entry itself."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of the elements of a region.

    Args:
        interval: the elements, before `lowered` is taken off.
        lowered: what a mask takes off each element. 0: nothing.
        lit: the elements of the region that masks leave, where the region holds whole rows (padded queries). If not
            given, all.
    """

    interval: Interval = ANY
    lowered: float = 0.0
    lit: Interval = _ALL

    def __post_init__(self) -> None:
        if self.lit is _ALL:
            object.__setattr__(self, "lit", self.interval)

    @property
    def only(self) -> float | None:
        """The number that every element of the region is, if that is known."""
        return self.interval.only if not self.lowered else None

    @property
    def high(self) -> float:
        """No element is greater."""
        return self.interval.high - self.lowered


Region = tuple[str, int, int]
"""`("pad", f, f)`: padded along varying factor f, real along all others. `("above", q, k)`: real along both factors, at
a later position along k than along q."""


@dataclass(frozen=True, slots=True)
class Value:
    """What is known of a value.

    Args:
        layout: its axes. None: not known.
        standing: how the sequence's own part compares between the two runs.
        cause: the node that makes it differ, where it is not equal.
        span: the interval of all elements, hidden and padded ones included.
        lit: the interval of the elements that masks leave. Every row has at least one, if requests keep to the needs.
        regions: what is known of the elements of each region.
        masks: the inputs whose needs `lit` depends on.
        along: the varying factors that these masks run along.
        structured: the varying factors of a causal frontier or a window, on whose diagonal `lit` holds.
        constant: the array, of a constant.
        sizes: each element, in row-major order, as a function of symbols. None: one that is not known.
        floating: whether `sizes` are held as floating-point numbers, so that a quotient is not rounded down.
        index: for each varying factor that is counted, what one position adds.
        offset: what is added to these.
        outer: what is added plain times.
        symbols: the symbols that elements depend on whose `sizes`, `index` or `offset` are no longer known.
        below: the bound of a plain number that is added, from 0 on.
        columns: the parts of an index, one for each element of its last axis.
        raw: the input of token ids that it is, element by element; or, of values that are made of one other value,
            `top of NAME` (its k-th greatest elements), `nan of NAME` (IsNaN), `below top of NAME` (a comparison).
        items: of indices of the rows that a tap selects: `rows`; `times:H`, H times these; `outer:H` and `inner:H`,
            indices in an axis of rows and H heads, with rows outermost or innermost.
        norm: the greatest Euclidean length of vectors along `norm_axis`. Infinite: not known.
        norm_axis: the axis of these vectors.
        count: of a number of allowed positions minus this number: it is at most the sequence's own length minus this.
        valid: whether each element of the sequence's own part is the index of one of its own positions.
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
        """By how much the only varying factor counts, where it counts positions of that one alone, from 0 on."""
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
        """Whether any of its axes varies."""
        return self.layout is None or bool(varying(self.layout))

    def pad(self, factor: int) -> Entry:
        """What is known behind the sequence's own part of a varying factor."""
        return self.regions.get(("pad", factor, factor), Entry(self.span, lit=self.lit))

    @property
    def dependence(self) -> frozenset[str]:
        """The sizes and places that its numbers are made of: as data, these may differ between the two runs."""
        known = [*(self.sizes or ()), self.offset, self.outer, *(self.index or {}).values()]
        found = self.symbols.union(*(size.symbols for size in known if size is not None))
        if self.index or self.items:
            found |= {BATCH}  # along the batch, an index is the place of a row
        return found.union(*(column.dependence for column in self.columns or ()))

    def moved(self, layout: Layout, places: Places) -> Value:
        """The same elements on other axes; what is said of varying factors that are gone is gone too."""
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
        """Without all that only holds element by element of the same content."""
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
    """The worst standing of several values, and its cause."""
    found = max(values, key=lambda value: value.standing, default=None)
    return (Standing.EQUAL, None) if found is None else (found.standing, found.cause)
