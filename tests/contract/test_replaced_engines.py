"""An engine that crashes, hangs or takes too much memory is replaced: no call is lost, and only a culprit fails.

`serve` is run as a command, with faults on request (`engine.failpoints`): the id of a request, or a signal to a
process, causes one.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import urllib.error
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from attnserve.v1 import inference_service_pb2 as pb
from attnserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from attnserve_server.engine.failpoints import VARIABLE
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from processes import CODE, Running, children, ids, started

pytestmark = pytest.mark.slow

MODEL = {"model": "plain", "version": "1"}
TIMEOUT_S = 30.0
KILLS = 10
FAULTS = {VARIABLE: "1"}
_numbers = itertools.count()


def engine_of(running: Running, role: str = "engine") -> psutil.Process:
    """The process that runs the model, which is older than the one in reserve; or the only front."""
    found = [one for one, line in children(running.process.pid) if f"attnserve_server.processes.{role}" in line]
    return min(found, key=lambda one: one.create_time())


def restarts(running: Running, reason: str) -> float:
    return running.sample("attnserve_engine_restarts_total", reason=reason, **MODEL)


def state(running: Running) -> tuple[str, str]:
    try:
        page = running.page("/readyz")
    except urllib.error.HTTPError as error:  # 503 while the model is not ready
        page = error.read().decode()
    (model,) = json.loads(page)["models"]
    return model["state"], model["reason"]


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not await asyncio.to_thread(condition):  # noqa: ASYNC110 - it waits for a server
            await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
def running(tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One engine with two instances, whose runs may take 1.5 s and its memory 400 MB. Each test leaves it ready."""
    flags = ["--models", "plain", "--instances", "2", "--watchdog-floor-s", "1.5", "--wide-threads", "1"]
    flags += ["--engine-memory-bytes", "400000000"]
    one = started(tiny_repository, tmp_path_factory.mktemp("faulty"), *flags, variables=FAULTS)
    yield one
    one.process.terminate()
    assert one.process.wait(30) == 0


@pytest.fixture
async def stub(running: Running) -> AsyncIterator[InferenceServiceStub]:
    await until(lambda: state(running)[0] == "ready")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{running.grpc_port}") as channel:
        yield InferenceServiceStub(channel)


def faulty(kind: str, count: int = 5) -> pb.InferRequest:
    return ids(count, request_id=f"fail:{kind}:{next(_numbers)}")


def values(answer: pb.InferResponse) -> np.ndarray:
    return np.frombuffer(next(one for one in answer.results[0].outputs if one.name == "hidden").data, np.float32)


