"""The model that is attacked, as everything that runs it needs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.model.equality import WEIGHTS_PREFIX
from attnserve_server.model.manifest import DerivedLength, OutputSpec, SiteSpec


@dataclass(frozen=True, slots=True)
class Target:
    """A tapped graph, and what is known of it.

    Args:
        runner: the tapped graph.
        sampler: makes sequences for it.
        outputs: those that are served.
        sites: those that were found; unavailable ones are passed over.
        max_lengths: the greatest length of each of the inputs' symbols.
        max_batch_size: rows of the largest batch.
        derived: the forms of symbols that are none of the inputs'.
        extreme_ids: by the name of an input of ids: those with the greatest and the least embeddings.
    """

    runner: GraphRunner
    sampler: Sampler
    outputs: Sequence[OutputSpec]
    sites: Sequence[SiteSpec]
    max_lengths: Mapping[str, int]
    max_batch_size: int
    derived: Mapping[str, DerivedLength] = field(default_factory=dict)
    extreme_ids: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows of the largest batch that the graph takes."""
        return self.sampler.signature.fixed_batch or self.max_batch_size

    @property
    def available(self) -> tuple[SiteSpec, ...]:
        """The sites that give weights."""
        return tuple(site for site in self.sites if site.available)

    @property
    def fetched(self) -> dict[str, str]:
        """The graph's output for each served output and, as `attention.<site>`, for each available site's weights."""
        weights = {WEIGHTS_PREFIX + site.name: site.weights_output or "" for site in self.available}
        return {**{spec.name: spec.name for spec in self.outputs}, **weights}
