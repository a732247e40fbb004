"""Learns by running whether a model answers NaN where an added mask hides every key of a query."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.probing.probe import probe_lengths
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.domain.values import Array
from attnserve_server.model.manifest import InputSpec


def with_needed_keys(runner: GraphRunner, sampler: Sampler, outputs: Sequence[str]) -> tuple[InputSpec, ...]:
    """The sampler's inputs; masks of which no row may hide every key are marked.

    Args:
        runner: the graph.
        sampler: makes sequences for it.
        outputs: those in which a NaN counts.
    """
    lengths, _ = probe_lengths(sampler.signature.symbols)
    sequence = sampler.sequence(lengths)

    def needs(spec: InputSpec) -> bool:
        hidden = {**sequence, spec.name: np.full_like(sequence[spec.name], -np.inf)}
        try:
            found = runner.run(sampler.batch([hidden], lengths), outputs, tap=False)
        except BuildRefused:
            return False
        return any(_has_nan(array) for array in found.values())

    return tuple(
        spec.model_copy(update={"needs_key": True}) if spec.additive_mask and needs(spec) else spec
        for spec in sampler.signature.inputs
    )


def _has_nan(array: Array) -> bool:
    return array.dtype.kind == "f" and bool(np.isnan(array).any())
