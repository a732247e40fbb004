"""Virtual time: an event loop whose clock jumps to the next timer when no task is ready, so that no test waits.

The fixture `virtually` runs a coroutine on that loop. It fails with AssertionError if all tasks wait and no timer is
set. `bench` is a scheduler on a fake executor; `sequence` makes a sequence whose answer is its tag, and `tags_of` reads
the tags of results.
"""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from attnserve_server.domain.errors import AttnserveError, InternalFault, RequestCancelled
from attnserve_server.domain.values import PreparedSequence, Priority, RunFacts, SequenceResult
from attnserve_server.engine.cost import CostModel
from attnserve_server.engine.executor import Outcome
from attnserve_server.engine.session import RunHandle
from attnserve_server.model.equality import Difference
from attnserve_server.model.manifest import (
    AxisSpec,
    InputRole,
    InputSpec,
    Manifest,
    OutputSpec,
)
from attnserve_server.observability.metrics import CHECK_OUTCOMES, Metrics
from attnserve_server.scheduling.policy import SchedulingSettings
from attnserve_server.scheduling.queue import Request
from attnserve_server.scheduling.scheduler import Scheduler
from attnserve_server.scheduling.verifier import ShadowSettings, Verifier
from made_by_hand import CHECK, PROVENANCE, proved


class ManualClock:
    """A clock that moves only when a test or the loop moves it."""

    def __init__(self) -> None:
        self.time_s = 1000.0

    def now(self) -> float:
        return self.time_s


