"""The scheduler: takes requests in, gives each idle instance its next run, and answers every request exactly once.

It carries out decisions of others: `admission` decides who may wait, `policy` who runs next. Everything here happens on
the event loop; the executor runs the batches.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count

from attnserve_server.domain.clock import Clock
from attnserve_server.domain.errors import (
    AttnserveError,
    DeadlineExpired,
    InternalFault,
    NotServing,
    RequestCancelled,
)
from attnserve_server.domain.values import PreparedSequence, Priority, SequenceResult
from attnserve_server.engine.cost import CostModel
from attnserve_server.engine.executor import BatchExecutor, Outcome
from attnserve_server.engine.session import RunHandle
from attnserve_server.model.manifest import Manifest
from attnserve_server.observability.metrics import ModelMetrics
from attnserve_server.scheduling.admission import Demand, Load, Speed, refusal
from attnserve_server.scheduling.policy import Candidate, Layout, SchedulingSettings, adjusted_arrival, plan
from attnserve_server.scheduling.queue import DeadlineTimer, Entry, Queue, Request, Run, State
from attnserve_server.scheduling.verifier import Verifier

_log = logging.getLogger(__name__)


class Scheduler:
    """Batches the sequences of one loaded model. Event loop only, every method and all state."""

    def __init__(
        self,
        executor: BatchExecutor,
        manifest: Manifest,
        settings: SchedulingSettings,
        clock: Clock,
        metrics: ModelMetrics,
        on_fault: Callable[[], None] | None = None,
        verifier: Verifier | None = None,
    ) -> None:
        self._executor = executor
        self._manifest = manifest
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._on_fault = on_fault
        self._verifier = verifier
        self._layout = Layout(manifest)
        self._past_layout = None if manifest.continuing is None else Layout(manifest.continuing)
        self._speed = Speed()
        self._queue = Queue()
        metrics.watch_queue(lambda: len(self._queue), lambda: self._queue.totals.bytes)
        self._running_tokens = 0
        self._busy = 0  # instances that run served work
        self._requests: set[Request] = set()  # admitted, and not ended
        self._numbers = count()
        self._wake = asyncio.Event()
        if verifier is not None:
            verifier.attach(self._wake, lambda: (len(self._queue), self._busy), self.isolate)
        self._draining = False
        self._faulted = False
        self._task: asyncio.Task[None] | None = None

    @property
    def healthy(self) -> bool:
        """Whether requests are served: the loops were started, run, and did not fail."""
        return self._task is not None and not self._task.done() and not self._faulted

    def isolate(self) -> None:
        """Run each sequence alone from now on; running batches are not split."""
        self._settings = replace(self._settings, max_batch_size=1)

    def start(self) -> None:
        """Start the instances' loops. Warm the executor up first: the cost of runs is taken from it."""
        cost = self._executor.cost
        if cost is not None:
            self._speed = Speed(cost.token_s)
        self._task = asyncio.create_task(self._serve(), name=f"scheduler {self._manifest.name}")
        self._task.add_done_callback(self._ended)

    async def drain(self) -> None:
        """Take no more requests, and return when all admitted ones have ended."""
        self._draining = True
        if self._verifier is not None:
            self._verifier.close()
        self._wake.set()
        if self._task is not None:
            await asyncio.wait({self._task})

    async def aclose(self) -> None:
        """Abort, and return when the running batches have ended."""
        self.abort()
        await self.drain()

    def abort(self) -> None:
        """Fail all pending requests with `NotServing`, terminate running batches, and take no more requests."""
        self._draining = True
        self._fail_all(lambda: NotServing(self._manifest.name, "draining"))

    def check_room(self, deadline: float | None) -> None:
        """Raise what `submit` would raise now for the smallest request, before any work goes into a real one."""
        self._admit(Demand(1, 1, 0), self._serving_at(deadline), deadline)

    async def submit(
        self, request: Request, sequences: Sequence[PreparedSequence], priority: Priority = Priority.NORMAL
    ) -> list[SequenceResult]:
        """Run all sequences of a request and return their results in order.

        Cancelling the awaiting task withdraws the sequences, and so does failing the request from outside.

        Args:
            request: in state RECEIVED. Once admitted, it has ended when this returns or raises.
            sequences: prepared for this model.
            priority: moves their place in the queue.

        Raises:
            NotServing: The scheduler drains, was not started, or failed.
            Overloaded: The queue is full, or the predicted wait exceeds the time to the deadline.
            DeadlineExpired: The deadline passed; raised at that moment, also while the sequences run.
            RequestCancelled: The request was failed with it.
            InternalFault: One of the sequences failed; the request's others were withdrawn.
        """
        deadline = request.deadline_s
        now = self._serving_at(deadline)
        if not sequences:
            request.answer()
            return []
        held = [sum(tensor.nbytes for tensor in one.tensors.values()) for one in sequences]
        unused = max(0, request.received_bytes - sum(held)) // len(sequences)
        sizes = [size + unused + one.response_bytes for size, one in zip(held, sequences, strict=True)]
        self._admit(Demand(len(sequences), sum(one.tokens for one in sequences), sum(sizes)), now, deadline)
        request.admit(now)
        self._requests.add(request)
        for sequence, size in zip(sequences, sizes, strict=True):
            self._enqueue(request, sequence, size, priority)
        self._wake.set()
        if self._verifier is not None:
            self._verifier.preempt()
        loop = asyncio.get_running_loop()
        timer = None if deadline is None else DeadlineTimer(loop, self._clock, deadline, partial(self._expire, request))
        try:
            return await request.results()
        except asyncio.CancelledError:
            expired = deadline is not None and self._clock.now() >= deadline
            self._fail(request, RequestCancelled(), "expired" if expired else "cancelled")
            raise
        except RequestCancelled:
            self._withdraw(request, "cancelled")
            raise
        finally:
            if timer is not None:
                timer.cancel()
            self._requests.discard(request)
            request.release()

    def _serving_at(self, deadline: float | None) -> float:
        """Return the time. Raises NotServing, and DeadlineExpired if the deadline has passed."""
        if self._draining or not self.healthy:
            raise NotServing(self._manifest.name, self._state())
        now = self._clock.now()
        if deadline is not None and deadline <= now:
            raise DeadlineExpired(0.0)
        return now

    def _state(self) -> str:
        if self._task is None:
            return "loading"
        return "failed" if self._faulted or not self._draining else "draining"

    def _admit(self, demand: Demand, now: float, deadline: float | None) -> None:
        load = Load(
            waiting=self._queue.totals,
            running_tokens=self._running_tokens,
            instances=self._executor.instances,
            seconds_per_token=self._speed.seconds_per_token,
        )
        refused = refusal(demand, load, None if deadline is None else deadline - now, self._settings)
        if refused is not None:
            self._metrics.refused(refused.cause)
            raise refused

    def _enqueue(self, request: Request, sequence: PreparedSequence, size: int, priority: Priority) -> None:
        layout = self._past_layout if sequence.past and self._past_layout is not None else self._layout
        arrival_s = adjusted_arrival(request.arrived_s, priority, self._settings)
        candidate = layout.candidate(sequence, arrival_s, request.deadline_s)
        entry = Entry(request, len(request.entries), next(self._numbers), sequence, candidate, size)
        request.entries.append(entry)
        self._queue.push(entry)

    async def _serve(self) -> None:
        async with asyncio.TaskGroup() as group:
            for instance in range(self._executor.instances):
                group.create_task(self._work(instance), name=f"instance {instance} of {self._manifest.name}")

    async def _work(self, instance: int) -> None:
        """Run batches on one instance; end when draining and the queue is empty."""
        while True:
            entries = self._next_entries()
            if entries:
                await self._run(entries, instance)
            elif self._draining:
                return
            elif self._verifier is not None:
                await self._verifier.idle(instance)
            else:
                self._wake.clear()
                await self._wake.wait()

    def _next_entries(self) -> list[Entry]:
        """Take the next batch from the queue, and drop expired requests before they reach the runtime."""
        while len(self._queue):
            front = self._queue.candidates(self._settings.look_ahead)
            candidates = [entry.candidate for entry in front]
            settings, cost = self._terms(candidates[0])
            planned = plan(candidates, self._clock.now(), settings, cost, self._pace())
            # A request that has ended was cancelled in this turn of the loop: its task has not withdrawn it yet.
            for request in {front[at].request for at in planned.expired}:
                if request.ended:
                    self._withdraw(request, "cancelled")
                else:
                    self._expire(request)
            # An expired request takes all its sequences with it, planned ones too.
            entries = [front[at] for at in planned.indices if front[at].state is State.ADMITTED]
            ended = {entry.request for entry in entries if entry.request.ended}
            for request in ended:
                self._withdraw(request, "cancelled")
            if ended:
                continue
            for entry in entries:
                self._queue.remove(entry)
            if entries:
                return entries
        return []

    async def _run(self, entries: list[Entry], instance: int) -> None:
        sequences = [entry.sequence for entry in entries]
        run = Run(RunHandle(), len(entries), sum(one.tokens for one in sequences))
        started = self._clock.now()
        for entry in entries:
            entry.start(run)
            self._metrics.queue_seconds.observe(started - entry.request.arrived_s)
        self._running_tokens += run.tokens
        self._busy += 1
        outcomes = await self._execute(entries, sequences, run.handle, instance)
        self._busy -= 1
        self._running_tokens -= run.tokens
        if run.handle.terminated:
            self._metrics.dropped("terminated").inc(len(entries))
            return
        self._speed.add(self._clock.now() - started, run.tokens, self._predicted_s(sequences[0], outcomes[0]))
        for entry, outcome in zip(entries, outcomes, strict=True):
            self._resolve(entry, outcome, started)

    async def _execute(
        self, entries: list[Entry], sequences: list[PreparedSequence], handle: RunHandle, instance: int
    ) -> list[Outcome]:
        verifier = self._verifier
        if verifier is None:
            return await self._executor.run(sequences, handle, instance)
        verifier.preempt()
        samples = verifier.draw_samples(entries, sequences)
        outcomes = await self._executor.run(sequences, handle, instance)
        verifier.take(samples, outcomes)
        return outcomes

    def _terms(self, candidate: Candidate) -> tuple[SchedulingSettings, CostModel]:
        """Return the bounds and the cost of runs of the graph that runs a sequence."""
        settings, cost = self._settings, self._executor.cost
        if candidate.past and self._past_layout is not None:
            most = min(settings.max_batch_size, self._past_layout.max_batch_size)
            settings, cost = replace(settings, max_batch_size=most), self._executor.past_cost
        return settings, (cost or CostModel()).with_overhead(settings.run_overhead_tokens)

    def _pace(self) -> float:
        """Return seconds on the clock for each second of the cost model, with headroom; 0 if unknown.

        An overhead that is set by hand expresses what neighbours are worth, and not how long a run takes.
        """
        if self._settings.run_overhead_tokens is not None:
            return 0.0
        return self._settings.wait_headroom * self._speed.pace

    def _predicted_s(self, sequence: PreparedSequence, first: Outcome) -> float:
        """Return the cost model's seconds for the run of this sequence and outcome; 0 if unknown."""
        cost = self._executor.past_cost if sequence.past else self._executor.cost
        if cost is None or isinstance(first, AttnserveError):
            return 0.0
        return cost.seconds(first.run.batch_size, first.run.computed_tokens / first.run.batch_size)

    def _resolve(self, entry: Entry, outcome: Outcome, started: float) -> None:
        request = entry.request
        if isinstance(outcome, AttnserveError):
            self._metrics.dropped("failed").inc()
            self._fail(request, outcome, "failed")
        elif not request.ended:
            waited_s = started - request.arrived_s
            entry.answer(SequenceResult(outcome.outputs, outcome.attention, outcome.run, waited_s, outcome.labels))

    def _expire(self, request: Request) -> None:
        now = self._clock.now()
        early = request.deadline_s is not None and now < request.deadline_s
        self._fail(request, DeadlineExpired(now - request.arrived_s, early=early), "expired")

    def _fail(self, request: Request, error: AttnserveError, reason: str) -> None:
        request.fail(error)
        self._withdraw(request, reason)

    def _withdraw(self, request: Request, reason: str) -> None:
        """Remove an ended request from the queue and its runs; terminate a run whose requests have all ended."""
        for entry in request.entries:
            if entry.state is State.ADMITTED:
                self._queue.remove(entry)
                self._metrics.dropped(reason).inc()
                entry.fail()
            elif entry.run is not None:
                entry.run.present -= 1
                if not entry.run.present:
                    entry.run.handle.terminate()
                entry.fail()

    def _fail_all(self, error: Callable[[], AttnserveError]) -> None:
        for request in self._requests:
            self._fail(request, error(), "failed")

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Fail all pending requests if the loops ended by an exception."""
        if not task.cancelled() and task.exception() is None:
            return
        self._faulted = True
        _log.critical(
            "the scheduler's loop died",
            exc_info=None if task.cancelled() else task.exception(),
            extra={"model": self._manifest.name},
        )
        self._fail_all(InternalFault)
        if self._on_fault is not None:
            self._on_fault()
