"""Fixes axes of a graph's inputs at sizes, and bounds the others, by the names that its signature gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import onnx

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.graphs.reading import checked
from attnserve_server.conversion.inputs.relations import formula_of
from attnserve_server.conversion.inputs.signature import Signature
from attnserve_server.model.formula import Formula, FormulaInvalid

TOKENS: Final = 512
"""The greatest length of an axis of tokens, if neither the graph nor the caller bounds it."""
FRAMES: Final = 2048
"""The greatest length of an axis of floats alone, if neither the graph nor the caller bounds it: more than the 1,500
encoder states of Whisper, and conversion runs it within seconds."""


@dataclass(frozen=True, slots=True)
class Bound:
    """The greatest length of an axis that is requested or assumed, and where it comes from."""

    length: int
    reason: str


def bounds_of(signature: Signature, max_length: int | None, of_axes: Mapping[str, int]) -> dict[str, Bound]:
    """Return the bound of each free axis. The graph may turn out to take less.

    Args:
        signature: of the graph.
        max_length: of axes of tokens, which an input of whole numbers or booleans has; of all axes where none has
            tokens. None: the defaults.
        of_axes: bounds of single axes, by symbol; they come before the others.

    Raises:
        BuildRefused: a bound is given of an axis that is not free.
    """
    unknown = [symbol for symbol in of_axes if symbol not in signature.symbols]
    if unknown:
        formula = signature.relations.get(unknown[0])
        why = f"it follows from others: {formula}" if formula is not None else "there is no such axis"
        free = ", ".join(signature.symbols) or "none"
        raise BuildRefused(f"--max-length {unknown[0]}={of_axes[unknown[0]]}: {why}; free axes are: {free}")
    tokens = {size for spec in signature.inputs if not spec.dtype.startswith("float") for size in spec.shape}
    tokens = tokens & {*signature.symbols} or ({*signature.symbols} if max_length is not None else set())
    found: dict[str, Bound] = {}
    for symbol in signature.symbols:
        if symbol in of_axes:
            found[symbol] = Bound(of_axes[symbol], "--max-length AXIS=N")
        elif symbol in tokens:
            found[symbol] = Bound(
                max_length or TOKENS, "--max-length" if max_length else "the default of axes of tokens"
            )
        else:
            found[symbol] = Bound(FRAMES, "the default of axes of floats")
    return found


def with_sizes(proto: onnx.ModelProto, signature: Signature, sizes: Mapping[str, int], name: str) -> onnx.ModelProto:
    """Return a copy of a graph in which axes of the inputs have fixed sizes, with its shapes inferred again.

    Args:
        proto: the graph.
        signature: of the graph.
        sizes: by axis symbol.
        name: of the graph, for refusals.

    Raises:
        BuildRefused: no input has such an axis, or the graph is not valid with these sizes.
    """
    places: dict[str, list[tuple[str, int]]] = {symbol: [] for symbol in sizes}
    for spec in signature.inputs:
        for at, dimension in enumerate(spec.shape, start=1):
            if isinstance(dimension, str) and dimension in places:
                places[dimension].append((spec.name, at))
    missing = [symbol for symbol, found in places.items() if not found]
    if missing:
        free = ", ".join(signature.symbols) or "none"
        raise BuildRefused(f"{name} has no axis {missing[0]!r} to fix; its dynamic axes are: {free}")
    fixed = onnx.ModelProto()
    fixed.CopyFrom(proto)
    by_input = {(where, at): sizes[symbol] for symbol, found in places.items() for where, at in found}
    named: dict[str, int] = {}
    for value in fixed.graph.input:
        for at, axis in enumerate(value.type.tensor_type.shape.dim):
            if (value.name, at) in by_input:
                named |= {axis.dim_param: by_input[value.name, at]} if axis.dim_param else {}
                axis.dim_value = by_input[value.name, at]
    for value in (*fixed.graph.input, *fixed.graph.value_info, *fixed.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            _fix(axis, named)
    return checked(fixed, name)


def _fix(axis: onnx.TensorShapeProto.Dimension, sizes: Mapping[str, int]) -> None:
    """Put sizes in the place of symbols in the name of one axis, which may be a formula such as `height / 16`."""
    if axis.dim_param in sizes:
        axis.dim_value = sizes[axis.dim_param]
        return
    formula = formula_of(axis.dim_param)
    if formula is None or not {*formula.symbols} & {*sizes}:
        return
    whole = formula.replaced({symbol: Formula(size) for symbol, size in sizes.items()})
    if whole.symbols:
        axis.dim_param = str(whole)
        return
    try:
        axis.dim_value = whole.length_at({})
    except FormulaInvalid as fault:
        raise BuildRefused(f"the axis {axis.dim_param!r} has no size: {fault}") from None
