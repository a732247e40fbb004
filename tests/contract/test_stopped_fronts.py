"""A front that stops: callers of the other front are served meanwhile, and it resumes or is replaced."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from attnserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from processes import Running, ids, started

pytestmark = pytest.mark.slow

CHANNELS = 12
"""Connections, which the kernel spreads over the fronts."""
Stubs = list[InferenceServiceStub]


@pytest.fixture(scope="module")
def running(tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    flags = ["--models", "plain", "--standby", "false", "--fronts", "2"]
    one = started(tiny_repository, tmp_path_factory.mktemp("stopped"), *flags)
    yield one
    one.process.terminate()
    assert one.process.wait(30) == 0


@pytest.fixture
async def stubs(running: Running) -> AsyncIterator[Stubs]:
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 500)]
    channels = [grpc.aio.insecure_channel(f"127.0.0.1:{running.grpc_port}", options) for _ in range(CHANNELS)]
    yield [InferenceServiceStub(channel) for channel in channels]
    await asyncio.gather(*(channel.close() for channel in channels))


def front_of(running: Running) -> psutil.Process:
    """The front that was started last."""
    children = psutil.Process(running.process.pid).children()
    fronts = [one for one in children if "attnserve_server.processes.front" in one.cmdline()]
    assert len(fronts) == 2
    return max(fronts, key=lambda one: one.create_time())


def connections(front: psutil.Process) -> int:
    return sum(one.status == psutil.CONN_ESTABLISHED for one in front.net_connections("tcp"))


async def codes(stubs: Stubs, timeout_s: float, *, patient: bool = False) -> list[str]:
    answers = (stub.Infer(ids(5), timeout=timeout_s, wait_for_ready=patient) for stub in stubs)
    found = await asyncio.gather(*answers, return_exceptions=True)
    return [one.code().name if isinstance(one, grpc.aio.AioRpcError) else "OK" for one in found]


def hangs(running: Running) -> float:
    return running.sample("attnserve_front_restarts_total", reason="hang")


async def test_stopped_front_resumes_and_others_answer_meanwhile(running: Running, stubs: Stubs) -> None:
    assert await codes(stubs, 20.0) == ["OK"] * CHANNELS
    front, before = front_of(running), hangs(running)
    own = connections(front)
    assert 0 < own < CHANNELS, "the control: both fronts have connections"
    front.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    found = await codes(stubs, 2.0)
    assert time.monotonic() - begun < 2.25
    assert (found.count("OK"), found.count("DEADLINE_EXCEEDED")) == (CHANNELS - own, own)
    front.send_signal(signal.SIGCONT)
    assert await codes(stubs, 20.0) == ["OK"] * CHANNELS
    assert hangs(running) == before


async def test_front_that_stays_stopped_is_replaced(running: Running, stubs: Stubs) -> None:
    assert await codes(stubs, 20.0) == ["OK"] * CHANNELS
    front, before = front_of(running), hangs(running)
    front.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    found = await codes(stubs, 30.0)
    assert set(found) == {"OK", "UNAVAILABLE"}, (
        "calls of the stopped front end with it, those of the other are answered"
    )
    assert 5 < time.monotonic() - begun < 25, "a heartbeat may be late by ten seconds"
    assert await codes(stubs, 20.0, patient=True) == ["OK"] * CHANNELS
    assert hangs(running) == before + 1
    assert not front.is_running()
