"""The model under attack: its graph, sampler, outputs, sites and limits.

An attack runs a graph on batches that are likely to change an answer. A site is one attention computation, and a tapped
graph returns the weights of its sites. Nothing here runs the graph, or raises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.model.equality import WEIGHTS_PREFIX
from attnserve_server.model.manifest import Following, OutputSpec, SiteSpec


@dataclass(frozen=True, slots=True)
class Target:
    """A tapped graph, with what its runs need.

    Args:
        runner: Runs the tapped graph.
        sampler: Makes sequences for it.
        outputs: The outputs that are served.
        sites: All sites. Unavailable ones are skipped.
        max_lengths: The greatest length of each of the inputs' symbols, in positions.
        max_batch_size: The number of rows of the largest batch.
        derived: The forms of symbols that no input has.
        extreme_ids: For each input of ids: the ids with the greatest and the smallest embeddings.
    """

    runner: GraphRunner
    sampler: Sampler
    outputs: Sequence[OutputSpec]
    sites: Sequence[SiteSpec]
    max_lengths: Mapping[str, int]
    max_batch_size: int
    derived: Mapping[str, Following] = field(default_factory=dict)
    extreme_ids: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """The number of rows of the largest batch that the graph takes."""
        return self.sampler.signature.fixed_batch or self.max_batch_size

    @property
    def available(self) -> tuple[SiteSpec, ...]:
        """The sites whose weights can be returned."""
        return tuple(site for site in self.sites if site.available)

    @property
    def fetched(self) -> dict[str, str]:
        """The graph's output for each served output and, as `attention.<site>`, for each available site's weights."""
        weights = {WEIGHTS_PREFIX + site.name: site.weights_output or "" for site in self.available}
        return {**{spec.name: spec.name for spec in self.outputs}, **weights}
