"""The state of one interpretation, which its rules share, and the table of rules.

One interpretation follows a graph, by a rule for each operator, to prove that the batch, or padding along one axis,
cannot change an answer. A rule reports a problem as a value (`bad`, `unknown`), or raises `NotFollowed` or `Mixed`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import onnx_ir as ir

from attnserve_server.conversion.proof.layout import Axis, Factor, Layout, merged, plain
from attnserve_server.conversion.proof.sizes import Size
from attnserve_server.conversion.proof.values import Cause, Standing, Value, worst
from attnserve_server.model.manifest import BATCH


@dataclass
class Context:
    """One interpretation, in which the batch or one symbol is varied."""

    varied: str
    lengths: Mapping[str, int]
    """The greatest length of each symbol."""
    precision: str = "fp32"
    weight_tolerance: float = 1e-5
    opset: int = 23
    own_size: Size | None = None
    """The size of the varied axis itself."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """The number of axes of each input of the graph, without the batch axis."""
    mask_values: Mapping[str, float | None] = field(default_factory=dict)
    """For each input that may hide positions, the one value of allowed positions. None: any value but the padding's."""
    needs: dict[str, str] = field(default_factory=dict)
    thresholds: set[int] = field(default_factory=set)
    shortest: Mapping[str, int] = field(default_factory=dict)
    """The least length of each symbol; 1 where it is not given."""
    bounds: bool = True
    """Whether Euclidean lengths are computed, which takes time where weights are large."""
    node: ir.Node | None = None
    run_graph: Callable[[ir.Graph, Mapping[ir.Value, Value]], list[Value]] | None = None
    """Interprets a subgraph."""
    known: Callable[[ir.Value], Value] | None = None
    """Returns what is known of any value so far."""
    norms: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    """Results computed from constants, by the constant's identity. The constant is kept here too, so that its identity
    is not
    reused."""

    @property
    def is_batch(self) -> bool:
        """True if the batch is varied. Rows of other requests then replace padded positions."""
        return self.varied == BATCH

    @property
    def others(self) -> str:
        """What may change an answer, in words."""
        return "the other rows of the batch" if self.is_batch else "padded positions"

    def depends(self, size: Size | None) -> bool:
        """Return whether a size differs between the two runs."""
        return size is not None and self.varied in size.symbols

    def cause(self, reason: str) -> Cause:
        """Return the current node as the cause, with a reason."""
        node = self.node
        if node is None:
            return Cause("", "", reason)
        return Cause(node.name or next((str(out.name) for out in node.outputs), ""), node.op_type, reason)

    def bad(self, standing: Standing, reason: str, layout: Layout | None = None) -> Value:
        """Return a value that is not equal, because of the current node."""
        return Value(layout, standing, self.cause(reason))

    def unknown(self, reason: str) -> Value:
        """Return a value of which nothing is known."""
        return self.bad(Standing.UNKNOWN, reason)

    def need(self, masks: frozenset[str], *, everything: bool) -> None:
        """Record that masks must allow all positions (`everything`), or at least one in each row."""
        for name in masks:
            wide = everything or self.ranks.get(name, 1) > 1
            if wide or name not in self.needs:
                self.needs[name] = "all" if wide else "some"

    def as_data(self, value: Value) -> Value:
        """Return a value whose numbers are used as data.

        Sizes and positions that differ between the runs make it different.
        """
        if value.standing is Standing.DIFFERENT:
            return value
        if value.columns is not None:
            worst_column, cause = worst([self.as_data(column) for column in value.columns])
            return replace(value.bare(), standing=max(worst_column, value.standing), cause=cause or value.cause)
        what = ""
        sizes = value.sizes is not None and any(self.depends(size) for size in value.sizes)
        if sizes or self.varied in value.symbols:
            what = "the number of rows in the batch" if self.is_batch else "the padded length"
        elif any(self.depends(size) for size in (value.offset, value.outer, *(value.index or {}).values())):
            what = "the number of rows in the batch" if self.is_batch else "positions counted from the padded end"
        elif self.is_batch and (value.items or value.index):
            what = "the place of the row in the batch"
        if not what:
            return value
        return replace(value.bare(), standing=Standing.DIFFERENT, cause=self.cause(f"computes with {what}"))

    def axis_of(self, size: Size) -> Axis:
        """Return a new axis whose first positions are the same in both runs. It varies where the size differs."""
        if not self.depends(size):
            return plain(size)
        one = self.own_size
        rest = None if one is None or size == one else size.over(one)
        if one is None or rest is None or rest.number == 1:
            return (Factor(size, size),)
        varied, other = self.axis_of(one), self.axis_of(rest)
        return merged((*varied, *other) if self.is_batch else (*other, *varied))


SOFTMAX_OVER_ROWS: Final = "computes a softmax over the rows of the batch"
SUM_OVER_ROWS: Final = "sums over the rows of the batch"
"""Reasons for attention that runs over the batch axis."""
Rule = Callable[[Context, ir.Node, list[Value | None]], "Value | list[Value]"]


@dataclass(frozen=True, slots=True)
class Registered:
    """A rule.

    Args:
        apply: The rule.
        shapes_only: True if it reads no number of its inputs, or follows their differences itself. The interpreter then
            does not lower its outputs to the worst standing of its inputs.
    """

    apply: Rule
    shapes_only: bool


RULES: Final[dict[tuple[str, str], Registered]] = {}
"""By domain and operator. The package `rules` fills it."""
STANDARD: Final = ""
MICROSOFT: Final = "com.microsoft"


def rule(*names: str, domain: str = STANDARD, shapes_only: bool = False) -> Callable[[Rule], Rule]:
    """Return a decorator that registers a rule for operators, in the place of an earlier rule for them.

    Args:
        names: Operators.
        domain: Their domain.
        shapes_only: As in `Registered`.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[domain, name] = Registered(function, shapes_only)
        return function

    return register
