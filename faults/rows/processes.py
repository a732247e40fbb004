"""Rows 17, 18 and 20: an engine process is killed, stops, hangs or takes too much memory. The server goes on.

Faults from outside are signals. Those from inside are the server's failpoints (`engine/failpoints.py`): the id of a
request names what its run does to the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import grpc
import psutil
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from faults import bundles
from faults.history import End
from faults.lab import Lab, Row, Setup, Share
from faults.wire import Wire, states_of

FAILPOINTS: Final = (("ATTNSERVE_FAILPOINTS", "1"),)
MEMORY_BYTES: Final = 512 * 2**20
SUPERVISED: Final = Setup(
    models=(bundles.CANARY, bundles.TINY, bundles.HEAVY),
    flags=("--fronts", "1", "--watchdog-floor-s", "1", "--engine-memory-bytes", str(MEMORY_BYTES)),
    isolation="process",
    needs=("watchdog_floor_s", "engine_memory_bytes"),
    environment=FAILPOINTS,
)
NEIGHBOURS: Final = Share(0.999, None)
"""The canary has an engine that lives. The start of another engine takes processor time from it."""
CALLERS: Final = 12
DEADLINE_S, BUSY_DEADLINE_S = 20, 90
"""Of calls that wait for the next engine, and in a reduced run: on a busy machine, a start without a process in reserve
takes up to 20 s, and a culprit waits for two or three."""
NEXT_S: Final = 1.0
VERSION: Final = {bundles.TINY: "2", bundles.HEAVY: "1"}
"""The highest version of each model."""
CULPRIT: Final = ("INTERNAL:ENGINE_CRASHED",)

name_of = health_pb2.HealthCheckResponse.ServingStatus.Name


def _deadline_s(lab: Lab) -> float:
    return float(lab.count(BUSY_DEADLINE_S, DEADLINE_S))


@asynccontextmanager
async def _load(lab: Lab, model: str, name: str = "load") -> AsyncIterator[None]:
    """Run callers in loops until the block ends; all must be answered."""
    done = asyncio.Event()
    async with lab.caller(f"{name} on {model}") as wire:

        async def caller() -> None:
            texts = lab.texts(50)
            number = 0
            while not done.is_set():
                await wire.infer(model, texts[number % 50], timeout_s=_deadline_s(lab))
                number += 1

        callers = [asyncio.create_task(caller()) for _ in range(CALLERS)]
        try:
            yield
        finally:
            done.set()
            await asyncio.gather(*callers)


@asynccontextmanager
async def _replaced(lab: Lab, model: str) -> AsyncIterator[psutil.Process]:
    """Yield the engine of a model's highest version, which the block ends, and wait until another one is ready.

    In between, a lower version may answer.
    """
    old = await _engine(lab, model)
    lab.bench.service.pause(model, time.monotonic())
    yield old

    def other() -> bool:
        with contextlib.suppress(psutil.Error):
            found = lab.server.engine(model)
            return found is not None and found.pid != old.pid
        return False

    timeout_s = _deadline_s(lab)
    replaced = await lab.until(other, timeout_s)
    lab.control(replaced, f"the engine of {model} was not replaced")
    until = time.monotonic() + timeout_s
    async with lab.caller("lister") as wire:
        while replaced:
            if (await states_of(wire))[model, VERSION[model]].endswith("READY"):
                lab.bench.service.resume(model, time.monotonic())
                return
            lab.must(replaced := time.monotonic() < until, f"the new engine of {model} is not ready")
            await asyncio.sleep(0.05)


async def _engine(lab: Lab, model: str) -> psutil.Process:
    """Return the engine process of a model, once there is one."""
    found: list[psutil.Process] = []

    def there() -> bool:
        with contextlib.suppress(psutil.Error):
            found[:] = [one for one in (lab.server.engine(model),) if one is not None]
        return bool(found)

    if not await lab.until(there, _deadline_s(lab)):
        raise RuntimeError(f"{model} has no engine")
    return found[0]


async def _standby(lab: Lab) -> bool:
    """Wait until the process in reserve has imported what it needs, and rests; return whether it does."""
    used: list[float] = [-1.0]

    def rests() -> bool:
        time.sleep(0.2)
        used.append(lab.server.metric("process_cpu_seconds_total", process="engine in reserve"))
        return 0.1 < used[-1] < used[-2] + 0.01

    return await lab.until(rests, _deadline_s(lab))


async def _settle(lab: Lab) -> None:
    """Take the figures of the start again, once the process in reserve that the row before used up is replaced."""
    lab.control(await _standby(lab), "no process in reserve is ready")
    lab.before = await lab.blocking(lab.bench.usage)


async def _kills(lab: Lab, model: str, count: int, *, warm: bool) -> list[float]:
    """Kill the engine of a model at random times under load. Return the seconds to the next answer of its version.

    `warm`: wait for a process in reserve before each.
    """
    gaps: list[float] = []
    name = "with standby" if warm else "without standby"
    async with lab.caller(f"next {name} on {model}") as wire, _load(lab, model, f"load {name}"):
        for _ in range(count):
            await asyncio.sleep(float(lab.random.uniform(0.05, 0.4)))
            if warm:
                lab.control(await _standby(lab), "no process in reserve is ready")
            async with _replaced(lab, model) as engine:
                engine.send_signal(signal.SIGKILL)
                begun = time.monotonic()
                lab.injected[f"SIGKILL of {model}"] += 1
                end = await wire.infer(model, "the cat", version=VERSION[model], timeout_s=_deadline_s(lab))
                gaps.append(end.at_s - begun)
    return gaps


async def killed(lab: Lab) -> None:
    """Row 17."""
    await _settle(lab)
    cold = await _kills(lab, bundles.TINY, lab.count(10, 20), warm=False)
    gaps = await _kills(lab, bundles.TINY, lab.count(6, 20), warm=True)
    slow = await _kills(lab, bundles.HEAVY, lab.count(2, 6), warm=False)
    async with lab.caller("culprit", *CULPRIT) as culprit, _load(lab, bundles.TINY, "neighbours"):
        for number in range(lab.count(2, 4)):
            kind = ("kill", "abort")[number % 2]
            async with _replaced(lab, bundles.TINY):
                end = await _fault(lab, culprit, kind, number)
            lab.must(b"RetryInfo" not in culprit.details, "the error of a culprit holds a RetryInfo")
            lab.control(end.code == "INTERNAL", f"a request that kills its engine got {end.code}")
            lab.injected["requests that kill their engine"] += 1
    lab.measured |= {
        "next_answer_s": round(max(gaps), 3),
        "next_answer_median_s": round(sorted(gaps)[len(gaps) // 2], 3),
        "next_answer_without_standby_s": round(max(cold), 3),
        "next_answer_without_standby_median_s": round(sorted(cold)[len(cold) // 2], 3),
        "next_answer_of_a_slow_model_s": round(max(slow), 3),
    }
    lab.quick(max(gaps) <= NEXT_S, f"with a warm standby, the next answer came after {max(gaps):.2f} s, above 1 s")


async def _fault(lab: Lab, culprit: Wire, kind: str, number: int) -> End:
    """Send the highest version of `tiny` a request that makes its engine fail."""
    identity = f"fail:{kind}:{number}"
    version = VERSION[bundles.TINY]
    return await culprit.infer(
        bundles.TINY, "the dog", version=version, timeout_s=_deadline_s(lab), request_id=identity
    )


async def stopped(lab: Lab) -> None:
    """Row 18."""
    await _settle(lab)
    states: list[str] = []
    watching = asyncio.create_task(_health(lab, bundles.HEAVY, states))
    patient = ("OK", "UNAVAILABLE", "DEADLINE_EXCEEDED")
    async with lab.caller("usual", *patient) as usual, lab.caller("culprit", *CULPRIT, *patient[1:]) as culprit:
        for number in range(lab.count(2, 10)):
            await usual.infer(bundles.HEAVY, "the cat")
            async with _replaced(lab, bundles.HEAVY) as engine:  # its only version
                engine.send_signal(signal.SIGSTOP)
                lab.injected["SIGSTOP from outside"] += 1
                await usual.infer(bundles.HEAVY, "the cat", timeout_s=_deadline_s(lab))
            for kind in ("stop", "hang"):
                # The first run of a shape in an engine has a longer limit.
                await usual.infer(bundles.TINY, "the dog", version=VERSION[bundles.TINY])
                async with _replaced(lab, bundles.TINY):
                    end = await _fault(lab, culprit, kind, number)
                lab.control(end.code != "OK", f"a request that makes its engine {kind} was answered")
                lab.injected[f"requests that {kind} their engine"] += 1
        for model in (bundles.HEAVY, bundles.TINY):
            end = await usual.infer(model, "the cat", timeout_s=_deadline_s(lab))
            lab.must(end.code == "OK", f"after all of this, a call got {end.code}")
    watching.cancel()
    lab.measured["health"] = states[:6]
    lab.must("NOT_SERVING" in states, f"the health of a model without an engine was {states}")


async def _health(lab: Lab, model: str, found: list[str]) -> None:
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
        async with grpc.aio.insecure_channel(lab.server.target) as channel:
            async for answer in HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=model)):
                found.append(name_of(answer.status))  # noqa: PERF401 - the list is read while it grows


async def memory(lab: Lab) -> None:
    """Row 20."""
    await _settle(lab)
    main = lab.server.process.pid
    async with lab.caller("culprit", *CULPRIT) as culprit, _load(lab, bundles.TINY):
        for number in range(lab.count(2, 10)):
            async with _replaced(lab, bundles.TINY):
                end = await _fault(lab, culprit, "memory", number)
            lab.control(end.code == "INTERNAL", f"a request whose run takes gigabytes got {end.code}")
            lab.injected["runs that take memory without a limit"] += 1
    lab.must(lab.server.process.pid == main and lab.server.lives, "the supervisor ended")


ROWS: Final = (
    Row(17, "SIGKILL of an engine in a run", SUPERVISED, killed, NEIGHBOURS),
    Row(18, "an engine stops or hangs", SUPERVISED, stopped, NEIGHBOURS),
    Row(20, "an engine takes more memory than its limit", SUPERVISED, memory, NEIGHBOURS),
)
