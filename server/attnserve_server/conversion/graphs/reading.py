"""Read an ONNX file of unknown origin: within bounds of memory and time, and checked, or refused in one sentence.

`read_graph` takes a file and `checked` a model; both raise BuildRefused. Nothing is run.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import onnx
import onnx.inliner
import onnx_ir as ir
from google.protobuf.message import DecodeError

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.graphs.external_data import MAX_GRAPH_BYTES, read_external_data, too_large
from attnserve_server.conversion.graphs.lowering import lowered
from attnserve_server.conversion.graphs.operators import (
    refuse_unknown_operators,
    refuse_unknown_versions,
    runtime_operators_set_apart,
)

HOW_TO_NAME = "name its axes in the file, as onnx.tools.update_model_dims does, or in the export"
MAX_NODES = 1_000_000
"""The limit of nodes after functions are inlined. The largest models have some ten thousand; functions that call
functions could make any number from a small file."""


def read_graph(path: Path) -> onnx.ModelProto:
    """Read a model with its external data, check it, and infer its shapes.

    Raises:
        BuildRefused: the file is no ONNX file, is cut short or invalid, needs a version or operator that is not
            supported, refers to data outside its folder and cache, or exceeds 2 GiB.
    """
    name = path.name
    if not path.is_file():
        raise BuildRefused(f"{name}: there is no such file" if not path.is_dir() else f"{name} is a folder")
    size = path.stat().st_size
    if size > MAX_GRAPH_BYTES:
        raise too_large(name, size)
    proto = onnx.ModelProto()
    try:
        # onnx.load would choose the format by the file's name.
        proto.ParseFromString(path.read_bytes())
    except (DecodeError, OSError, ValueError):
        raise BuildRefused(f"{name} is not an ONNX file, or is cut short") from None
    if not proto.graph.node:
        raise BuildRefused(f"{name} is not an ONNX file, or is empty: it has no graph")
    refuse_unknown_versions(proto, name)
    read_external_data(proto, path)
    return checked(proto, name)


def checked(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Check a model and return it with its functions inlined, its nodes in order and its shapes inferred.

    Raises:
        BuildRefused: the model is invalid, needs a version or operator that is not supported, or exceeds 2 GiB.
    """
    if proto.ByteSize() > MAX_GRAPH_BYTES:
        raise too_large(name, proto.ByteSize())
    refuse_unknown_versions(proto, name)
    for value in proto.graph.input:
        kind = value.type.WhichOneof("value") or "unknown_type"
        if kind != "tensor_type":
            raise BuildRefused(not_a_tensor(value.name, kind))
        if not _has_shape(value):
            raise BuildRefused(f"input {value.name!r} has no known shape: {HOW_TO_NAME}")
    outputs = [value.name for value in proto.graph.output]
    if len(set(outputs)) < len(outputs):
        raise BuildRefused(f"{name} is not a valid ONNX model: two outputs have the same name")
    proto = _in_order(proto, name)
    _rename_duplicates(proto)
    try:
        _check(proto)
        if proto.functions:
            _refuse_too_many_nodes(proto, name)
            # Finders do not look into functions.
            proto = onnx.inliner.inline_local_functions(proto)
        proto = lowered(proto, name)
        refuse_unknown_operators(proto, name)
        proto = onnx.shape_inference.infer_shapes(proto)
        # onnx_ir refuses models that onnx accepts, such as those with names that are not UTF-8.
        model = ir.from_proto(proto)
        model.graph.initializers.clear()
        ir.to_proto(model)
    except BuildRefused:
        raise
    except Exception as fault:  # noqa: BLE001 - the boundary to onnx, which raises many types here
        raise BuildRefused(f"{name} is not a valid ONNX model: {_first_words(fault)}") from None
    return proto


def not_a_tensor(name: str, kind: str) -> str:
    """Return the refusal of an input of another type, such as `sequence_type`."""
    return f"input {name!r} is of type {kind.removesuffix('_type')}; only tensors can be served"


def _check(proto: onnx.ModelProto) -> None:
    """Run onnx's checker without the outputs that have no shape, which it requires; a run finds these shapes later."""
    outputs = list(proto.graph.output)
    shaped = [value for value in outputs if not value.type.HasField("tensor_type") or _has_shape(value)]
    try:
        if len(shaped) < len(outputs):
            del proto.graph.output[:]
            proto.graph.output.extend(shaped)
        with runtime_operators_set_apart(proto):
            onnx.checker.check_model(proto)
    finally:
        if len(shaped) < len(outputs):
            del proto.graph.output[:]
            proto.graph.output.extend(outputs)


