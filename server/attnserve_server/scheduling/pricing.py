"""What runs may hold and what they take: the bounds and cost models of a model's graphs, and the pace of late."""

from __future__ import annotations

from dataclasses import replace

from attnserve_server.domain.errors import AttnserveError
from attnserve_server.domain.values import PreparedSequence
from attnserve_server.engine.cost import CostModel
from attnserve_server.engine.executor import BatchExecutor, Outcome
from attnserve_server.model.manifest import Manifest
from attnserve_server.scheduling.admission import Demand, Speed
from attnserve_server.scheduling.policy import Candidate, SchedulingSettings


class Pricing:
    """Bounds and costs of one model's runs. Event loop only."""

    def __init__(self, executor: BatchExecutor, manifest: Manifest, settings: SchedulingSettings) -> None:
        self._executor = executor
        self._most_with_past = 0 if manifest.continuing is None else manifest.continuing.max_batch_size
        self.settings = settings
        self.speed = Speed()

    def begin(self) -> None:
        """Take the speed from the executor, which was warmed up."""
        cost = self._executor.cost
        if cost is not None:
            self.speed = Speed(cost.token_s)

    def isolate(self) -> None:
        """Let each sequence run alone from now on."""
        self.settings = replace(self.settings, max_batch_size=1)

    def terms(self, candidate: Candidate) -> tuple[SchedulingSettings, CostModel]:
        """Return the bounds and the cost of runs of the graph that runs a sequence."""
        settings, cost = self.settings, self._executor.cost
        if candidate.past and self._most_with_past:
            most = min(settings.max_batch_size, self._most_with_past)
            settings, cost = replace(settings, max_batch_size=most), self._executor.past_cost
        return settings, (cost or CostModel()).with_overhead(settings.run_overhead_tokens)

    @property
    def pace(self) -> float:
        """Seconds on the clock for each second of the cost model, with headroom; 0 if unknown.

        An overhead that is set by hand expresses what neighbours are worth, and not how long a run takes.
        """
        if self.settings.run_overhead_tokens is not None:
            return 0.0
        return self.settings.wait_headroom * self.speed.pace

    def rough_s(self, waiting: Demand) -> float | None:
        """Return about how long one run of all that waits would take, in seconds; None if unknown."""
        cost = self._executor.cost
        return None if cost is None else cost.run_s + waiting.tokens * cost.token_s

    def add(self, seconds: float, tokens: int, sequence: PreparedSequence, first: Outcome) -> None:
        """Add a run that has ended.

        Args:
            seconds: how long it took.
            tokens: useful tokens of its sequences.
            sequence: one of them.
            first: its outcome.
        """
        cost = self._executor.past_cost if sequence.past else self._executor.cost
        predicted_s = 0.0
        if cost is not None and not isinstance(first, AttnserveError):
            predicted_s = cost.seconds(first.run.batch_size, first.run.computed_tokens / first.run.batch_size)
        self.speed.add(seconds, tokens, predicted_s)
