"""What is known of one value of the graph, in the two runs that are compared. Applies no operator.

Statements about a value hold for every length, every content of the sequence and of its neighbours. What they take for
granted of requests, that a mask allows something, is kept beside them and ends up in the certificate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from types import MappingProxyType

from attnserve_server.build.proof.intervals import ANY, Interval
from attnserve_server.build.proof.layout import Layout, Places, varying
from attnserve_server.build.proof.sizes import Size
from attnserve_server.domain.values import Array

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


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of the elements of a region: within an interval, and how far they were lowered by a mask.

    `lowered`: the elements are scores within `interval`, minus this much, which a mask took off. 0: none. `lit`: the
    interval of those elements of the region that masks leave, if the region is one of rows.
    """

    interval: Interval = ANY
    lowered: float = 0.0
    lit: Interval = ANY

    @property
    def only(self) -> float | None:
        """The number that every element of the region is, if that is known."""
        return self.interval.only if not self.lowered else None

    @property
    def high(self) -> float:
        """No element is greater."""
        return self.interval.high - self.lowered


Region = tuple[str, int, int]
"""`("pad", f, f)`: behind the sequence's own part of varying factor f, within it on all others. `("above", q, k)`: at a
later position of factor k than of factor q, both within the sequence's own part."""


@dataclass(frozen=True, slots=True)
class Value:
    """One value.

    Args:
        layout: its axes; None: not known.
        standing: of the sequence's own part.
        cause: why it is not equal.
        span: the interval of all elements, hidden and padded ones included.
        lit: the interval of the elements that masks leave, of which every row has at least one, as long as requests
            keep to what `masks` and `structured` say.
        regions: what is known of each region.
        masks: the inputs that `lit` speaks of, and `along`: the varying factors that these run along.
        structured: the varying factors of a frontier or a window, on whose diagonal `lit` holds; empty: there is none.
        constant: the array, of a constant.
        sizes: of whole numbers made of sizes, each, in row-major order; None stands for one that is not known.
        symbols: on what numbers depend that were sizes before they were moved.
        index: of whole numbers that count positions: the number by which each varying factor's position counts.
        offset: what is added to these; `outer`: and multiples of this, by numbers that are the same in both runs;
            `below`: and such a number itself, from 0 to below this.
        raw: the input of token ids that it is, element by element.
        items: of places of the rows whose weights a tap was asked for: `rows`; `times:H`, H times that; `outer:H` and
            `inner:H`, places in an axis of rows and H heads, rows outermost or innermost.
        norm: the greatest Euclidean length along `norm_axis`.
        count: whether it is a number of allowed positions, at most the sequence's own length, minus `offset_back`.
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
    """Whether every number of the sequence's own part is the place of one of its own positions."""

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
        symbols = self.symbols
        if self.sizes is not None:
            symbols = symbols.union(*(size.symbols for size in self.sizes if size is not None))
        return replace(
            self,
            layout=layout,
            symbols=symbols,
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
