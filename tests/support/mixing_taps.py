"""Generated graphs with taps, as conversion makes them, and the truths of their weights.

A tap is what conversion adds to a graph so that it returns a site's attention weights; a site is a place that computes
attention. A truth is what is known of a graph by its construction: whether padding or other rows change an answer.
`tapped` returns None for a graph that conversion refuses.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
from attnserve_server.conversion.assemble import assemble
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.proof import Proof, prove
from attnserve_server.model.manifest import OutputSpec, SiteSpec
from mixing_graphs import MixingGraph
from mixing_values import UNSAID


@dataclass(frozen=True, slots=True)
class Tapped:
    """A graph with taps. `graph` has their weights among its outputs; `sites` are the sites with weights."""

    graph: MixingGraph
    outputs: tuple[OutputSpec, ...]
    sites: tuple[SiteSpec, ...]

    def proved(self, _: MixingGraph) -> Proof:
        """Return the product's proof."""
        return prove(
            self.graph.proto,
            self.graph.signature,
            self.outputs,
            self.sites,
            max_lengths=self.graph.max_lengths,
            derived=self.graph.derived,
            precision="fp32",
        )


def tapped(graph: MixingGraph) -> Tapped | None:
    """Return the graph tapped as in conversion, or None where it has no site with weights, or is refused."""
    with tempfile.TemporaryDirectory() as work:
        try:
            made = assemble(graph.proto, Sampler(graph.signature), Path(work), Steps.silent())
        except BuildRefused:
            return None
        proto = onnx.load(made.model_path)
    sites = tuple(site for site in made.sites if site.available)
    if not sites:
        return None
    truths = {spec.name: graph.truths[spec.name] for spec in made.outputs}
    weights: list[OutputSpec] = []
    for site in sites:
        node = made.found[site.name].node.name or ""
        known = [truth for prefix, truth in graph.weights.items() if node.startswith(f"{prefix}.")]
        assert site.weights_output is not None
        truths[site.weights_output] = known[0] if known else dict.fromkeys(graph.axes, UNSAID)
        shape = (site.heads, site.query_axis, site.key_axis)
        weights.append(OutputSpec(name=site.weights_output, dtype="float32", shape=shape))
    of_all = replace(
        graph, proto=proto, outputs=(*made.outputs, *weights), derived=dict(made.derived_axes), truths=truths
    )
    return Tapped(of_all, made.outputs, sites)
