"""Taps: nodes beside a site's own operator that give its weights for the batch rows that ask. Finds no sites.

Everything behind a tap's first Gather has n, the number of rows asked for, as its first extent. With none, every tensor
is empty and the tap costs next to nothing. The site's own operator is left as it was, and so is the rest of the graph.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from attnserve_server.conversion.base.sites import FoundSite, Learnt, Linear, Probabilities, Scores
from attnserve_server.conversion.rewrite.taps.linear import weights_of_linear
from attnserve_server.conversion.rewrite.taps.nodes import ITEMS_PREFIX, WEIGHTS_PREFIX, TapNodes
from attnserve_server.conversion.rewrite.taps.operands import with_plain_values
from attnserve_server.conversion.rewrite.taps.probabilities import weights_of_probabilities
from attnserve_server.conversion.rewrite.taps.scores import weights_of_scores
from attnserve_server.conversion.rewrite.taps.windows import weights_of_windows

__all__ = ["ITEMS_PREFIX", "WEIGHTS_PREFIX", "add_taps", "with_plain_values"]


def add_taps(graph: ir.Graph, sites: Mapping[str, FoundSite], learnt: Mapping[str, Learnt]) -> None:
    """Add to a graph, for every site that can have one, the input and the output of its tap.

    Input `attention_items.<name>`: int64 (n,), rows of the batch, in any order, n may be 0. Output
    `attention.<name>`: float32 (n, H, L, S), or (n, H, L, W) where a site has windows; rows sum to 1, fully masked rows
    are 0.
    Source: Vaswani et al. 2017, eq. 1, in the form of ONNX Attention-23.

    Args:
        graph: changed in place.
        sites: of this graph.
        learnt: the layouts of sites with `Probabilities`; such a site without one gets no tap.
    """
    shared: dict[tuple[str, ir.Value], ir.Value] = {}
    for name, site in sites.items():
        tap = TapNodes(graph, name, shared)
        match site.attention:
            case Scores() as scores:
                tap.finish(weights_of_scores(tap, scores), site.heads, behind=site.node)
            case Linear() as linear:
                tap.finish(weights_of_linear(tap, linear), site.heads, behind=site.node)
            case Probabilities(weights=weights) if name in learnt:
                _add_tap_of_probabilities(tap, graph, weights, learnt[name])


def _add_tap_of_probabilities(tap: TapNodes, graph: ir.Graph, weights: ir.Value, learnt: Learnt) -> None:
    last = weights.producer()
    assert last is not None
    layout, windows = learnt.layout, learnt.windows
    if windows is None:
        rows = weights_of_probabilities(tap, weights, layout)
    else:
        values = (*graph.inputs, *(value for node in graph for value in node.outputs))
        anchor = next(value for value in values if value.name == windows.anchor)
        rows = weights_of_windows(tap, weights, layout, windows, anchor)
    tap.finish(rows, layout.heads, behind=last)
