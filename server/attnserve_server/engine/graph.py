"""One loaded graph of a model, and what a thread counts for the event loop. Nothing here fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from attnserve_server.domain.values import RunFacts
from attnserve_server.engine.collation import ShapeCheck
from attnserve_server.engine.cost import CostEstimate
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.model.manifest import Manifest
from attnserve_server.observability.metrics import ModelMetrics


@dataclass(slots=True, eq=False)
class Graph:
    """One loaded graph of a model.

    Args:
        sessions: one for each device; instance i runs on session i modulo their number.
        manifest: of the graph.
        shapes: its shape check.
        cost: the cost of its runs; None before warm-up. Event loop only.
    """

    sessions: tuple[RuntimeSession, ...]
    manifest: Manifest
    shapes: ShapeCheck
    cost: CostEstimate | None = None

    @classmethod
    def of(cls, sessions: Sequence[RuntimeSession], manifest: Manifest) -> Graph:
        """Lay out one graph."""
        return cls(tuple(sessions), manifest, ShapeCheck(manifest))

    def session_of(self, instance: int) -> RuntimeSession:
        """Return the session of an instance."""
        return self.sessions[instance % len(self.sessions)]


@dataclass(slots=True, eq=False)
class Counts:
    """What an instance's thread did for one batch. The event loop counts it, because metrics belong to that."""

    runs: list[RunFacts] = field(default_factory=list)
    attention_s: list[float] = field(default_factory=list)
    """Seconds to reduce the attention of each sequence that selected some."""

    def add_to(self, metrics: ModelMetrics) -> None:
        """Count it. Event loop only."""
        for run in self.runs:
            metrics.compute_seconds.observe(run.compute_s)
            metrics.batch_size.observe(run.batch_size)
            metrics.count_tokens(useful=run.useful_tokens, computed=run.computed_tokens)
            metrics.sequences.inc(run.batch_size)
        for seconds in self.attention_s:
            metrics.attention_seconds.observe(seconds)
