"""A front's scheduler and an engine's host: answers, refusals, withdrawals, the end of either side, the next engine."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from attnserve_server.domain.clock import MonotonicClock
from attnserve_server.domain.errors import DeadlineExpired, EngineCrashed, NotServing, Overloaded
from attnserve_server.domain.values import PreparedSequence, SequenceResult
from attnserve_server.engine.pulse import Pulse
from attnserve_server.isolation.arena import SLOT_BYTES, Arena, LoadBoard
from attnserve_server.isolation.host import Host
from attnserve_server.isolation.remote import MOST_SENDS, RemoteScheduler
from attnserve_server.observability.metrics import REFUSED, Metrics
from attnserve_server.scheduling.policy import SchedulingSettings
from attnserve_server.scheduling.queue import Request
from gated import Gate, until
from tiny_bundle import tiny_manifest

SIZE = 32 * SLOT_BYTES


def arenas() -> tuple[Arena, Arena]:
    """Two views of one arena."""
    descriptor = Arena.create_descriptor(SIZE)
    try:
        return Arena(descriptor, SIZE), Arena(descriptor, SIZE)
    finally:
        os.close(descriptor)


@dataclass
class Both:
    """An engine with its fronts, in one process."""

    gate: Gate
    host: Host
    board: int
    pulse: Pulse = field(default_factory=Pulse)
    fronts: list[RemoteScheduler] = field(default_factory=list)
    read: list[Arena] = field(default_factory=list)
    answered: list[Arena] = field(default_factory=list)
    memory: list[tuple[Arena, Arena]] = field(default_factory=list)
    metrics: Metrics = field(default_factory=Metrics)

    async def front(self) -> RemoteScheduler:
        """Connect one more front, for at most 8 waiting sequences."""
        asked, read = arenas()
        settings = SchedulingSettings(max_queue_size=8)
        model = self.metrics.model("tiny", "1")
        made = RemoteScheduler("tiny", asked, LoadBoard(self.board), settings, MonotonicClock(), model)
        self.fronts.append(made)
        self.read.append(read)
        await self.connect(made)
        self.memory.append((asked, self.answered[-1]))
        return made

    async def connect(self, front: RemoteScheduler, suspects: Sequence[int] = ()) -> None:
        """Connect a front to the engine that there is now."""
        here, there = socket.socketpair()
        answered, seen = arenas()
        at = self.fronts.index(front)
        await self.host.attach(there, (answered, self.read[at]), at)
        await front.connect(here, seen, suspects)
        self.answered.append(answered)

    async def crash(self) -> None:
        """End the engine."""
        self.host.close()
        await asyncio.sleep(0.01)

    def start(self, suspects: dict[int, list[int]] | None = None) -> None:
        """Start the next engine."""
        self.gate = Gate(tiny_manifest())
        self.host = Host(self.gate, LoadBoard(self.board), self.pulse, suspects)

    def waiting(self) -> int:
        return len(self.gate.waiting)


@pytest.fixture
async def both() -> AsyncIterator[Both]:
    gate, board = Gate(tiny_manifest()), Arena.create_descriptor(LoadBoard.SIZE)
    made = Both(gate, Host(gate, LoadBoard(board)), board)
    yield made
    for front in made.fronts:
        front.close()
    made.host.close()
    await asyncio.sleep(0.01)
    os.close(board)


def sequence(length: int = 4) -> PreparedSequence:
    ids = np.zeros(length, np.int64)
    return PreparedSequence({"input_ids": ids}, {"seq": length}, ("hidden",))


def asked(front: RemoteScheduler, *sequences: PreparedSequence, deadline_s: float | None = None) -> Answer:
    request = Request("id", deadline_s, 10)
    return front.submit(request, sequences)


Answer = asyncio.Future[list[SequenceResult]]


async def test_requests_of_all_fronts_meet_in_one_queue_and_go_back_to_their_own(both: Both) -> None:
    one, other = await both.front(), await both.front()
    answers = [asked(one, sequence(3)), asked(other, sequence(5), sequence(6)), asked(one, sequence(3000))]
    await until(lambda: both.waiting() == 3)
    both.gate.open()
    results = await asyncio.gather(*answers)
    assert [[len(one.outputs["hidden"]) for one in result] for result in results] == [[3], [5, 6], [3000]]
    del results, answers
    await until(lambda: all(arena.free_slots == SIZE // SLOT_BYTES for pair in both.memory for arena in pair))


async def test_errors_of_the_engine_reach_the_caller(both: Both) -> None:
    front = await both.front()
    answer = asked(front, sequence())
    await until(lambda: both.waiting() == 1)
    both.gate.release(error=Overloaded("queue_full", 1, 2, 0.25))
    with pytest.raises(Overloaded, match="2 exceeds 1") as caught:
        await answer
    assert caught.value.retry_delay_s == 0.25


async def test_a_full_queue_refuses_in_the_front_without_a_message(both: Both) -> None:
    front = await both.front()
    answers = [asked(front, sequence()) for _ in range(8)]
    await until(lambda: both.waiting() == 8)
    await asyncio.sleep(0.01)  # the load is published in the next turn
    with pytest.raises(Overloaded, match="queue_full"):
        asked(front, sequence())
    with pytest.raises(Overloaded, match="queue_full"):
        front.check_room(None)
    await asyncio.sleep(0.01)
    assert len(both.gate.deadlines) == 8, "no message reached the engine"
    refused = both.metrics.counter(REFUSED).labels("tiny", "1", "queue_full")
    assert refused.value == 2
    both.gate.open()
    await asyncio.gather(*answers)
    await asyncio.sleep(0.01)
    front.check_room(None)


async def test_a_wait_beyond_the_deadline_refuses_in_the_front(both: Both) -> None:
    front = await both.front()
    both.gate.seconds_per_token = 100.0
    waiting = asked(front, sequence())
    await until(lambda: both.waiting() == 1)
    await asyncio.sleep(0.01)
    with pytest.raises(Overloaded, match="predicted_wait"):
        asked(front, sequence(), deadline_s=MonotonicClock().now() + 5)
    with pytest.raises(DeadlineExpired):
        asked(front, sequence(), deadline_s=MonotonicClock().now() - 1)
    both.gate.open()
    await waiting


async def test_a_cancelled_request_is_withdrawn_and_its_neighbours_are_answered(both: Both) -> None:
    front = await both.front()
    leaving, staying = asked(front, sequence()), asked(front, sequence())
    await until(lambda: both.waiting() == 2)
    leaving.cancel()
    await until(lambda: both.gate.withdrawn == 1)
    both.gate.release(1)
    assert len(await staying) == 1


async def test_requests_without_an_answer_go_to_the_next_engine(both: Both) -> None:
    front = await both.front()
    before = asked(front, sequence(3000))
    await until(lambda: both.waiting() == 1)
    await both.crash()
    between = asked(front, sequence(2))
    both.start()
    await both.connect(front)
    await until(lambda: both.waiting() == 2)
    both.gate.open()
    assert [len(one.outputs["hidden"]) for one in (*await before, *await between)] == [3000, 2]
    del before, between
    await until(lambda: both.memory[0][0].free_slots == SIZE // SLOT_BYTES)


async def test_a_request_that_ends_without_an_engine_leaves_no_memory_behind(both: Both) -> None:
    front = await both.front()
    sent = asked(front, sequence(3000))
    await until(lambda: both.waiting() == 1)
    await both.crash()
    unsent = asked(front, sequence(3000))
    assert both.memory[0][0].free_slots == SIZE // SLOT_BYTES - 4
    for one in (sent, unsent):
        one.cancel()
    await asyncio.sleep(0.01)
    both.start()
    await both.connect(front)
    assert both.memory[0][0].free_slots == SIZE // SLOT_BYTES


async def test_requests_wait_for_an_engine_until_their_deadlines(both: Both) -> None:
    front = await both.front()
    await both.crash()
    now = MonotonicClock().now()
    answer = asked(front, sequence(), deadline_s=now + 0.1)
    with pytest.raises(DeadlineExpired):
        await answer
    assert 0.1 <= MonotonicClock().now() - now < 0.35


async def test_deadlines_before_the_next_engine_are_refused_with_a_delay(both: Both) -> None:
    front = await both.front()
    now = MonotonicClock().now()
    soon, late = asked(front, sequence(), deadline_s=now + 5), asked(front, sequence(), deadline_s=now + 60)
    await both.crash()
    front.expect(20)
    with pytest.raises(NotServing) as caught:
        await soon
    assert 19 < caught.value.retry_delay_s <= 20
    with pytest.raises(NotServing):
        asked(front, sequence(), deadline_s=now + 5)
    with pytest.raises(NotServing):
        front.check_room(now + 5)
    assert not late.done()
    both.start()
    await both.connect(front)
    both.gate.is_open = True
    asked(front, sequence(), deadline_s=now + 5)


async def test_requests_that_wait_for_an_engine_are_bounded(both: Both) -> None:
    front = await both.front()
    await both.crash()
    for _ in range(8):
        asked(front, sequence())
    with pytest.raises(Overloaded, match="queue_full"):
        asked(front, sequence())


async def test_a_model_that_has_failed_fails_its_requests_and_refuses_new_ones(both: Both) -> None:
    front = await both.front()
    answer = asked(front, sequence())
    await both.crash()
    front.refuse("failed")
    with pytest.raises(NotServing, match="failed"):
        await answer
    with pytest.raises(NotServing, match="failed"):
        asked(front, sequence())


async def test_a_request_that_many_engines_did_not_survive_is_sent_no_more(both: Both) -> None:
    front = await both.front()
    answer = asked(front, sequence())
    for sent in range(1, MOST_SENDS + 1):
        await until(lambda: both.waiting() == 1)
        assert not answer.done(), f"it failed after {sent} engines"
        await both.crash()
        both.start()
        await both.connect(front)
    with pytest.raises(NotServing):
        await answer


async def test_suspects_run_alone_one_after_another_before_all_others(both: Both) -> None:
    one, other = await both.front(), await both.front()
    answers = [asked(front, sequence(length)) for front in (one, other) for length in (2, 3, 4)]
    await until(lambda: both.waiting() == 6)
    await both.crash()
    both.start({0: [2, 3], 1: [1]})
    assert both.pulse.alone
    for front, suspects in ((one, [2, 3]), (other, [1])):
        await both.connect(front, suspects)
    alone = []
    for _ in range(3):
        await until(lambda: both.waiting() == 1)
        await asyncio.sleep(0.02)
        (request,) = both.gate.waiting
        alone.append(request.entries[0].sequence.origin)
        both.gate.release()
    assert alone == [(0, 2), (0, 3), (1, 1)]
    await until(lambda: both.waiting() == 3)
    assert not both.pulse.alone
    both.gate.open()
    assert [len(result[0].outputs["hidden"]) for result in await asyncio.gather(*answers)] == [2, 3, 4] * 2


async def test_suspects_that_have_ended_hold_up_no_one(both: Both) -> None:
    one, other = await both.front(), await both.front()
    gone, stays = asked(one, sequence()), asked(other, sequence())
    await until(lambda: both.waiting() == 2)
    await both.crash()
    gone.cancel()
    both.start({0: [1], 1: [1], 7: []})
    await both.connect(other, [1])
    await until(lambda: both.waiting() == 1)
    both.gate.open()
    await stays
    later = asked(other, sequence())
    await asyncio.sleep(0.02)
    assert not later.done(), "a suspect of the first front may still come"
    await both.connect(one, [1])
    await later


async def test_a_suspect_that_is_cancelled_while_it_waits_leaves_no_memory_behind(both: Both) -> None:
    front = await both.front()
    first, second = asked(front, sequence(3000)), asked(front, sequence(3000))
    await until(lambda: both.waiting() == 2)
    await both.crash()
    both.start({0: [1, 2]})
    await both.connect(front, [1, 2])
    await until(lambda: both.waiting() == 1)
    second.cancel()
    await asyncio.sleep(0.02)
    both.gate.open()
    await first
    del first
    await until(lambda: both.memory[0][0].free_slots == SIZE // SLOT_BYTES)


async def test_a_culprit_fails_without_a_retry_delay(both: Both) -> None:
    front = await both.front()
    culprit, innocent = asked(front, sequence()), asked(front, sequence())
    await both.crash()
    front.crashed(1)
    front.crashed(99)  # it has ended in the meantime
    with pytest.raises(EngineCrashed) as caught:
        await culprit
    assert not hasattr(caught.value, "retry_delay_s")
    both.start()
    await both.connect(front)
    both.gate.is_open = True
    await until(lambda: both.waiting() == 1 or innocent.done())
    both.gate.open()
    assert len(await innocent) == 1


async def test_the_requests_of_a_front_that_has_ended_are_withdrawn_and_others_stay(both: Both) -> None:
    one, other = await both.front(), await both.front()
    lost, kept = asked(one, sequence()), asked(other, sequence())
    await until(lambda: both.waiting() == 2)
    one.close()
    await until(lambda: both.gate.withdrawn == 1)
    with pytest.raises(NotServing):
        await lost
    both.gate.open()
    assert len(await kept) == 1


async def test_drained_waits_for_the_last_answer(both: Both) -> None:
    front = await both.front()
    answer = asked(front, sequence())
    drained = asyncio.create_task(front.drained())
    await asyncio.sleep(0.02)
    assert not drained.done()
    both.gate.open()
    await drained
    assert answer.done()
