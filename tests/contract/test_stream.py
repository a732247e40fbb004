"""Many requests on one stream: each is answered once, by its id, regardless of the others.

Needs the fixtures of tests/contract/conftest.py: a `server` and `channel` of the tiny model, and `gate`, which holds
each request until the test releases it. A test whose answer does not arrive fails with TimeoutError after 10 s.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import grpc
import numpy as np
import pytest
import structlog
from attnserve.v1 import attention_pb2
from attnserve.v1 import inference_service_pb2 as pb
from attnserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from attnserve_server.app import Application
from attnserve_server.domain.errors import Overloaded
from attnserve_server.transport import codec
from attnserve_server.transport import stream as stream_module
from gated import Gate, until
from google.rpc import status_pb2

MAX_IN_FLIGHT = 4  # as in the settings fixture


class Talk:
    """The caller's side of one stream."""

    def __init__(self, channel: grpc.aio.Channel, timeout: float | None = None) -> None:
        self.call = InferenceServiceStub(channel).StreamInfer(timeout=timeout)

    async def send(self, request_id: str, text: str = "the cat", timeout_ms: int = 0, **fields: object) -> None:
        sequence = pb.Sequence(text=pb.TextInput(text=text))
        request = pb.InferRequest(model="tiny", sequences=[sequence], request_id=request_id, **fields)
        await self.call.write(pb.StreamInferRequest(request=request, timeout_ms=timeout_ms))

    async def cancel(self, request_id: str) -> None:
        await self.call.write(pb.StreamInferRequest(cancel_request_id=request_id))

    async def read(self) -> pb.StreamInferResponse:
        async with asyncio.timeout(10):
            answer = await self.call.read()
        assert answer is not grpc.aio.EOF
        return answer

    async def ended(self) -> grpc.StatusCode:
        async with asyncio.timeout(10):
            code = await self.call.code()
        assert isinstance(code, grpc.StatusCode)
        return code


@pytest.fixture
def talk_of(channel: grpc.aio.Channel) -> Callable[..., Talk]:
    return lambda **fields: Talk(channel, **fields)


@pytest.fixture
def talk(channel: grpc.aio.Channel) -> Talk:
    return Talk(channel)


def failure(answer: pb.StreamInferResponse) -> tuple[str, int, str]:
    assert answer.WhichOneof("message") == "status"
    status = status_pb2.Status.FromString(answer.status)
    return answer.request_id, status.code, status.message


async def test_each_answer_of_a_stream_has_its_timings(talk: Talk) -> None:
    await talk.send("plain")
    plain = await talk.read()
    await talk.send("weighed", attention=attention_pb2.AttentionSelection())
    weighed = await talk.read()
    timings = [one.response.receipt.timings for one in (plain, weighed)]
    assert all(one.queue_seconds > 0 and one.compute_seconds > 0 and one.encode_seconds > 0 for one in timings)
    assert timings[0].attention_seconds == 0 < timings[1].attention_seconds


async def test_every_request_is_answered_once_by_its_id(talk: Talk) -> None:
    names = [f"r{number}" for number in range(50)]

    async def ask_all() -> None:
        for name in names:
            await talk.send(name)
        await talk.call.done_writing()

    asking = asyncio.create_task(ask_all())
    answers = [answer async for answer in talk.call]
    await asking
    assert sorted(answer.request_id for answer in answers) == sorted(names)
    for answer in answers:
        assert answer.response.receipt.request_id == answer.request_id
        assert len(answer.response.results) == 1
    assert await talk.ended() is grpc.StatusCode.OK


async def test_answers_are_sent_as_they_become_ready(talk: Talk, gate: Gate) -> None:
    for name in ("slow", "fast"):
        await talk.send(name)
    await until(lambda: len(gate.waiting) == 2)
    gate.release(1)
    assert (await talk.read()).request_id == "fast"
    gate.release(0)
    assert (await talk.read()).request_id == "slow"


async def test_a_failed_request_leaves_the_others_unaffected(talk: Talk) -> None:
    await talk.send("bad", text="")
    assert failure(await talk.read()) == ("bad", 3, "sequences[0].text.text: empty: at least 1 character is needed")
    await talk.send("good")
    assert (await talk.read()).response.results


async def test_overload_is_reported_in_the_requests_own_status(talk: Talk, gate: Gate) -> None:
    await talk.send("a")
    await until(lambda: bool(gate.waiting))
    gate.release(error=Overloaded("queue_full", 1, 2, 0.5))
    request_id, code, _ = failure(await talk.read())
    assert (request_id, code) == ("a", grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])