class _JumpingSelector(selectors.DefaultSelector):  # type: ignore[valid-type, misc]
    clock: ManualClock

    def select(self, timeout: float | None = None) -> list:
        assert timeout is not None, "all tasks wait and no timer is set: the loop would hang"
        self.clock.time_s += max(timeout, 0)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time is that of a manual clock, which it moves instead of waiting."""

    def __init__(self, clock: ManualClock) -> None:
        selector = _JumpingSelector()
        selector.clock = clock
        super().__init__(selector)
        self._virtual = clock

    def time(self) -> float:
        return self._virtual.now()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def virtually(clock: ManualClock) -> Callable[[Coroutine], object]:
    """Run a coroutine in virtual time."""

    def run(coroutine: Coroutine) -> object:
        with asyncio.Runner(loop_factory=lambda: VirtualLoop(clock)) as runner:
            return runner.run(coroutine)

    return run


@dataclass
class FakeExecutor:
    """Returns each sequence's own tag after `seconds` of virtual time; a terminated run ends at once.

    Sequences whose tag is in `poisoned` get InternalFault. If `breaks` is true, each run raises RuntimeError instead.
    `runs` and `terminated` have the tags of each run, `alone` whether it was stated to be alone, and `stopped` the tags
    of terminated repeats.
    """

    clock: ManualClock
    instances: int = 1
    seconds: Callable[[Sequence[PreparedSequence]], float] = lambda sequences: 1.0
    cost: CostModel | None = None
    past_cost: CostModel | None = None
    runs: list[list[int]] = field(default_factory=list)
    alone: list[bool] = field(default_factory=list)
    terminated: list[list[int]] = field(default_factory=list)
    busy: set[int] = field(default_factory=set)
    poisoned: set[int] = field(default_factory=set)
    breaks: bool = False
    splits: bool = False
    """Whether batches fail, so that each sequence runs alone."""
    handed: list[tuple[int, bool]] = field(default_factory=list)
    """Of each sequence that ran: the id of the object, and its `keep_values`."""
    repeats: list[tuple[int, int, float]] = field(default_factory=list)
    """Tag, instance and start of each repeat."""
    stopped: list[int] = field(default_factory=list)
    mixed: set[int] = field(default_factory=set)
    """Tags whose answers their batch changes."""

    async def run(
        self, sequences: Sequence[PreparedSequence], handle: RunHandle, instance: int, *, alone: bool = False
    ) -> list[Outcome]:
        assert instance not in self.busy, "one run at a time on an instance"
        self.busy.add(instance)
        tags = [tag_of(one) for one in sequences]
        self.runs.append(tags)
        self.alone.append(alone)
        self.handed += [(id(one), one.keep_values) for one in sequences]
        if self.breaks:
            raise RuntimeError("the executor broke")
        until = self.clock.now() + self.seconds(sequences)
        while self.clock.now() < until - 1e-9 and not handle.terminated:  # noqa: ASYNC110 - a handle has no event
            await asyncio.sleep(min(0.01, until - self.clock.now()))  # virtual: the loop jumps
        self.busy.discard(instance)
        if handle.terminated:
            self.terminated.append(tags)
            return [RequestCancelled() for _ in sequences]
        facts = RunFacts(1 if self.splits else len(sequences), 0, 0, self.seconds(sequences), instance)
        return [
            InternalFault()
            if tag_of(one) in self.poisoned
            else SequenceResult(values_of(one), None, facts, values=values_of(one) if one.keep_values else None)
            for one in sequences
        ]

    async def repeat(
        self, sequence: PreparedSequence, served: Mapping[str, np.ndarray], handle: RunHandle, instance: int
    ) -> Difference | AttnserveError:
        assert instance not in self.busy, "one run at a time on an instance"
        self.busy.add(instance)
        tag = tag_of(sequence)
        assert served == values_of(sequence)
        self.repeats.append((tag, instance, self.clock.now()))
        until = self.clock.now() + self.seconds([sequence])
        while self.clock.now() < until - 1e-9 and not handle.terminated:  # noqa: ASYNC110 - a handle has no event
            await asyncio.sleep(min(0.01, until - self.clock.now()))  # virtual: the loop jumps
        self.busy.discard(instance)
        if handle.terminated:
            self.stopped.append(tag)
            return RequestCancelled()
        return InternalFault() if tag in self.poisoned else Difference("tag", 40.0 if tag in self.mixed else 0.5)


def tag_of(sequence: PreparedSequence) -> int:
    return int(sequence.tensors["input_ids"][0])


def values_of(sequence: PreparedSequence) -> dict[str, np.ndarray]:
    return {"tag": np.array(tag_of(sequence))}


def tagged(tag: int, length: int = 4) -> PreparedSequence:
    """A sequence of `length` positions, each with the id `tag`."""
    ids = np.full(length, tag, np.int64)
    return PreparedSequence({"input_ids": ids}, {"seq": length}, ("embedding",), response_bytes=8)


def tags(results: Sequence[SequenceResult]) -> list[int]:
    return [int(result.outputs["tag"]) for result in results]


MANIFEST = Manifest(
    name="tiny",
    version="1",
    digest="sha256:" + "0" * 64,
    files={},
    precision="fp32",
    max_batch_size=16,
    axes=(AxisSpec(symbol="seq", max_length=512, paddable=True),),
    inputs=(InputSpec(name="input_ids", dtype="int64", shape=("seq",), role=InputRole.TOKEN_IDS, padding=0.0),),
    outputs=(OutputSpec(name="embedding", dtype="float32", shape=(8,)),),
    provenance=PROVENANCE,
    check=CHECK,
    certificate=proved("seq"),
)


@dataclass
class Bench:
    """A scheduler on a fake executor, with its metrics."""

    clock: ManualClock
    executor: FakeExecutor
    settings: SchedulingSettings = field(default_factory=SchedulingSettings)
    metrics: Metrics = field(default_factory=Metrics)
    faults: list[str] = field(default_factory=list)
    shadow: ShadowSettings | None = None
    draw: Callable[[], float] = random.Random(7).random
    isolated: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler: Scheduler | None = None
        self.verifier: Verifier | None = None

    async def __aenter__(self) -> Scheduler:
        metrics = self.metrics.model("tiny", "1")
        if self.shadow is not None:
            self.verifier = Verifier(
                self.executor,
                MANIFEST,
                self.shadow,
                self.clock,
                metrics,
                self.draw,
                on_isolated=lambda: self.isolated.append(self.clock.now()),
            )
        self.scheduler = Scheduler(
            self.executor,
            MANIFEST,
            self.settings,
            self.clock,
            metrics,
            on_fault=lambda: self.faults.append("fault"),
            verifier=self.verifier,
        )
        self.scheduler.start()
        return self.scheduler

    async def __aexit__(self, *_: object) -> None:
        assert self.scheduler is not None
        await self.scheduler.aclose()

    async def submit(
        self,
        sequences: Sequence[PreparedSequence],
        *,
        deadline: float | None = None,
        priority: Priority = Priority.NORMAL,
        received_bytes: int = 0,
        request_id: str = "",
    ) -> list[SequenceResult]:
        """Submit a request of these sequences, as the data plane does."""
        assert self.scheduler is not None
        with Request(request_id, deadline, received_bytes) as request:
            return await self.scheduler.submit(request, sequences, priority)

    def checks(self) -> dict[str, int]:
        """Drawn sequences by outcome, without outcomes that have none."""
        counts = {outcome: int(self.metric("batch_checks_total", outcome=outcome)) for outcome in CHECK_OUTCOMES}
        return {outcome: count for outcome, count in counts.items() if count}

    def metric(self, name: str, **labels: str) -> float:
        value = self.metrics.registry.get_sample_value(f"attnserve_{name}", {"model": "tiny", "version": "1", **labels})
        return value or 0.0


@pytest.fixture
def bench(clock: ManualClock) -> Bench:
    return Bench(clock, FakeExecutor(clock))


@pytest.fixture
def sequence() -> Callable[..., PreparedSequence]:
    return tagged


@pytest.fixture
def tags_of() -> Callable[[Sequence[SequenceResult]], list[int]]:
    return tags
