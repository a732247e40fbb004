"""What callers of the REST port can take is bounded: answers that they do not read, by age and by bytes; and its end.

Needs the fixtures of tests/contract/conftest.py.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any

import pytest
from attnserve_server.app import Application
from attnserve_server.config import Settings
from gated import Gate, until
from http_calls import call, head

INFER = "/v2/models/tiny/infer"
TEXT = "the cat sat on a mat and looked at the dog " * 2
SMALL = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["the cat"]}]}
LARGE = {
    "inputs": [{"name": "text", "shape": [8], "datatype": "BYTES", "data": [TEXT] * 8}],
    "outputs": [{"name": "attention:0"}, {"name": "attention:1"}],
}
"""All maps of eight texts; the answer holds about 800 KB of the memory for unread answers."""
REQUESTS = 40
"""On one connection, so that the answers are longer than what the system buffers."""


@asynccontextmanager
async def started(settings: Settings, **changed: Any) -> AsyncIterator[Application]:
    application = Application(settings.model_copy(update=changed))
    await application.start()
    try:
        yield application
    finally:
        await application.aclose()


@contextmanager
def slow_caller(port: int) -> Iterator[socket.socket]:
    """A connection that has sent requests and reads no answer."""
    body = json.dumps(LARGE).encode()
    fields = {"host": "a", "content-type": "application/json", "content-length": str(len(body))}
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.connect(("127.0.0.1", port))
        one.sendall((head("POST", INFER, fields) + body) * REQUESTS)
        yield one


def ended(one: socket.socket) -> bool:
    """Whether the server ended the connection; reads what has arrived."""
    one.setblocking(False)
    try:
        while one.recv(65_536):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


@pytest.mark.parametrize(("timeout_s", "dropped"), [(0.5, True), (30.0, False)], ids=["bound", "control"])
async def test_a_caller_that_does_not_read_loses_its_connection(
    settings: Settings, timeout_s: float, dropped: bool
) -> None:
    async with started(settings, unread_timeout_s=timeout_s) as server:
        with slow_caller(server.rest_port) as slow:
            await until(lambda: server.grpc.unread.bytes > 4 * 65_536)
            await asyncio.sleep(2)
            assert (server.grpc.unread.bytes == 0) is dropped
            assert ended(slow) is dropped


async def test_slow_readers_cost_a_caller_of_small_answers_nothing(settings: Settings) -> None:
    async with started(settings, unread_timeout_s=30.0, max_unread_bytes=2**21) as server:
        with ExitStack() as stack:
            for _ in range(6):
                stack.enter_context(slow_caller(server.rest_port))
            await until(lambda: server.grpc.unread.bytes > 2**20)
            statuses = []
            most = 0
            for _ in range(30):
                statuses.append((await call(server.rest_port, "POST", INFER, SMALL)).status)
                most = max(most, server.grpc.unread.bytes)
            refused = await call(server.rest_port, "POST", INFER, LARGE)
            assert statuses == [200] * 30
            assert most <= 2**21
            assert (refused.status, refused.json["reason"], refused.headers["retry-after"]) == (429, "OVERLOADED", "1")
        await until(lambda: server.grpc.unread.bytes == 0)
        assert (await call(server.rest_port, "POST", INFER, LARGE)).status == 200, "the control: there is room again"
        assert not any(model.prepared for model in server.catalog.all())


async def test_a_graceful_end_answers_what_is_in_flight_and_refuses_the_rest(server: Application, gate: Gate) -> None:
    asked = [
        asyncio.create_task(call(server.rest_port, "POST", path, body))
        for path, body in ((INFER, SMALL), ("/v1/embeddings", {"model": "tiny", "input": "the cat"}))
    ]
    await until(lambda: len(gate.waiting) == 2)
    draining = asyncio.create_task(server.drain())
    await until(lambda: not server.health.serving())
    late = await call(server.rest_port, "POST", INFER, SMALL)
    assert (late.status, late.json["reason"], late.headers["retry-after"]) == (503, "NOT_SERVING", "1")
    gate.open()
    assert [one.status for one in await asyncio.gather(*asked)] == [200, 200]
    await draining
