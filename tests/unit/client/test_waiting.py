"""Both clients wait for a server that has not started yet, within their timeout, and for models that are not ready.

`driver_class` runs a test with each client. The server listens on a port of loopback that the system chose, which is
free until the test starts the server there.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from attnserve.v1 import inference_service_pb2_grpc
from attnserve_client import DeadlineExpired, RetryPolicy, ServerUnreachable
from attnserve_client._lanes import Lanes
from attnserve_client._retry import RetryBudget, Retrying
from attnserve_client.testing import FakeServer
from attnserve_client.testing._server import _Servicer

REFUSED = "connections to all backends failing; last error: ipv4:127.0.0.1:1: Connection refused"


@contextmanager
def started_later(after_s: float) -> Iterator[str]:
    """Yield an address, and start a server there `after_s` seconds later."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fake = FakeServer()
    server = grpc.server(futures.ThreadPoolExecutor(8))
    inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(_Servicer(fake), server)
    server.add_generic_rpc_handlers((fake._health(),))

    def start() -> None:
        assert server.add_insecure_port(f"127.0.0.1:{port}") == port
        server.start()

    timer = threading.Timer(after_s, start)
    timer.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        timer.join()
        server.stop(None).wait()
        fake.stop()


def waiting(driver: Any) -> Any:
    """Let a driver wait where it would only record its waits."""
    asynchronous = asyncio.iscoroutinefunction(driver.client._calls._sleep)
    driver.client._calls._sleep = asyncio.sleep if asynchronous else time.sleep
    return driver


CALLS: dict[str, Callable[[Any], Any]] = {
    "infer": lambda driver: driver.infer("fake", "a text", timeout=20),
    "token ids": lambda driver: driver.infer("fake", [1, 2], timeout=20),
    "models": lambda driver: driver.models(timeout=20),
    "stream": lambda driver: driver.stream("fake", ["a text"], timeout=20),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
async def test_call_before_the_server_starts_is_answered_within_its_timeout(driver_class: Any, name: str) -> None:
    with started_later(0.7) as target:
        driver = waiting(driver_class(target))
        assert await CALLS[name](driver)
        await driver.close()


@pytest.mark.slow
async def test_control_without_the_wait_the_call_fails_before_the_server_starts(driver_class: Any) -> None:
    with started_later(1.5) as target:
        driver = waiting(driver_class(target, retry=RetryPolicy(wait_for_ready=False)))
        with pytest.raises(ServerUnreachable):
            await driver.infer("fake", "a text", timeout=20)
        await driver.close()


@pytest.mark.parametrize("name", ["infer", "stream"])
async def test_server_that_never_starts_is_unreachable_after_the_timeout(driver_class: Any, name: str) -> None:
    driver = waiting(driver_class("127.0.0.1:1"))
    began = time.monotonic()
    with pytest.raises(ServerUnreachable):
        await getattr(driver, name)("fake", "a text" if name == "infer" else ["a text"], timeout=0.5)
    assert time.monotonic() - began < 5
    await driver.close()


def attempts(policy: RetryPolicy) -> tuple[Any, list[float]]:
    now = [0.0]
    retrying = Retrying(policy, RetryBudget(policy), lambda: now[0], lambda: 1.0)
    return retrying.attempts(Lanes(1, 1, lambda: now[0]), 30.0), now


def test_waits_for_a_server_count_neither_as_attempts_nor_in_the_budget() -> None:
    call, now = attempts(RetryPolicy())
    waits = []
    while (wait_s := call.wait_after(call.begin(), ServerUnreachable(REFUSED, code="UNAVAILABLE"))) is not None:
        waits.append(wait_s)
        now[0] += wait_s
    assert waits[:5] == [0.1, 0.2, 0.4, 0.8, 1.0]
    assert now[0] > 29, "it waits until the timeout"
    assert call.made == 0
    assert call.retrying.budget.tokens == 10.0


@pytest.mark.parametrize(
    ("policy", "message", "reached"),
    [
        (RetryPolicy(), "connections to all backends failing; last error: Tls handshake failed", False),
        (RetryPolicy(), REFUSED, True),
        (RetryPolicy(wait_for_ready=False), REFUSED, False),
        (RetryPolicy(max_attempts=1), REFUSED, False),
    ],
    ids=["wrong encryption", "after an answer", "turned off", "without retries"],
)
def test_no_call_waits_where_the_server_cannot_be_about_to_start(
    policy: RetryPolicy, message: str, reached: bool
) -> None:
    call, _ = attempts(policy)
    call.lanes.reached = reached
    made = 0
    while call.wait_after(call.begin(), ServerUnreachable(message, code="UNAVAILABLE")) is not None:
        made += 1
    assert made < 4


async def test_wait_ready_returns_once_the_model_is(driver_class: Any, server: FakeServer) -> None:
    driver = waiting(driver_class(server.target))
    server.state = "loading"
    with pytest.raises(DeadlineExpired, match=r"^model 'fake' was not ready within 0.2 s: model 'fake' is loading$"):
        await wait_ready(driver, "fake", timeout=0.2)
    with pytest.raises(DeadlineExpired, match=r"^the server was not ready within 0.2 s: model 'fake' is loading$"):
        await wait_ready(driver, timeout=0.2)
    threading.Timer(0.2, lambda: setattr(server, "state", "ready")).start()
    await wait_ready(driver, "fake", timeout=10)
    await wait_ready(driver)
    with pytest.raises(DeadlineExpired, match="no model 'other'"):
        await wait_ready(driver, "other", timeout=0.1)
    await driver.close()


@pytest.mark.slow
async def test_wait_ready_waits_for_a_server_that_starts(driver_class: Any) -> None:
    with started_later(0.5) as target:
        driver = waiting(driver_class(target))
        await wait_ready(driver, "fake", timeout=20)
        await driver.close()


async def wait_ready(driver: Any, *arguments: Any, **options: Any) -> None:
    method = driver.client.wait_ready
    if asyncio.iscoroutinefunction(method):
        await method(*arguments, **options)
    else:
        await asyncio.to_thread(method, *arguments, **options)
