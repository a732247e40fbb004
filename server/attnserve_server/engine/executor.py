"""The executor: N instances, each a thread, over one session a device. What to run and when, scheduling says."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from attnserve_server import attention
from attnserve_server.domain.clock import Clock
from attnserve_server.domain.errors import AttnserveError, InternalFault, RequestCancelled
from attnserve_server.domain.values import Array, AttentionAnswer, PreparedSequence, RunFacts, SequenceResult
from attnserve_server.engine import warmup
from attnserve_server.engine.collation import CollatedBatch, collate, kept_as_view, outputs_of, weights_of
from attnserve_server.engine.cost import CostEstimate, CostModel, TimedRun
from attnserve_server.engine.extents import ShapeCheck, UnexpectedShape
from attnserve_server.engine.instance import InstanceThread
from attnserve_server.engine.providers import CPU
from attnserve_server.engine.repetition import Difference, copied, equality_of, greatest_difference, values_of
from attnserve_server.engine.session import RunHandle, RunTerminated, RuntimeSession
from attnserve_server.engine.warmup import ThreadCpuClock
from attnserve_server.model.manifest import Manifest
from attnserve_server.observability.metrics import ModelMetrics

_log = logging.getLogger(__name__)

Outcome = SequenceResult | AttnserveError


class Runner(Protocol):
    """What scheduling needs of an executor."""

    @property
    def instances(self) -> int:
        """How many runs may be under way at once."""
        ...

    @property
    def cost(self) -> CostModel | None:
        """What runs cost, as seen at warm-up and since; None before."""
        ...

    async def run(self, sequences: Sequence[PreparedSequence], handle: RunHandle, instance: int) -> list[Outcome]:
        """Runs one batch; one outcome for each sequence, in order."""
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
    ) -> None:
        """Instance i runs on session i modulo their number: one session holds the weights of one device."""
        self._sessions = tuple(sessions)
        self._manifest = manifest
        self._shapes = ShapeCheck(manifest)
        self._metrics = metrics
        self._clock = clock
        self._instances = instances
        self._equality = equality_of(manifest)
        # On a CPU by processor time: by the clock on the wall, whatever else uses the cores would be counted in.
        self._cost_clock = ThreadCpuClock() if self.provider == CPU else clock
        # Event loop only.
        self._threads: list[InstanceThread] = []
        self._cost: CostEstimate | None = None

    @property
    def instances(self) -> int:
        """How many runs may be under way at once."""
        return self._instances

    @property
    def provider(self) -> str:
        """The execution provider in use."""
        return self._sessions[0].provider

    @property
    def cost(self) -> CostModel | None:
        """What runs cost, as seen at warm-up and since; None before."""
        return None if self._cost is None else self._cost.model

    def start(self) -> None:
        """Makes the instances' threads."""
        name = f"{self._manifest.name}-{self._manifest.version}"
        self._threads = [InstanceThread(f"{name}-{instance}") for instance in range(self._instances)]

    async def aclose(self) -> None:
        """Ends the threads, after the runs under way. Terminate those first for a quick end."""
        threads, self._threads = self._threads, []
        for thread in threads:
            await thread.end()

    async def warm_up(self, known: tuple[TimedRun, ...] = ()) -> tuple[TimedRun, ...]:
        """Really runs batches on every instance, attention of every site included, and times a few shapes on one.

        Args:
            known: what runs were seen to cost on this machine before; nothing is timed then.

        Returns:
            What runs cost.

        Raises:
            RunFailed: the model cannot run on valid inputs.
        """
        for instance, thread in enumerate(self._threads):
            await thread.run(warmup.touch, self._session_of(instance), self._manifest)
        if not known:
            known = await self._threads[0].run(warmup.measure, self._session_of(0), self._manifest, self._cost_clock)
        self._cost = CostEstimate(known)
        return known

    def _session_of(self, instance: int) -> RuntimeSession:
        return self._sessions[instance % len(self._sessions)]

    async def run(self, sequences: Sequence[PreparedSequence], handle: RunHandle, instance: int) -> list[Outcome]:
        """Runs one batch on one instance.

        A run that fails is split in halves until the sequence that breaks it is found: that one gets InternalFault, its
        batch mates get their answers. After `handle.terminate()` whatever has not come out yet is RequestCancelled.

        Args:
            sequences: one or more; lengths agree along axes that do not pad.
            handle: stops the runs.
            instance: which thread, from 0.

        Returns:
            One outcome for each sequence, in order.
        """
        self._metrics.running.inc()
        try:
            outcomes, timed = await self._threads[instance].run(self._timed, sequences, handle, instance)
        finally:
            self._metrics.running.dec()
        if timed is not None and self._cost is not None:
            self._cost.saw(timed)
        return outcomes

    async def repeat(
        self, sequence: PreparedSequence, served: Mapping[str, Array], handle: RunHandle, instance: int
    ) -> Difference | AttnserveError:
        """Runs a sequence that was served in a batch alone, and compares. No metric of served runs counts this run.

        Args:
            sequence: as it was served.
            served: the values that its batch gave, `SequenceResult.values`.
            handle: stops the run.
            instance: which thread, from 0.

        Returns:
            The greatest difference; RequestCancelled if the run was stopped, InternalFault if it failed.
        """
        return await self._threads[instance].run(self._repeat, sequence, served, handle, instance)

    def _repeat(
        self, sequence: PreparedSequence, served: Mapping[str, Array], handle: RunHandle, instance: int
    ) -> Difference | AttnserveError:
        """Instance's thread. The comparison is made here too: large maps would block the event loop."""
        try:
            batch = collate([sequence], self._manifest)
            # Not by a recorded CUDA graph: that would pad the sequence, and fill the batch up with copies of it.
            outputs = self._session_of(instance).run(batch.feeds, batch.fetches, handle, exact_shape=True)
            fetched = dict(zip(batch.fetches, outputs, strict=True))
            alone = values_of(
                outputs_of(batch, fetched, 0, sequence, self._manifest),
                weights_of(batch, fetched, 0, sequence, self._manifest),
                self._manifest,
            )
            return greatest_difference(served, alone, self._equality)
        except RunTerminated:
            return RequestCancelled()
        except Exception:  # noqa: BLE001 - the boundary of a repeat: no request depends on it
            _log.exception("a sequence failed to run again, alone", extra={"model": self._manifest.name})
            return InternalFault()

    def _kept(
        self, sequence: PreparedSequence, outputs: dict[str, Array], weights: dict[int, Array]
    ) -> dict[str, Array] | None:
        return copied(values_of(outputs, weights, self._manifest)) if sequence.keep_values else None

    def _timed(
        self, sequences: Sequence[PreparedSequence], handle: RunHandle, instance: int
    ) -> tuple[list[Outcome], TimedRun | None]:
        """Instance's thread. The outcomes, and what the run cost; None where it tells nothing of runs in general."""
        started = self._cost_clock.now()
        outcomes = self._run_all(sequences, handle, instance)
        first = outcomes[0]
        usual = isinstance(first, SequenceResult) and first.run.batch_size == len(sequences)
        if not usual or any(one.attention is not None for one in sequences):
            return outcomes, None
        assert isinstance(first, SequenceResult)
        tokens = first.run.computed_tokens // len(sequences)
        return outcomes, TimedRun(len(sequences), tokens, self._cost_clock.now() - started)

    def _run_all(self, sequences: Sequence[PreparedSequence], handle: RunHandle, instance: int) -> list[Outcome]:
        """Instance's thread. Runs the batch, and its halves where it fails."""
        try:
            return self._run_once(sequences, handle, instance)
        except RunTerminated:
            return [RequestCancelled() for _ in sequences]
        except Exception as fault:  # noqa: BLE001 - the boundary of a run: whatever went wrong may cost one sequence only
            if len(sequences) == 1:
                self._log_failure(fault)
                return [InternalFault()]
            middle = len(sequences) // 2
            first = self._run_all(sequences[:middle], handle, instance)
            return first + self._run_all(sequences[middle:], handle, instance)

    def _log_failure(self, fault: Exception) -> None:
        """Logs why a sequence failed; a tensor of another shape than declared is named, with both shapes."""
        if isinstance(fault, UnexpectedShape):
            named = {"tensor": fault.tensor, "declared": fault.declared, "expected": fault.expected}
            _log.error(
                "a tensor has another shape than the manifest declares",
                extra={"model": self._manifest.name, **named, "found": fault.found},
            )
        else:
            _log.exception("a sequence failed to run", extra={"model": self._manifest.name}, exc_info=fault)

    def _run_once(self, sequences: Sequence[PreparedSequence], handle: RunHandle, instance: int) -> list[Outcome]:
        batch = collate(sequences, self._manifest)
        started = self._clock.now()
        session = self._session_of(instance)
        outputs = session.run(batch.feeds, batch.fetches, handle, exact_shape=batch.unpadded)
        compute_s = self._clock.now() - started
        self._metrics.compute_seconds.observe(compute_s)
        self._metrics.batch_size.observe(batch.size)
        self._metrics.count_tokens(useful=batch.useful_tokens, computed=batch.computed_tokens)
        self._metrics.sequences.inc(batch.size)
        fetched = dict(zip(batch.fetches, outputs, strict=True))
        self._shapes.check(batch, fetched, filled_up=session.fills_up)
        # One look at each whole array: only where something is wrong must each sequence be looked at by itself.
        finite = all(map(_is_finite, outputs))
        facts = RunFacts(batch.size, batch.useful_tokens, batch.computed_tokens, compute_s, instance)
        return [
            self._outcome(batch, fetched, row, sequence, facts, finite=finite) for row, sequence in enumerate(sequences)
        ]

    def _outcome(
        self,
        batch: CollatedBatch,
        fetched: dict[str, Array],
        row: int,
        sequence: PreparedSequence,
        facts: RunFacts,
        *,
        finite: bool,
    ) -> Outcome:
        """One sequence's answer. What goes wrong here is this sequence's alone, so the run need not be split.

        `finite`: whether all numbers of the run are, padding included.
        """
        try:
            outputs = outputs_of(batch, fetched, row, sequence, self._manifest)
            weights = weights_of(batch, fetched, row, sequence, self._manifest)
            wrong = None if finite else self._wrong_tensor(outputs, weights)
            if wrong is not None:
                _log.error("NaN, or a weight that is infinite", extra={"model": self._manifest.name, "tensor": wrong})
                return InternalFault()
            if sequence.attention is None:
                return SequenceResult(outputs, None, facts, values=self._kept(sequence, outputs, weights))
            started = self._clock.now()
            answer = attention.answer(weights, sequence.attention, self._manifest.sites, sequence.units)
            if not kept_as_view(batch, sequence):
                answer = _owned(answer, fetched.values())
            self._metrics.attention_seconds.observe(self._clock.now() - started)
            return SequenceResult(outputs, answer, facts, values=self._kept(sequence, outputs, weights))
        except Exception:  # noqa: BLE001 - the boundary of one sequence's answer: its batch mates have theirs
            _log.exception("an answer could not be made", extra={"model": self._manifest.name})
            return InternalFault()

    def _wrong_tensor(self, outputs: dict[str, Array], weights: dict[int, Array]) -> str | None:
        """The first tensor that is no answer: an output with NaN, or weights with NaN or an infinity.

        Infinities are legitimate outputs, such as logits of what a mask hides.
        """
        for name, values in outputs.items():
            if _has_nan(values):
                return name
        for layer, values in weights.items():
            if not _is_finite(values):
                return self._manifest.sites[layer].name
        return None


def _is_finite(values: Array) -> bool:
    return values.dtype.kind != "f" or bool(np.isfinite(values).all())


def _has_nan(values: Array) -> bool:
    return values.dtype.kind == "f" and bool(np.isnan(values).any())


def _owned(answer: AttentionAnswer, arrays: Iterable[Array]) -> AttentionAnswer:
    """Copies maps that are still views into the run's arrays, for the reason that collation gives."""
    arrays = tuple(arrays)
    maps = tuple(
        replace(made, content=made.content.copy())
        if isinstance(made.content, np.ndarray) and any(np.may_share_memory(made.content, array) for array in arrays)
        else made
        for made in answer.maps
    )
    return replace(answer, maps=maps)
