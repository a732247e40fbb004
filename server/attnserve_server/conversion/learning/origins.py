"""Where the positions of a site's queries and keys come from: which inputs, and which of two axes of one length.

Shapes alone cannot tell 49 patches from 49 words. But projections, norms and residuals keep positions: going back from
queries and keys through what only reads one value, two sides that meet are of one sequence, and those that do not are
not. Products of two such values, attention itself above all, are where one sequence takes from another; the way back
ends at their outputs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from attnserve_server.conversion.base.sites import FoundSite, Linear, Probabilities, Scores

_ATTENTION = {"Attention", "MultiHeadAttention", "GroupQueryAttention", "PackedMultiHeadAttention", "LSTM", "GRU"}
_PRODUCTS = {"MatMul", "Gemm", "Einsum", "MatMulInteger", "FusedMatMul"}
_FIRST_ALONE = {"Reshape", "Expand", "Tile", "Slice", "Unsqueeze", "Squeeze", "Pad", "Resize", "TopK", "Split"}
"""Operators whose further inputs are shapes and places, not data."""
_NO_DATA = {"Shape", "Size", "ConstantOfShape", "Range", "NonZero"}
"""What comes out of these says how long something is, not what it is."""

Side = tuple[str, int]
"""A site's name, with 0 for its queries and 1 for its keys."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What a side's positions come from: values met on the way back, and the graph inputs among them, by name."""

    values: frozenset[ir.Value] = field(default_factory=frozenset)
    inputs: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True, slots=True)
class FixedAxes:
    """A symbol for every fixed extent of a site, and of each symbol its length and what its positions come from."""

    symbols: Mapping[Side, str]
    lengths: Mapping[str, int]
    origins: Mapping[str, Origin]


def fixed_axes(
    extents: Mapping[str, tuple[str | int | None, str | int | None]],
    sites: Mapping[str, FoundSite],
    taken: Collection[str],
) -> FixedAxes:
    """Name the fixed extents of sites: `fixed_<length>`, and another name for what is as long but of another sequence.

    Args:
        extents: of the queries and keys of each site; those that are whole numbers are named.
        sites: in the order of their layers.
        taken: symbols that are others' already.
    """
    groups: list[tuple[int, Origin]] = []
    member: dict[Side, int] = {}
    for name, pair in extents.items():
        for side, extent in enumerate(pair):
            if isinstance(extent, int):
                member[name, side] = _joined(groups, extent, _origin(sites[name], side))
    symbols: list[str] = []
    for length, _ in groups:
        symbol = f"fixed_{length}"
        while symbol in taken or symbol in symbols:
            symbol += "_"
        symbols.append(symbol)
    return FixedAxes(
        symbols={side: symbols[group] for side, group in member.items()},
        lengths={symbol: length for symbol, (length, _) in zip(symbols, groups, strict=True)},
        origins={symbol: origin for symbol, (_, origin) in zip(symbols, groups, strict=True)},
    )


def of_one_sequence(site: FoundSite) -> bool:
    """Whether a site's queries and keys come from the same positions; True where neither is known."""
    query, key = _origin(site, 0), _origin(site, 1)
    return not query.values or not key.values or not query.values.isdisjoint(key.values)


def _joined(groups: list[tuple[int, Origin]], length: int, origin: Origin) -> int:
    """The group that a side belongs to, a new one where it meets none of its length."""
    for at, (other, known) in enumerate(groups):
        if other == length and (not origin.values or not known.values or not known.values.isdisjoint(origin.values)):
            groups[at] = (length, Origin(known.values | origin.values, known.inputs | origin.inputs))
            return at
    groups.append((length, origin))
    return len(groups) - 1


def _origin(site: FoundSite, side: int) -> Origin:
    start = _operand(site, side)
    if start is None:
        return Origin()
    seen: set[ir.Value] = set()
    waiting = [start]
    while waiting:
        value = waiting.pop()
        if value in seen or value.const_value is not None or value.is_initializer():
            continue
        node = value.producer()
        if node is not None and node.op_type in {"Constant", *_NO_DATA}:
            continue
        seen.add(value)
        if node is not None:
            waiting.extend(_read(node))
    inputs = frozenset(str(value.name) for value in seen if value.is_graph_input())
    return Origin(frozenset(seen), inputs)


def _operand(site: FoundSite, side: int) -> ir.Value | None:
    match site.attention:
        case Scores(query=query, key=key) | Linear(query=query, key=key):
            return (query, key)[side].value
        case Probabilities(scores=(first, *_)) if len(first.inputs) > side:
            return first.inputs[side]
    return None


def _read(node: ir.Node) -> list[ir.Value]:
    """The inputs of a node whose positions its outputs keep; none of a product of two values that are no constants."""
    inputs = [value for value in node.inputs if value is not None]
    if node.op_type in _ATTENTION:
        return []
    if node.op_type in _PRODUCTS and sum(not _is_constant(value) for value in inputs[:2]) > 1:
        return []
    return inputs[:1] if node.op_type in _FIRST_ALONE else inputs


def _is_constant(value: ir.Value) -> bool:
    """Whether a value is in the file, or made of such by what only casts and turns it."""
    steps = 0
    while value.const_value is None and not value.is_initializer():
        node = value.producer()
        steps += 1
        if node is None or steps > 8:
            return False
        if node.op_type == "Constant":
            return True
        if node.op_type not in {"Transpose", "Cast", "Identity", "DequantizeLinear", "Reshape", "Unsqueeze"}:
            return False
        first = node.inputs[0]
        if first is None:
            return False
        value = first
    return True