async def test_a_cancelled_request_is_answered_with_cancelled_and_withdrawn(talk: Talk, gate: Gate) -> None:
    for name in ("stays", "goes"):
        await talk.send(name)
    await until(lambda: len(gate.waiting) == 2)
    await talk.cancel("goes")
    assert failure(await talk.read()) == ("goes", 1, "cancelled by the caller")
    assert gate.withdrawn == 1
    gate.release(0)
    assert (await talk.read()).request_id == "stays"


async def test_a_request_cancelled_at_once_is_still_answered(talk: Talk, gate: Gate) -> None:
    await talk.send("goes")
    await talk.cancel("goes")
    assert failure(await talk.read())[:2] == ("goes", 1)


async def test_cancelling_an_unknown_id_has_no_effect(talk: Talk) -> None:
    await talk.cancel("unknown")
    await talk.send("a")
    assert (await talk.read()).request_id == "a"


async def test_an_id_may_be_used_again_after_its_answer(talk: Talk) -> None:
    for _ in range(2):
        await talk.send("a")
        assert (await talk.read()).response.results


async def test_an_id_in_use_is_refused_and_the_first_request_continues(talk: Talk, gate: Gate) -> None:
    await talk.send("a")
    await until(lambda: bool(gate.waiting))
    await talk.send("a")
    assert failure(await talk.read()) == ("a", 3, "request_id: 'a' is the id of an unanswered request")
    gate.release()
    assert (await talk.read()).response.results


@pytest.mark.parametrize(
    "message",
    [
        pb.StreamInferRequest(),
        pb.StreamInferRequest(request=pb.InferRequest(model="tiny")),
        pb.StreamInferRequest(request=pb.InferRequest(model="tiny", request_id="a\nb")),
    ],
    ids=["neither set", "no name", "a name that may not be echoed"],
)
async def test_a_message_that_cannot_be_answered_ends_the_stream(
    talk: Talk, gate: Gate, message: pb.StreamInferRequest
) -> None:
    await talk.send("a")
    await until(lambda: bool(gate.waiting))
    await talk.call.write(message)
    assert await talk.ended() is grpc.StatusCode.INVALID_ARGUMENT
    await until(lambda: gate.withdrawn == 1)


async def test_bytes_that_are_no_message_end_the_stream_with_invalid_argument(channel: grpc.aio.Channel) -> None:
    call = channel.stream_stream("/attnserve.v1.InferenceService/StreamInfer")()
    await call.write(b"\xff\xff")
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_broken_utf8_fails_only_its_request(channel: grpc.aio.Channel) -> None:
    call = channel.stream_stream("/attnserve.v1.InferenceService/StreamInfer")()
    sequence = pb.Sequence(text=pb.TextInput(text="MARK"))
    request = pb.InferRequest(model="tiny", sequences=[sequence], request_id="bad")
    data = pb.StreamInferRequest(request=request).SerializeToString()
    await call.write(data.replace(b"MARK", b"MA\xffK"))
    answer = pb.StreamInferResponse.FromString(await call.read())
    assert failure(answer) == ("bad", 3, "sequences[0].text.text: not UTF-8: byte 2 is 0xff")
    await call.write(data)
    assert pb.StreamInferResponse.FromString(await call.read()).response.results


async def test_broken_utf8_that_is_not_searched_for_fails_only_its_request(channel: grpc.aio.Channel) -> None:
    call = channel.stream_stream("/attnserve.v1.InferenceService/StreamInfer")()
    sequences = [pb.Sequence(text=pb.TextInput(text=text)) for text in ["a"] * 4095 + ["MARK"]]
    request = pb.InferRequest(model="tiny", sequences=sequences, request_id="bad")
    data = pb.StreamInferRequest(request=request).SerializeToString()
    await call.write(data.replace(b"MARK", b"MA\xffK"))
    request_id, code, _ = failure(pb.StreamInferResponse.FromString(await call.read()))
    assert (request_id, code) == ("bad", 3)
    good = pb.InferRequest(model="tiny", sequences=sequences[:1], request_id="good")
    await call.write(pb.StreamInferRequest(request=good).SerializeToString())
    assert pb.StreamInferResponse.FromString(await call.read()).response.results