def _has_shape(value: onnx.ValueInfoProto) -> bool:
    return value.type.tensor_type.HasField("shape")


def _in_order(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Return the model with its nodes sorted so that they can run; some exporters write them in another order."""
    known = {value.name for value in proto.graph.input} | {tensor.name for tensor in proto.graph.initializer}
    known.update(sparse.values.name for sparse in proto.graph.sparse_initializer)
    made = {output for node in proto.graph.node for output in node.output}
    for node in proto.graph.node:
        if any(value not in known for value in node.input if value in made):
            break
        known.update(node.output)
    else:
        return proto
    try:
        model = ir.from_proto(proto)
        model.graph.sort()
        return ir.to_proto(model)
    except ValueError as fault:
        if "cycle" in str(fault):
            raise BuildRefused(
                f"{name} has a cycle: a node takes a value that is computed from its own output"
            ) from None
        raise BuildRefused(f"{name} is not a valid ONNX model: {_first_words(fault)}") from None
    except Exception as fault:  # noqa: BLE001 - the boundary to onnx_ir, which raises many types for invalid graphs
        raise BuildRefused(f"{name} is not a valid ONNX model: {_first_words(fault)}") from None


def _rename_duplicates(proto: onnx.ModelProto) -> None:
    """Rename nodes that share a name; the standard allows that, and the runtime does not."""
    seen: set[str] = set()
    for position, node in enumerate(proto.graph.node):
        if node.name in seen:
            node.name = f"{node.name}_{position}"
        if node.name:
            seen.add(node.name)


def _refuse_too_many_nodes(proto: onnx.ModelProto, name: str) -> None:
    """Count the nodes before functions are inlined. The checker has refused functions that call themselves."""
    functions = {(function.domain, function.name): function for function in proto.functions}
    sizes: dict[tuple[str, str], int] = {}

    def size_of(key: tuple[str, str]) -> int:
        if key not in sizes:
            called = [(node.domain, node.op_type) for node in functions[key].node]
            sizes[key] = sum(size_of(each) if each in functions else 1 for each in called)
        return sizes[key]

    total = sum(
        size_of((node.domain, node.op_type)) if (node.domain, node.op_type) in functions else 1
        for node in proto.graph.node
    )
    if total > MAX_NODES:
        raise BuildRefused(f"{name} has {total} nodes after its functions are inlined; the limit is {MAX_NODES}")


def _first_words(fault: Exception) -> str:
    """Return the first line of the message of the first cause, and the second line if the first ends in a colon."""
    while fault.__cause__ is not None and isinstance(fault.__cause__, Exception):
        fault = fault.__cause__
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    if not lines:
        return type(fault).__name__
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:300]


_INTEGRAL = {
    *("DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits"),
    *("QAttention", "QGemm", "QLinearMatMul", "QuantizeLinear"),
}
"""MatMuls and attention of integers, and the quantizers around them in files that state the MatMuls in floats."""


def save(model: ir.Model, path: Path) -> None:
    """Write a model to one file."""
    ir.save(model, path)


def quantizes_statically(proto: onnx.ModelProto) -> bool:
    """Return whether a graph quantizes activations or weights with scales that no input changes."""
    pair = {"DequantizeLinear", "QuantizeLinear"}
    return any(node.op_type in pair or node.op_type.startswith("QLinear") for node in proto.graph.node)


def _multiplies_dequantized(proto: onnx.ModelProto) -> bool:
    """Return whether a MatMul reads dequantized numbers. The runtime multiplies integers there, as MatMulNBits does."""
    numbers = {node.output[0] for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    products = (node for node in proto.graph.node if node.op_type in {"Gemm", "MatMul"})
    return any(name in numbers for node in products for name in node.input)


def precision_of(proto: onnx.ModelProto) -> Literal["fp32", "fp16", "int8"]:
    """Return int8 if integers are multiplied or activations quantized, fp16 if most weights are float16, else fp32.

    A graph without weights computes in the type of its inputs.
    """
    if any(node.op_type in _INTEGRAL for node in proto.graph.node) or _multiplies_dequantized(proto):
        return "int8"
    sizes: dict[int, int] = {onnx.TensorProto.FLOAT16: 0, onnx.TensorProto.FLOAT: 0}
    for tensor in proto.graph.initializer:
        if tensor.data_type in sizes:
            sizes[tensor.data_type] += math.prod(tensor.dims)
    if not any(sizes.values()):
        for given in proto.graph.input:
            kind = given.type.tensor_type.elem_type
            if kind in sizes:
                sizes[kind] += 1
    return "fp16" if sizes[onnx.TensorProto.FLOAT16] > sizes[onnx.TensorProto.FLOAT] else "fp32"
