"""Settles what the windows of a graph's sites are, all of them in one copy of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.sites import Layout, Learnt, Untappable, WeightAxes, Windows
from attnserve_server.conversion.finders import find_probabilities
from attnserve_server.conversion.learning.provenance import NotTraced, Tracer
from attnserve_server.conversion.learning.windows.anchors import Anchors, anchors_of
from attnserve_server.conversion.learning.windows.products import Products, products_of
from attnserve_server.conversion.learning.windows.study import Study
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.probing.probe import Axes
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.model.bands import GridBand
from attnserve_server.model.manifest import SiteSpec


def windows_of(
    proto: onnx.ModelProto, layouts: Mapping[str, Layout], sampler: Sampler, work: Path
) -> dict[str, Windows | Untappable]:
    """Return for each site whose layout has windows what these are, or the reason why that is not known.

    Args:
        proto: the source.
        layouts: by the site's name.
        sampler: draws sequences for the source.
        work: a folder for files.
    """
    windowed = {name: layout.axes for name, layout in layouts.items() if layout.windowed}
    if not windowed:
        return {}
    found: dict[str, Windows | NotTraced]
    try:
        found = _windows(proto, windowed, sampler, work)
    except BuildRefused as why:  # the graph with what was added to it does not run
        found = {name: NotTraced(str(why)) for name in windowed}
    return {
        name: each if isinstance(each, Windows) else Untappable(f"which keys its windows hold is not known: {each}")
        for name, each in found.items()
    }


def _windows(
    proto: onnx.ModelProto, own: Mapping[str, WeightAxes], sampler: Sampler, work: Path
) -> dict[str, Windows | NotTraced]:
    """All sites of a graph in one copy of it, since graphs are large."""
    found: dict[str, Windows | NotTraced] = {}
    anchors: dict[str, Anchors] = {}
    for name, anchor in anchors_of(proto, own, sampler, work / "anchors.onnx").items():
        if isinstance(anchor, NotTraced):
            found[name] = anchor
        else:
            anchors[name] = anchor
    model = ir.from_proto(proto)
    values = values_of(model.graph)
    sites = find_probabilities(model.graph)
    traced: dict[str, tuple[Products, list[str]]] = {}
    for number, (name, anchor) in enumerate(anchors.items()):
        products = products_of(sites[name])
        try:
            query = Tracer(model.graph, values[anchor.query], f"{number}.query").trace(products.query)
            key = Tracer(model.graph, values[anchor.key], f"{number}.key").trace(products.value)
        except NotTraced as why:
            found[name] = why
            continue
        shown = [products.key, products.scores, products.weights]
        model.graph.outputs.extend(value for value in shown if not value.is_graph_output())
        traced[name] = products, [str(value.name) for value in (query, key, *shown)]
    if not traced:
        return found
    path = work / "provenance.onnx"
    ir.save(model, path)
    runner = GraphRunner(path)
    for name, (products, names) in traced.items():
        study = Study(runner, sampler, names, own[name], products, anchors[name])
        try:
            found[name] = study.windows()
        except (NotTraced, BuildRefused) as why:
            found[name] = NotTraced(str(why))
        except ValueError:  # arrays of shapes that no windows have
            found[name] = NotTraced("its layout is not understood")
    return found


def values_of(graph: ir.Graph) -> dict[str, ir.Value]:
    """A graph's inputs and the outputs of its nodes, by name."""
    made = (value for node in graph for value in node.outputs)
    return {str(value.name): value for value in (*graph.inputs, *made)}


def with_key_axes(axes: Axes, learnt: Mapping[str, Learnt]) -> Axes:
    """The axes with those that the keys of windowed sites are on, and what is causal: bands have other columns."""
    windows = {name: each.windows for name, each in learnt.items() if each.windows and name in axes.sites}
    banded = {name: (axes.sites[name][0], each.key) for name, each in windows.items()}
    causal = {name for name, each in windows.items() if each.causal}
    return replace(axes, sites={**axes.sites, **banded}, causal_sites=(axes.causal_sites - set(banded)) | causal)


def grid_of_windows(sites: Sequence[SiteSpec], axis: str) -> tuple[int, int] | None:
    """Rows and columns of the patches along an axis, where windows over them tell; None where none do."""
    bands = {site.band for site in sites if axis in {site.query_axis, site.key_axis}}
    grids = {(band.rows, band.columns) for band in bands if isinstance(band, GridBand)}
    return grids.pop() if len(grids) == 1 else None
