"""A graph on its way into a bundle: read with care, its shapes inferred, copied with taps. Runs nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import onnx
import onnx.inliner
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx.external_data_helper import load_external_data_for_model

from attnserve_server.build.errors import BuildRefused
from attnserve_server.build.finders import find_sites
from attnserve_server.build.sites import FoundSite
from attnserve_server.build.taps import add_taps

MAX_GRAPH_BYTES = 2**31 - 1
"""What one protobuf message can hold."""


def read_graph(path: Path) -> onnx.ModelProto:
    """A model from a file, whole (external data is read in) and checked, with inferred shapes.

    Raises:
        BuildRefused: it is no ONNX file, is cut short, is invalid, reads data from elsewhere, or is over 2 GiB.
    """
    name = path.name
    if not path.is_file():
        raise BuildRefused(f"{name}: there is no such file")
    try:
        proto = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, ValueError):
        raise BuildRefused(f"{name} is not an ONNX file, or is cut short") from None
    if not proto.graph.node:
        raise BuildRefused(f"{name} is not an ONNX file, or is empty: it has no graph")
    try:
        # Refuses data outside the model's own folder, and links.
        load_external_data_for_model(proto, str(path.parent))
    except Exception:  # noqa: BLE001 - the boundary to onnx, which raises many types here
        raise BuildRefused(f"{name}: its external data is missing, cut short, or outside its own folder") from None
    if proto.functions:
        # Finders look through the graph alone.
        proto = onnx.inliner.inline_local_functions(proto)
    return checked(proto, name)


def checked(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """A model with inferred shapes. Raises BuildRefused where it is invalid or over 2 GiB."""
    if proto.ByteSize() > MAX_GRAPH_BYTES:
        raise BuildRefused(f"{name}: {proto.ByteSize()} bytes exceed the {MAX_GRAPH_BYTES} of one ONNX file")
    try:
        onnx.checker.check_model(proto)
        return onnx.shape_inference.infer_shapes(proto)
    except Exception as fault:  # noqa: BLE001 - the boundary to onnx, which raises many types here
        first = str(fault).strip().splitlines()[0] if str(fault).strip() else type(fault).__name__
        raise BuildRefused(f"{name} is not a valid ONNX model: {first}") from None


def tapped(proto: onnx.ModelProto) -> tuple[ir.Model, dict[str, FoundSite]]:
    """A copy of a model with taps at all sites that can have one, and the sites by name."""
    model = ir.from_proto(proto)
    sites = find_sites(model.graph)
    add_taps(model.graph, sites)
    return model, sites


def tapped_at(proto: onnx.ModelProto, settled: Mapping[str, FoundSite]) -> ir.Model:
    """A copy of a model with taps at the named sites only, which have the layouts that were learnt of them."""
    model = ir.from_proto(proto)
    found = find_sites(model.graph)
    add_taps(model.graph, {name: with_layout_of(found[name], site) for name, site in settled.items()})
    return model


def with_layout_of(site: FoundSite, settled: FoundSite) -> FoundSite:
    """A site of one copy of a graph, with what was learnt about it in another copy."""
    if site.probabilities is None or settled.probabilities is None:
        return site
    layout = replace(site.probabilities, axes=settled.probabilities.axes)
    return replace(site, heads=settled.heads, kv_heads=settled.kv_heads, probabilities=layout)


def expose(model: ir.Model, sites: Collection[FoundSite]) -> None:
    """Make what checks need of sites outputs of the graph. Inputs and outputs already stand open."""
    values = [operand.value for site in sites for operand in (site.output, site.value) if operand is not None]
    values += [site.probabilities.value for site in sites if site.probabilities is not None]
    for value in values:
        if not value.is_graph_output() and not value.is_graph_input() and value.const_value is None:
            model.graph.outputs.append(value)


def save(model: ir.Model, path: Path) -> None:
    """Write a model into one file."""
    ir.save(model, path)


def precision_of(proto: onnx.ModelProto) -> Literal["fp32", "fp16", "int8"]:
    """What kernels work in: int8 where they are integer ones, fp16 where most weights are float16, else fp32."""
    if any(node.op_type in {"MatMulInteger", "QLinearMatMul", "DynamicQuantizeMatMul"} for node in proto.graph.node):
        return "int8"
    sizes: dict[int, int] = {onnx.TensorProto.FLOAT16: 0, onnx.TensorProto.FLOAT: 0}
    for tensor in proto.graph.initializer:
        if tensor.data_type in sizes:
            count = 1
            for extent in tensor.dims:
                count *= extent
            sizes[tensor.data_type] += count
    return "fp16" if sizes[onnx.TensorProto.FLOAT16] > sizes[onnx.TensorProto.FLOAT] else "fp32"
