"""Inputs of generated graphs: ids or features, with or without a mask, and their signature.

A stream is a value (B, T, width) with what is known of it; a mask states which positions are no padding. A kind of mask
that `stream_of` does not draw raises.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from attnserve_server.model.manifest import InputRole, InputSpec
from mixing_values import Context, MaskInput, State, Stream
from onnx import TensorProto, helper

VOCABULARY = 24
_TYPES = {
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "bool": TensorProto.BOOL,
    "float32": TensorProto.FLOAT,
}


@dataclass
class Inputs:
    """The inputs so far."""

    values: list[onnx.ValueInfoProto] = field(default_factory=list)
    specs: list[InputSpec] = field(default_factory=list)

    def add(self, spec: InputSpec) -> str:
        """Declare an input, the batch first."""
        shape = ["b", *spec.shape]
        self.values.append(helper.make_tensor_value_info(spec.name, _TYPES[spec.dtype], shape))
        self.specs.append(spec)
        return spec.name


def stream_of(context: Context, inputs: Inputs, symbol: str, second: str) -> Stream:
    """Return the inputs of one sequence as a stream. Its mask, if it has one, is added to the context.

    Args:
        context: The graph that is written.
        inputs: Collects the declared inputs.
        symbol: The symbol of the sequence's axis.
        second: The prefix of names of a second sequence's inputs.
    """
    writer = context.writer
    width = writer.pick(4, 8, 8, 16)
    if writer.rng.random() < 0.55:
        context.pieces.append("ids")
        padding = writer.pick(0, 0, 0, 1, 7)
        ids = inputs.add(
            InputSpec(
                name=f"{second}input_ids",
                dtype=writer.pick("int64", "int64", "int32"),
                shape=(symbol,),
                role=InputRole.TOKEN_IDS,
                padding=padding,
                vocabulary_size=VOCABULARY,
            )
        )
        table = writer.drawn(VOCABULARY, width, scale=1.0)
        if writer.rng.random() < 0.3:
            table[padding] = 0
        norm = float(np.linalg.norm(table, axis=1).max())
        stream = Stream(writer.op("Gather", writer.const(table), ids, axis=0), symbol, width, State(norm=norm))
    else:
        context.pieces.append("features")
        name = inputs.add(InputSpec(name=f"{second}features", dtype="float32", shape=(symbol, width)))
        ids, padding = "", 0
        stream = Stream(name, symbol, width, State(behind="zero", raw=True))
    kinds = ["none"] + ["int64"] * 3 + ["int32", "bool", "float32", "inverted", "wrong"] + (["ids"] * 2 if ids else [])
    kind = writer.pick(*kinds)
    if kind not in {"none", "wrong"}:
        context.masks[symbol] = mask_of(context, inputs, symbol, f"{second}attention_mask", kind, ids, padding)
    elif kind == "wrong":
        context.wrong_masks[symbol] = wrong_mask(context, inputs, symbol, f"{second}padding_mask", ids, padding)
    context.pieces.append(f"mask: {kind}")
    return stream


def mask_of(context: Context, inputs: Inputs, symbol: str, name: str, kind: str, ids: str, padding: int) -> MaskInput:
    """Return a mask input, or a mask that the graph derives from ids, as booleans and as numbers."""
    writer = context.writer
    if kind == "ids":
        same = writer.op("Equal", ids, _like(context, inputs, ids, padding))
        keep = writer.op("Not", same)
        return MaskInput(ids, keep, writer.cast(keep, TensorProto.FLOAT))
    if kind == "inverted":
        value = inputs.add(InputSpec(name=f"{name}_inverted", dtype="bool", shape=(symbol,), padding=1))
        keep = writer.op("Not", value)
        return MaskInput(value, keep, writer.cast(keep, TensorProto.FLOAT))
    role = InputRole.ATTENTION_MASK if kind in {"int64", "int32"} else InputRole.DATA
    fill = 1.0 if role is InputRole.ATTENTION_MASK else None
    value = inputs.add(InputSpec(name=name, dtype=kind, shape=(symbol,), role=role, fill=fill))
    if kind == "bool":
        return MaskInput(value, value, writer.cast(value, TensorProto.FLOAT))
    ones = value if kind == "float32" else writer.cast(value, TensorProto.FLOAT)
    return _numbered(context, value, ones, np.dtype(kind))


def _numbered(context: Context, value: str, ones: str, dtype: np.dtype[np.generic]) -> MaskInput:
    """Return a mask of numbers. Which numbers allow a position differs by spelling."""
    writer = context.writer
    spelling = writer.pick("cast", "cast", "greater", "equal", "not zero")
    if spelling == "cast":
        return MaskInput(value, writer.cast(value, TensorProto.BOOL), ones, arithmetic=True)
    if spelling == "not zero":
        keep = writer.op("Not", writer.op("Equal", value, writer.const(0, dtype)))
        return MaskInput(value, keep, ones, arithmetic=True)
    kind, number = {"greater": ("Greater", 0), "equal": ("Equal", 1)}[spelling]
    return MaskInput(value, writer.op(kind, value, writer.const(number, dtype)), ones, arithmetic=True, picky=True)


def wrong_mask(context: Context, inputs: Inputs, symbol: str, name: str, ids: str, padding: int) -> MaskInput:
    """Return a mask that hides allowed positions, or tests for an id that is not the padding id: padded keys count."""
    writer = context.writer
    if ids:
        keep = writer.op("Not", writer.op("Equal", ids, _like(context, inputs, ids, padding + 2)))
        return MaskInput(ids, keep, writer.cast(keep, TensorProto.FLOAT))
    value = inputs.add(InputSpec(name=name, dtype="bool", shape=(symbol,)))
    keep = writer.op("Not", value)
    return MaskInput(value, keep, writer.cast(keep, TensorProto.FLOAT))


def _like(context: Context, inputs: Inputs, ids: str, number: int) -> str:
    dtype = next(spec.dtype for spec in inputs.specs if spec.name == ids)
    return context.writer.const(number, np.dtype(dtype))
