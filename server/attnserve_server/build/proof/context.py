"""What the rules of one interpretation share: which axis is varied, what was taken for granted, how rules are found."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import onnx_ir as ir

from attnserve_server.build.proof.intervals import Interval, interval_of
from attnserve_server.build.proof.layout import (
    Axis,
    Factor,
    Layout,
    NotFollowed,
    Places,
    broadcast,
    merged,
    plain,
    size_of,
    varying,
)
from attnserve_server.build.proof.sizes import Size
from attnserve_server.build.proof.values import Cause, Entry, Region, Standing, Value, worst
from attnserve_server.domain.values import Array
from attnserve_server.model.manifest import BATCH

MOST_SIZES: Final = 64
"""Elements of a whole-number constant up to which each is followed as a size."""


@dataclass
class Context:
    """One interpretation: the batch, or one symbol, is varied."""

    varied: str
    lengths: Mapping[str, int]
    """The greatest length of each symbol."""
    precision: str = "fp32"
    weight_tolerance: float = 1e-5
    opset: int = 23
    own_size: Size | None = None
    """The size of the varied axis itself."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """How many axes each input of the graph has, without the batch's."""
    mask_values: Mapping[str, float | None] = field(default_factory=dict)
    """For each input that may hide positions, the one value that allowed positions have; None: any but padding's."""
    needs: dict[str, str] = field(default_factory=dict)
    thresholds: set[int] = field(default_factory=set)
    bounds: bool = True
    """Whether Euclidean lengths are followed, which takes time where weights are large."""
    node: ir.Node | None = None
    run_graph: Callable[[ir.Graph, Mapping[ir.Value, Value]], list[Value]] | None = None
    norms: dict[int, Any] = field(default_factory=dict)

    @property
    def is_batch(self) -> bool:
        """Whether the batch is varied: rows of other callers, then, in the place of padded positions."""
        return self.varied == BATCH

    @property
    def others(self) -> str:
        """What may change an answer, in words."""
        return "the other rows of the batch" if self.is_batch else "padded positions"

    def depends(self, size: Size | None) -> bool:
        """Whether a size differs between the two runs."""
        return size is not None and self.varied in size.symbols

    def cause(self, reason: str) -> Cause:
        """The present node as the cause of something."""
        node = self.node
        if node is None:
            return Cause("", "", reason)
        return Cause(node.name or next((str(out.name) for out in node.outputs), ""), node.op_type, reason)

    def bad(self, standing: Standing, reason: str, layout: Layout | None = None) -> Value:
        """A value that is not equal, because of the present node."""
        return Value(layout, standing, self.cause(reason))

    def unknown(self, reason: str) -> Value:
        """A value of which nothing is known any more."""
        return self.bad(Standing.UNKNOWN, reason)

    def need(self, masks: frozenset[str], *, everything: bool) -> None:
        """Take for granted that masks allow something."""
        for name in masks:
            wide = everything or self.ranks.get(name, 1) > 1
            if wide or name not in self.needs:
                self.needs[name] = "all" if wide else "some"

    def as_data(self, value: Value) -> Value:
        """A value whose numbers are used as numbers: sizes and positions that differ between the runs count then."""
        if value.standing is Standing.DIFFERENT:
            return value
        if value.columns is not None:
            worst_column, cause = worst([self.as_data(column) for column in value.columns])
            return replace(value.bare(), standing=max(worst_column, value.standing), cause=cause or value.cause)
        said = ""
        sizes = value.sizes is not None and any(self.depends(size) for size in value.sizes)
        if sizes or self.varied in value.symbols:
            said = "the number of rows in the batch" if self.is_batch else "the padded length"
        elif self.depends(value.offset) or self.depends(value.outer):
            said = "the number of rows in the batch" if self.is_batch else "positions counted from the padded end"
        elif self.is_batch and (value.items or value.index):
            said = "the place of the row in the batch"
        if not said:
            return value
        return replace(value.bare(), standing=Standing.DIFFERENT, cause=self.cause(f"computes with {said}"))

    def axis_of(self, size: Size) -> Axis:
        """A new axis whose positions are the same ones from the first on: varying, where the size differs."""
        if not self.depends(size):
            return plain(size)
        one = self.own_size
        rest = None if one is None or size == one else size.over(one)
        if one is None or rest is None or rest.number == 1:
            return (Factor(size, size),)
        varied, other = self.axis_of(one), self.axis_of(rest)
        return merged((*varied, *other) if self.is_batch else (*other, *varied))


Rule = Callable[[Context, ir.Node, list[Value | None]], "Value | list[Value]"]


@dataclass(frozen=True, slots=True)
class Registered:
    """A rule. `shapes_only`: it looks at no number of its inputs, or follows what differs among them itself."""

    apply: Rule
    shapes_only: bool


RULES: Final[dict[tuple[str, str], Registered]] = {}
"""By domain and operator."""
STANDARD: Final = ""
MICROSOFT: Final = "com.microsoft"


