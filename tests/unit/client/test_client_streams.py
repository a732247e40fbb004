"""Streams: answers matched by id, in order or as they are ready, in pieces, and what happens when something breaks."""

from __future__ import annotations

import asyncio
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
    ServerUnreachable,
)
from attnserve_client._exchange import Exchange
from attnserve_client.errors import BadAnswer
from attnserve_client.testing import FakeServer


async def test_every_input_is_answered_once_and_in_order(driver: Any) -> None:
    answers = await driver.stream("fake", [f"text {number}" for number in range(50)], max_in_flight=4)
    assert [answer.index for answer in answers] == list(range(50))
    assert len({answer.request_id for answer in answers}) == 50
    alone = await driver.infer("fake", "text 31")
    np.testing.assert_array_equal(answers[31].result.outputs["embedding"], alone.outputs["embedding"])


async def test_large_answers_are_joined_from_their_pieces(driver: Any, server: FakeServer) -> None:
    whole = await driver.infer("fake", "a longer text of several words", attention=True)
    (answer,) = await driver.stream("fake", ["a longer text of several words"], attention=True)
    assert whole.predicted_bytes > server.chunk_bytes, "the answer must need several pieces"
    for one, other in zip(answer.result.attention, whole.attention, strict=True):
        np.testing.assert_array_equal(one.weights, other.weights)


async def test_one_inputs_failure_leaves_the_others(driver: Any) -> None:
    good, bad, last = await driver.stream("fake", ["good", "", [1, 2]])
    assert good.error is None
    assert last.result.outputs["embedding"].shape == (16,)
    assert isinstance(bad.error, InvalidRequest)
    assert bad.error.request_id == bad.request_id
    assert bad.error.violations[0].field == "text"
    with pytest.raises(InvalidRequest):
        _ = bad.result


async def test_input_that_cannot_be_sent_ends_the_stream_after_the_others(driver: Any, server: FakeServer) -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        await driver.stream("fake", ["good", "\ud800", "never sent"])
    assert [request.sequences[0].text.text for request in server.requests] == ["good"]


async def test_what_the_inputs_raise_is_raised(driver: Any) -> None:
    def inputs() -> Iterator[str]:
        yield "good"
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await driver.stream("fake", inputs())


async def test_broken_stream_is_told(driver: Any, server: FakeServer) -> None:
    server.stop()
    with pytest.raises(ServerUnreachable):
        await driver.stream("fake", ["text"])


async def test_no_inputs_give_no_answers(driver: Any) -> None:
    assert await driver.stream("fake", []) == []


async def test_unknown_model_fails_each_input(driver: Any) -> None:
    answers = await driver.stream("other", ["a", "b"])
    assert [type(answer.error) for answer in answers] == [ModelNotFound, ModelNotFound]


async def test_room_for_nobody_is_refused(driver: Any) -> None:
    with pytest.raises(InvalidRequest, match="max_in_flight"):
        await driver.stream("fake", ["a"], max_in_flight=0)


async def test_message_may_not_hold_more_than_may_be_under_way(driver: Any) -> None:
    with pytest.raises(InvalidRequest, match="4 exceeds max_in_flight, 3"):
        await driver.stream("fake", ["a"], max_in_flight=3, per_message=4)
    with pytest.raises(InvalidRequest, match="per_message"):
        await driver.stream("fake", ["a"], per_message=0)


@pytest.mark.parametrize("ordered", [True, False])
async def test_inputs_that_travel_together_are_answered_each_for_itself(
    driver: Any, server: FakeServer, ordered: bool
) -> None:
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


async def test_refused_message_is_the_end_of_all_its_inputs_and_of_no_others(driver: Any, server: FakeServer) -> None:
    server.fail_next(server.overloaded())
    answers = await driver.stream("fake", [f"text {number}" for number in range(6)], per_message=3, max_in_flight=3)
    assert [answer.error is None for answer in answers] == [False] * 3 + [True] * 3
    assert [answer.index for answer in answers] == list(range(6))


@pytest.mark.parametrize("texts", [["one"], ["one", "two", "three"]], ids=["rest", "full"])
async def test_message_that_cannot_be_made_ends_the_stream_with_its_fault(driver: Any, texts: list[str]) -> None:
    with pytest.raises(InvalidRequest, match="head_reduction"):
        await driver.stream("fake", texts, attention=AttentionSelection(head_reduction="all"), per_message=2)


