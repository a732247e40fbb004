"""Taps: nodes beside a site's own operator that give its weights for the batch rows that ask. Finds no sites.

Everything behind a tap's first Gather has n, the number of rows asked for, as its first extent. With none, every tensor
is empty and the tap costs next to nothing. The site's own operator is left as it was, and so is the rest of the graph.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from attnserve_server.conversion.base.sites import FoundSite
from attnserve_server.conversion.rewrite.taps.linear import weights_of_linear
from attnserve_server.conversion.rewrite.taps.nodes import ITEMS_PREFIX, WEIGHTS_PREFIX, TapNodes
from attnserve_server.conversion.rewrite.taps.operands import with_plain_values
from attnserve_server.conversion.rewrite.taps.probabilities import weights_of_probabilities
from attnserve_server.conversion.rewrite.taps.scores import weights_of_scores
from attnserve_server.conversion.rewrite.taps.windows import weights_of_windows

__all__ = ["ITEMS_PREFIX", "WEIGHTS_PREFIX", "add_taps", "with_plain_values"]


def add_taps(graph: ir.Graph, sites: Mapping[str, FoundSite]) -> None:
    """Add to a graph, for every site that can have one, the input and the output of its tap.

    Input `attention_items.<name>`: int64 (n,), rows of the batch, in any order, n may be 0. Output
    `attention.<name>`: float32 (n, H, L, S), or (n, H, L, W) where a site has windows; rows sum to 1, fully masked rows
    are 0.
    Source: Vaswani et al. 2017, eq. 1, in the form of ONNX Attention-23.
    """
    shared: dict[tuple[str, ir.Value], ir.Value] = {}
    for name, site in sites.items():
        tap = TapNodes(graph, name, shared)
        if site.scores is not None:
            tap.finish(weights_of_scores(tap, site.scores), site.heads, behind=site.node)
        elif site.linear is not None:
            tap.finish(weights_of_linear(tap, site.linear), site.heads, behind=site.node)
        elif site.probabilities is not None and site.probabilities.axes:
            last = site.probabilities.value.producer()
            assert last is not None
            if site.windows is None:
                tap.finish(weights_of_probabilities(tap, site.probabilities), site.heads, behind=last)
                continue
            values = (*graph.inputs, *(value for node in graph for value in node.outputs))
            anchor = next(value for value in values if value.name == site.windows.anchor)
            weights = weights_of_windows(tap, site.probabilities, site.windows, anchor)
            tap.finish(weights, site.heads, behind=last)