def rule(*names: str, domain: str = STANDARD, shapes_only: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for operators."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[domain, name] = Registered(function, shapes_only)
        return function

    return register


def constant(array: Array) -> Value:
    """The value of a constant."""
    layout = tuple(plain(Size.of(extent)) for extent in array.shape)
    sizes = None
    if array.dtype.kind in "biu" and array.size <= MOST_SIZES:
        sizes = tuple(Size.of(int(number)) for number in array.reshape(-1))
    span = interval_of(array)
    return Value(layout, span=span, lit=span, constant=array, sizes=sizes)


def required(inputs: Sequence[Value | None], at: int) -> Value:
    """An input that the operator cannot do without."""
    found = inputs[at] if at < len(inputs) else None
    if found is None:
        raise NotFollowed(f"input {at} is left out")
    return found


def optional(inputs: Sequence[Value | None], at: int) -> Value | None:
    """An input that may be left out."""
    return inputs[at] if at < len(inputs) else None


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """An attribute's value, or the default."""
    found = node.attributes.get(name)
    if found is None:
        return default
    value = found.value
    return list(value) if isinstance(value, (tuple, list)) else value


def numbers(value: Value | None) -> list[int] | None:
    """The whole numbers of a constant (or of sizes that depend on nothing); None where they are not known."""
    if value is None or value.sizes is None:
        return None
    found = [None if size is None else size.number for size in value.sizes]
    return None if any(number is None for number in found) else [int(number or 0) for number in found]


def sizes_of(value: Value | None) -> list[Size]:
    """The sizes that a value holds. Raises NotFollowed where one is not known."""
    if value is not None and value.sizes is not None and all(size is not None for size in value.sizes):
        return [size for size in value.sizes if size is not None]
    only = value.span.only if value is not None else None
    if value is None or only is None or not float(only).is_integer() or value.layout is None or len(value.layout) > 1:
        raise NotFollowed("a shape that is computed cannot be followed")
    count = size_of(value.layout[0]).number if value.layout else 1
    if count is None or value.symbols:
        raise NotFollowed("a shape that is computed cannot be followed")
    return [Size.of(int(only))] * count


def aligned(values: Sequence[Value]) -> tuple[Layout, list[tuple[Value, Places]]]:
    """Values on the axes that they are broadcast to; and each with where its varying factors are there."""
    if any(value.layout is None for value in values):
        raise NotFollowed("the axes of an operand are not known")
    layout, places = broadcast([value.axes for value in values])
    return layout, list(zip(values, places, strict=True))


def entry_at(value: Value, places: Places, region: Region) -> Entry:
    """What is known of a broadcast operand in a region of the result."""
    kind, one, other = region
    back = {there: here for here, there in places.items()}
    if one in back and other in back:
        found = value.regions.get((kind, back[one], back[other]))
        if found is not None:
            return found
    return Entry(value.span, lit=value.lit)


def regions_over(operands: Sequence[tuple[Value, Places]]) -> set[Region]:
    """All regions of a result of which any operand says something."""
    return {
        (kind, places[one], places[other])
        for value, places in operands
        for kind, one, other in value.regions
        if one in places and other in places
    }


def joined(values: Sequence[Value]) -> tuple[Standing, Cause | None]:
    """The worst standing of several values."""
    return worst(list(values))


def wild_anywhere(value: Value) -> int:
    """What infinities and NaN a value may hold, in any region."""
    bits = value.span.wild
    for entry in value.regions.values():
        bits |= entry.interval.wild
    return bits


def index_value(
    ctx: Context,
    layout: Layout,
    index: Mapping[int, Size],
    offset: Size,
    *,
    outer: Size | None = None,
    below: Size | None = None,
) -> Value:
    """Whole numbers that count positions along varying factors, with what follows for each region."""
    index = {factor: by for factor, by in index.items() if by.terms}
    if not index and outer is None and below is None:
        least, greatest = offset.bounds()
        span = Interval(least, greatest)
        return Value(layout, span=span, lit=span, offset=offset if ctx.depends(offset) else None)
    blank = Value(layout, index=index, offset=offset, outer=outer, below=below)
    plus, steps = offset.number, {factor: by.number for factor, by in index.items()}
    if plus is None or ctx.is_batch or outer is not None or below is not None or None in steps.values():
        return blank
    known = {factor: by for factor, by in steps.items() if by is not None}
    if len(known) == 1:
        return _along_one(blank, known, plus)
    factors = list(known)
    if len(known) == 2 and known[factors[0]] == -known[factors[1]] and _one_length(layout, factors):
        return _between_two(blank, known, plus)
    return blank


def _along_one(value: Value, index: Mapping[int, int], plus: int) -> Value:
    ((factor, by),) = index.items()
    span = Interval(plus, math.inf) if by > 0 else Interval(-math.inf, plus)
    behind = Interval(plus + by, math.inf) if by > 0 else Interval(-math.inf, plus + by)
    regions = {("pad", factor, factor): Entry(behind, lit=behind)}
    return replace(value, span=span, lit=span, regions=regions)


def _between_two(value: Value, index: Mapping[int, int], plus: int) -> Value:
    """The distance of two positions, times a number: above and below the diagonal it has a sign."""
    factors = list(index)
    regions: dict[Region, Entry] = {}
    for first, last in (factors, factors[::-1]):
        by = index[last]
        # `last` counts further than `first` here, by one or more.
        interval = Interval(plus + by, math.inf) if by > 0 else Interval(-math.inf, plus + by)
        entry = Entry(interval, lit=interval)
        regions["above", first, last] = entry
        regions["pad", last, last] = entry
    return replace(value, lit=Interval(plus, plus), regions=regions, structured=frozenset(factors))


def _one_length(layout: Layout, factors: Sequence[int]) -> bool:
    real = [factor.real for _, factor in varying(layout)]
    return real[factors[0]] == real[factors[1]]
