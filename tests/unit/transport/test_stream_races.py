"""Events on a stream within one turn of the event loop, which a network cannot reproduce.

`Wire` replaces the network, and the fixture `gate` the scheduler: it holds each request until the test releases it. A
test that waits for an event that never comes fails after a time limit of `until`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from attnserve.v1 import inference_service_pb2 as pb
from attnserve_server.config import Settings
from attnserve_server.domain.clock import MonotonicClock
from attnserve_server.domain.errors import InvalidRequest, NotServing
from attnserve_server.model.tokenizer import TextTokenizer
from attnserve_server.observability.metrics import Metrics
from attnserve_server.scheduling.catalog import Catalog, ModelState, ServedModel
from attnserve_server.transport.dataplane import DataPlane
from attnserve_server.transport.rpc import Streams
from attnserve_server.transport.stream import InferStream
from attnserve_server.transport.unread import Unread
from gated import Gate, until
from google.rpc import status_pb2
from tiny_bundle import tiny_manifest, tiny_tokenizer


class Wire:
    """The server's side of a stream whose messages have all arrived."""

    def __init__(self, *messages: pb.StreamInferRequest, closed: bool = True) -> None:
        self.incoming = [message.SerializeToString() for message in messages]
        self.sent: list[pb.StreamInferResponse] = []
        self.closed = closed
        self.peer = lambda: "ipv4:127.0.0.1:1"
        self.more = asyncio.Event()
        self.on_send: Callable[[pb.StreamInferResponse], None] = lambda answer: None

    def arrive(self, *messages: pb.StreamInferRequest) -> None:
        self.incoming += [message.SerializeToString() for message in messages]
        self.more.set()

    async def read(self) -> object:
        while not self.incoming and not self.closed:
            self.more.clear()
            await self.more.wait()
        return self.incoming.pop(0) if self.incoming else grpc.aio.EOF

    async def send_initial_metadata(self, _: object) -> None:
        pass

    async def write(self, data: bytes) -> None:
        self.sent.append(pb.StreamInferResponse.FromString(data))
        self.on_send(self.sent[-1])
        await asyncio.sleep(0)  # the caller's next message may be read before the writer goes on

    def time_remaining(self) -> None:
        return None


@pytest.fixture
def gate() -> Gate:
    return Gate(tiny_manifest())


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def streams(gate: Gate, metrics: Metrics) -> Streams:
    settings = Settings(repository=Path("none"))
    catalog = Catalog()
    model = ServedModel("tiny", "1", metrics.model("tiny", "1"), gate.manifest, scheduler=gate)
    model.tokenizer = TextTokenizer(tiny_tokenizer(), "seq")
    model.move(ModelState.READY)
    catalog.add(model)
    clock = MonotonicClock()
    unread = Unread(2**20, 20.0, clock, lambda *_: None)
    return Streams(InferStream, DataPlane(catalog, settings, clock), clock, settings, unread)


def asking(request_id: str) -> pb.StreamInferRequest:
    sequence = pb.Sequence(text=pb.TextInput(text="the cat"))
    return pb.StreamInferRequest(request=pb.InferRequest(model="tiny", sequences=[sequence], request_id=request_id))


async def test_a_request_cancelled_by_the_next_message_is_answered_and_withdrawn(streams: Streams, gate: Gate) -> None:
    wire = Wire(asking("a"), pb.StreamInferRequest(cancel_request_id="a"))
    await streams.stream_infer(None, wire)  # type: ignore[arg-type]
    (answer,) = wire.sent
    assert answer.request_id == "a"
    assert status_pb2.Status.FromString(answer.status).code == grpc.StatusCode.CANCELLED.value[0]
    assert gate.withdrawn == 1


async def test_a_request_cancelled_as_its_stream_ends_is_withdrawn_once(streams: Streams, gate: Gate) -> None:
    wire = Wire(asking("a"), closed=False)
    serving = asyncio.create_task(streams.stream_infer(None, wire))  # type: ignore[arg-type]
    await until(lambda: bool(gate.waiting))
    wire.arrive(pb.StreamInferRequest(cancel_request_id="a"), pb.StreamInferRequest())
    with pytest.raises(InvalidRequest):
        await serving
    assert {status_pb2.Status.FromString(answer.status).code for answer in wire.sent} <= {1}, "CANCELLED, if any"
    assert gate.withdrawn == 1


async def test_a_drain_while_a_message_waits_for_a_slot_ends_the_stream(streams: Streams, gate: Gate) -> None:
    streams._settings = streams._settings.model_copy(update={"max_stream_in_flight": 1})
    wire = Wire(asking("a"), asking("b"), closed=False)
    serving = asyncio.create_task(streams.stream_infer(None, wire))  # type: ignore[arg-type]
    await until(lambda: bool(gate.waiting))
    streams.drain()
    gate.open()
    with pytest.raises(NotServing, match="the server is draining"):
        await serving
    assert [answer.request_id for answer in wire.sent][:1] == ["a"]


async def test_a_request_cancelled_while_it_waits_for_its_allowance_is_not_submitted(
    streams: Streams, gate: Gate, metrics: Metrics
) -> None:
    streams._settings = streams._settings.model_copy(update={"max_stream_answer_bytes": 1})
    wire = Wire(asking("a"), asking("b"), closed=False)
    serving = asyncio.create_task(streams.stream_infer(None, wire))  # type: ignore[arg-type]
    await until(lambda: bool(gate.waiting))
    wire.arrive(pb.StreamInferRequest(cancel_request_id="b"))
    await until(lambda: bool(wire.sent))
    assert wire.sent[0].request_id == "b"
    assert status_pb2.Status.FromString(wire.sent[0].status).code == grpc.StatusCode.CANCELLED.value[0]
    gate.open()
    wire.closed = True
    wire.arrive()
    await serving
    assert wire.sent[1].request_id == "a"
    assert wire.sent[1].response.results
    assert len(gate.deadlines) == 1
    labels = {"model": "tiny", "version": "1"}
    counts = [
        metrics.registry.get_sample_value("attnserve_requests_total", {**labels, "code": code})
        for code in ("OK", "CANCELLED")
    ]
    assert counts == [1, 1]


async def test_a_cancellation_after_the_results_has_no_effect(streams: Streams, gate: Gate) -> None:
    wire = Wire(asking("a"), closed=False)
    serving = asyncio.create_task(streams.stream_infer(None, wire))  # type: ignore[arg-type]
    await until(lambda: bool(gate.waiting))
    wire.closed = True
    wire.arrive(pb.StreamInferRequest(cancel_request_id="a"))
    gate.release()  # in the same turn of the loop, and before the cancellation is read
    await serving
    (answer,) = wire.sent
    assert answer.response.results


async def test_an_id_may_be_used_again_as_soon_as_its_answer_is_sent(streams: Streams, gate: Gate) -> None:
    gate.open()
    wire = Wire(asking("a"), asking("b"), closed=False)
    wire.on_send = lambda answer: wire.arrive(asking(answer.request_id)) if len(wire.sent) <= 4 else None
    serving = asyncio.create_task(streams.stream_infer(None, wire))  # type: ignore[arg-type]
    await until(lambda: len(wire.sent) == 6)
    wire.closed = True
    wire.arrive()
    await serving
    assert [answer.request_id for answer in wire.sent] == ["a", "b"] * 3
    assert all(answer.response.results for answer in wire.sent), "none was refused"
