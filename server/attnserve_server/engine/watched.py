"""The executor of a server: it states each run in the process's pulse before it begins, with the time it may take.

It also has row features counted, by an `Observer`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

from attnserve_server.domain.errors import AttnserveError
from attnserve_server.domain.values import Array, PreparedSequence, RunFacts
from attnserve_server.engine.collation import CollatedBatch
from attnserve_server.engine.cost import CostModel, TimedRun
from attnserve_server.engine.executor import Executor, Outcome
from attnserve_server.engine.failpoints import fault_of
from attnserve_server.engine.graph import Counts
from attnserve_server.engine.observer import Drawn, Observer
from attnserve_server.engine.providers import CPU
from attnserve_server.engine.pulse import Pulse
from attnserve_server.engine.session import RunHandle
from attnserve_server.model.equality import Difference
from attnserve_server.model.manifest import Manifest

FIRST_RUN_S: Final = 120.0
"""Limit of a shape's first run, for which a provider may compile the graph."""
FACTOR: Final = 20.0
"""A run may take so many times its predicted time, or the floor if that is longer."""
_MOST_SHAPES: Final = 65_536

_Shape = tuple[int, ...]


class RunLimits:
    """How long runs may take. Event loop only."""

    def __init__(self, floor_s: float, provider: str) -> None:
        """Begin. `floor_s`: the least limit, in seconds. `provider`: nothing is compiled for shapes on a CPU."""
        self._floor_s = floor_s
        self._compiles = provider != CPU
        self._ran: set[_Shape] = set()

    def limit_s(self, sequences: Sequence[PreparedSequence], cost: CostModel | None, *, alone: bool = False) -> float:
        """Return the limit of a run.

        Args:
            sequences: of the run.
            cost: of the graph that runs them; None: unknown.
            alone: whether they are suspects of a crash. Their first run on a CPU has no longer limit, because the other
                requests wait for it.
        """
        if _shape(sequences) not in self._ran and (self._compiles or not alone):
            return max(FIRST_RUN_S, self._floor_s)
        longest = max(one.tokens for one in sequences)
        predicted_s = 0.0 if cost is None else cost.seconds(len(sequences), longest)
        return max(self._floor_s, FACTOR * predicted_s)

    def ran(self, sequences: Sequence[PreparedSequence]) -> None:
        """Note that a run has ended."""
        if len(self._ran) >= _MOST_SHAPES:
            self._ran.clear()
        self._ran.add(_shape(sequences))


class WatchedExecutor(Executor):
    """An executor whose runs are stated in a pulse."""

    def __init__(
        self, *arguments: Any, pulse: Pulse, floor_s: float, observer: Observer | None = None, **options: Any
    ) -> None:
        """As `Executor`.

        Args:
            arguments: as `Executor`.
            pulse: of the process.
            floor_s: the least limit of a run, in seconds.
            observer: counts row features; None: they are not counted.
            options: as `Executor`.
        """
        super().__init__(*arguments, **options)
        self._observer = observer
        self._pulse = pulse
        self._limits = RunLimits(floor_s, self.provider)

    async def run(
        self, sequences: Sequence[PreparedSequence], handle: RunHandle, instance: int, *, alone: bool = False
    ) -> list[Outcome]:
        """Run one batch, as `Executor.run`."""
        with self._stated(sequences, instance):
            fault = fault_of(sequences)
            if fault is not None:
                await self._threads[instance].run(fault)
            outcomes = await super().run(sequences, handle, instance, alone=alone)
        if self._observer is not None and self._observer.found:
            self._observer.flush()
        return outcomes

    async def repeat(
        self, sequence: PreparedSequence, served: Mapping[str, Array], handle: RunHandle, instance: int
    ) -> Difference | AttnserveError:
        """Repeat a sequence, as `Executor.repeat`."""
        with self._stated([sequence], instance, is_repeat=True):
            return await super().repeat(sequence, served, handle, instance)

    def _timed(
        self, sequences: Sequence[PreparedSequence], handle: RunHandle, instance: int, counts: Counts
    ) -> tuple[list[Outcome], TimedRun | None]:
        """Run a batch, as `Executor._timed`, with the taps of the sequences that are drawn."""
        if self._observer is not None and self._observer.share:
            sequences = self._observer.drawn(sequences)
        return super()._timed(sequences, handle, instance, counts)

    def _outcome(
        self,
        manifest: Manifest,
        batch: CollatedBatch,
        fetched: dict[str, Array],
        row: int,
        sequence: PreparedSequence,
        facts: RunFacts,
        counts: Counts,
        *,
        finite: bool,
    ) -> Outcome:
        """Make one sequence's result, as `Executor._outcome`, and count its row features."""
        observer, selection = self._observer, sequence.attention
        if observer is not None and selection is not None and (selection.features or observer.share):
            observer.observe(batch, fetched, row, sequence)
            if isinstance(selection, Drawn):
                sequence = replace(sequence, attention=None)
        return super()._outcome(manifest, batch, fetched, row, sequence, facts, counts, finite=finite)

    @contextmanager
    def _stated(
        self, sequences: Sequence[PreparedSequence], instance: int, *, is_repeat: bool = False
    ) -> Iterator[None]:
        """State a run until the block ends."""
        cost = self.past_cost if sequences[0].past else self.cost
        limit_s = self._limits.limit_s(sequences, cost, alone=self._pulse.alone)
        self._pulse.begin(instance, () if is_repeat else [one.origin for one in sequences], limit_s)
        try:
            yield
        finally:
            self._pulse.end(instance)
            self._limits.ran(sequences)


def _shape(sequences: Sequence[PreparedSequence]) -> _Shape:
    """The rows of a run, and its padded length along each axis."""
    symbols = sequences[0].lengths
    lengths = [max(one.lengths[symbol] for one in sequences) for symbol in symbols]
    return len(sequences), bool(sequences[0].past), *lengths
