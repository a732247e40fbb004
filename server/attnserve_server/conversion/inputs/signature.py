"""Read the signature of a graph: the types, roles, shapes and axis symbols of its inputs.

`signature_of` raises BuildRefused for inputs that the server cannot fill. Nothing is run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import onnx
from onnx import helper

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.graphs.reading import HOW_TO_NAME, not_a_tensor
from attnserve_server.conversion.inputs.additive import additive_masks_of
from attnserve_server.conversion.inputs.index_ranges import index_ranges_of
from attnserve_server.conversion.inputs.relations import relations_of
from attnserve_server.conversion.inputs.roles import is_position, is_second, roles_of
from attnserve_server.model.formula import Formula
from attnserve_server.model.manifest import BATCH, NUMPY_DTYPES, Dtype, IndexRange, InputRole, InputSpec

SEQUENCE = "seq"
"""The symbol of the axis that token inputs share, where the graph has none."""
SECOND_SEQUENCE = "decoder_seq"
"""The same for inputs of a second text, by their names."""


@dataclass(frozen=True, slots=True)
class Signature:
    """The inputs of a graph.

    Attributes:
        inputs: without the batch axis.
        symbols: of their dynamic axes that are free, in order.
        fixed_batch: the only batch size that the graph takes; None: any.
        unbounded: inputs that the graph looks rows up with, and whose legal numbers are not known.
        relations: the formula of each other dynamic axis, over `symbols`.
    """

    inputs: tuple[InputSpec, ...]
    symbols: tuple[str, ...]
    fixed_batch: int | None = None
    unbounded: frozenset[str] = frozenset()
    relations: Mapping[str, Formula] = field(default_factory=dict)

    def lengths(self, free: Mapping[str, int]) -> dict[str, int]:
        """Return the lengths of all axes of the inputs, given those of all the free ones (else KeyError)."""
        return {**free, **{symbol: formula.length_at(free) for symbol, formula in self.relations.items()}}

    def where(self, symbol: str) -> tuple[InputSpec, int] | None:
        """Return the first input that has an axis of this symbol, and the axis, counted behind the batch from 0."""
        return next(((spec, spec.shape.index(symbol)) for spec in self.inputs if symbol in spec.shape), None)

    def solved(self, known: Mapping[str, int | Formula]) -> Signature:
        """Return the signature with sizes, other symbols, or formulas in the place of free symbols."""
        sizes = {symbol: each for symbol, each in known.items() if isinstance(each, int)}
        formulas = {symbol: Formula(each) if isinstance(each, int) else each for symbol, each in known.items()}
        names = {symbol: str(each.leaf) for symbol, each in formulas.items() if isinstance(each.leaf, str)}
        relations = {symbol: formula.replaced(formulas) for symbol, formula in self.relations.items()}
        relations |= {symbol: each for symbol, each in formulas.items() if each.operator}
        sizes |= {symbol: formula.length_at({}) for symbol, formula in relations.items() if not formula.symbols}
        names |= {symbol: str(each.leaf) for symbol, each in relations.items() if isinstance(each.leaf, str)}

        def dimension(size: str | int) -> str | int:
            return sizes.get(size, names.get(size, size)) if isinstance(size, str) else size

        inputs = tuple(spec.model_copy(update={"shape": tuple(map(dimension, spec.shape))}) for spec in self.inputs)
        kept = {symbol: each for symbol, each in relations.items() if each.operator and each.symbols}
        # A symbol makes way for those of its formula.
        parts = [formulas[symbol].symbols if symbol in known else (symbol,) for symbol in self.symbols]
        symbols = tuple(dict.fromkeys(part for each in parts for part in each))
        return replace(self, inputs=inputs, symbols=symbols, relations=kept)


def dtype_of(element_type: int, name: str) -> Dtype:
    """Return the manifest's name of an ONNX element type. Raises BuildRefused for a type that cannot be served."""
    try:
        known = np.dtype(helper.tensor_dtype_to_np_dtype(element_type)).name
    except (KeyError, ValueError):
        known = "unknown"
    if known not in NUMPY_DTYPES:
        known = "string" if element_type == onnx.TensorProto.STRING else known
        raise BuildRefused(f"{name!r} is of type {known}; {', '.join(NUMPY_DTYPES)} can be served")
    return cast("Dtype", known)


