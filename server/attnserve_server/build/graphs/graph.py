"""A graph on its way into a bundle: copied with taps, opened for checks, written. Runs nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import onnx
import onnx_ir as ir

from attnserve_server.build.finders import find_sites
from attnserve_server.build.graphs.reading import checked, read_graph
from attnserve_server.build.sites import FoundSite
from attnserve_server.build.taps import add_taps

__all__ = ["checked", "expose", "precision_of", "read_graph", "save", "tapped", "tapped_at", "with_layout_of"]


_INTEGRAL = {
    *("DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits"),
    *("QAttention", "QLinearMatMul"),
}
"""Operators that multiply integers."""


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
    return replace(site, heads=settled.heads, kv_heads=settled.kv_heads, probabilities=layout, windows=settled.windows)


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
