"""One loaded graph of a model, what a thread counts for the event loop, and the values that a comparison reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from attnserve_server.domain.values import Array, PreparedSequence, RunFacts
from attnserve_server.engine.collation import CollatedBatch, ShapeCheck, outputs_of, weights_of
from attnserve_server.engine.cost import CostEstimate
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.model.equality import values_of
from attnserve_server.model.manifest import Manifest
from attnserve_server.observability.metrics import ModelMetrics

_LEAST_GAIN: Final = 0.9
"""A run on all cores must be predicted to take at most this share of a narrow one's time."""
_RETRY: Final = 64


@dataclass(slots=True, eq=False)
class Graph:
    """One loaded graph of a model.

    Args:
        sessions: one for each device; instance i runs on session i modulo their number.
        manifest: of the graph.
        shapes: its shape check.
        cost: the cost of its runs; None before warm-up. Event loop only.
        wide: a session whose runs use all cores, for a run while no other work waits or runs; None: there is none.
        wide_cost: the cost of its runs, on the clock.
    """

    sessions: tuple[RuntimeSession, ...]
    manifest: Manifest
    shapes: ShapeCheck
    cost: CostEstimate | None = None
    wide: RuntimeSession | None = None
    wide_cost: CostEstimate | None = None
    _passed_over: int = 0

    @classmethod
    def of(cls, sessions: Sequence[RuntimeSession], manifest: Manifest, wide: RuntimeSession | None = None) -> Graph:
        """Lay out one graph."""
        return cls(tuple(sessions), manifest, ShapeCheck(manifest), wide=wide)

    def is_wide(self, sequences: Sequence[PreparedSequence]) -> bool:
        """Return whether a run that is alone is faster on all cores, by the measured costs. Event loop only.

        One of `_RETRY` runs for which it is not uses them in any case, to correct a cost that was too high.
        """
        if self.wide is None or self.wide_cost is None or self.cost is None:
            return False
        size, tokens = len(sequences), max(one.tokens for one in sequences)
        if self.wide_cost.model.seconds(size, tokens) < _LEAST_GAIN * self.cost.model.seconds(size, tokens):
            return True
        self._passed_over = (self._passed_over + 1) % _RETRY
        return not self._passed_over

    def session_of(self, instance: int) -> RuntimeSession:
        """Return the session of an instance."""
        return self.sessions[instance % len(self.sessions)]


@dataclass(slots=True, eq=False)
class Counts:
    """What an instance's thread did for one batch. The event loop counts it, because metrics belong to that."""

    wide: bool = False
    """Whether its runs use all cores."""
    runs: list[RunFacts] = field(default_factory=list)
    attention_s: list[float] = field(default_factory=list)
    """Seconds to reduce the attention of each sequence that selected some."""

    def add_to(self, metrics: ModelMetrics) -> None:
        """Count it. Event loop only."""
        for run in self.runs:
            metrics.wide_runs.inc(run.wide)
            metrics.compute_seconds.observe(run.compute_s)
            metrics.batch_size.observe(run.batch_size)
            metrics.count_tokens(useful=run.useful_tokens, computed=run.computed_tokens)
            metrics.sequences.inc(run.batch_size)
        for seconds in self.attention_s:
            metrics.attention_seconds.observe(seconds)


def compared_values(
    batch: CollatedBatch, fetched: Mapping[str, Array], row: int, sequence: PreparedSequence, manifest: Manifest
) -> dict[str, Array]:
    """Return the values of the sequence in `row` that a comparison reads, by the names that `Equality` uses.

    They are outputs, the weights of all heads, and means over heads where the sequence reads those. Views, cropped to
    its own lengths. The sequence must have `keep_values`. Arguments as for `weights_of`.
    """
    selection = sequence.attention
    read = weights_of(batch, fetched, row, sequence, manifest)
    joined = {layer for layer in read if selection is not None and manifest.sites[layer].mean_of(selection)}
    return values_of(
        outputs_of(batch, fetched, row, sequence, manifest),
        weights_of(batch, fetched, row, sequence, manifest, whole=True) if joined else read,
        manifest,
        means={layer: read[layer] for layer in joined},
        scores=sequence.selects_scores,
    )
