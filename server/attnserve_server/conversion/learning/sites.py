"""Learns what a graph's sites are by running it, and withdraws the sites that are not understood or fail the check.

A site is one attention computation of the graph. A withdrawn site becomes `Untappable(reason)`, and the conversion goes
on without its weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.sites import (
    FoundSite,
    Layout,
    Learnt,
    Probabilities,
    Tappable,
    Untappable,
    Windows,
)
from attnserve_server.conversion.graphs.reading import save
from attnserve_server.conversion.learning.layout import layouts_of
from attnserve_server.conversion.learning.products import product_errors
from attnserve_server.conversion.learning.windows.apart import windows_apart
from attnserve_server.conversion.learning.windows.study import windows_of
from attnserve_server.conversion.probing.axes import ProbedAxes
from attnserve_server.conversion.probing.feeds import Sampler, probe_lengths
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.conversion.rewrite.taps import WEIGHTS_PREFIX
from attnserve_server.model.bands import GridBand
from attnserve_server.model.manifest import SiteSpec


def tappable_of(found: Mapping[str, FoundSite]) -> dict[str, Tappable]:
    """Return the attention of the sites that a tap can be added to, by name."""
    return {name: own for name, site in found.items() if not isinstance(own := site.attention, Untappable)}


def learn(
    proto: onnx.ModelProto, model: ir.Model, found: Mapping[str, FoundSite], sampler: Sampler, work: Path
) -> tuple[dict[str, FoundSite], dict[str, Learnt]]:
    """Run the graph to learn the layouts and the windows of sites that have their own weights.

    Args:
        proto: the source.
        model: a copy of it whose outputs include every site's weights and value.
        found: the sites of `model`.
        sampler: draws sequences for the source.
        work: a folder for files.

    Returns:
        The sites, of which those that are not understood are now `Untappable`; and what was learnt, about these too.
    """
    own = {name: weights for name, site in found.items() if isinstance(weights := site.attention, Probabilities)}
    if not own:
        return dict(found), {}
    path = work / "untapped.onnx"
    save(model, path)
    known: dict[str, Layout | Untappable]
    try:
        known = layouts_of(GraphRunner(path), sampler, own, probe_lengths(sampler.signature.symbols))
    except BuildRefused as fault:
        # The probe that follows fails too, and its message names the lengths.
        known = dict.fromkeys(own, Untappable(f"its layout is not known: {fault}"))
    layouts = {name: layout for name, layout in known.items() if isinstance(layout, Layout)}
    apart = windows_apart(proto, layouts, sampler, work)
    layouts |= {name: layout for name, layout in apart.items() if isinstance(layout, Layout)}
    lost = {name: why for name, why in (known | apart).items() if isinstance(why, Untappable)}
    windows = windows_of(proto, {name: layout for name, layout in layouts.items() if name not in lost}, sampler, work)
    lost |= {name: why for name, why in windows.items() if isinstance(why, Untappable)}
    learnt = {
        name: Learnt(layout, each if isinstance(each := windows.get(name), Windows) else None)
        for name, layout in layouts.items()
    }
    return {name: replace(site, attention=lost.get(name, site.attention)) for name, site in found.items()}, learnt


def verified(
    checker: GraphRunner,
    sampler: Sampler,
    found: Mapping[str, FoundSite],
    learnt: Mapping[str, Learnt],
    tolerance: float,
) -> dict[str, FoundSite]:
    """Return the sites; one whose weights @ value do not give its own output, or do not run, is now `Untappable`.

    Args:
        checker: the graph with taps, whose outputs include every site's value and output.
        sampler: draws sequences for it.
        found: all sites.
        learnt: the layouts of sites with `Probabilities`.
        tolerance: the greatest difference, relative to the greatest value where that exceeds 1.
    """
    lengths, _ = probe_lengths(sampler.signature.symbols)
    feeds = sampler.rows(lengths, sampler.signature.fixed_batch or 3)
    tappable = tappable_of(found)
    result = dict(found)
    for name in tappable:
        try:
            weights = checker.run(feeds, [WEIGHTS_PREFIX + name])[WEIGHTS_PREFIX + name]
            error = product_errors(checker, tappable, learnt, {name: weights}, feeds)[name]
        except BuildRefused as fault:
            reason = f"its tap does not run: {fault}"
        except ValueError:  # shapes of weights and value do not fit
            reason = "its first axis is not the batch"
        else:
            reason = f"its weights @ value differ from its own output by {error:.3g}, more than {tolerance:g}"
            if error <= tolerance:
                continue
        result[name] = replace(found[name], attention=Untappable(reason))
    return result


def with_key_axes(axes: ProbedAxes, learnt: Mapping[str, Learnt]) -> ProbedAxes:
    """Replace the key axes of windowed sites by those of their keys, and add which of them are causal.

    The last axis of a windowed site's weights is the columns of its band, not its keys.
    """
    windows = {name: each.windows for name, each in learnt.items() if each.windows and name in axes.sites}
    banded = {name: (axes.sites[name][0], each.key) for name, each in windows.items()}
    causal = {name for name, each in windows.items() if each.causal}
    return replace(axes, sites={**axes.sites, **banded}, causal_sites=(axes.causal_sites - set(banded)) | causal)


def grid_of_windows(sites: Sequence[SiteSpec], axis: str) -> tuple[int, int] | None:
    """Return the rows and columns of the patches along an axis, if the windows over them give one grid."""
    bands = {site.band for site in sites if axis in {site.query_axis, site.key_axis}}
    grids = {(band.rows, band.columns) for band in bands if isinstance(band, GridBand)}
    return grids.pop() if len(grids) == 1 else None
