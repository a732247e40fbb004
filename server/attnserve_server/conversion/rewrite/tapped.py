"""Copies of a graph with taps, and the values that checks need as outputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx
import onnx_ir as ir

from attnserve_server.conversion.base.sites import FoundSite, Learnt, Probabilities, Untappable, value_and_output
from attnserve_server.conversion.finders import find_sites
from attnserve_server.conversion.rewrite.taps import add_taps


def tapped(proto: onnx.ModelProto) -> tuple[ir.Model, dict[str, FoundSite]]:
    """Copy a model and add the taps that need no run of the graph. Return the copy and all its sites by name."""
    model = ir.from_proto(proto)
    sites = find_sites(model.graph)
    add_taps(model.graph, sites, {})
    return model, sites


def tapped_at(proto: onnx.ModelProto, names: Collection[str], learnt: Mapping[str, Learnt]) -> ir.Model:
    """Copy a model and add taps at the named sites only; `learnt` holds the layouts, which are those of every copy."""
    model = ir.from_proto(proto)
    sites = find_sites(model.graph)
    add_taps(model.graph, {name: sites[name] for name in names}, learnt)
    return model


def expose(model: ir.Model, sites: Collection[FoundSite]) -> None:
    """Make each site's output, value and own weights outputs of the graph, where they are no inputs or constants."""
    own = [site.attention for site in sites if not isinstance(site.attention, Untappable)]
    values = [value for attention in own for value in reversed(value_and_output(attention))]
    values += [attention.weights for attention in own if isinstance(attention, Probabilities)]
    for value in values:
        if not value.is_graph_output() and not value.is_graph_input() and value.const_value is None:
            model.graph.outputs.append(value)
