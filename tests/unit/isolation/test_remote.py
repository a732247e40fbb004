"""A front's scheduler and an engine's host: answers, refusals, withdrawals, and the end of either side."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from attnserve_server.domain.clock import MonotonicClock
from attnserve_server.domain.errors import DeadlineExpired, NotServing, Overloaded
from attnserve_server.domain.values import PreparedSequence, SequenceResult
from attnserve_server.isolation.arena import SLOT_BYTES, Arena, LoadBoard
from attnserve_server.isolation.host import Host
from attnserve_server.isolation.remote import RemoteScheduler
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
    fronts: list[RemoteScheduler] = field(default_factory=list)
    memory: list[tuple[Arena, Arena]] = field(default_factory=list)
    metrics: Metrics = field(default_factory=Metrics)

    async def front(self) -> RemoteScheduler:
        """Connect one more front, for at most 8 waiting sequences."""
        here, there = socket.socketpair()
        (asked, read), (answered, seen) = arenas(), arenas()
        settings = SchedulingSettings(max_queue_size=8)
        model = self.metrics.model("tiny", "1")
        made = RemoteScheduler("tiny", (asked, seen), LoadBoard(self.board), settings, MonotonicClock(), model)
        await self.host.attach(there, (answered, read))
        await made.open(here)
        self.fronts.append(made)
        self.memory.append((asked, answered))
        return made

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


async def test_an_engine_that_has_ended_fails_its_requests_and_refuses_new_ones(both: Both) -> None:
    front = await both.front()
    answer = asked(front, sequence())
    await until(lambda: both.waiting() == 1)
    both.host.close()
    with pytest.raises(NotServing, match="failed"):
        await answer
    with pytest.raises(NotServing, match="failed"):
        asked(front, sequence())


async def test_the_requests_of_a_front_that_has_ended_are_withdrawn_and_others_stay(both: Both) -> None:
    one, other = await both.front(), await both.front()
    lost, kept = asked(one, sequence()), asked(other, sequence())
    await until(lambda: both.waiting() == 2)
    one.close()
    await until(lambda: both.gate.withdrawn == 1)
    with pytest.raises(NotServing):
        await lost
    both.gate.release(1)
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
