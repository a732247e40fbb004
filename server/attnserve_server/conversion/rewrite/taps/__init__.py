"""Taps: nodes beside a site's own operator that return its weights for the batch rows that select attention.

Every value behind a tap's first Gather has n, the number of selected rows, as its first dimension. With n = 0 all are
empty, and the tap costs next to nothing. The site's own operator, and the rest of the graph, stay as they are.
`add_taps` changes a graph; `tapped` and `tapped_at` copy it first; `add_means` adds the means over heads to taps;
`expose` opens the values that checks compare. A site is a place in a graph that computes attention.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

import onnx
import onnx_ir as ir

from attnserve_server.conversion.base.sites import (
    FoundSite,
    Learnt,
    Linear,
    Probabilities,
    Recurrent,
    Scores,
    Untappable,
    value_and_output,
)
from attnserve_server.conversion.finders import find_sites
from attnserve_server.conversion.rewrite.taps.linear import weights_of_linear, weights_of_recurrent
from attnserve_server.conversion.rewrite.taps.means import MEAN_PREFIX, add_means
from attnserve_server.conversion.rewrite.taps.operands import with_plain_values
from attnserve_server.conversion.rewrite.taps.probabilities import weights_of_probabilities, weights_of_windows
from attnserve_server.conversion.rewrite.taps.scores import weights_of_scores
from attnserve_server.conversion.rewrite.taps.tap import ITEMS_PREFIX, SCORES_PREFIX, WEIGHTS_PREFIX, Tap
from attnserve_server.conversion.rewrite.taps.unsigned import sites_to_tap

__all__ = [
    "ITEMS_PREFIX",
    "MEAN_PREFIX",
    "SCORES_PREFIX",
    "TAP_PREFIXES",
    "WEIGHTS_PREFIX",
    "add_means",
    "add_taps",
    "expose",
    "sites_to_tap",
    "tapped",
    "tapped_at",
    "with_plain_values",
]


TAP_PREFIXES: Final = (WEIGHTS_PREFIX, SCORES_PREFIX, MEAN_PREFIX)
"""Starts of the names of a tap's outputs."""


def add_taps(graph: ir.Graph, sites: Mapping[str, FoundSite], learnt: Mapping[str, Learnt]) -> None:
    """Add a tap to a graph for every site that can have one.

    A tap adds the input `attention_items.<name>`, int64 (n,): rows of the batch, in any order; n may be 0. It adds the
    output `attention.<name>`, float32 (n, H, L, S), or (n, H, L, W) where a site has windows. Rows sum to 1; fully
    masked rows are 0. A site with `Scores` adds the output `attention_scores.<name>` of the same shape: after scale,
    softcap and bias, before the masks; the lowest float32 for a hidden key.
    Source: Vaswani et al. 2017, eq. 1, in the form of ONNX Attention-23.

    Args:
        graph: changed in place.
        sites: of this graph.
        learnt: the layouts of sites with `Probabilities`; such a site without one gets no tap.
    """
    shared: dict[tuple[object, ...], ir.Value] = {}
    for name, site in sites.items():
        tap = Tap(graph, name, shared)
        match site.attention:
            case Scores() as scores:
                weights, shown = weights_of_scores(tap, scores)
                tap.finish(weights, site.heads, behind=site.node, scores=shown)
            case Linear() as linear:
                tap.finish(weights_of_linear(tap, linear), site.heads, behind=site.node)
            case Recurrent() as recurrent:
                tap.finish(weights_of_recurrent(tap, recurrent), site.heads, behind=site.node)
            case Probabilities() as own if name in learnt:
                _add_tap_of_probabilities(tap, graph, own, learnt[name])


def _add_tap_of_probabilities(tap: Tap, graph: ir.Graph, site: Probabilities, learnt: Learnt) -> None:
    last = site.weights.producer()
    assert last is not None
    layout, windows = learnt.layout, learnt.windows
    if windows is None:
        rows = weights_of_probabilities(tap, site, layout)
    else:
        values = (*graph.inputs, *(value for node in graph for value in node.outputs))
        anchor = next(value for value in values if value.name == windows.anchor)
        rows = weights_of_windows(tap, site, layout, windows, anchor)
    tap.finish(rows, layout.heads, behind=last)


def tapped(proto: onnx.ModelProto) -> tuple[ir.Model, dict[str, FoundSite]]:
    """Copy a model and add the taps that need no run of the graph. Return the copy and all its sites by name."""
    model = ir.from_proto(proto)
    sites = find_sites(model.graph)
    add_taps(model.graph, sites, {})
    return model, sites


def tapped_at(proto: onnx.ModelProto, names: Collection[str], learnt: Mapping[str, Learnt]) -> ir.Model:
    """Copy a model and add taps at the named sites only; `learnt` holds the layouts, which are those of every copy.

    Raises:
        KeyError: the model has no site of one of these names.
    """
    model = ir.from_proto(proto)
    sites = sites_to_tap(model.graph)
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
