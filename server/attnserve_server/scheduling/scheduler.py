"""The scheduler: takes sequences in, gives each idle instance its next run, and answers every caller exactly once.

It decides nothing by itself: `admission` says who may wait and `policy` who goes next. Everything here happens on the
event loop; the runs themselves are the executor's business.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count

from attnserve_server.domain.clock import Clock
from attnserve_server.domain.errors import AttnserveError, DeadlineExpired, InternalFault, NotServing
from attnserve_server.domain.values import PreparedSequence, Priority, SequenceResult
from attnserve_server.engine.cost import CostModel, Footprint
from attnserve_server.engine.executor import BatchExecutor, Outcome
from attnserve_server.engine.session import RunHandle
from attnserve_server.model.manifest import Manifest
from attnserve_server.observability.metrics import ModelMetrics
from attnserve_server.scheduling.admission import Demand, Load, refusal
from attnserve_server.scheduling.policy import SchedulingSettings, Waiting, plan, rank_s
from attnserve_server.scheduling.queue import Entry, Queue, Request, Run
from attnserve_server.scheduling.speed import Speed
from attnserve_server.scheduling.timer import DeadlineTimer
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
        self._footprint = Footprint(manifest)
        self._rigid = tuple(at for at, axis in enumerate(manifest.axes) if not axis.paddable)
        self._speed = Speed()
        self._queue = Queue()
        metrics.watch_queue(lambda: len(self._queue), lambda: self._queue.totals.bytes)
        self._running_tokens = 0
        self._busy = 0  # instances that run served work
        self._requests: set[Request] = set()  # all that are not answered yet, wherever they are
        self._numbers = count()
        self._wake = asyncio.Event()
        if verifier is not None:
            verifier.attach(self._wake, lambda: (len(self._queue), self._busy), self.isolate)
        self._draining = False
        self._faulted = False
        self._task: asyncio.Task[None] | None = None

    @property
    def healthy(self) -> bool:
        """Whether requests are being worked on: started, not ended, and nothing broke."""
        return self._task is not None and not self._task.done() and not self._faulted

    def isolate(self) -> None:
        """Run each sequence alone from now on; batches under way end as they are."""
        self._settings = replace(self._settings, max_batch_size=1)

    def start(self) -> None:
        """Starts the instances' loops. Warm the executor up first: what runs cost is taken from it."""
        cost = self._executor.cost
        if cost is not None:
            self._speed = Speed(cost.token_s)
        self._task = asyncio.create_task(self._serve(), name=f"scheduler {self._manifest.name}")
        self._task.add_done_callback(self._ended)

    async def drain(self) -> None:
        """Takes no more requests, and returns when all that were taken have ended."""
        self._draining = True
        if self._verifier is not None:
            self._verifier.close()
        self._wake.set()
        if self._task is not None:
            await asyncio.wait({self._task})

    async def aclose(self) -> None:
        """Ends at once, see `give_up`; returns when the runs under way have ended."""
        self.give_up()
        await self.drain()

    def give_up(self) -> None:
        """Whoever still waits gets NotServing now, and runs under way are terminated. Takes no more requests."""
        self._draining = True
        self._fail_all(lambda: NotServing(self._manifest.name, "draining"))

    def check_room(self, deadline: float | None) -> None:
        """Raises what `submit` would raise now for the smallest of requests, before any work goes into a real one."""
        self._admit(Demand(1, 1, 0), self._serving_at(deadline), deadline)

    async def submit(
        self,
        sequences: Sequence[PreparedSequence],
        *,
        deadline: float | None = None,
        priority: Priority = Priority.NORMAL,
        received_bytes: int = 0,
        request_id: str = "",
    ) -> list[SequenceResult]:
        """Answers for all of these sequences, in their order. Cancelling the awaiting task withdraws them.

        Args:
            sequences: prepared for this model.
            deadline: monotonic seconds on the scheduler's clock; None: wait for ever.
            priority: moves their place in line.
            received_bytes: of the message that they came in. It is kept as long as they wait, so that it counts, even
                where most of it is nothing that they use.
            request_id: the request's name, for the log.

        Raises:
            NotServing: draining, not started, or broken.
            Overloaded: the queue is full, or the wait would outlast the deadline.
            DeadlineExpired: the deadline passed; raised then, also while the sequences run.
            InternalFault: one of the sequences failed; the others of this request were withdrawn.
        """
        now = self._serving_at(deadline)
        if not sequences:
            return []
        held = [sum(tensor.nbytes for tensor in one.tensors.values()) for one in sequences]
        unused = max(0, received_bytes - sum(held)) // len(sequences)
        sizes = [size + unused + one.response_bytes for size, one in zip(held, sequences, strict=True)]
        self._admit(Demand(len(sequences), sum(one.tokens for one in sequences), sum(sizes)), now, deadline)
        loop = asyncio.get_running_loop()
        request = Request(loop.create_future(), now, deadline, len(sequences), request_id)
        self._requests.add(request)
        for sequence, size in zip(sequences, sizes, strict=True):
            self._enqueue(request, sequence, size, priority)
        self._wake.set()
        if self._verifier is not None:
            self._verifier.make_way()
        timer = None if deadline is None else DeadlineTimer(loop, self._clock, deadline, partial(self._expire, request))
        try:
            return await request.future
        except asyncio.CancelledError:
            expired = deadline is not None and self._clock.now() >= deadline
            self._withdraw(request, "expired" if expired else "cancelled")
            raise
        finally:
            if timer is not None:
                timer.cancel()
            self._requests.discard(request)
            request.entries.clear()
            del request, timer  # an error's traceback holds this frame: let the frame not hold the error as well

    def _serving_at(self, deadline: float | None) -> float:
        """The time, if there is any left and the model serves."""
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
        # A model without axes takes sequences of one position: of none, no batch of them would be worth its run.
        lengths = tuple(sequence.lengths.get(axis.symbol, 0) for axis in self._manifest.axes) or (1,)
        view = Waiting(
            rank_s=rank_s(request.arrived_s, priority, self._settings),
            lengths=lengths,
            deadline_s=request.deadline_s,
            # All lengths are more than the rigid ones of a model that pads, so that the two never share a run.
            rigid=lengths if sequence.unpadded else tuple(lengths[at] for at in self._rigid),
            footprint=self._footprint.of(sequence),
        )
        entry = Entry(request, len(request.entries), next(self._numbers), sequence, view, size)
        request.entries.append(entry)
        self._queue.push(entry)

    async def _serve(self) -> None:
        async with asyncio.TaskGroup() as group:
            for instance in range(self._executor.instances):
                group.create_task(self._work(instance), name=f"instance {instance} of {self._manifest.name}")

    async def _work(self, instance: int) -> None:
        """One instance: idle only while nothing waits; ends when draining and nothing waits."""
        while True:
            entries = self._next_entries()
            if entries:
                await self._run(entries, instance)
            elif self._draining:
                return
            elif self._verifier is not None:
                await self._verifier.rest(instance)
            else:
                self._wake.clear()
                await self._wake.wait()

    def _next_entries(self) -> list[Entry]:
        """Forms a batch; what expired is given up here, so that it never reaches the runtime."""
        cost = (self._executor.cost or CostModel()).with_overhead(self._settings.run_overhead_tokens)
        while len(self._queue):
            front = self._queue.view(self._settings.look_ahead)
            views = [entry.view for entry in front]
            planned = plan(views, self._clock.now(), self._settings, cost, self._pace())
            # What is done was cancelled in this very turn of the loop: its task has not come to withdraw it yet.
            for request in {front[at].request for at in planned.expired}:
                if request.future.done():
                    self._withdraw(request, "cancelled")
                else:
                    self._expire(request)
            # What expired may have taken others of its request with it.
            entries = [front[at] for at in planned.indices if front[at].waiting]
            left = {entry.request for entry in entries if entry.request.future.done()}
            for request in left:
                self._withdraw(request, "cancelled")
            if left:
                continue
            for entry in entries:
                self._queue.remove(entry)
            if entries:
                return entries
        return []

    async def _run(self, entries: list[Entry], instance: int) -> None:
        sequences = [entry.sequence for entry in entries]
        run = Run(RunHandle(), entries, len(entries), sum(one.tokens for one in sequences))
        started = self._clock.now()
        for entry in entries:
            entry.run = run
            self._metrics.queue_seconds.observe(started - entry.request.arrived_s)
        self._running_tokens += run.tokens
        self._busy += 1
        outcomes = await self._execute(entries, sequences, run.handle, instance)
        self._busy -= 1
        self._running_tokens -= run.tokens
        for entry in entries:
            entry.run = None
        if run.handle.terminated:
            self._metrics.dropped("terminated").inc(len(entries))
            return
        self._speed.saw(self._clock.now() - started, run.tokens, self._foreseen_s(outcomes[0]))
        for entry, outcome in zip(entries, outcomes, strict=True):
            self._resolve(entry, outcome, started)

    async def _execute(
        self, entries: list[Entry], sequences: list[PreparedSequence], handle: RunHandle, instance: int
    ) -> list[Outcome]:
        verifier = self._verifier
        if verifier is None:
            return await self._executor.run(sequences, handle, instance)
        verifier.make_way()
        samples = verifier.drawn(entries, sequences)
        outcomes = await self._executor.run(sequences, handle, instance)
        verifier.take(samples, outcomes)
        return outcomes

    def _pace(self) -> float:
        """Seconds on the clock for each of the cost model's, with headroom; 0: not known.

        An overhead that was set by hand says what mates are worth, and not how long a run takes.
        """
        if self._settings.run_overhead_tokens is not None:
            return 0.0
        return self._settings.wait_headroom * self._speed.pace

    def _foreseen_s(self, first: Outcome) -> float:
        """What the run that an outcome came from was foreseen to take; 0 where that is not known."""
        cost = self._executor.cost
        if cost is None or isinstance(first, AttnserveError):
            return 0.0
        return cost.seconds(first.run.batch_size, first.run.computed_tokens / first.run.batch_size)

    def _resolve(self, entry: Entry, outcome: Outcome, started: float) -> None:
        request = entry.request
        if isinstance(outcome, AttnserveError):
            self._metrics.dropped("failed").inc()
            self._fail(request, outcome, "failed")
        elif not request.future.done():
            waited_s = started - request.arrived_s
            request.results[entry.index] = SequenceResult(outcome.outputs, outcome.attention, outcome.run, waited_s)
            if len(request.results) == request.size:
                request.future.set_result([request.results[index] for index in range(request.size)])

    def _expire(self, request: Request) -> None:
        now = self._clock.now()
        early = request.deadline_s is not None and now < request.deadline_s
        self._fail(request, DeadlineExpired(now - request.arrived_s, early=early), "expired")

    def _fail(self, request: Request, error: AttnserveError, reason: str) -> None:
        if not request.future.done():
            request.future.set_exception(error)
        self._withdraw(request, reason)

    def _withdraw(self, request: Request, reason: str) -> None:
        """Takes a request out of the queue and of its runs. A run that nobody waits for any more is terminated."""
        for entry in request.entries:
            if entry.waiting:
                self._queue.remove(entry)
                self._metrics.dropped(reason).inc()
            elif entry.run is not None:
                entry.run.present -= 1
                if not entry.run.present:
                    entry.run.handle.terminate()
                entry.run = None

    def _fail_all(self, error: Callable[[], AttnserveError]) -> None:
        for request in self._requests:
            self._fail(request, error(), "failed")

    def _ended(self, task: asyncio.Task[None]) -> None:
        """The loops have ended. Unless that was asked for, nobody may be left waiting for them."""
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
