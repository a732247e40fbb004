"""Copies of a graph with taps, and the values that checks need opened as outputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import onnx
import onnx_ir as ir

from attnserve_server.conversion.base.sites import FoundSite
from attnserve_server.conversion.finders import find_sites
from attnserve_server.conversion.rewrite.taps import add_taps


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
