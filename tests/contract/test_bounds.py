"""What callers can take is bounded: connections, calls, messages, unread answers and time. Each bound has a control."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from attnserve.v1 import attention_pb2
from attnserve.v1 import inference_service_pb2 as pb
from attnserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from attnserve_server.app import Application
from attnserve_server.config import Settings
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.transport import http, receiving
from attnserve_server.transport import server as grpc_server
from attnserve_server.transport.receiving import ReceiveBounds, ReceiveBudgetTooSmall, largest_request
from gated import Gate, until
from raw_http2 import SlowCaller
from relay import Relay
from serving import serve
from tiny_bundle import tiny_manifest

SEPARATE = [("grpc.use_local_subchannel_pool", 1)]
INFER = receiving.INFER


def asking(text: str = "the cat", **fields: Any) -> pb.InferRequest:
    return pb.InferRequest(model="tiny", sequences=[pb.Sequence(text=pb.TextInput(text=text))], **fields)


def large() -> pb.InferRequest:
    """A request whose answer has over 64 KiB: all maps of 32 sequences of the greatest length."""
    text = pb.Sequence(text=pb.TextInput(text="the cat sat on a mat and looked at the dog " * 2))
    return pb.InferRequest(model="tiny", sequences=[text] * 8, attention=attention_pb2.AttentionSelection())


@asynccontextmanager
async def started(settings: Settings, **changed: Any) -> AsyncIterator[Application]:
    application = Application(settings.model_copy(update=changed))
    await application.start()
    try:
        yield application
    finally:
        await application.aclose()


def closed_gate(server: Application) -> Gate:
    model = server.catalog.get("tiny", "2")
    assert model.manifest is not None
    gate = model.scheduler = Gate(model.manifest)
    return gate


async def code_of(call: Awaitable[Any]) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


# Time


async def test_a_call_and_a_message_without_a_deadline_end_after_the_call_timeout(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started(settings, call_timeout_s=0.3) as server:
        go = threading.Event()
        monkeypatch.setattr(RuntimeSession, "run", lambda *_, **__: go.wait(5))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            stub, began = InferenceServiceStub(channel), time.monotonic()
            stream = stub.StreamInfer()
            for request_id, timeout_ms in (("none", 0), ("own", 5_000)):
                request = asking(request_id=request_id)
                await stream.write(pb.StreamInferRequest(request=request, timeout_ms=timeout_ms))
            assert await code_of(stub.Infer(asking())) is grpc.StatusCode.DEADLINE_EXCEEDED
            assert 0.25 < time.monotonic() - began < 1.5
            expired = await stream.read()
            assert (expired.request_id, expired.WhichOneof("message")) == ("none", "status")
            call = stub.Infer(asking(), timeout=1.0)
            await asyncio.sleep(0.5)
            assert not call.done(), "the control: a deadline of the caller's own counts"
            call.cancel()
            stream.cancel()
            go.set()


@pytest.mark.parametrize(("timeout_ms", "freed"), [(500, True), (60_000, False)], ids=["bound", "control"])
async def test_the_state_of_a_dead_peer_is_freed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, timeout_ms: int, freed: bool
) -> None:
    monkeypatch.setattr(grpc_server, "PING_TIMEOUT_MS", timeout_ms)
    async with started(settings, keepalive_s=1.0) as server, Relay(server.grpc_port) as relay:
        gate = closed_gate(server)
        options = [*SEPARATE, ("grpc.keepalive_time_ms", 100_000)]
        async with grpc.aio.insecure_channel(relay.target, options=options) as channel:
            call = InferenceServiceStub(channel).Infer(asking())
            await until(lambda: bool(gate.waiting))
            relay.freeze()
            await asyncio.sleep(3)
            assert (gate.withdrawn == 1) is freed
            call.cancel()


# Connections and calls


@pytest.mark.parametrize(("most", "refused"), [(8, 6), (100, 0)], ids=["bound", "control"])
async def test_surplus_connections_end_and_those_that_were_there_stay(
    settings: Settings, most: int, refused: int
) -> None:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(started(settings, max_connections=most))

        async def connected() -> InferenceServiceStub:
            channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}", options=SEPARATE)
            stub = InferenceServiceStub(await stack.enter_async_context(channel))
            await stub.Infer(asking(), timeout=10)
            return stub

        first = [await connected() for _ in range(4)]
        with ExitStack() as idle:
            sockets = [idle.enter_context(SlowCaller(server.grpc_port)) for _ in range(10)]
            await until(lambda: sum(one.ended() for one in sockets) == refused)
            for stub in first:
                await stub.Infer(asking(), timeout=10)
            if refused:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await connected()
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await asyncio.sleep(0.5)
        await connected()


async def test_a_handshake_that_does_not_end_loses_its_connection(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_server, "HANDSHAKE_MS", 500)
    async with started(settings) as server:
        with socket.create_connection(("127.0.0.1", server.grpc_port)) as silent:
            await asyncio.sleep(0.2)
            assert not _ended(silent), "the control: it was accepted"
            await until(lambda: _ended(silent))


async def test_calls_of_one_connection_beyond_its_streams_wait_in_the_client(settings: Settings) -> None:
    async with started(settings, max_streams_per_connection=3) as server:
        gate = closed_gate(server)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}", options=SEPARATE) as channel:
            stub = InferenceServiceStub(channel)
            calls = [stub.Infer(asking(), timeout=10) for _ in range(8)]
            await until(lambda: len(gate.waiting) >= 3)
            await asyncio.sleep(0.2)
            assert len(gate.waiting) == 3
            gate.open()
            assert len(await asyncio.gather(*calls)) == 8


async def test_calls_and_streams_beyond_the_budget_are_refused_unread(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReceiveBounds, "of", lambda *_: ReceiveBounds(2**21, messages=4, streams=1, calls=3))
    async with started(settings) as server:
        gate = closed_gate(server)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}", options=SEPARATE) as channel:
            stub = InferenceServiceStub(channel)
            stream = stub.StreamInfer()
            await stream.write(pb.StreamInferRequest(request=asking(request_id="a")))
            await until(lambda: len(gate.waiting) == 1)
            other = stub.StreamInfer()
            assert await other.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            calls = [stub.Infer(asking(), timeout=10) for _ in range(2)]
            await until(lambda: len(gate.waiting) == 3)
            assert await code_of(stub.Infer(asking(), timeout=10)) is grpc.StatusCode.RESOURCE_EXHAUSTED
            calls[0].cancel()
            await until(lambda: gate.withdrawn == 1)
            gate.open()
            await stub.Infer(asking(), timeout=10)
            await calls[1]
            stream.cancel()


async def test_messages_that_do_not_arrive_lose_their_connection_and_others_are_served(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReceiveBounds, "of", lambda *_: ReceiveBounds(2**21, messages=4, streams=1, calls=100))
    monkeypatch.setattr(receiving, "ARRIVES_S", 0.5)
    message = asking().SerializeToString()
    async with started(settings) as server:
        with SlowCaller(server.grpc_port) as early, SlowCaller(server.grpc_port) as late:
            for caller in (early, early, late, late):
                caller.call(INFER, message, sent=4)
                await asyncio.sleep(0.05)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}", options=SEPARATE) as channel:
                call = InferenceServiceStub(channel).Infer(asking(), timeout=10)
                await asyncio.sleep(0.2)
                assert not call.done(), "the control: all places are taken"
                assert (await call).results
            await until(late.ended)


# Messages


def compressed_calls(target: str, count: int) -> set[grpc.StatusCode]:
    zeros = bytes(60 * 2**20)  # 60 KB on the wire
    with grpc.insecure_channel(target, options=[("grpc.max_send_message_length", -1)]) as channel:
        method = channel.unary_unary(INFER)
        calls = [method.future(zeros, compression=grpc.Compression.Gzip, timeout=30) for _ in range(count)]
        return {call.exception().code() for call in calls}


@pytest.mark.parametrize(
    ("flags", "most_bytes"),
    [((), 3 * 2**20), (("--accept-compression", "--max-request-bytes", str(64 * 2**20)), None)],
    ids=["bound", "control"],
)
def test_compressed_messages_are_refused_without_expanding_them(
    tiny_repository: Path, tmp_path: Path, flags: tuple[str, ...], most_bytes: int | None
) -> None:
    with serve(tiny_repository, tmp_path, "--models", "tiny/2", "--isolation", "none", *flags) as server:
        with grpc.insecure_channel(server.target) as channel:
            for _ in range(20):
                InferenceServiceStub(channel).Infer(asking(), timeout=20)
        process = psutil.Process(server.process.pid)
        before, peak, codes = process.memory_info().rss, 0, set()
        for _ in range(4):
            codes |= compressed_calls(server.target, 10)
            peak = max(peak, process.memory_info().rss)
        if most_bytes is not None:
            assert codes == {grpc.StatusCode.UNIMPLEMENTED}
            assert peak - before <= most_bytes
        else:
            assert codes == {grpc.StatusCode.RESOURCE_EXHAUSTED}, "expanded, and then over the limit of the models"


async def test_the_limit_of_a_message_is_that_of_the_models(settings: Settings) -> None:
    manifest = tiny_manifest()
    largest = largest_request(manifest, settings)
    assert largest < receiving.LEAST_MESSAGE
    wide = settings.model_copy(update={"max_text_bytes": 2**20})
    two_texts_and_tensors = 2 * 2**20 + 2 * 32 * 8
    assert largest_request(manifest, wide) == manifest.max_batch_size * two_texts_and_tensors + 2**19
    bounds = ReceiveBounds.of(wide, [(manifest, 0)])
    assert bounds.message == min(wide.max_request_bytes, largest_request(manifest, wide))
    assert bounds.why_too_large(manifest, wide) == ""
    small = ReceiveBounds.of(settings, [(manifest, 0)])
    assert f"model {manifest.name!r}" in small.why_too_large(manifest, wide)


@pytest.mark.parametrize("isolation", ["none", "process"])
async def test_a_budget_below_two_messages_is_refused_at_the_start(settings: Settings, isolation: str) -> None:
    from attnserve_server.processes.supervisor import Supervisor  # noqa: PLC0415 - one of two

    short = settings.model_copy(update={"receive_budget_bytes": 6 * 2**20, "isolation": isolation})
    server = (Application if isolation == "none" else Supervisor)(short)
    try:
        with pytest.raises(ReceiveBudgetTooSmall, match="--receive-budget-bytes is 6291456"):
            await server.start()
    finally:
        await server.aclose()


# Answers that are not read


@pytest.mark.parametrize(("timeout_s", "dropped"), [(0.5, True), (30.0, False)], ids=["bound", "control"])
async def test_a_caller_that_does_not_read_loses_its_connection(
    settings: Settings, timeout_s: float, dropped: bool
) -> None:
    async with started(settings, unread_timeout_s=timeout_s) as server:
        with SlowCaller(server.grpc_port) as unary, SlowCaller(server.grpc_port) as stream:
            for _ in range(4):
                unary.call(INFER, large().SerializeToString())
            asked = large()
            asked.request_id = "a"
            stream.call(receiving.STREAM, pb.StreamInferRequest(request=asked).SerializeToString())
            await until(lambda: server.grpc.unread.bytes > 4 * 65_536)
            await asyncio.sleep(1.5)
            assert (unary.ended(), stream.ended()) == (dropped, dropped)
            assert (server.grpc.unread.bytes == 0) is dropped


async def test_slow_readers_cost_a_caller_of_small_answers_nothing(settings: Settings) -> None:
    async with started(settings, unread_timeout_s=1.0, max_unread_bytes=2**20) as server:
        with ExitStack() as stack:
            slow = [stack.enter_context(SlowCaller(server.grpc_port)) for _ in range(40)]
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}", options=SEPARATE) as channel:
                stub, most = InferenceServiceStub(channel), 0
                for one in slow:
                    for _ in range(6):
                        one.call(INFER, large().SerializeToString())
                codes = []
                for _ in range(100):
                    codes.append(await code_of(stub.Infer(asking(), timeout=5)))
                    most = max(most, server.grpc.unread.bytes)
                    await asyncio.sleep(0.01)
            assert codes.count(grpc.StatusCode.OK) == 100
            assert 2**19 < most <= 2**20, "the control: the slow readers held what they may"
            await until(lambda: server.grpc.unread.bytes == 0)
        await until(lambda: not any(model.prepared for model in server.catalog.all()))


# HTTP


async def test_http_ends_connections_without_a_request_and_surplus_ones(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "HEAD_S", 0.5)
    monkeypatch.setattr(http, "MOST_CONNECTIONS", 3)
    async with started(settings) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.http_port)
        slow = [socket.create_connection(("127.0.0.1", server.http_port)) for _ in range(4)]
        try:
            for one in slow:
                one.sendall(b"GET /livez HTTP/1.1\r\n")
            writer.write(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            assert sum(_ended(one) for one in slow) == 2, "beyond three connections"
            await asyncio.sleep(0.8)
            assert all(map(_ended, slow))
        finally:
            writer.close()
            for one in slow:
                one.close()


def _ended(one: socket.socket) -> bool:
    one.setblocking(False)
    try:
        return one.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