async def test_what_came_before_a_fault_of_the_inputs_is_sent(driver: Any, server: FakeServer) -> None:
    def inputs() -> Iterator[str]:
        yield from ("one", "two", "three")
        raise RuntimeError("the file ended in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        await driver.stream("fake", inputs(), per_message=2)
    assert [len(request.sequences) for request in server.requests] == [2, 1]


async def test_timeout_is_sent_with_each_request_and_never_as_none() -> None:
    request = wire.InferRequest(model="m")
    assert Exchange(2.5, validate_only=False).open(request).timeout_ms == 2500
    assert Exchange(0.0001, validate_only=False).open(request).timeout_ms == 1
    assert Exchange(None, validate_only=False).open(request).timeout_ms == 0
    assert Exchange(1e9, validate_only=False).open(request).timeout_ms == 2**32 - 1


def test_inputs_are_taken_only_as_there_is_room(server: FakeServer) -> None:
    taken: list[int] = []

    def inputs() -> Iterator[str]:
        for number in range(100):
            taken.append(number)
            yield f"text {number}"

    with Client(server.target) as client:
        answers = client.stream("fake", inputs(), max_in_flight=3)
        next(answers)
        assert len(taken) <= 4
        answers.close()  # type: ignore[attr-defined] # a generator
    assert len(taken) <= 5


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


def response(name: str) -> wire.InferResponse:
    return wire.InferResponse(results=[wire.SequenceResult()], receipt=wire.Receipt(request_id=name))


def opened(count: int) -> tuple[Exchange, list[str]]:
    exchange = Exchange(None, validate_only=False)
    return exchange, [
        exchange.open(wire.InferRequest(sequences=[wire.Sequence()])).request.request_id for _ in range(count)
    ]


def pieces(name: str, count: int) -> list[wire.StreamInferResponse]:
    data = response(name).SerializeToString()
    cuts = [len(data) * part // count for part in range(count + 1)]
    return [
        wire.StreamInferResponse(
            request_id=name, chunk=wire.ResponseChunk(index=part, count=count, data=data[cuts[part] : cuts[part + 1]])
        )
        for part in range(count)
    ]


def test_pieces_of_different_answers_may_interleave() -> None:
    exchange, (one, other) = opened(2)
    first, second = pieces(one, 3), pieces(other, 2)
    order = [first[0], second[0], first[1], second[1], first[2]]
    came = [answer.index for message in order for answer in exchange.take(message)]
    assert came == [1, 0]
    exchange.check_done()


@pytest.mark.parametrize("broken", ["order", "nobody", "twice", "empty", "garbage", "count"])
def test_answers_that_do_not_fit_break_the_stream(broken: str) -> None:
    exchange, (one,) = opened(1)
    first, second = pieces(one, 2)
    messages = {
        "order": [second],
        "nobody": [wire.StreamInferResponse(request_id="other", response=response("other"))],
        "twice": [wire.StreamInferResponse(request_id=one, response=response(one))] * 2,
        "empty": [wire.StreamInferResponse(request_id=one)],
        "garbage": [
            first,
            wire.StreamInferResponse(request_id=one, chunk=wire.ResponseChunk(index=1, count=2, data=b"\xff\xff")),
        ],
        "count": [wire.StreamInferResponse(request_id=one, chunk=wire.ResponseChunk(index=0, count=0))],
    }[broken]
    *fine, last = messages
    for message in fine:
        exchange.take(message)
    with pytest.raises(BadAnswer):
        exchange.take(last)


def test_stream_that_ends_too_early_is_told() -> None:
    exchange, _ = opened(2)
    assert exchange.pending == 2
    with pytest.raises(BadAnswer, match="2 requests unanswered"):
        exchange.check_done()


def test_stall_is_counted_only_while_somebody_waits_for_an_answer() -> None:
    now = [100.0]
    exchange = Exchange(1.0, validate_only=False, clock=lambda: now[0])
    assert exchange.patience_s == 1.25
    exchange.reading()
    now[0] += 60.0
    assert exchange.stalled_in_s(1.25) == 1.25, "nothing is under way"
    request_id = exchange.open(wire.InferRequest(sequences=[wire.Sequence()])).request.request_id
    exchange.open(wire.InferRequest(sequences=[wire.Sequence()]))
    now[0] += 1.0
    assert exchange.stalled_in_s(1.25) == pytest.approx(0.25)
    exchange.take(wire.StreamInferResponse(request_id=request_id, response=response(request_id)))
    now[0] += 60.0
    assert exchange.stalled_in_s(1.25) == 1.25, "the reader is busy with what came"
    exchange.reading()
    now[0] += 2.0
    assert exchange.stalled_in_s(1.25) < 0


async def test_server_that_says_nothing_any_more_does_not_hold_the_stream(driver_class: Any, raw_server: Any) -> None:
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


async def test_stream_without_a_timeout_is_never_cut(driver: Any) -> None:
    assert len(await driver.stream("fake", ["a", "b"], timeout=None)) == 2


async def test_attention_selection_goes_with_every_input(driver: Any, server: FakeServer) -> None:
    await driver.stream("fake", ["a", "b"], attention=AttentionSelection(top_k=2), outputs=[])
    assert [request.attention.top_k for request in server.requests] == [2, 2]


@pytest.mark.parametrize("end", ["server", "reader", "cancelled"])
async def test_nothing_of_a_stream_that_ended_stays_behind(raw_server: Any, end: str) -> None:
    def once(request_iterator: Any, context: Any) -> Iterator[wire.StreamInferResponse]:
        gone = threading.Event()
        context.add_callback(gone.set)
        request_id = next(request_iterator).request.request_id
        if end == "server":  # while the client waits for room to send the next one
            context.abort(grpc.StatusCode.UNAVAILABLE, "draining")
        yield wire.StreamInferResponse(request_id=request_id, response=response(request_id))
        gone.wait()

    async def read(client: AsyncClient) -> None:
        answers = client.stream("fake", ["answered", "never answered", "never sent"], max_in_flight=1)
        async for _ in answers:
            if end == "reader":
                await answers.aclose()  # type: ignore[attr-defined] # a generator
                return
            if end == "cancelled":
                reading.cancel()

    with raw_server(StreamInfer=once) as server:
        async with AsyncClient(server.target) as client:
            before = asyncio.all_tasks()
            reading = asyncio.create_task(read(client))
            await asyncio.wait({reading})
            assert reading.cancelled() == (end == "cancelled")
            assert isinstance(None if reading.cancelled() else reading.exception(), ServerUnreachable | None)
            async with asyncio.timeout(5):
                await asyncio.gather(*(asyncio.all_tasks() - before), return_exceptions=True)
