"""The mean over heads of each site's weights, one more output of a tapped graph.

weights (n, H, L, S) -> (n, H, L * S) -> ones (n, 1, H) @ -> (n, L, S) -> / H -> mean

A request that reads only the mean then takes 1/H of the numbers out of the runtime. The product adds the heads of each
element by itself, in one order for every n. `ReduceMean` does not: for one row onnxruntime's CPU takes another
kernel, of other last bits and ten times the time (findings/reduce_mean_of_one_row.sh). The sum is divided last, so that
the mean of ones is 1.

A site is a place in the graph that computes attention. A tap is the nodes that return its weights for the rows of the
batch that its input `items` selects. A graph without the outputs that the sites name raises KeyError.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from attnserve_server.conversion.graphs.nodes import NodeBuilder, typed
from attnserve_server.model.manifest import SiteSpec

MEAN_PREFIX = "attention_mean."


def add_means(graph: ir.Graph, sites: Iterable[SiteSpec]) -> None:
    """Add the output `mean_output`, float32 (n, L, S), for each site that has one; (n, L, W) where weights are a band.

    Args:
        graph: with the taps of these sites. Changed in place.
        sites: as the manifest describes them.
    """
    place = {node: at for at, node in enumerate(graph)}
    values = {value.name: value for value in (*graph.inputs, *graph.outputs)}
    shapes: dict[tuple[object, ...], ir.Value] = {}
    # In the order of the graph, because the first site of some axes makes the shape for all of them.
    found = [(site, values[site.items_input], values[site.weights_output]) for site in sites if site.mean_output]
    for site, items, weights in sorted(found, key=lambda each: place[_producer(each[2])]):
        _add_mean(graph, site, items, weights, shapes)


def _producer(weights: ir.Value) -> ir.Node:
    node = weights.producer()
    assert node is not None, "a tap computes its output"
    return node


def _add_mean(
    graph: ir.Graph, site: SiteSpec, items: ir.Value, weights: ir.Value, shapes: dict[tuple[object, ...], ir.Value]
) -> None:
    """Add the nodes behind that which makes the weights. None of them copies the weights.

    `shapes`: (-1, L, S) as a value, by the axes that L and S are of.
    """
    new = NodeBuilder(graph, f"{site.mean_output}/")
    # (n, H, L * S). A shape of constants, where -1 is n, because n may be 0: then no other size could be inferred.
    # Reshape keeps the size of an axis with 0, at the same place; so the last of three axes is made first.
    flat = new.unsqueeze(new.op("Flatten", [weights], axis=2), 0)
    rows = new.op("Reshape", [flat, new.ints(-1, site.heads, 0)])
    # One row of ones for each item: onnxruntime 1.31 does not broadcast a matrix over no items.
    row = new.stored(f"attnserve.ones.1.1.{site.heads}", np.ones((1, 1, site.heads), np.float32))
    ones = new.op("Gather", [row, new.op("Mul", [items, new.scalar(0)])], axis=0)
    sums = new.op("MatMul", [ones, rows])
    axes = (site.query_axis, site.columns)
    if axes not in shapes:
        shapes[axes] = new.op("Concat", [new.ints(-1), new.shape(weights, 2, 4)], axis=0)
    mean = new.op("Div", [new.op("Reshape", [sums, shapes[axes]]), new.number(float(site.heads))])
    new.place_after(_producer(weights))
    count = weights.shape[0] if weights.shape is not None else None
    mean.name = site.mean_output
    graph.outputs.append(typed(mean, ir.DataType.FLOAT, [count, None, None]))
