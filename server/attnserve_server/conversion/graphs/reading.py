"""A graph from a file that anybody may have made: read within bounds, or refused in one sentence. Runs nothing."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Literal

import onnx
import onnx.inliner
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx.external_data_helper import load_external_data_for_model, uses_external_data

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.graphs.operators import (
    refuse_unknown_operators,
    refuse_unknown_versions,
    without_what_only_the_runtime_has,
)

HOW_TO_NAME = "name its axes in the file, as onnx.tools.update_model_dims does, or in the export"
MAX_GRAPH_BYTES = 2**31 - 1
"""What one protobuf message can hold."""
MAX_NODES = 1_000_000
"""Nodes of a graph with its functions written out; the largest models have some ten thousand. Functions of functions
could make any number from a small file."""


def read_graph(path: Path) -> onnx.ModelProto:
    """A model from a file, whole (external data is read in) and checked, with inferred shapes.

    Raises:
        BuildRefused: it is no ONNX file, is cut short, is invalid, needs what is not supported, reads data from
            elsewhere, or is over 2 GiB.
    """
    name = path.name
    if not path.is_file():
        raise BuildRefused(f"{name}: there is no such file" if not path.is_dir() else f"{name} is a folder")
    size = path.stat().st_size
    if size > MAX_GRAPH_BYTES:
        raise _too_large(name, size)
    proto = onnx.ModelProto()
    try:
        # Not by onnx.load, which goes by the name and takes other formats for others.
        proto.ParseFromString(path.read_bytes())
    except (DecodeError, OSError, ValueError):
        raise BuildRefused(f"{name} is not an ONNX file, or is cut short") from None
    if not proto.graph.node:
        raise BuildRefused(f"{name} is not an ONNX file, or is empty: it has no graph")
    refuse_unknown_versions(proto, name)
    _read_external_data(proto, path)
    return checked(proto, name)


def checked(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """A model with its functions written out, its nodes in order and its shapes inferred.

    Raises:
        BuildRefused: it is invalid, needs what is not supported, or is over 2 GiB.
    """
    if proto.ByteSize() > MAX_GRAPH_BYTES:
        raise _too_large(name, proto.ByteSize())
    refuse_unknown_versions(proto, name)
    for value in proto.graph.input:
        kind = value.type.WhichOneof("value") or "unknown_type"
        if kind != "tensor_type":
            said = f"input {value.name!r} is of type {kind.removesuffix('_type')}"
            raise BuildRefused(f"{said}; only tensors can be served")
        if not _has_shape(value):
            raise BuildRefused(f"input {value.name!r} has no known shape: {HOW_TO_NAME}")
    outputs = [value.name for value in proto.graph.output]
    if len(set(outputs)) < len(outputs):
        raise BuildRefused(f"{name} is not a valid ONNX model: two of its outputs have one name")
    proto = _in_order(proto, name)
    _part_names(proto)
    try:
        _check(proto)
        if proto.functions:
            _refuse_too_many_nodes(proto, name)
            # Finders look through the graph alone.
            proto = onnx.inliner.inline_local_functions(proto)
        refuse_unknown_operators(proto, name)
        proto = onnx.shape_inference.infer_shapes(proto)
        # The way through the other library finds what the first does not, such as names that are no text.
        model = ir.from_proto(proto)
        model.graph.initializers.clear()
        ir.to_proto(model)
    except BuildRefused:
        raise
    except Exception as fault:  # noqa: BLE001 - the boundary to onnx, which raises many types here
        raise BuildRefused(f"{name} is not a valid ONNX model: {_first_words(fault)}") from None
    return proto


def _check(proto: onnx.ModelProto) -> None:
    """The library's checker, which wants a shape of every output; running the model will tell those left out."""
    outputs = list(proto.graph.output)
    shaped = [value for value in outputs if not value.type.HasField("tensor_type") or _has_shape(value)]
    try:
        if len(shaped) < len(outputs):
            del proto.graph.output[:]
            proto.graph.output.extend(shaped)
        with without_what_only_the_runtime_has(proto):
            onnx.checker.check_model(proto)
    finally:
        if len(shaped) < len(outputs):
            del proto.graph.output[:]
            proto.graph.output.extend(outputs)


def _has_shape(value: onnx.ValueInfoProto) -> bool:
    return value.type.tensor_type.HasField("shape")