def signature_of(graph: onnx.GraphProto, padding_id: int = 0) -> Signature:
    """Return the roles, types and axis symbols of a graph's inputs.

    The first axis of every input is the batch, regardless of its symbol. Other dynamic axes keep their symbols. One
    without a symbol is `seq` in a token input (`decoder_seq` in one of a second text), else `<input>_axis_<position>`.

    Args:
        graph: with inferred shapes.
        padding_id: the token id of padding.

    Raises:
        BuildRefused: the graph has no inputs, or one has no axes, no known shape, a type that cannot be served, or a
            batch axis that is fixed at another size than 1 or not the first.
    """
    initialized = {tensor.name for tensor in graph.initializer}
    values = [value for value in graph.input if value.name not in initialized]
    if not values:
        raise BuildRefused("the graph has no inputs")
    axes = {value.name: _axes(value) for value in values}
    dtypes = {value.name: dtype_of(value.type.tensor_type.elem_type, value.name) for value in values}
    fixed, batch_symbols = _batch(axes)
    flat = {
        name: _sequence_symbol(name, axes[name][1])
        for name, dtype in dtypes.items()
        if len(axes[name]) == 2 and (np.issubdtype(NUMPY_DTYPES[dtype], np.integer) or dtype == "bool")
    }
    roles, vocabularies = roles_of(graph, flat)
    counted = {name: NUMPY_DTYPES[dtype] for name, dtype in dtypes.items() if dtype != "bool"}
    bounds = index_ranges_of(graph, counted)
    additive = additive_masks_of(graph, {name: dtype for name, dtype in counted.items() if dtype.kind == "f"})
    specs: list[InputSpec] = []
    for name, dtype in dtypes.items():
        role = roles.get(name, InputRole.DATA)
        along_tokens = role is not InputRole.DATA or (name in flat and is_position(name))
        shape = tuple(
            _dimension(name, position, axis, along_tokens=along_tokens)
            for position, axis in enumerate(axes[name][1:], start=1)
        )
        fill = {InputRole.ATTENTION_MASK: 1.0, InputRole.TOKEN_TYPE_IDS: 0.0}.get(role)
        spec = InputSpec(name=name, dtype=dtype, shape=shape, role=role, fill=fill)
        if name in additive:
            # Padding with the lowest finite number hides the padded keys.
            specs.append(spec.model_copy(update={"additive_mask": True, "padding": additive[name]}))
        else:
            specs.append(_bounded(spec, bounds.of.get(name, ()), vocabularies.get(name, 0), padding_id))
    symbols = {dimension: None for spec in specs for dimension in spec.shape if isinstance(dimension, str)}
    clash = [symbol for symbol in symbols if symbol == BATCH or symbol in batch_symbols]
    if clash:
        raise BuildRefused(_clash(BATCH if BATCH in clash else clash[0], specs, axes))
    whole = Signature(tuple(specs), tuple(symbols), fixed_batch=1 if fixed else None, unbounded=bounds.lost)
    named = relations_of(symbols, batch_symbols)
    whole = whole.solved({symbol: Formula(name) for symbol, name in named.renamed.items()})
    free = tuple(symbol for symbol in whole.symbols if symbol not in named.formulas)
    return replace(whole, symbols=free, relations=named.formulas)


def in_float16(signature: Signature) -> Signature:
    """Return the signature of the graph in float16, where the number that hides a padded key must stay finite."""
    least = float(np.finfo(np.float16).min)
    inputs = tuple(
        spec.model_copy(update={"padding": max(spec.padding, least)}) if spec.additive_mask else spec
        for spec in signature.inputs
    )
    return replace(signature, inputs=inputs)


def with_counted_positions(signature: Signature) -> Signature:
    """Return the signature of a decoder, whose positions the server counts from 0 where a request sends none.

    An encoder may count from another number, as RoBERTa does from 2: there, requests must send positions.
    """
    inputs = tuple(
        spec.model_copy(update={"role": InputRole.POSITION_IDS})
        if is_position(spec.name) and len(spec.shape) == 1 and isinstance(spec.shape[0], str)
        else spec
        for spec in signature.inputs
    )
    return replace(signature, inputs=inputs)