async def test_a_message_of_too_much_structure_fails_only_its_request(talk: Talk) -> None:
    swollen = attention_pb2.AttentionSelection(heads=[0] * 2**20)
    await talk.send("bad", attention=swollen)
    request_id, code, message = failure(await talk.read())
    assert (request_id, code) == ("bad", 3)
    assert message.startswith("attention.heads: over 524288 of the message's ")
    await talk.send("good")
    assert (await talk.read()).response.results


async def test_a_request_expires_while_it_waits_to_be_prepared(talk: Talk, gate: Gate, server: Application) -> None:
    busy = threading.Event()
    server.plane._preparing.submit(busy.wait)
    try:
        await talk.send("late", text="a" + " " * 10_000, timeout_ms=20)
        assert failure(await talk.read())[:2] == ("late", grpc.StatusCode.DEADLINE_EXCEEDED.value[0])
        assert not busy.is_set()
    finally:
        busy.set()
    assert gate.deadlines == []


async def test_a_request_expires_while_every_slot_is_taken(talk: Talk, gate: Gate) -> None:
    for number in range(MAX_IN_FLIGHT):
        await talk.send(str(number))
    await talk.send("late", timeout_ms=20)
    assert failure(await talk.read())[:2] == ("late", grpc.StatusCode.DEADLINE_EXCEEDED.value[0])
    await talk.send("next")
    gate.open()
    answered = {(await talk.read()).request_id for _ in range(MAX_IN_FLIGHT + 1)}
    assert answered == {*map(str, range(MAX_IN_FLIGHT)), "next"}


async def test_a_requests_own_timeout_is_its_deadline(talk: Talk, gate: Gate, server: Application) -> None:
    before = server.clock.now()
    await talk.send("a", timeout_ms=60_000)
    await talk.send("b")
    await until(lambda: len(gate.waiting) == 2)
    first, second = gate.deadlines
    assert first is not None
    assert before + 60 <= first <= server.clock.now() + 60
    assert second is not None
    assert 0 <= second - before - server.settings.call_timeout_s < 5


async def test_the_streams_deadline_bounds_every_request(
    talk_of: Callable[..., Talk], gate: Gate, server: Application
) -> None:
    talk = talk_of(timeout=30.0)
    await talk.send("a", timeout_ms=60_000)
    await talk.send("b", timeout_ms=10_000)
    await until(lambda: len(gate.waiting) == 2)
    now = server.clock.now()
    assert [deadline is not None and deadline - now for deadline in gate.deadlines] == [
        pytest.approx(30, abs=5),
        pytest.approx(10, abs=5),
    ]


async def test_an_expired_request_is_answered_and_the_stream_goes_on(talk: Talk, server: Application) -> None:
    # A run of a thousand tokens takes longer than a millisecond only sometimes: either answer is right, and the stream
    # works afterwards.
    await talk.send("a", timeout_ms=1)
    answer = await talk.read()
    assert answer.WhichOneof("message") == "response" or failure(answer)[1] in (4, 8)
    await talk.send("b")
    assert (await talk.read()).response.results


async def test_closing_the_sending_half_lets_requests_finish(talk: Talk, gate: Gate) -> None:
    for name in ("a", "b"):
        await talk.send(name)
    await talk.call.done_writing()
    await until(lambda: len(gate.waiting) == 2)
    gate.open()
    assert {answer.request_id async for answer in talk.call} == {"a", "b"}
    assert await talk.ended() is grpc.StatusCode.OK


async def test_leaving_withdraws_all_requests(talk: Talk, gate: Gate) -> None:
    for name in ("a", "b", "c"):
        await talk.send(name)
    await until(lambda: len(gate.waiting) == 3)
    talk.call.cancel()
    await until(lambda: gate.withdrawn == 3)


async def test_requests_in_flight_are_bounded(talk: Talk, gate: Gate) -> None:
    names = [f"r{number}" for number in range(3 * MAX_IN_FLIGHT)]

    async def ask_all() -> None:
        for name in names:
            await talk.send(name)

    asking = asyncio.create_task(ask_all())
    answered = []
    for _ in names:
        await until(lambda: bool(gate.waiting))
        assert len(gate.waiting) <= MAX_IN_FLIGHT
        gate.release()
        answered.append((await talk.read()).request_id)
    await asking
    assert sorted(answered) == sorted(names)


