"""The executor: N instances, each a thread, over one session per device. Scheduling decides what runs and when.

It takes prepared sequences and returns one result or error for each. A failing sequence fails alone: the executor
splits a failing batch until it has found that sequence.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from attnserve_server import attention
from attnserve_server.domain.clock import Clock, ThreadCpuClock
from attnserve_server.domain.errors import AttnserveError, InternalFault, RequestCancelled
from attnserve_server.domain.values import Array, PreparedSequence, RunFacts, SequenceResult
from attnserve_server.engine import shrinking, warmup
from attnserve_server.engine.collation import (
    CollatedBatch,
    UnexpectedShape,
    collate,
    invalid_tensor,
    is_finite,
    may_alias,
    outputs_of,
    owned,
    weights_of,
)
from attnserve_server.engine.cost import CostEstimate, CostModel, Timed, TimedRun
from attnserve_server.engine.graph import Counts, Graph, compared_values
from attnserve_server.engine.instance_thread import InstanceThread, Occupancy, end_all
from attnserve_server.engine.labels import labels_of
from attnserve_server.engine.providers import CPU
from attnserve_server.engine.session import RunHandle, RunTerminated, RuntimeSession
from attnserve_server.model.equality import Difference, copied, equality_of, greatest_difference
from attnserve_server.model.manifest import Manifest
from attnserve_server.observability.metrics import ModelMetrics

_log = logging.getLogger(__name__)

Outcome = SequenceResult | AttnserveError


class BatchExecutor(Protocol):
    """The part of an executor that scheduling uses."""

    @property
    def instances(self) -> int:
        """Maximum number of concurrent runs."""
        ...

    @property
    def cost(self) -> CostModel | None:
        """The cost model of runs, from warm-up and later runs; None before warm-up."""
        ...

    @property
    def past_cost(self) -> CostModel | None:
        """The same for sequences with a past; None if the model takes none."""
        ...

    async def run(
        self, sequences: Sequence[PreparedSequence], handle: RunHandle, instance: int, *, alone: bool = False
    ) -> list[Outcome]:
        """Run one batch. Return one outcome for each sequence, in order. `alone`: no other work waits or runs."""
        ...


class Executor:
    """Runs batches. Each instance's thread collates, runs, crops and reduces; the event loop only waits for it."""

    def __init__(
        self,
        sessions: Sequence[RuntimeSession],
        manifest: Manifest,
        metrics: ModelMetrics,
        clock: Clock,
        instances: int,
        past_sessions: Sequence[RuntimeSession] = (),
        wide: RuntimeSession | None = None,
        occupancy: Occupancy | None = None,
    ) -> None:
        """Instance i runs on session i modulo their number; one session holds the weights of one device.

        `past_sessions`: those of the continuing graph, one for each device; none if the manifest has no past. `wide`: a
        session of the first graph whose runs use all cores; None: there is none. `occupancy`: shared by all models.
        """
        self._manifest = manifest
        self._prompt = Graph.of(sessions, manifest, wide)
        self._past = None if manifest.continuing is None else Graph.of(past_sessions, manifest.continuing)
        self._metrics = metrics
        self._occupancy = occupancy or Occupancy()
        self._clock = clock
        self._instances = instances
        # Processor time on a CPU: wall time would include the work of other threads on the same cores.
        self._cost_clock = ThreadCpuClock() if self.provider == CPU else clock
        # Event loop only.
        self._threads: list[InstanceThread] = []

    @property
    def instances(self) -> int:
        """Maximum number of concurrent runs."""
        return self._instances

    @property
    def provider(self) -> str:
        """The execution provider in use."""
        return self._prompt.sessions[0].provider

    @property
    def cost(self) -> CostModel | None:
        """The cost model of runs, from warm-up and later runs; None before warm-up."""
        return None if self._prompt.cost is None else self._prompt.cost.model

    @property
    def past_cost(self) -> CostModel | None:
        """The same for sequences with a past, in P + T tokens; None if the model takes none."""
        return None if self._past is None or self._past.cost is None else self._past.cost.model

    def start(self) -> None:
        """Start the instances' threads."""
        name = f"{self._manifest.name}-{self._manifest.version}"
        self._threads = [InstanceThread(f"{name}-{instance}") for instance in range(self._instances)]

    async def aclose(self) -> None:
        """End the threads after the current runs, or leave them behind. Terminate the runs first to end quickly."""
        threads, self._threads = self._threads, []
        await end_all(threads, self._manifest.name)

    async def warm_up(self, known: Timed = (), known_wide: Timed = ()) -> tuple[Timed, Timed]:
        """Run batches on every instance, with attention of every site, and time a few shapes on one instance.

        `known` and `known_wide` are timed runs of an earlier start on this machine, which are not timed again. Return
        the timed runs, on which the cost models start: those of an instance, and those on all cores.

        Raises:
            RunFailed: the model cannot run on valid inputs.
        """
        for graph in filter(None, (self._prompt, self._past)):
            for instance, thread in enumerate(self._threads):
                await thread.run(warmup.touch, graph.session_of(instance), graph.manifest)
        known = known or await self._measured(self._prompt)
        self._prompt.cost = CostEstimate(known)
        if self._prompt.wide is not None:
            known_wide = await self._warm_up_wide(self._prompt.wide, known_wide)
        if self._past is not None:
            self._past.cost = CostEstimate(await self._measured(self._past))
        return known, known_wide

    async def _warm_up_wide(self, session: RuntimeSession, known: Timed) -> Timed:
        await self._threads[0].run(warmup.touch, session, self._manifest)
        # On the clock: the thread's processor time would be that of one of the cores.
        measure = partial(warmup.measure, more_s=0.0)
        known = known or await self._threads[0].run(measure, session, self._manifest, self._clock)
        self._prompt.wide_cost = CostEstimate(known)
        return known

    async def on_all_instances(self, function: Callable[..., None], *arguments: object) -> None:
        """Run a function on the threads of all instances at the same time. Raise what it raises."""
        await asyncio.gather(*(thread.run(function, *arguments) for thread in self._threads))

    async def shrink(self) -> None:
        """Give back the memory that earlier runs took and later ones may not need."""
        if self._threads:
            await self._threads[0].run(shrinking.shrink, tuple(filter(None, (self._prompt, self._past))))

    async def _measured(self, graph: Graph) -> Timed:
        # The fewest shapes for a past: they are timed at each start.
        measure = partial(warmup.measure, more_s=0.0) if graph is self._past else warmup.measure
        return await self._threads[0].run(measure, graph.session_of(0), graph.manifest, self._cost_clock)

    async def run(
        self, sequences: Sequence[PreparedSequence], handle: RunHandle, instance: int, *, alone: bool = False
    ) -> list[Outcome]:
        """Run one batch on one instance.

        A batch that fails is split in halves until the failing sequence is found: that one gets InternalFault, the rest
        of the batch gets its answers. After `handle.terminate()`, each sequence without a result gets RequestCancelled.

        Args:
            sequences: one or more, whose lengths agree along axes that are not padded.
            handle: stops the runs.
            instance: index of the thread, from 0.
            alone: whether no other work waits or runs, so that the run may use all cores.

        Returns:
            One outcome for each sequence, in order.
        """
        graph = self._graph_of(sequences[0])
        wide = alone and not self._occupancy.busy and graph.is_wide(sequences)
        self._occupancy.begin()
        self._metrics.running.inc()
        try:
            counts = Counts(wide=wide)
            outcomes, timed = await self._threads[instance].run(self._timed, sequences, handle, instance, counts)
        finally:
            self._metrics.running.dec()
            self._occupancy.end()
        counts.add_to(self._metrics)
        cost = graph.wide_cost if wide else graph.cost
        if timed is not None and cost is not None:
            cost.add(timed)
        return outcomes

    async def repeat(
        self, sequence: PreparedSequence, served: Mapping[str, Array], handle: RunHandle, instance: int
    ) -> Difference | AttnserveError:
        """Run a sequence alone that was served in a batch, and compare. Metrics of served runs do not count this run.

        Args:
            sequence: as it was served.
            served: the values from its batch, `SequenceResult.values`.
            handle: stops the run.
            instance: index of the thread, from 0.

        Returns:
            The greatest difference; RequestCancelled if the run was stopped, InternalFault if it failed.
        """
        return await self._threads[instance].run(self._repeat, sequence, served, handle, instance)

    def _graph_of(self, sequence: PreparedSequence) -> Graph:
        """The graph that runs a sequence; all sequences of a batch have the same."""
        if not sequence.past:
            return self._prompt
        assert self._past is not None, "validation refuses a past that the model does not take"
        return self._past

    def _repeat(
        self, sequence: PreparedSequence, served: Mapping[str, Array], handle: RunHandle, instance: int
    ) -> Difference | AttnserveError:
        """Instance's thread. It also makes the comparison, because large maps would block the event loop."""
        try:
            graph = self._graph_of(sequence)
            sequence = replace(sequence, keep_values=True)
            batch = collate([sequence], graph.manifest)
            # Without a recorded CUDA graph, which would pad the sequence and fill the batch with copies of it.
            outputs = graph.session_of(instance).run(batch.feeds, batch.fetches, handle, exact_shape=True)
            fetched = dict(zip(batch.fetches, outputs, strict=True))
            alone = compared_values(batch, fetched, 0, sequence, graph.manifest)
            return greatest_difference(served, alone, equality_of(graph.manifest))
        except RunTerminated:
            return RequestCancelled()
        except Exception:  # noqa: BLE001 - the boundary of a repeat: no request depends on it
            _log.exception("a sequence failed when it was repeated alone", extra={"model": self._manifest.name})
            return InternalFault()

    def _timed(
        self, sequences: Sequence[PreparedSequence], handle: RunHandle, instance: int, counts: Counts
    ) -> tuple[list[Outcome], TimedRun | None]:
        """Instance's thread. The outcomes, and the timed run; None if it was split or reduced attention."""
        clock = self._clock if counts.wide else self._cost_clock
        started = clock.now()
        outcomes = self._run_all(sequences, handle, instance, counts)
        first = outcomes[0]
        usual = isinstance(first, SequenceResult) and first.run.batch_size == len(sequences)
        if not usual or any(one.attention is not None for one in sequences):
            return outcomes, None
        assert isinstance(first, SequenceResult)
        tokens = first.run.computed_tokens // len(sequences)
        return outcomes, TimedRun(len(sequences), tokens, clock.now() - started)

    def _run_all(
        self, sequences: Sequence[PreparedSequence], handle: RunHandle, instance: int, counts: Counts
    ) -> list[Outcome]:
        """Instance's thread. Runs the batch, or its halves if it fails."""
        try:
            return self._run_once(sequences, handle, instance, counts)
        except RunTerminated:
            return [RequestCancelled() for _ in sequences]
        except Exception as fault:  # noqa: BLE001 - the boundary of a run: a fault may fail one sequence only
            if len(sequences) == 1:
                self._log_failure(fault)
                return [InternalFault()]
            middle = len(sequences) // 2
            first = self._run_all(sequences[:middle], handle, instance, counts)
            return first + self._run_all(sequences[middle:], handle, instance, counts)

    def _log_failure(self, fault: Exception) -> None:
        """Log why a sequence failed. For an unexpected shape, the log line has the tensor and both shapes."""
        if isinstance(fault, UnexpectedShape):
            named = {name: getattr(fault, name) for name in ("tensor", "declared", "expected", "found")}
            what = "a tensor has another shape than the manifest declares"
            _log.error(what, extra={"model": self._manifest.name, **named})
        else:
            _log.exception("a sequence failed to run", extra={"model": self._manifest.name}, exc_info=fault)

    def _run_once(
        self, sequences: Sequence[PreparedSequence], handle: RunHandle, instance: int, counts: Counts
    ) -> list[Outcome]:
        graph = self._graph_of(sequences[0])
        batch = collate(sequences, graph.manifest)
        started = self._clock.now()
        session = (graph.wide if counts.wide else None) or graph.session_of(instance)
        outputs = session.run(batch.feeds, batch.fetches, handle, exact_shape=batch.unpadded)
        compute_s = self._clock.now() - started
        tokens = batch.useful_tokens, batch.computed_tokens
        facts = RunFacts(batch.size, *tokens, compute_s, instance, counts.wide, started)
        counts.runs.append(facts)
        fetched = dict(zip(batch.fetches, outputs, strict=True))
        graph.shapes.check(batch, fetched, filled_up=session.fills_up)
        # Whole arrays are checked first: single sequences are checked only if a whole array is not finite.
        finite = all(map(is_finite, outputs))
        return [
            self._outcome(graph.manifest, batch, fetched, row, sequence, facts, counts, finite=finite)
            for row, sequence in enumerate(sequences)
        ]

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
        """One sequence's result. A fault here belongs to this sequence alone, so the batch is not split.

        `finite`: whether all numbers of the run are finite, padding included.
        """
        try:
            outputs = outputs_of(batch, fetched, row, sequence, manifest)
            weights = weights_of(batch, fetched, row, sequence, manifest)
            scores = sequence.selects_scores
            invalid = None if finite else invalid_tensor(outputs, weights, manifest, scores=scores)
            if invalid is not None:
                _log.error("NaN, or a weight that is infinite", extra={"model": manifest.name, "tensor": invalid})
                return InternalFault()
            answer, attention_s, started = None, 0.0, 0.0
            if sequence.attention is not None:
                started = self._clock.now()
                answer = attention.answer(weights, sequence.attention, manifest.sites, sequence.units)
                if not may_alias(batch, sequence):
                    answer = owned(answer, fetched.values())
                counts.attention_s.append(attention_s := self._clock.now() - started)
            kept = copied(compared_values(batch, fetched, row, sequence, manifest)) if sequence.keep_values else None
            labels = None if sequence.labels is None else labels_of(outputs, sequence, manifest)
            return SequenceResult(outputs, answer, facts, 0.0, labels, attention_s, started, kept)
        except Exception:  # noqa: BLE001 - the boundary of one sequence's result: the rest of the batch has its own
            _log.exception("an answer could not be made", extra={"model": manifest.name})
            return InternalFault()
