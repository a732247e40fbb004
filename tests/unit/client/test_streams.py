"""Streams: order, chunks, limits, errors, and cleanup.

The fixtures `driver` and `driver_class` run a test with each client. `server` is a fake server, and `raw_server` is one
with methods of the test. A failing input gives an answer with its error; other errors end the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from attnserve.v1 import inference_service_pb2 as wire
from attnserve_client import (
    AsyncClient,
    AttentionSelection,
    Client,
    DeadlineExpired,
    InvalidRequest,
    ModelNotFound,
    RetryPolicy,
    ServerUnreachable,
)
from attnserve_client.testing import FakeServer


def response(name: str) -> wire.InferResponse:
    return wire.InferResponse(results=[wire.SequenceResult()], receipt=wire.Receipt(request_id=name))


async def test_every_input_is_answered_once_in_order(driver: Any) -> None:
    answers = await driver.stream("fake", [f"text {number}" for number in range(50)], max_in_flight=4)
    assert [answer.index for answer in answers] == list(range(50))
    assert len({answer.request_id for answer in answers}) == 50
    alone = await driver.infer("fake", "text 31")
    np.testing.assert_array_equal(answers[31].result.outputs["embedding"], alone.outputs["embedding"])


async def test_large_responses_are_joined_from_chunks(driver: Any, server: FakeServer) -> None:
    whole = await driver.infer("fake", "a longer text of several words", attention=True)
    (answer,) = await driver.stream("fake", ["a longer text of several words"], attention=True)
    assert whole.predicted_bytes > server.chunk_bytes, "the answer must need several pieces"
    for one, other in zip(answer.result.attention, whole.attention, strict=True):
        np.testing.assert_array_equal(one.weights, other.weights)


async def test_failed_input_leaves_the_others_answered(driver: Any) -> None:
    good, bad, last = await driver.stream("fake", ["good", "", [1, 2]])
    assert good.error is None
    assert last.result.outputs["embedding"].shape == (16,)
    assert isinstance(bad.error, InvalidRequest)
    assert bad.error.request_id == bad.request_id
    assert bad.error.violations[0].field == "sequences[0].text.text"
    with pytest.raises(InvalidRequest):
        _ = bad.result


async def test_unsendable_input_ends_the_stream_after_the_inputs_before_it(driver: Any, server: FakeServer) -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        await driver.stream("fake", ["good", "\ud800", "never sent"])
    assert [request.sequences[0].text.text for request in server.requests] == ["good"]


async def test_error_of_the_inputs_is_raised(driver: Any) -> None:
    def inputs() -> Iterator[str]:
        yield "good"
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await driver.stream("fake", inputs())


async def test_stream_without_a_server_raises_server_unreachable(driver: Any, server: FakeServer) -> None:
    server.stop()
    with pytest.raises(ServerUnreachable):
        await driver.stream("fake", ["text"])


async def test_stream_of_no_inputs_is_empty(driver: Any) -> None:
    assert await driver.stream("fake", []) == []


async def test_unknown_model_fails_each_input(driver: Any) -> None:
    answers = await driver.stream("other", ["a", "b"])
    assert [type(answer.error) for answer in answers] == [ModelNotFound, ModelNotFound]


async def test_max_in_flight_below_1_is_refused(driver: Any) -> None:
    with pytest.raises(InvalidRequest, match="max_in_flight"):
        await driver.stream("fake", ["a"], max_in_flight=0)


async def test_per_message_is_from_1_to_max_in_flight(driver: Any) -> None:
    with pytest.raises(InvalidRequest, match="4 exceeds max_in_flight, 3"):
        await driver.stream("fake", ["a"], max_in_flight=3, per_message=4)
    with pytest.raises(InvalidRequest, match="per_message"):
        await driver.stream("fake", ["a"], per_message=0)


@pytest.mark.parametrize("ordered", [True, False])
async def test_inputs_of_one_message_are_answered_separately(driver: Any, server: FakeServer, ordered: bool) -> None:
    texts = [f"text number {number}" for number in range(11)]
    alone = {answer.index: answer for answer in await driver.stream("fake", texts)}
    before = len(server.requests)
    together = await driver.stream("fake", texts, per_message=4, max_in_flight=8, ordered=ordered)
    assert sorted(answer.index for answer in together) == list(range(11))
    if ordered:
        assert [answer.index for answer in together] == list(range(11))
    for answer in together:
        expected = alone[answer.index].result.outputs["embedding"]
        np.testing.assert_array_equal(answer.result.outputs["embedding"], expected)
    assert [len(request.sequences) for request in server.requests[before:]] == [4, 4, 3]


async def test_refused_message_fails_its_inputs_alone(driver: Any, server: FakeServer) -> None:
    server.fail_next(server.overloaded())
    answers = await driver.stream("fake", [f"text {number}" for number in range(6)], per_message=3, max_in_flight=3)
    assert [answer.error is None for answer in answers] == [False] * 3 + [True] * 3
    assert [answer.index for answer in answers] == list(range(6))


@pytest.mark.parametrize("texts", [["one"], ["one", "two", "three"]], ids=["rest", "full"])
async def test_unencodable_message_ends_the_stream_with_its_error(driver: Any, texts: list[str]) -> None:
    with pytest.raises(InvalidRequest, match="head_reduction"):
        await driver.stream("fake", texts, attention=AttentionSelection(head_reduction="all"), per_message=2)


async def test_inputs_before_an_error_are_sent(driver: Any, server: FakeServer) -> None:
    def inputs() -> Iterator[str]:
        yield from ("one", "two", "three")
        raise RuntimeError("the file ended in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        await driver.stream("fake", inputs(), per_message=2)
    assert [len(request.sequences) for request in server.requests] == [2, 1]


async def test_inputs_are_taken_only_as_there_is_room(driver: Any) -> None:
    taken: list[int] = []

    def inputs() -> Iterator[str]:
        for number in range(100):
            taken.append(number)
            yield f"text {number}"

    answer = await driver.first("fake", inputs(), max_in_flight=3)
    assert answer.index == 0
    assert len(taken) <= 5, "three in flight, one more taken, and one more in the room of the first answer"


async def test_async_inputs_may_wait_for_answers(server: FakeServer) -> None:
    async with AsyncClient(server.target) as client:
        answered: asyncio.Queue[str] = asyncio.Queue()

        async def inputs() -> AsyncIterator[str]:
            yield "first"
            yield f"after {await answered.get()}"

        texts = []
        async for answer in client.stream("fake", inputs(), ordered=False):
            texts.append(answer.index)
            await answered.put("the first")
    assert texts == [0, 1]
    assert server.requests[-1].sequences[0].text.text == "after the first"


async def test_silent_server_raises_deadline_expired(driver_class: Any, raw_server: Any) -> None:
    def hang(request_iterator: Any, context: Any) -> Iterator[wire.StreamInferResponse]:
        gone = threading.Event()
        context.add_callback(gone.set)
        gone.wait()
        yield from ()

    with raw_server(StreamInfer=hang) as server:
        driver = driver_class(server.target)
        with pytest.raises(DeadlineExpired, match=r"no answer for 0\.35 s with 2 requests"):
            await driver.stream("fake", ["a", "b"], timeout=0.1)
        await driver.close()


async def test_stream_without_a_timeout_is_answered(driver: Any) -> None:
    assert len(await driver.stream("fake", ["a", "b"], timeout=None)) == 2


async def test_selection_is_sent_with_every_input(driver: Any, server: FakeServer) -> None:
    await driver.stream("fake", ["a", "b"], attention=AttentionSelection(top_k=2), outputs=[])
    assert [request.attention.top_k for request in server.requests] == [2, 2]


def answering_one(end: str) -> Any:
    """A `StreamInfer` that answers one request, or with "server" aborts the call instead."""

    def once(request_iterator: Any, context: Any) -> Iterator[wire.StreamInferResponse]:
        ended = threading.Event()
        context.add_callback(ended.set)
        request_id = next(request_iterator).request.request_id
        if end == "server":  # while the client waits for room to send the next request
            context.abort(grpc.StatusCode.UNAVAILABLE, "draining")
        yield wire.StreamInferResponse(request_id=request_id, response=response(request_id))
        ended.wait()

    return once


@pytest.mark.parametrize("end", ["server", "reader", "cancelled"])
async def test_ended_stream_leaves_no_task(raw_server: Any, end: str) -> None:
    async def read(client: AsyncClient) -> None:
        answers = client.stream("fake", ["answered", "never answered", "never sent"], max_in_flight=1)
        async for _ in answers:
            if end == "reader":
                await answers.aclose()  # type: ignore[attr-defined] # a generator
                return
            if end == "cancelled":
                reading.cancel()

    with raw_server(StreamInfer=answering_one(end)) as server:
        async with AsyncClient(server.target) as client:
            before = asyncio.all_tasks()
            reading = asyncio.create_task(read(client))
            await asyncio.wait({reading})
            assert reading.cancelled() == (end == "cancelled")
            assert isinstance(None if reading.cancelled() else reading.exception(), ServerUnreachable | None)
            async with asyncio.timeout(5):
                await asyncio.gather(*(asyncio.all_tasks() - before), return_exceptions=True)


@pytest.mark.parametrize("end", ["server", "reader"])
def test_ended_stream_leaves_no_thread(raw_server: Any, end: str) -> None:
    with raw_server(StreamInfer=answering_one(end)) as server, Client(server.target) as client:
        before = set(threading.enumerate())
        answers = client.stream("fake", ["answered", "never answered", "never sent"], max_in_flight=1)
        with contextlib.suppress(ServerUnreachable):
            next(answers)
        started = [each for each in threading.enumerate() if each not in before and "ThreadPool" not in each.name]
        assert started, "the stream has threads, besides the server's"
        answers.close()  # type: ignore[attr-defined] # a generator
        for thread in started:
            thread.join(5)
            assert not thread.is_alive(), thread.name


async def test_stream_that_is_answered_ends_the_avoidance_of_a_failed_connection(
    driver_class: Any, server: FakeServer
) -> None:
    driver = driver_class(server.target, connections=2)
    lanes = driver.client._connections.lanes
    failed = lanes.take()
    lanes.failed(failed, ServerUnreachable("Socket closed", code="UNAVAILABLE"))
    lanes.leave(failed)
    assert await driver.stream("fake", ["a"])
    assert failed.lane.misses == 1, "the stream took the other connection"
    failed.lane.avoided_until = 0.0
    assert await driver.stream("fake", ["a"])
    assert failed.lane.misses == 0
    await driver.close()


async def test_stream_that_stalls_makes_calls_avoid_its_connection(driver_class: Any, raw_server: Any) -> None:
    leave = threading.Event()

    def silent(requests: Any, context: Any) -> Any:
        leave.wait(20)
        yield from ()

    with raw_server(StreamInfer=silent) as server:
        driver = driver_class(server.target, connections=2, retry=RetryPolicy(wait_for_ready=False))
        with pytest.raises(DeadlineExpired):
            await driver.stream("fake", ["a"], timeout=0.05)
        lanes = driver.client._connections.lanes
        assert {lanes.take().lane.number for _ in range(3)} == {1}
        leave.set()
        await driver.close()
