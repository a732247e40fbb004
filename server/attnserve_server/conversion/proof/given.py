"""What the proof assumes of a graph's inputs: sizes by their symbols, padding values, and which values hide a position.

An input that neither the signature nor a tap declares is left out, and the interpreter treats it as unknown. A tap is
the nodes that return attention weights, for the rows of the batch that its input lists.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from attnserve_server.conversion.inputs.roles import is_position, plain_name
from attnserve_server.conversion.inputs.signature import Signature
from attnserve_server.conversion.proof.context import Context
from attnserve_server.conversion.proof.intervals import ANY, NEGATIVE, Interval, number
from attnserve_server.conversion.proof.layout import Axis, Factor, plain, varying
from attnserve_server.conversion.proof.sizes import Atom, Size
from attnserve_server.conversion.proof.values import Entry, Value
from attnserve_server.conversion.rewrite.taps import ITEMS_PREFIX
from attnserve_server.model.formula import Formula
from attnserve_server.model.manifest import BATCH, NUMPY_DTYPES, InputRole, InputSpec

_MASKED_BELOW = -1e4
"""A float input that is padded with a number below this is a mask that is added to scores."""


def symbol_size(symbol: str, most: float, least: int = 1) -> Size:
    """Return the size of an axis with a symbol: `least` or more."""
    return Size.atom(Atom(symbol, frozenset({symbol}), least, most))


def size_of_formula(ctx: Context, formula: Formula) -> Size:
    """Return the size of an axis that is a sum or a product of others."""

    def leaf(own: int | str) -> Size:
        if isinstance(own, int):
            return Size.of(own)
        return symbol_size(own, ctx.lengths.get(own, math.inf), ctx.shortest.get(own, 1))

    def applied(operator: str, one: Size, other: Size) -> Size:
        return one + other if operator == "+" else one * other

    return formula.fold(leaf, applied)


def allowed_value(spec: InputSpec) -> float | None:
    """Return the value that an input has at positions that it does not hide.

    None: any value but the padding's. NaN: the input hides no position.
    """
    dtype = NUMPY_DTYPES[spec.dtype]
    if spec.role is InputRole.ATTENTION_MASK:
        return float(spec.data_value)
    if spec.role is InputRole.TOKEN_IDS:
        return None
    if spec.role is InputRole.TOKEN_TYPE_IDS or is_position(spec.name):
        return math.nan
    if np.issubdtype(dtype, np.floating) and spec.padding <= _MASKED_BELOW:
        return 0.0
    if dtype == np.bool_ or "mask" in plain_name(spec.name):
        return 1.0 if spec.padding == 0 else 0.0
    return math.nan


def values_of_inputs(
    ctx: Context, graph: ir.Graph, signature: Signature, vocabularies: Mapping[str, int]
) -> dict[ir.Value, Value]:
    """Return what holds of each input of a graph. The inputs of taps list rows of the batch."""
    specs = {spec.name: spec for spec in signature.inputs}
    found: dict[ir.Value, Value] = {}
    for value in graph.inputs:
        name = str(value.name)
        if name in specs:
            batch = Size.of(signature.fixed_batch) if signature.fixed_batch else symbol_size(BATCH, math.inf)
            found[value] = _of_spec(ctx, specs[name], batch, vocabularies.get(name, 0), signature.relations)
        elif name.startswith(ITEMS_PREFIX):
            count = Size.atom(Atom(f"{name}.count", frozenset({BATCH}), 0, math.inf))
            wide = Interval(0, math.inf)
            found[value] = Value((ctx.axis_of(count),), span=wide, lit=wide, items="rows")
    return found


def _of_spec(ctx: Context, spec: InputSpec, batch: Size, vocabulary: int, relations: Mapping[str, Formula]) -> Value:
    axes: list[Axis] = [ctx.axis_of(batch)]
    for extent in spec.shape:
        if isinstance(extent, int):
            axes.append(plain(Size.of(extent)))
        elif extent in relations:
            # Its own positions come first, and padding follows, also where it is a multiple of the varied axis.
            size = size_of_formula(ctx, relations[extent])
            axes.append((Factor(size, size),) if ctx.depends(size) else plain(size))
        else:
            size = symbol_size(extent, ctx.lengths.get(extent, math.inf), ctx.shortest.get(extent, 1))
            axes.append(ctx.axis_of(size))
    layout = tuple(axes)
    ctx.ranks = {**ctx.ranks, spec.name: len(spec.shape)}
    allowed = allowed_value(spec)
    span = _span(spec, vocabulary)
    value = Value(layout, span=span, lit=span)
    if ctx.is_batch:
        return value
    padding = number(float(spec.padding))
    regions = {("pad", at, at): Entry(padding, lit=padding) for at in range(len(varying(layout)))}
    value = replace(value, regions=regions, span=span.hull(padding), lit=span.hull(padding))
    if allowed is None:
        ctx.mask_values = {**ctx.mask_values, spec.name: None}
        return replace(value, raw=spec.name)
    if math.isnan(allowed):
        return value
    ctx.mask_values = {**ctx.mask_values, spec.name: allowed}
    lit = number(allowed)
    along = frozenset(range(len(varying(layout))))
    return replace(value, span=lit.hull(padding), lit=lit, masks=frozenset({spec.name}), along=along)


def _span(spec: InputSpec, vocabulary: int) -> Interval:
    dtype = NUMPY_DTYPES[spec.dtype]
    known = vocabulary or spec.vocabulary_size
    if spec.role is InputRole.TOKEN_IDS and known:
        return Interval(0, known - 1)  # the server refuses others
    if dtype == np.bool_:
        return Interval(0, 1)
    if np.issubdtype(dtype, np.floating) and spec.padding <= _MASKED_BELOW:
        return Interval(wild=NEGATIVE)
    return ANY
