"""Opens a small graph for a test: in a session, with the values that checks need as outputs.

A site is a place in a graph that computes attention. `folder` is where the graph's file is written. A graph that the
runtime cannot load raises BuildRefused.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
from attnserve_server.conversion.base.sites import FoundSite
from attnserve_server.conversion.finders import find_sites
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.conversion.rewrite.taps import expose


def runner_of(model: onnx.ModelProto, folder: Path) -> GraphRunner:
    """The graph as it is."""
    path = folder / "graph.onnx"
    onnx.save(model, path)
    return GraphRunner(path)


def sites_of(model: onnx.ModelProto) -> dict[str, FoundSite]:
    """The sites of a graph, by name."""
    return find_sites(ir.from_proto(onnx.shape_inference.infer_shapes(model)).graph)


def exposed(model: onnx.ModelProto, folder: Path) -> tuple[GraphRunner, dict[str, FoundSite]]:
    """The graph with every site's output, value and own weights as outputs, and the sites."""
    copy = ir.from_proto(onnx.shape_inference.infer_shapes(model))
    sites = find_sites(copy.graph)
    expose(copy, sites.values())
    return runner_of(ir.to_proto(copy), folder), sites
