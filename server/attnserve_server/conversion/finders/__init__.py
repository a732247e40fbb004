"""Find the attention sites of a graph: the registry of finders, one for each way in which graphs compute attention.

A site is one attention computation. `find_sites` returns the sites by name, and none for a graph without attention.
Finders only read the graph; rewrite/taps adds the taps, the nodes that return a site's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx_ir as ir

from attnserve_server.conversion.base.sites import FoundSite, Probabilities
from attnserve_server.conversion.finders import (
    catalogue,
    decomposed,
    linear,
    microsoft_attention,
    microsoft_group_query,
    microsoft_multi_head,
    onnx_attention,
    recurrent,
)
from attnserve_server.conversion.finders.names import site_names
from attnserve_server.conversion.finders.order import in_layer_order

Finder = Callable[[ir.Graph], Iterable[FoundSite]]
"""Yields the sites of its form in a graph, and does not change the graph."""

FINDERS: tuple[Finder, ...] = (
    onnx_attention.find,
    microsoft_attention.find,
    microsoft_multi_head.find,
    microsoft_group_query.find,
    recurrent.find,
    catalogue.find_untapped,
    decomposed.find,
    linear.find,
)
"""In order of precedence: of two sites with the same node, the first finder's counts."""


def find_sites(graph: ir.Graph, finders: Iterable[Finder] = FINDERS) -> dict[str, FoundSite]:
    """Return all sites of a graph by name, in the order of their layers."""
    claimed: dict[ir.Node, FoundSite] = {}
    for finder in finders:
        for site in finder(graph):
            claimed.setdefault(site.node, site)
    nodes = [node for node in graph.all_nodes() if node in claimed]
    ordered = [claimed[node] for node in in_layer_order(graph, nodes)]
    return dict(zip(site_names([site.node for site in ordered]), ordered, strict=True))


def find_probabilities(graph: ir.Graph) -> dict[str, Probabilities]:
    """Return the sites whose weights the graph has as a value, by name."""
    sites = find_sites(graph)
    return {name: own for name, site in sites.items() if isinstance(own := site.attention, Probabilities)}
