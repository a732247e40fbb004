"""The scheduler: takes requests in, gives each idle instance its next run, and answers every request exactly once.

It carries out decisions of others: `admission` decides who may wait, `policy` who runs next. Everything here happens on
the event loop; the executor runs the batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Final

from attnserve_server.domain.clock import Clock
from attnserve_server.domain.errors import AttnserveError, DeadlineExpired, InternalFault, NotServing, RequestCancelled
from attnserve_server.domain.values import PreparedSequence, Priority, SequenceResult
from attnserve_server.engine.executor import BatchExecutor, Outcome
from attnserve_server.engine.failpoints import mark
from attnserve_server.engine.instance_thread import LEAVE_S
from attnserve_server.engine.session import RunHandle
from attnserve_server.model.manifest import Manifest
from attnserve_server.observability.metrics import ModelMetrics
from attnserve_server.scheduling.admission import Demand, Load, Pricing, refusal
from attnserve_server.scheduling.deadlines import Deadlines
from attnserve_server.scheduling.idle import Gathering, IdleInstances
from attnserve_server.scheduling.policy import Layout, SchedulingSettings, adjusted_arrival, plan
from attnserve_server.scheduling.queue import Entry, Queue, Request, Run, State
from attnserve_server.scheduling.verifier import Verifier

_log = logging.getLogger(__name__)

_SMALLEST: Final = Demand(1, 1, 0)


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
        self._clock = clock
        self._metrics = metrics
        self._on_fault = on_fault
        self._verifier = verifier
        self._layout = Layout(manifest)
        self._past_layout = None if manifest.continuing is None else Layout(manifest.continuing)
        self._pricing = Pricing(executor, manifest, settings)
        self._queue = Queue()
        metrics.watch_queue(lambda: len(self._queue), lambda: self._queue.totals.bytes)
        self._running_tokens = 0
        self._busy = 0  # instances that run served work
        self._requests: set[Request] = set()  # admitted, and not ended
        self._deadlines = Deadlines(clock, self._expire)
        self._numbers = count()
        self._idle = IdleInstances()
        self._gathering = Gathering(self._idle.wake)
        if verifier is not None:
            verifier.attach(self._idle.wake, lambda: (len(self._queue), self._busy), self.isolate)
        self._draining = False
        self._faulted = False
        self._task: asyncio.Task[None] | None = None

    @property
    def healthy(self) -> bool:
        """Whether requests are served: the loops were started, run, and did not fail."""
        return self._task is not None and not self._task.done() and not self._faulted

    def isolate(self) -> None:
        """Run each sequence alone from now on; running batches are not split."""
        self._pricing.isolate()

    def start(self) -> None:
        """Start the instances' loops. Warm the executor up first: the cost of runs is taken from it."""
        self._pricing.begin()
        self._task = asyncio.create_task(self._serve(), name=f"scheduler {self._manifest.name}")
        self._task.add_done_callback(self._ended)

    async def drain(self) -> None:
        """Take no more requests, and return when all admitted ones have ended."""
        self._draining = True
        if self._verifier is not None:
            self._verifier.close()
        self._idle.wake_all()
        if self._task is not None:
            await asyncio.wait({self._task})

    async def aclose(self) -> None:
        """Abort, and return when the running batches have ended, or cannot be stopped within `LEAVE_S`."""
        self.abort()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.drain(), LEAVE_S)
        if self._task is not None and not self._task.done():
            self._task.remove_done_callback(self._ended)
            self._task.cancel()
        self._deadlines.close()

    def abort(self) -> None:
        """Fail all pending requests with `NotServing`, terminate running batches, and take no more requests."""
        self._draining = True
        self._fail_all(lambda: NotServing(self._manifest.name, "draining"))

    def load(self, caller: str | None = None) -> Load:
        """Return what waits and runs now, as a request of `caller` meets it."""
        queue, waiting = self._queue, self._queue.totals
        own = None if caller is None else queue.waiting(caller)
        speed = self._pricing.seconds_per_token(waiting, self._running_tokens)
        return Load(waiting, self._running_tokens, self._executor.instances, speed, own, queue.callers)

    def check_room(self, deadline: float | None, caller: str = "") -> None:
        """Raise what `submit` would raise now for the smallest request, before any work goes into a real one."""
        self._admit(_SMALLEST, self._serving_at(deadline), deadline, caller)

    def submit(
        self, request: Request, sequences: Sequence[PreparedSequence], priority: Priority = Priority.NORMAL
    ) -> asyncio.Future[list[SequenceResult]]:
        """Queue all sequences of a request and return the future of their results, in order.

        Cancelling the future, or the task that awaits it, withdraws the sequences, and so does failing the request from
        outside. The future raises DeadlineExpired at the deadline, also while the sequences run; RequestCancelled if
        the request was failed with it; and InternalFault if one of the sequences failed: the others were withdrawn.

        Args:
            request: in state RECEIVED. Once admitted, it has ended when the future is done.
            sequences: one or more, prepared for this model.
            priority: moves their place in the queue.

        Raises:
            NotServing: The scheduler drains, was not started, or failed.
            Overloaded: The queue is full, or the predicted wait exceeds the time to the deadline.
            DeadlineExpired: The deadline has passed.
        """
        deadline = request.deadline_s
        now = self._serving_at(deadline)
        unused = max(0, request.received_bytes - sum([one.bytes for one in sequences])) // len(sequences)
        sizes = [one.bytes + unused + one.response_bytes for one in sequences]
        demand = Demand(len(sequences), sum([one.tokens for one in sequences]), sum(sizes))
        self._admit(demand, now, deadline, request.caller)
        request.admit(now)
        mark(request.request_id, sequences)
        self._requests.add(request)
        for sequence, size in zip(sequences, sizes, strict=True):
            self._enqueue(request, sequence, size, priority)
        self._gathering.arrived(len(self._requests))
        if not self._waits_for_neighbours():
            self._idle.wake()
        if self._verifier is not None:
            self._verifier.preempt()
        if deadline is not None:
            self._deadlines.add(request)
        results = request.results
        results.add_done_callback(partial(self._end, request))
        return results

    def _end(self, request: Request, results: asyncio.Future[list[SequenceResult]]) -> None:
        """Forget a request whose results are known; withdraw its sequences if it was cancelled."""
        if results.cancelled():
            deadline = request.deadline_s
            expired = deadline is not None and self._clock.now() >= deadline
            self._fail(request, RequestCancelled(), "expired" if expired else "cancelled")
        elif request.state is State.FAILED:
            self._withdraw(request, "cancelled")  # failed from outside; nothing is left to withdraw otherwise
        self._requests.discard(request)
        self._deadlines.discard(request)
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

    def _admit(self, demand: Demand, now: float, deadline: float | None, caller: str) -> None:
        if not len(self._queue) and self._pricing.are_in_time(self._running_tokens + demand.tokens, deadline, now):
            return  # the usual case
        load = self.load(caller)
        refused = refusal(demand, load, None if deadline is None else deadline - now, self._pricing.settings)
        if refused is not None:
            self._metrics.refused(refused.cause)
            raise refused

    def _enqueue(self, request: Request, sequence: PreparedSequence, size: int, priority: Priority) -> None:
        layout = self._past_layout if sequence.past and self._past_layout is not None else self._layout
        arrival_s = adjusted_arrival(request.arrived_s, priority, self._pricing.settings)
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
            entries = [] if self._waits_for_neighbours() else self._next_entries()
            if entries:
                self._gathering.started()
                if len(self._queue):
                    self._idle.wake()  # for the rest
                await self._run(entries, instance)
            elif self._draining:
                return
            else:
                woken = self._idle.enter()
                await (woken if self._verifier is None else self._verifier.idle(instance, woken))
                self._idle.leave(woken)

    def _waits_for_neighbours(self) -> bool:
        """Return whether the next run is so cheap that it waits for more sequences, which are expected."""
        waiting = self._queue.totals
        rough_s = self._pricing.rough_s(waiting)
        if rough_s is None or self._draining or not waiting.sequences:
            return False
        return self._gathering.waits(waiting.sequences, rough_s)

    def _next_entries(self) -> list[Entry]:
        """Take the next batch from the queue, and drop expired requests before they reach the runtime."""
        while len(self._queue):
            front = self._queue.candidates(self._pricing.settings.look_ahead)
            candidates = [entry.candidate for entry in front]
            settings, cost = self._pricing.terms(candidates[0])
            planned = plan(candidates, self._clock.now(), settings, cost, self._pricing.pace, first=0)
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
            if entries:
                self._queue.take(entries, cost)
                return entries
        return []

    async def _run(self, entries: list[Entry], instance: int) -> None:
        sequences = [entry.sequence for entry in entries]
        run = Run(RunHandle(), len(entries), sum(one.tokens for one in sequences))
        started = self._clock.now()
        for entry in entries:
            entry.start(run)
            self._metrics.queue_seconds.observe(started - entry.request.arrived_s)
        alone = not self._busy and not len(self._queue) and self._gathering.lone
        self._running_tokens += run.tokens
        self._busy += 1
        outcomes = await self._execute(entries, sequences, run.handle, instance, alone=alone)
        self._busy -= 1
        self._running_tokens -= run.tokens
        if run.handle.terminated:
            self._metrics.dropped("terminated").inc(len(entries))
            return
        self._pricing.add(self._clock.now() - started, run.tokens, sequences[0], outcomes[0])
        for entry, outcome in zip(entries, outcomes, strict=True):
            self._resolve(entry, outcome, started)

    async def _execute(
        self,
        entries: list[Entry],
        sequences: list[PreparedSequence],
        handle: RunHandle,
        instance: int,
        *,
        alone: bool,
    ) -> list[Outcome]:
        verifier = self._verifier
        if verifier is None:
            return await self._executor.run(sequences, handle, instance, alone=alone)
        verifier.preempt()
        samples = verifier.draw_samples(entries, sequences)
        outcomes = await self._executor.run(sequences, handle, instance, alone=alone)
        verifier.take(samples, outcomes)
        return outcomes

    def _resolve(self, entry: Entry, outcome: Outcome, started: float) -> None:
        request = entry.request
        if isinstance(outcome, AttnserveError):
            self._metrics.dropped("failed").inc()
            self._fail(request, outcome, "failed")
        elif not request.ended:
            waited_s = started - request.arrived_s
            found, labels = outcome.attention, outcome.labels
            entry.answer(SequenceResult(outcome.outputs, found, outcome.run, waited_s, labels, outcome.attention_s))

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
        error = None if task.cancelled() else task.exception()
        _log.critical("the scheduler's loop died", exc_info=error, extra={"model": self._manifest.name})
        self._fail_all(InternalFault)
        if self._on_fault is not None:
            self._on_fault()
