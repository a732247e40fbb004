"""The verifier: keeps samples of what batches answered, repeats each alone on an idle instance, and counts differences.

The scheduler lends it instances that have nothing to do; when it may use them, `shadow` decides.
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
from typing import Protocol

from attnserve_server.domain.clock import Clock
from attnserve_server.domain.errors import AttnserveError, RequestCancelled
from attnserve_server.domain.values import Array, PreparedSequence, RunFacts
from attnserve_server.engine.executor import Outcome
from attnserve_server.engine.session import RunHandle
from attnserve_server.model.equality import Difference
from attnserve_server.model.manifest import Manifest
from attnserve_server.observability.metrics import ModelMetrics
from attnserve_server.scheduling.queue import Entry
from attnserve_server.scheduling.shadow import ShadowSettings, Throttle, has_room, may_start, must_stop, size_of

_log = logging.getLogger(__name__)


class Repeater(Protocol):
    """What the verifier needs of an executor."""

    @property
    def instances(self) -> int:
        """How many runs may be under way at once."""
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
    """Its place in the batch."""
    sequence: PreparedSequence
    """For the repeat: with inputs of its own, since those that were received keep their whole message in memory."""
    request_id: str
    bytes: int
    answered: bool = False
    """Whether its request has ended."""
    served: Mapping[str, Array] = field(default_factory=dict)
    run: RunFacts | None = None
    """The run that served it; None until it has ended."""


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
        """`draw` gives random numbers from 0 up to, and without, 1; `on_isolated` is called once, if ever."""
        self._repeater = repeater
        self._manifest = manifest
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._draw = draw
        self._on_isolated = on_isolated
        self._throttle = Throttle(settings.warn_every_s)
        self._wake = asyncio.Event()
        self._load: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self._isolate: Callable[[], None] = lambda: None
        self._waiting: deque[Sample] = deque()  # served, and not yet repeated
        self._samples = 0  # drawn: in their run, waiting, or being repeated
        self._bytes = 0
        self._handle: RunHandle | None = None  # of the repeat under way
        self._isolated = False
        self._closed = False

    def attach(self, wake: asyncio.Event, load: Callable[[], tuple[int, int]], isolate: Callable[[], None]) -> None:
        """Work for one scheduler.

        Args:
            wake: what its idle instances wait for.
            load: gives how many sequences wait, and how many instances run served work.
            isolate: has it run each sequence alone from now on.
        """
        self._wake, self._load, self._isolate = wake, load, isolate

    def drawn(self, entries: Sequence[Entry], sequences: list[PreparedSequence]) -> list[Sample]:
        """Draw from a batch that is about to run. Hand each sample to `take` when the run has ended.

        A sequence that runs alone is never drawn: it has neither neighbours nor padding.

        Args:
            entries: the batch.
            sequences: theirs, in the same order; of those drawn, the values are asked for in place.
        """
        if self._closed or len(entries) < 2:
            return []
        chosen = [at for at in range(len(entries)) if self._draw() < self._settings.share]
        samples = [sample for at in chosen if (sample := self._keep(at, entries[at])) is not None]
        for sample in samples:
            sequences[sample.at] = replace(sequences[sample.at], keep_values=True)
        return samples

    def _keep(self, at: int, entry: Entry) -> Sample | None:
        size = size_of(entry.view)
        if not has_room(self._samples, self._bytes, size, self._settings):
            self._metrics.checked("dropped").inc()
            return None
        tensors = {name: tensor.copy() for name, tensor in entry.sequence.tensors.items()}
        alone = replace(entry.sequence, tensors=tensors, units={}, lone=False)
        sample = Sample(at, alone, entry.request.request_id, size)
        self._samples += 1
        self._bytes += size
        entry.request.future.add_done_callback(partial(self._answered, sample))
        return sample

    def _answered(self, sample: Sample, _: asyncio.Future[object]) -> None:
        # The request's own task was called back first, as it has waited for longer: its answer is on its way.
        sample.answered = True
        self._wake.set()

    def take(self, samples: Sequence[Sample], outcomes: Sequence[Outcome]) -> None:
        """Take what a run gave. A sample without an answer from a batch has nothing to compare, and is forgotten."""
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

    async def rest(self, instance: int) -> None:
        """Wait for work on behalf of an instance that has none; after a while without any, repeat a sample."""
        self._wake.clear()
        if not self._may_repeat():
            await self._wake.wait()
            return
        try:
            async with asyncio.timeout(self._settings.rest_s):
                await self._wake.wait()
        except TimeoutError:
            if self._may_repeat():
                await self._repeat(instance)

    def _may_repeat(self) -> bool:
        """Whether there is a sample to repeat, no repeat under way, and room for one."""
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
        """Do what the settings say follows from a difference."""
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

    def make_way(self) -> None:
        """Stop the repeat under way if sequences wait that no free instance takes. Its sample is dropped."""
        if self._handle is None:
            return
        waiting, busy = self._load()
        if must_stop(waiting, self._repeater.instances - busy - 1):
            self._handle.terminate()

    def close(self) -> None:
        """Draw no more, stop the repeat under way, and drop the samples that wait."""
        self._closed = True
        if self._handle is not None:
            self._handle.terminate()
        self._drop_waiting()

    def _drop_waiting(self) -> None:
        while self._waiting:
            self._release(self._waiting.popleft())
            self._metrics.checked("dropped").inc()
