"""A message whose scan takes long is read beside the event loop, and all others on it."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from attnserve.v1 import inference_service_pb2 as pb
from attnserve.v1 import tensor_pb2
from attnserve_server.domain.errors import InvalidRequest
from attnserve_server.transport import servicer, wire
from attnserve_server.transport.servicer import QUICK_FIELDS, receive_aside
from attnserve_server.transport.wire import MAX_STRUCTURE_BYTES, ManyFields, receive


def request_of(sequences: int, size: int) -> pb.InferRequest:
    tensor = tensor_pb2.Tensor(name="input_ids", dtype=5, shape=[size // 8], data=bytes(size))
    return pb.InferRequest(sequences=[pb.Sequence(tensors=pb.TensorInput(tensors=[tensor]))] * sequences)


FEW, MANY = request_of(2, MAX_STRUCTURE_BYTES), request_of(4096, 512)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads that read messages."""
    found: list[str] = []

    def receive_here(*arguments: Any, **options: Any) -> Any:
        found.append(threading.current_thread().name)
        return receive(*arguments, **options)

    monkeypatch.setattr(servicer, "receive", receive_here)
    return found


async def test_message_of_few_fields_is_read_on_the_event_loop(threads: list[str]) -> None:
    received = await receive_aside(pb.InferRequest, FEW.SerializeToString())
    assert len(received.message.sequences) == 2
    assert threads == [threading.current_thread().name]


async def test_message_of_many_fields_is_read_in_a_thread(threads: list[str]) -> None:
    received = await receive_aside(pb.InferRequest, MANY.SerializeToString())
    assert len(received.message.sequences) == 4096
    assert threads == [threading.current_thread().name, "scan_0"]


async def test_event_loop_scans_few_fields_of_any_message(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, read, fields = threading.current_thread(), 0, wire.fields

    def counted(*arguments: Any) -> Any:
        nonlocal read
        for found in fields(*arguments):
            read += threading.current_thread() is loop
            yield found

    monkeypatch.setattr(wire, "fields", counted)
    data = pb.StreamInferRequest(request=MANY).SerializeToString()
    assert len((await receive_aside(pb.StreamInferRequest, data)).message.request.sequences) == 4096
    assert QUICK_FIELDS <= read <= QUICK_FIELDS + 1


async def test_several_long_scans_share_one_thread(threads: list[str]) -> None:
    data = MANY.SerializeToString()
    await asyncio.gather(*(receive_aside(pb.InferRequest, data) for _ in range(4)))
    assert set(threads) == {threading.current_thread().name, "scan_0"}


async def test_refusal_of_a_long_scan_reaches_its_caller() -> None:
    with pytest.raises(InvalidRequest, match="no text or tensor data"):
        await receive_aside(pb.InferRequest, b"\x1a\x00" * MAX_STRUCTURE_BYTES)


async def test_strings_that_are_not_utf8_are_searched_in_a_thread_where_there_are_many_fields(
    threads: list[str],
) -> None:
    short = b"\x1a\x00" * (QUICK_FIELDS + 1) + b"\x0a\x01\xff"  # empty sequences, and a model that is not UTF-8
    assert len(short) < MAX_STRUCTURE_BYTES
    with pytest.raises(InvalidRequest, match="model: not UTF-8"):
        await receive_aside(pb.InferRequest, short)
    assert threads == [threading.current_thread().name, "scan_0"]


async def test_a_long_scan_lets_other_threads_run(monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[str] = []
    monkeypatch.setattr(wire.time, "sleep", lambda _: rests.append(threading.current_thread().name))
    await receive_aside(pb.InferRequest, MANY.SerializeToString())
    assert set(rests) == {"scan_0"}
    assert len(rests) >= 4096 // 256


def test_scan_ends_at_its_limit_of_fields() -> None:
    with pytest.raises(ManyFields):
        receive(pb.InferRequest, MANY.SerializeToString(), 100)
