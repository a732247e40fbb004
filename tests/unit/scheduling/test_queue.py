"""A request passes through its states in order and ends once; the queue finds the nearest sequences in length.

Requests and runs are made by hand; no model runs. A change of state out of order raises AssertionError. The results of
a failed request raise its error.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from attnserve_server.domain.errors import InternalFault, RequestCancelled
from attnserve_server.domain.values import PreparedSequence, RunFacts, SequenceResult
from attnserve_server.engine.session import RunHandle
from attnserve_server.scheduling.policy import Candidate
from attnserve_server.scheduling.queue import Entry, Queue, Request, Run, State

RESULT = SequenceResult({}, None, RunFacts(1, 1, 1, 0.0, 0))


def admitted(count: int = 1) -> Request:
    request = Request("mine")
    request.admit(5.0)
    sequence = PreparedSequence({}, {}, ())
    request.entries += [Entry(request, at, at, sequence, Candidate(0.0, (1,)), 0) for at in range(count)]
    return request


def run_of(*entries: Entry) -> None:
    run = Run(RunHandle(), len(entries), len(entries))
    for entry in entries:
        entry.start(run)


async def test_a_request_is_answered_with_its_last_sequence() -> None:
    request = admitted(2)
    first, second = request.entries
    assert (request.state, request.arrived_s) == (State.ADMITTED, 5.0)
    run_of(second)
    assert (request.state, first.state, second.state) == (State.RUNNING, State.ADMITTED, State.RUNNING)
    second.answer(RESULT)
    assert not request.ended
    run_of(first)
    first.answer(RESULT)
    assert request.state is State.ANSWERED
    assert await request.results == [RESULT, RESULT]


async def test_a_request_ends_once() -> None:
    request = admitted()
    assert request.fail(InternalFault())
    assert not request.fail(RequestCancelled())
    with pytest.raises(InternalFault):
        await request.results
    run_of(*request.entries)
    with pytest.raises(AssertionError, match="FAILED cannot become ANSWERED"):
        request.entries[0].answer(RESULT)


@pytest.mark.parametrize("state", [State.ADMITTED, State.RUNNING, State.ANSWERED, State.FAILED])
async def test_a_request_is_admitted_only_when_received(state: State) -> None:
    request = Request()
    request.state = state
    with pytest.raises(AssertionError, match=f"{state.name} cannot become ADMITTED"):
        request.admit(0.0)


async def test_a_request_ends_when_its_waiting_task_is_cancelled() -> None:
    request = admitted()
    results = request.results
    waiting = asyncio.ensure_future(asyncio.wait_for(results, None))
    await asyncio.sleep(0)
    waiting.cancel()
    assert request.ended, "before the task has run again"
    assert request.state is State.ADMITTED
    request.fail(RequestCancelled())
    assert request.state is State.FAILED
    await asyncio.wait({waiting})


async def test_an_exception_that_leaves_the_block_fails_the_request() -> None:
    with pytest.raises(ValueError, match="wrong"), Request() as request:
        raise ValueError("wrong")
    assert request.state is State.FAILED
    with Request() as request:
        pass
    assert request.state is State.RECEIVED


def test_a_validated_request_is_answered_without_results() -> None:
    request = Request()
    request.answer()
    assert request.ended


def test_candidates_are_the_oldest_and_the_nearest_in_length() -> None:
    queue = Queue()
    lengths = [50, 10, 49, 90, 51, 52, 30]
    for number, length in enumerate(lengths):
        sequence = SimpleNamespace(tokens=length)
        queue.push(Entry(Request(), 0, number, sequence, Candidate(float(number), (length,)), 8))  # type: ignore[arg-type]
    found = queue.candidates(4)
    assert found[0].number == 0
    assert sorted(entry.candidate.tokens for entry in found) == [30, 49, 50, 51, 52]
    assert (queue.totals.sequences, queue.totals.tokens, queue.totals.bytes) == (7, sum(lengths), 7 * 8)
    for entry in found:
        queue.remove(entry)
    assert len(queue) == 2


def test_sequences_with_a_past_and_those_without_are_never_candidates_together() -> None:
    queue = Queue()
    for number, past in enumerate([0, 3, 0, 3, 0]):
        candidate = Candidate(float(number), (10 + past,), rigid=(-past,) if past else (), past=past)
        queue.push(Entry(Request(), 0, number, SimpleNamespace(tokens=10), candidate, 8))  # type: ignore[arg-type]
    oldest, *others = queue.candidates(8)
    assert (oldest.number, sorted(entry.number for entry in others)) == (0, [2, 4])
    for entry in (oldest, *others):
        queue.remove(entry)
    assert sorted(entry.number for entry in queue.candidates(8)) == [1, 3]
