"""Rows 19, 21 and 22: one of two replicas ends, by an internal error, by a signal or by force. Callers use the SDK."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import grpc
from attnserve_client import AsyncClient
from attnserve_server.config import Settings
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from faults import bundles, sdk
from faults.history import Recorder
from faults.lab import WITHIN_DEADLINE, Bench, Lab, Row, Setup, Share
from faults.system import Server

TWO: Final = Setup(replicas=2)
BROKEN: Final = Setup(starts=False, isolation="none")
CALLERS: Final = 16
FAILING_OVER: Final = Share(0.999, None)
"""No call may fail; those that move to the other replica take longer."""
EXIT_FAULTED: Final = 70
END_S: Final = float(Settings.model_fields["drain_grace_s"].default) + 2.0
"""The grace period, the second after which the process ends in any case, and one to notice it."""
FOUND_S: Final = 5.0
"""Seconds in which a client finds a server that was restarted: gRPC connects again after up to 2.4 s, and the client
tries a failed address every two seconds."""

name_of = health_pb2.HealthCheckResponse.ServingStatus.Name


@asynccontextmanager
async def _load(lab: Lab, *codes: str) -> AsyncIterator[None]:
    """Run callers in loops at all servers until the block ends; their deadline is 20 s."""
    name = "load"
    lab.allowed[name] = frozenset({"OK", *codes})
    recorder, done = Recorder(name, lab.sink), asyncio.Event()
    async with AsyncClient([one.target for one in lab.bench.servers]) as client:

        async def caller(number: int) -> None:
            texts = lab.texts(50)
            while not done.is_set():
                await sdk.infer(client, recorder, bundles.TINY, texts[number % 50], 20.0)
                number += 1

        callers = [asyncio.create_task(caller(number)) for number in range(CALLERS)]
        try:
            yield
        finally:
            done.set()
            await asyncio.gather(*callers)


async def _restarted(bench: Bench, server: Server) -> Server:
    """Start a server on the port of one that ended, in its place."""
    port = str(server.running.grpc_port)
    again = await bench.start("--grpc-port", port)
    bench.servers.remove(again)
    bench.servers[bench.servers.index(server)] = again
    return again


async def _health(server: Server, found: list[str]) -> None:
    """Append the states of a server's health until its end."""
    with contextlib.suppress(grpc.aio.AioRpcError):
        async with grpc.aio.insecure_channel(server.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            async for answer in HealthStub(channel).Watch(health_pb2.HealthCheckRequest()):
                found.append(name_of(answer.status))  # noqa: PERF401 - the list is read while it grows


async def task_dies(lab: Lab) -> None:
    """Row 19."""
    broken = await lab.bench.start(failpoints=("batching-dies",))
    await lab.bench.start()
    await lab.watch()
    states: list[str] = []
    watching = asyncio.create_task(_health(broken, states))
    # Calls in the queue of the task fail with it, and many refusals at once use up the budget for retries. Calls of the
    # other models, such as the canary's, do not fail.
    async with _load(lab, "INTERNAL:INTERNAL", "UNAVAILABLE:NOT_SERVING"):
        await asyncio.sleep(1.0)
        begun = time.monotonic()
        lab.bench.service.pause(bundles.TINY, begun)  # without its task a version is not ready, and a lower one answers
        broken.process.send_signal(signal.SIGUSR1)
        lab.injected["batching tasks ended"] += 1
        ended = await lab.until(lambda: not broken.lives, END_S)
        lab.bench.service.resume(bundles.TINY, time.monotonic())
        lab.measured["ended_after_s"] = round(time.monotonic() - begun, 2)
        await asyncio.sleep(1.0)
    await watching
    lab.must(ended, "the server goes on without the task")
    lab.must(broken.running.process.poll() == EXIT_FAULTED, f"exit code {broken.running.process.poll()} and not 70")
    lab.must("NOT_SERVING" in states, f"its health was {states}")
    lab.control(any(line["event"] == "draining" for line in broken.events()), "the server noticed no error")


async def rolling(lab: Lab) -> None:
    """Row 21."""
    async with _load(lab):
        for _ in range(lab.count(1, 5)):
            for server in list(lab.bench.servers):
                states: list[str] = []
                watching = asyncio.create_task(_health(server, states))
                await asyncio.sleep(0.5)
                begun = time.monotonic()
                server.process.send_signal(signal.SIGTERM)
                lab.injected["SIGTERM"] += 1
                ended = await lab.until(lambda one=server: not one.lives, END_S)
                lab.measured["ended_after_s"] = round(time.monotonic() - begun, 2)
                await watching
                lab.must(ended, "the server did not end within its grace period")
                lab.must(server.running.process.poll() == 0, f"exit code {server.running.process.poll()} and not 0")
                lab.must(states[-1:] == ["NOT_SERVING"], f"its health was {states}")
                again = await _restarted(lab.bench, server)
                lab.control(again.running.process.pid != server.running.process.pid, "the process is another one")
                await asyncio.sleep(FOUND_S)


async def killed(lab: Lab) -> None:
    """Row 22."""
    async with _load(lab):
        for number in range(lab.count(3, 20)):
            await asyncio.sleep(float(lab.random.uniform(0.3, 0.8)))
            server = lab.bench.servers[number % 2]
            server.process.send_signal(signal.SIGKILL)
            lab.injected["SIGKILL"] += 1
            gone = await lab.until(lambda one=server: not one.lives)
            lab.control(gone and server.running.process.poll() == -signal.SIGKILL, "the server was not killed")
            await _restarted(lab.bench, server)
            await asyncio.sleep(FOUND_S)


ROWS: Final = (
    Row(19, "the batching task of a model ends", BROKEN, task_dies, FAILING_OVER, reconciles=False, lasts=False),
    Row(
        21,
        "SIGTERM under load, and a rolling restart of two replicas",
        TWO,
        rolling,
        FAILING_OVER,
        reconciles=False,
        lasts=False,
    ),
    Row(22, "SIGKILL of one of two replicas under load", TWO, killed, WITHIN_DEADLINE, reconciles=False, lasts=False),
)