def _read_external_data(proto: onnx.ModelProto, path: Path) -> None:
    """Read a model's external data in, from files of its own folder alone."""
    name = path.name
    total = proto.ByteSize()
    for tensor in _external_tensors(proto):
        facts = {entry.key: entry.value for entry in tensor.external_data}
        data = path.parent / _inside(facts.get("location", ""), name)
        try:
            status = data.lstat()
        except (OSError, ValueError):
            raise BuildRefused(f"{name}: its external data {data.name!r} is missing") from None
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            # What a link leads to is not in the folder, or may be changed from outside of it.
            raise BuildRefused(f"{name}: its external data {data.name!r} is no file of its own: links are not followed")
        length = facts.get("length", "")
        total += int(length) if length.isdecimal() and len(length) < 20 else status.st_size
        if total > MAX_GRAPH_BYTES:
            raise _too_large(name, total)
    try:
        load_external_data_for_model(proto, str(path.parent))
    except Exception:  # noqa: BLE001 - the boundary to onnx, which raises many types here
        raise BuildRefused(f"{name}: its external data is missing, cut short, or outside its own folder") from None


def _inside(location: str, name: str) -> str:
    """A location that cannot lead out of the model's folder: no drive, no root, no way up."""
    for path in (PurePosixPath(location), PureWindowsPath(location)):
        if not location or path.is_absolute() or path.drive or path.root or ".." in path.parts:
            raise BuildRefused(f"{name}: its external data lies outside its own folder")
    return location


def _external_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All tensors whose data is elsewhere, those of constants and subgraphs included."""
    graphs: list[onnx.GraphProto] = [proto.graph]
    nodes: list[onnx.NodeProto] = [node for function in proto.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from (tensor for tensor in graph.initializer if uses_external_data(tensor))
            nodes.extend(graph.node)
            continue
        for attribute in nodes.pop().attribute:
            yield from (tensor for tensor in (attribute.t, *attribute.tensors) if uses_external_data(tensor))
            graphs.extend((*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs))


def _in_order(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """The model with its nodes in an order in which they can run; exporters do not always write them so."""
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
            raise BuildRefused(f"{name} has a cycle: a node takes what is made from its own output") from None
        raise BuildRefused(f"{name} is not a valid ONNX model: {_first_words(fault)}") from None
    except Exception as fault:  # noqa: BLE001 - the boundary to onnx_ir, which raises many types for invalid graphs
        raise BuildRefused(f"{name} is not a valid ONNX model: {_first_words(fault)}") from None


def _part_names(proto: onnx.ModelProto) -> None:
    """Give nodes that share a name names of their own: the standard lets them, and the runtime does not."""
    seen: set[str] = set()
    for position, node in enumerate(proto.graph.node):
        if node.name in seen:
            node.name = f"{node.name}_{position}"
        if node.name:
            seen.add(node.name)


def _refuse_too_many_nodes(proto: onnx.ModelProto, name: str) -> None:
    """Count before writing functions out. The checker has seen that none calls itself."""
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
        raise BuildRefused(f"{name} has {total} nodes once its functions are written out, more than {MAX_NODES}")


def _too_large(name: str, size: int) -> BuildRefused:
    return BuildRefused(f"{name}: {size} bytes, with its external data, exceed the {MAX_GRAPH_BYTES} of one ONNX file")


def _first_words(fault: Exception) -> str:
    """The first line of the message of a library's first cause, and its second where the first ends in a colon."""
    while fault.__cause__ is not None and isinstance(fault.__cause__, Exception):
        fault = fault.__cause__
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    if not lines:
        return type(fault).__name__
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:300]


_INTEGRAL = {
    *("DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits"),
    *("QAttention", "QLinearMatMul"),
}
"""Operators that multiply integers."""


def save(model: ir.Model, path: Path) -> None:
    """Write a model into one file."""
    ir.save(model, path)


def precision_of(proto: onnx.ModelProto) -> Literal["fp32", "fp16", "int8"]:
    """What kernels work in: int8 where they are integer ones, fp16 where most weights are float16, else fp32."""
    if any(node.op_type in _INTEGRAL for node in proto.graph.node):
        return "int8"
    sizes: dict[int, int] = {onnx.TensorProto.FLOAT16: 0, onnx.TensorProto.FLOAT: 0}
    for tensor in proto.graph.initializer:
        if tensor.data_type in sizes:
            count = 1
            for extent in tensor.dims:
                count *= extent
            sizes[tensor.data_type] += count
    return "fp16" if sizes[onnx.TensorProto.FLOAT16] > sizes[onnx.TensorProto.FLOAT] else "fp32"