async def test_a_stream_holds_no_more_answer_bytes_than_its_allowance(
    talk_of: Callable[..., Talk], gate: Gate, server: Application
) -> None:
    # An answer to two words is 4 rows and their mean, of 8 floats: 160 bytes. Room for two, and not for three.
    server.grpc._streams._settings = server.settings.model_copy(update={"max_stream_answer_bytes": 350})
    talk = talk_of()
    for name, timeout_ms in (("a", 0), ("b", 0), ("late", 50), ("c", 0)):
        await talk.send(name, timeout_ms=timeout_ms)
    assert failure(await talk.read())[:2] == ("late", grpc.StatusCode.DEADLINE_EXCEEDED.value[0])
    assert len(gate.waiting) == 2
    gate.release()
    assert (await talk.read()).request_id == "a"
    await until(lambda: len(gate.waiting) == 2)
    gate.open()
    assert {(await talk.read()).request_id, (await talk.read()).request_id} == {"b", "c"}


async def test_a_cancellation_is_read_while_every_slot_is_taken(talk: Talk, gate: Gate) -> None:
    for number in range(MAX_IN_FLIGHT):
        await talk.send(str(number))
    await until(lambda: len(gate.waiting) == MAX_IN_FLIGHT)
    await talk.cancel("0")
    assert failure(await talk.read())[:2] == ("0", 1)


async def test_a_large_answer_is_sent_in_chunks_with_small_answers_between(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "CHUNK_BYTES", 700)
    everything = attention_pb2.AttentionSelection()
    await talk.send("large", text="the cat sat on a mat", attention=everything)
    await talk.send("small", text="a", outputs=pb.OutputSelection(names=["embedding"]))
    pieces: list[pb.ResponseChunk] = []
    small = None
    while small is None or not pieces or len(pieces) < pieces[0].count:
        answer = await talk.read()
        if answer.request_id == "small":
            small = answer.response
        else:
            pieces.append(answer.chunk)
    assert [piece.index for piece in pieces] == list(range(pieces[0].count))
    assert {piece.count for piece in pieces} == {len(pieces)}
    assert all(len(piece.data) <= 700 for piece in pieces)
    whole = pb.InferResponse.FromString(b"".join(piece.data for piece in pieces))
    assert whole.receipt.request_id == "large"
    weights = whole.results[0].attention.maps[1].weights
    sums = np.frombuffer(weights.data, "<f4").reshape(weights.shape).sum(axis=-1)
    np.testing.assert_allclose(sums, 1, atol=1e-5)


async def test_leaving_during_an_answer_is_not_an_internal_error(
    talk_of: Callable[..., Talk], server: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "CHUNK_BYTES", 1)
    with structlog.testing.capture_logs() as logged:
        for _ in range(5):
            talk = talk_of()
            await talk.send("large", text="the cat sat on a mat", attention=attention_pb2.AttentionSelection())
            assert (await talk.read()).chunk.count > 1
            talk.call.cancel()
        await until(lambda: not server.grpc._streams._open)
    assert [line for line in logged if line["log_level"] == "error"] == []


async def test_a_stream_that_ends_during_its_first_answer_has_a_status(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = asyncio.Event()
    sending = stream_module.send

    async def cut_short(context: grpc.aio.ServicerContext, data: bytes) -> bool:
        task = asyncio.current_task()
        assert task is not None
        # In the next turn of the loop gRPC has the write and has not reported its end.
        asyncio.get_running_loop().call_soon(task.cancel)
        cut.set()
        return await sending(context, data)

    monkeypatch.setattr(stream_module, "send", cut_short)
    await talk.send("a")
    await cut.wait()
    await talk.call.write(pb.StreamInferRequest())
    # The caller gets the status once it has read what came before.
    assert (await talk.read()).request_id == "a"
    assert await talk.ended() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_second_cancellation_has_no_effect(talk: Talk, gate: Gate) -> None:
    await talk.send("a")
    await until(lambda: bool(gate.waiting))
    await talk.cancel("a")
    await talk.cancel("a")
    assert failure(await talk.read())[:2] == ("a", 1)
    await talk.send("b")
    await until(lambda: len(gate.waiting) == 2)
    gate.release(1)
    assert (await talk.read()).request_id == "b"


async def test_a_drain_answers_pending_requests_and_then_ends_the_stream(
    talk: Talk, gate: Gate, server: Application
) -> None:
    await talk.send("a")
    await until(lambda: bool(gate.waiting))
    draining = asyncio.create_task(server.drain())
    await until(lambda: not server.health.serving())
    gate.open()
    assert (await talk.read()).response.results
    assert await talk.ended() is grpc.StatusCode.UNAVAILABLE
    # The server's own message: gRPC's, after the whole grace, is another.
    assert await talk.call.details() == "the server is draining"
    await draining
