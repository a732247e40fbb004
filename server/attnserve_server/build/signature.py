"""What the inputs of a graph are: roles by their names, axis symbols by their shapes. Runs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import onnx
from onnx import helper

from attnserve_server.build.errors import BuildRefused
from attnserve_server.model.manifest import BATCH, NUMPY_DTYPES, Dtype, InputRole, InputSpec

_ROLES = {
    "input_ids": InputRole.TOKEN_IDS,
    "attention_mask": InputRole.ATTENTION_MASK,
    "token_type_ids": InputRole.TOKEN_TYPE_IDS,
}
_SEQUENCE_INPUTS = {*_ROLES, "position_ids"}
SEQUENCE = "seq"
"""The symbol of the axis that token inputs share where the graph does not name it."""


@dataclass(frozen=True, slots=True)
class Signature:
    """The inputs, without the batch axis, and the largest batch that the graph takes (None: any)."""

    inputs: tuple[InputSpec, ...]
    symbols: tuple[str, ...]
    fixed_batch: int | None = None


def dtype_of(element_type: int, name: str) -> Dtype:
    """The manifest's name of an ONNX element type. Raises BuildRefused for those that cannot be served."""
    numpy_name = np.dtype(helper.tensor_dtype_to_np_dtype(element_type)).name if element_type else "unknown"
    if numpy_name not in NUMPY_DTYPES:
        raise BuildRefused(f"{name!r} is of type {numpy_name}; {', '.join(NUMPY_DTYPES)} can be served")
    return cast("Dtype", numpy_name)


def signature_of(graph: onnx.GraphProto, padding_id: int = 0) -> Signature:
    """Roles, types and axis symbols of a graph's inputs.

    The first axis of every input is the batch, whatever its symbol. Other dynamic axes keep their symbols; a token
    input's nameless one is `seq`, any other becomes `<input>_axis_<position>`.

    Raises:
        BuildRefused: an input has no axes, no known type, or a fixed batch axis other than 1.
    """
    initialized = {tensor.name for tensor in graph.initializer}
    specs: list[InputSpec] = []
    fixed: set[int] = set()
    batch_symbols: set[str] = set()
    for value in graph.input:
        if value.name in initialized:
            continue
        if not value.type.HasField("tensor_type") or not value.type.tensor_type.HasField("shape"):
            raise BuildRefused(f"input {value.name!r} has no known shape")
        axes = list(value.type.tensor_type.shape.dim)
        if not axes:
            raise BuildRefused(f"input {value.name!r} is a scalar: its first axis must be the batch")
        if axes[0].HasField("dim_value"):
            fixed.add(axes[0].dim_value)
        else:
            batch_symbols.add(axes[0].dim_param)
        shape = tuple(_extent(value.name, position, axis) for position, axis in enumerate(axes[1:], start=1))
        specs.append(_spec(value.name, dtype_of(value.type.tensor_type.elem_type, value.name), shape, padding_id))
    if not specs:
        raise BuildRefused("the graph has no inputs")
    if fixed - {1}:
        raise BuildRefused(f"the batch axis is fixed at {max(fixed)}: export the model with a dynamic first axis")
    symbols = {extent: None for spec in specs for extent in spec.shape if isinstance(extent, str)}
    clash = [symbol for symbol in symbols if symbol == BATCH or (symbol in batch_symbols and symbol)]
    if clash:
        raise BuildRefused(f"axis symbol {clash[0]!r} names the batch axis and another one")
    return Signature(tuple(specs), tuple(symbols), fixed_batch=1 if fixed else None)


def _extent(name: str, position: int, axis: Any) -> str | int:
    if axis.HasField("dim_value"):
        if axis.dim_value < 1:
            raise BuildRefused(f"input {name!r}: axis {position} has the extent {axis.dim_value}")
        return int(axis.dim_value)
    if axis.dim_param:
        return str(axis.dim_param)
    return SEQUENCE if name in _SEQUENCE_INPUTS and position == 1 else f"{name}_axis_{position}"


def _spec(name: str, dtype: Dtype, shape: tuple[str | int, ...], padding_id: int) -> InputSpec:
    integral = np.issubdtype(NUMPY_DTYPES[dtype], np.integer) or dtype == "bool"
    role = _ROLES.get(name, InputRole.DATA) if integral and len(shape) == 1 else InputRole.DATA
    padding = padding_id if role is InputRole.TOKEN_IDS else 0
    fill = {InputRole.ATTENTION_MASK: 1.0, InputRole.TOKEN_TYPE_IDS: 0.0}.get(role)
    return InputSpec(name=name, dtype=dtype, shape=shape, role=role, padding=padding, fill=fill)