def with_counted_masks(signature: Signature, counted: Collection[str]) -> Signature:
    """Return the signature with the attention masks marked of which the graph reads only the number of ones."""
    marked = tuple(
        spec.model_copy(update={"counted": True})
        if spec.name in counted and spec.role is InputRole.ATTENTION_MASK
        else spec
        for spec in signature.inputs
    )
    return replace(signature, inputs=marked)


def _bounded(spec: InputSpec, ranges: tuple[IndexRange, ...], vocabulary_size: int, padding_id: int) -> InputSpec:
    """Return an input with the numbers that it may hold, and a padding that is one of them."""
    if spec.role is InputRole.TOKEN_IDS:
        # Token ids are never negative, although Gather takes negative row numbers.
        past = [each.greatest + 1 for each in ranges if not each.along and each.least <= 0 <= each.greatest]
        sizes = [size for size in (vocabulary_size, *past) if size]
        return spec.model_copy(update={"padding": float(padding_id), "vocabulary_size": min(sizes, default=0)})
    if spec.role is InputRole.ATTENTION_MASK:
        return spec
    if spec.role is InputRole.TOKEN_TYPE_IDS:
        ranges = tuple(each.model_copy(update={"least": max(each.least, 0)}) for each in ranges if each.greatest >= 0)
    bounded = spec.model_copy(update={"index_ranges": ranges})
    resting = set(bounded.resting)
    return bounded.model_copy(update={"padding": float(resting.pop())}) if len(resting) == 1 else bounded


def _clash(symbol: str, specs: Sequence[InputSpec], axes: Mapping[str, Sequence[Any]]) -> str:
    """Return the refusal of a batch symbol that another axis has too, or that is not on the first axis."""
    firsts = [name for name, each in axes.items() if each[0].dim_param == symbol]
    spec = next(spec for spec in specs if symbol in spec.shape)
    if spec.name in firsts:
        return f"axis symbol {symbol!r} names the batch axis and another one"
    place = spec.shape.index(symbol) + 1
    message = f"input {spec.name!r} has its batch on axis {place}: it must be the first axis of all inputs"
    return f"{message}; {symbol!r} is axis 0 of {firsts[0]!r}" if firsts else message


def _axes(value: onnx.ValueInfoProto) -> list[Any]:
    """Return the axes of an input, the batch first."""
    if not value.type.HasField("tensor_type"):
        raise BuildRefused(not_a_tensor(value.name, value.type.WhichOneof("value") or "unknown_type"))
    if not value.type.tensor_type.HasField("shape"):
        raise BuildRefused(f"input {value.name!r} has no known shape: {HOW_TO_NAME}")
    axes = list(value.type.tensor_type.shape.dim)
    if not axes:
        raise BuildRefused(f"input {value.name!r} is a scalar: its first axis must be the batch")
    for position, axis in enumerate(axes):
        if axis.HasField("dim_value") and axis.dim_value < 1:
            message = f"input {value.name!r}: axis {position} has the size {axis.dim_value}"
            raise BuildRefused(message if not axis.dim_value else f"{message}: {HOW_TO_NAME}")
    return axes


def _batch(axes: Mapping[str, Sequence[Any]]) -> tuple[set[int], set[str]]:
    """Return the fixed sizes (none, or 1) and the symbols of the first axes."""
    firsts = [each[0] for each in axes.values()]
    fixed = {int(axis.dim_value) for axis in firsts if axis.HasField("dim_value")}
    if fixed - {1}:
        raise BuildRefused(f"the batch axis is fixed at {max(fixed)}: export the model with a dynamic first axis")
    return fixed, {axis.dim_param for axis in firsts if axis.dim_param}


def _sequence_symbol(name: str, axis: Any) -> str:
    if axis.HasField("dim_value"):
        return str(axis.dim_value)
    return str(axis.dim_param) or (SECOND_SEQUENCE if is_second(name) else SEQUENCE)


def _dimension(name: str, position: int, axis: Any, *, along_tokens: bool) -> str | int:
    if axis.HasField("dim_value"):
        return int(axis.dim_value)
    if along_tokens:
        return _sequence_symbol(name, axis)
    return str(axis.dim_param) or f"{name}_axis_{position}"