def reason_of(error: grpc.aio.AioRpcError) -> tuple[str, bool]:
    """The reason of an error, and whether it has a delay before a retry."""
    details = dict(error.trailing_metadata() or ())["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(details)
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return info.reason, any(one.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for one in status.details)


def counts(running: Running) -> dict[str, float]:
    """All counters and counts of histograms; a series that is exported twice fails."""
    found: dict[str, float] = {}
    for line in running.page("/metrics").splitlines():
        series, _, value = line.rpartition(" ")
        if line.startswith("attnserve_") and ("_total{" in line or "_bucket{" in line or "_count{" in line):
            assert series not in found
            found[series] = float(value)
    return found


async def test_random_kills_lose_no_call_and_leave_nothing_behind(running: Running, stub: InferenceServiceStub) -> None:
    expected = {count: values(await stub.Infer(ids(count))) for count in range(3, 9)}
    killed, done, waits = restarts(running, "crash"), asyncio.Event(), []
    answered = 0
    supervisor, front = psutil.Process(running.process.pid), engine_of(running, "front")

    def held() -> list[int]:
        return [number for one in (supervisor, front) for number in (one.num_fds(), one.num_threads())]

    async def call(number: int) -> None:
        nonlocal answered
        while not done.is_set():
            number = 3 + (number + 1) % 6
            answer = await stub.Infer(ids(number), timeout=TIMEOUT_S)
            np.testing.assert_allclose(values(answer), expected[number], rtol=0, atol=1e-5)
            answered += 1

    await asyncio.sleep(2.5)  # until there is a process in reserve
    held_before, before = held(), counts(running)
    callers = [asyncio.create_task(call(number)) for number in range(16)]
    chance = random.Random(5)
    for _ in range(KILLS):
        await asyncio.sleep(0.3 + 0.3 * chance.random())
        engine_of(running).kill()
        begun, had = time.monotonic(), answered
        while answered <= had + 16:  # what was on its way may still arrive
            await asyncio.sleep(0.005)
            assert time.monotonic() - begun < TIMEOUT_S
        waits.append(time.monotonic() - begun)
        after = await asyncio.to_thread(counts, running)
        assert all(after[series] >= value for series, value in before.items()), "a counter fell"
        before = after
    done.set()
    await asyncio.gather(*callers)
    shown = f"median {statistics.median(waits):.2f} s of {sorted(round(one, 2) for one in waits)}"
    sys.stdout.write(f"next answers after a kill: {shown}\n")
    assert restarts(running, "crash") - killed == KILLS
    await asyncio.sleep(2.5)
    assert all(now <= then + 2 for now, then in zip(held(), held_before, strict=True)), f"{held_before} and {held()}"


@pytest.mark.parametrize("kind", ["abort", "kill"])
async def test_of_a_batch_only_the_culprit_fails(running: Running, stub: InferenceServiceStub, kind: str) -> None:
    before = restarts(running, "crash")
    expected = values(await stub.Infer(ids(5)))
    requests = [ids(5) for _ in range(16)]
    requests[7] = faulty(kind)
    answers = await asyncio.gather(*(stub.Infer(one, timeout=TIMEOUT_S) for one in requests), return_exceptions=True)
    error = answers.pop(7)
    assert isinstance(error, grpc.aio.AioRpcError)
    assert error.code() is grpc.StatusCode.INTERNAL
    assert reason_of(error) == ("ENGINE_CRASHED", False)
    for answer in answers:
        assert isinstance(answer, pb.InferResponse), answer
        np.testing.assert_allclose(values(answer), expected, rtol=0, atol=1e-5)
    assert restarts(running, "crash") - before == (2 if kind == "abort" else 3)


@pytest.mark.parametrize(("kind", "reason"), [("hang", "hang"), ("stop", "hang"), ("memory", "memory")])
async def test_a_run_that_hangs_or_takes_too_much_memory_is_found(
    running: Running, stub: InferenceServiceStub, kind: str, reason: str
) -> None:
    before = restarts(running, reason)
    expected = values(await stub.Infer(ids(5)))
    bad = asyncio.ensure_future(stub.Infer(faulty(kind), timeout=TIMEOUT_S))
    await asyncio.sleep(0.1)
    good = [stub.Infer(ids(5), timeout=TIMEOUT_S) for _ in range(3)]
    for answer in await asyncio.gather(*good):
        np.testing.assert_allclose(values(answer), expected, rtol=0, atol=1e-5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bad
    assert reason_of(caught.value) == ("ENGINE_CRASHED", False)
    # One, if it was alone in its run from the start.
    assert restarts(running, reason) - before in (1, 2)


async def test_a_stopped_engine_is_replaced_and_health_reports_it(running: Running, stub: InferenceServiceStub) -> None:
    before, seen = restarts(running, "hang"), []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{running.grpc_port}") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="plain"))

        async def note() -> None:
            async for one in watch:
                seen.append(one.status)  # noqa: PERF401 - it is read while it grows

        noting = asyncio.create_task(note())
        engine_of(running).send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        answer = await stub.Infer(ids(5), timeout=TIMEOUT_S)
        assert len(answer.results) == 1
        assert time.monotonic() - begun > 1, "it was stopped"
        await until(lambda: len(seen) >= 3)
        watch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await noting
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    assert seen == [serving, not_serving, serving]
    assert restarts(running, "hang") - before == 1


async def test_calls_end_at_their_deadlines_without_an_engine(running: Running, stub: InferenceServiceStub) -> None:
    engine_of(running).send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    answers = await asyncio.gather(*(stub.Infer(ids(5), timeout=0.5) for _ in range(8)), return_exceptions=True)
    assert time.monotonic() - begun < 0.75
    codes = {one.code() for one in answers if isinstance(one, grpc.aio.AioRpcError)}
    assert codes <= {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE}
    assert len(codes) >= 1


async def test_a_front_that_ends_is_replaced(running: Running, stub: InferenceServiceStub) -> None:
    before = running.sample("attnserve_front_restarts_total", reason="crash")
    engine_of(running, "front").kill()
    await until(lambda: running.sample("attnserve_front_restarts_total", reason="crash") == before + 1)
    answer = await stub.Infer(ids(5), timeout=TIMEOUT_S, wait_for_ready=True)
    assert len(answer.results) == 1
    await until(lambda: state(running)[0] == "ready")


async def test_ids_cause_no_faults_unless_they_are_on(tiny_repository: Path, tmp_path: Path) -> None:
    one = started(tiny_repository, tmp_path, "--models", "plain", "--standby", "false")
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{one.grpc_port}") as channel:
            for kind in ("kill", "abort", "stop", "hang", "memory"):
                assert len((await InferenceServiceStub(channel).Infer(faulty(kind), timeout=5)).results) == 1
        assert sum(restarts(one, reason) for reason in ("crash", "hang", "memory")) == 0
    finally:
        one.process.terminate()
        assert one.process.wait(30) == 0


def test_an_engine_that_crashes_while_it_loads_fails_its_model_alone(tiny_repository: Path, tmp_path: Path) -> None:
    ports = tmp_path / "ports.json"
    line = [sys.executable, "-P", "-c", CODE, "serve", "--repository", str(tiny_repository), "--ports-file", str(ports)]
    line += ["--grpc-port", "0", "--http-port", "0", "--isolation", "process", "--fronts", "1", "--standby", "false"]
    process = subprocess.Popen(line)
    try:
        until_s, killed = time.monotonic() + 60, False
        while not ports.exists():
            for child, words in children(process.pid):
                if not killed and "engine plain/1" in words:
                    child.kill()
                    killed = True
            assert time.monotonic() < until_s
            assert process.poll() is None
            time.sleep(0.01)
        found = json.loads(ports.read_text())
        models = json.loads(Running(process, found["grpc"], found["http"]).page("/readyz"))["models"]
        states = {f"{one['name']}/{one['version']}": (one["state"], one["reason"]) for one in models}
    finally:
        process.terminate()
        assert process.wait(30) == 0
    assert states["tiny/1"] == states["tiny/2"] == ("ready", "")
    assert states["plain/1"] == ("failed", "engine crashed: signal 9 while it loaded")


async def test_one_process_reports_a_run_that_hangs(tiny_repository: Path, tmp_path: Path) -> None:
    flags = ["--models", "plain", "--isolation", "none", "--instances", "2", "--watchdog-floor-s", "0.5"]
    one = started(tiny_repository, tmp_path, *flags, variables=FAULTS)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{one.grpc_port}") as channel:
            stub, health = InferenceServiceStub(channel), health_pb2_grpc.HealthStub(channel)
            await stub.Infer(ids(5))
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Infer(faulty("hang"), timeout=2)
            for service in ("", "plain"):
                answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
                assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    finally:
        os.kill(one.process.pid, signal.SIGKILL)
        one.process.wait(30)
