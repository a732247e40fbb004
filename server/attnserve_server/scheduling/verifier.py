"""The shadow check: repeat a share of batched sequences alone, compare with what was served, and count differences.

The scheduler lends its idle instances. Served work always goes first:

- A repeat starts only while the queue is empty, and only if another instance stays free, so that a new request starts
  at once. A model of one instance repeats on that one.
- A repeat is stopped at its next node when work waits and no instance is free.
- One repeat runs at a time, of a bounded number of samples; a sample without room is dropped.
- A repeat that fails is counted, and changes no answer.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, Protocol

from attnserve_server.domain.clock import Clock
from attnserve_server.domain.errors import AttnserveError, RequestCancelled
from attnserve_server.domain.values import Array, PreparedSequence, RunFacts
from attnserve_server.engine.executor import Outcome
from attnserve_server.engine.session import RunHandle
from attnserve_server.model.equality import Difference
from attnserve_server.model.manifest import Manifest
from attnserve_server.observability.metrics import ModelMetrics
from attnserve_server.scheduling.policy import Candidate
from attnserve_server.scheduling.queue import Entry

_log = logging.getLogger(__name__)

Action = Literal["count", "isolate"]


@dataclass(frozen=True, slots=True)
class ShadowSettings:
    """How many sequences are repeated, the bounds of what is kept for that, and what a difference causes."""

    share: float
    """Of the sequences that run in a batch, from 0 to 1."""
    action: Action = "count"
    max_samples: int = 4
    """Most sequences kept, from the draw until the end of their repeat."""
    max_bytes: int = 64 * 2**20
    """Most bytes of tensors that they and their answers take together: over 400 tokens with every map of MiniLM."""
    rest_s: float = 0.005
    """Seconds for which an instance must be idle before a repeat: answers are sent first, and a caller that sends its
    next request at once finds the instance free."""
    warn_every_s: float = 10.0
    """Least seconds between two warnings; each reports how many differences were not logged."""


class Repeater(Protocol):
    """What the verifier needs of an executor."""

    @property
    def instances(self) -> int:
        """How many runs may be in progress at once."""
        ...

    async def repeat(
        self, sequence: PreparedSequence, served: Mapping[str, Array], handle: RunHandle, instance: int
    ) -> Difference | AttnserveError:
        """Run a sequence alone, and compare it with what was served."""
        ...


@dataclass(slots=True, eq=False)
class Sample:
    """One drawn sequence. Event loop only."""

    at: int
    """Its position in the batch."""
    sequence: PreparedSequence
    """For the repeat: with copies of its inputs, because the received ones keep their whole message in memory."""
    request_id: str
    bytes: int
    answered: bool = False
    """Whether its request has ended."""
    served: Mapping[str, Array] = field(default_factory=dict)
    run: RunFacts | None = None
    """The run that served it; None until that has ended."""


class Verifier:
    """The shadow check of one model. Event loop only, every method and all state."""

    def __init__(
        self,
        repeater: Repeater,
        manifest: Manifest,
        settings: ShadowSettings,
        clock: Clock,
        metrics: ModelMetrics,
        draw: Callable[[], float] = random.random,
        on_isolated: Callable[[], None] | None = None,
    ) -> None:
        """Store the parts.

        Args:
            repeater: repeats sequences alone.
            manifest: of the model.
            settings: the bounds.
            clock: for the interval between warnings.
            metrics: of the model.
            draw: returns random numbers in [0, 1).
            on_isolated: called once, when a difference turns batching off.
        """
        self._repeater = repeater
        self._manifest = manifest
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._draw = draw
        self._on_isolated = on_isolated
        self._throttle = Throttle(settings.warn_every_s)
        self._wake: Callable[[], None] = lambda: None
        self._load: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self._isolate: Callable[[], None] = lambda: None
        self._waiting: deque[Sample] = deque()  # served, and not yet repeated
        self._samples = 0  # drawn: in their run, waiting, or being repeated
        self._bytes = 0
        self._handle: RunHandle | None = None  # of the running repeat
        self._isolated = False
        self._closed = False

    def attach(
        self, wake: Callable[[], None], load: Callable[[], tuple[int, int]], isolate: Callable[[], None]
    ) -> None:
        """Connect to one scheduler.

        Args:
            wake: wakes one of its idle instances.
            load: returns the number of waiting sequences, and of instances that run served work.
            isolate: makes the scheduler run each sequence alone from now on.
        """
        self._wake, self._load, self._isolate = wake, load, isolate

    def draw_samples(self, entries: Sequence[Entry], sequences: list[PreparedSequence]) -> list[Sample]:
        """Draw samples from a batch that is about to run; pass them to `take` when the run has ended.

        A batch of one sequence gives no sample: it has neither neighbours nor padding.

        Args:
            entries: the batch.
            sequences: theirs, in the same order. Those drawn are replaced by copies with `keep_values`.
        """
        if self._closed or len(entries) < 2:
            return []
        chosen = [at for at in range(len(entries)) if self._draw() < self._settings.share]
        samples = [sample for at in chosen if (sample := self._keep(at, entries[at])) is not None]
        for sample in samples:
            sequences[sample.at] = replace(sequences[sample.at], keep_values=True)
        return samples

    def _keep(self, at: int, entry: Entry) -> Sample | None:
        size = size_of(entry.candidate)
        if not has_room(self._samples, self._bytes, size, self._settings):
            self._metrics.checked("dropped").inc()
            return None
        tensors = {name: tensor.copy() for name, tensor in entry.sequence.tensors.items()}
        alone = replace(entry.sequence, tensors=tensors, units={}, is_whole_request=False)
        sample = Sample(at, alone, entry.request.request_id, size)
        self._samples += 1
        self._bytes += size
        entry.request.add_done_callback(partial(self._answered, sample))
        return sample

    def _answered(self, sample: Sample, _: object) -> None:
        # The task that awaits the request was woken first, so that its answer is sent before the repeat.
        sample.answered = True
        self._wake()

    def take(self, samples: Sequence[Sample], outcomes: Sequence[Outcome]) -> None:
        """Take the results of a run. A sample without a result from a batch has nothing to compare, and is dropped."""
        for sample in samples:
            outcome = outcomes[sample.at]
            if isinstance(outcome, AttnserveError) or outcome.values is None or outcome.run.batch_size < 2:
                self._release(sample)
                continue
            sample.served, sample.run = outcome.values, outcome.run
            self._waiting.append(sample)
        if self._closed:
            self._drop_waiting()

    def _release(self, sample: Sample) -> None:
        self._samples -= 1
        self._bytes -= sample.bytes

    async def idle(self, instance: int, woken: asyncio.Future[None]) -> None:
        """Wait until an instance without work is woken; after `rest_s` of waiting, repeat a sample."""
        if not self._may_repeat():
            await woken
            return
        await asyncio.wait((woken,), timeout=self._settings.rest_s)
        if not woken.done() and self._may_repeat():
            await self._repeat(instance)

    def _may_repeat(self) -> bool:
        """Return whether a sample is ready, no repeat is running, and an instance may run one."""
        if self._handle is not None or not any(sample.answered for sample in self._waiting):
            return False
        waiting, busy = self._load()
        return may_start(waiting, self._repeater.instances - busy, self._repeater.instances)

    async def _repeat(self, instance: int) -> None:
        sample = next(sample for sample in self._waiting if sample.answered)
        self._waiting.remove(sample)
        self._handle = RunHandle()
        try:
            outcome = await self._repeater.repeat(sample.sequence, sample.served, self._handle, instance)
        finally:
            self._handle = None
            self._release(sample)
        if isinstance(outcome, RequestCancelled):
            self._metrics.checked("dropped").inc()
        elif isinstance(outcome, AttnserveError):
            self._metrics.checked("failed").inc()
        elif outcome.error <= 1:
            self._metrics.checked("equal").inc()
        else:
            self._metrics.checked("different").inc()
            self._metrics.batch_mismatches.inc()
            self._warn(sample, outcome)
            self._act()

    def _warn(self, sample: Sample, difference: Difference) -> None:
        unlogged = self._throttle.passes(self._clock.now())
        if unlogged is None or sample.run is None:
            return
        _log.warning(
            "an answer from a batch differs from the same sequence alone",
            extra={
                "model": self._manifest.name,
                "version": self._manifest.version,
                "request_id": sample.request_id,
                "tensor": difference.name,
                # JSON has no infinity.
                "error_over_allowed": round(difference.error, 3) if math.isfinite(difference.error) else "infinite",
                "batch_size": sample.run.batch_size,
                "tokens": sample.sequence.tokens,
                "computed_tokens": sample.run.computed_tokens // sample.run.batch_size,
                "unlogged": unlogged,
            },
        )

    def _act(self) -> None:
        """Turn batching off after a difference, if `action` is `isolate`."""
        if self._settings.action != "isolate" or self._isolated:
            return
        self._isolated = True
        self._metrics.isolated.set(1)
        _log.error(
            "batching is off until the next start: an answer from a batch differs from the same sequence alone",
            extra={"model": self._manifest.name, "version": self._manifest.version},
        )
        self._isolate()
        if self._on_isolated is not None:
            self._on_isolated()

    def preempt(self) -> None:
        """Stop the running repeat if sequences wait and no instance is free. Its sample is dropped."""
        if self._handle is None:
            return
        waiting, busy = self._load()
        if must_stop(waiting, self._repeater.instances - busy - 1):
            self._handle.terminate()

    def close(self) -> None:
        """Draw no more, stop the running repeat, and drop the samples that wait."""
        self._closed = True
        if self._handle is not None:
            self._handle.terminate()
        self._drop_waiting()

    def _drop_waiting(self) -> None:
        while self._waiting:
            self._release(self._waiting.popleft())
            self._metrics.checked("dropped").inc()


class Throttle:
    """Lets one event pass in `every_s` seconds, and counts the others. Event loop only."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._next_s = -math.inf
        self._held_back = 0

    def passes(self, now: float) -> int | None:
        """Return how many events were held back since the last one that passed; None if this one is held back too."""
        if now < self._next_s:
            self._held_back += 1
            return None
        held_back, self._held_back = self._held_back, 0
        self._next_s = now + self._every_s
        return held_back


def has_room(samples: int, kept_bytes: int, size: int, settings: ShadowSettings) -> bool:
    """Return whether a sample of `size` bytes may be kept beside `samples` others of `kept_bytes` in all."""
    return samples < settings.max_samples and kept_bytes + size <= settings.max_bytes


def may_start(waiting: int, free: int, instances: int) -> bool:
    """Return whether an idle instance may repeat a sample.

    Args:
        waiting: sequences in the queue.
        free: instances that run nothing, the idle one included.
        instances: how many there are.
    """
    return waiting == 0 and free >= min(2, instances)


def must_stop(waiting: int, free: int) -> bool:
    """Return whether the running repeat must stop: sequences wait, and no instance is free for them."""
    return waiting > 0 and free == 0


def size_of(candidate: Candidate) -> int:
    """Return the bytes of one sequence alone: inputs, outputs and selected maps, with the copies that its run needs."""
    lengths = candidate.lengths
    return sum(math.prod(lengths[at] for at in axes) * size for axes, size in candidate.footprint.items())
