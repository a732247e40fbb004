"""Overload: ten times the capacity of one caller leaves another its answers, refusals are fast, recovery is too.

The model waits 50 ms in native code in each run, so that its capacity is known on any machine.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from attnserve.v1 import inference_service_pb2 as pb
from attnserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from credentials import Tokens
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from serving import command
from stuck_runs import environment

RUN_S = 0.05
CAPACITY = 1 / RUN_S
LOAD_S = 4.0
DEADLINE_S = 3.0
"""Longer than a busy machine may stall."""
SEPARATE = [("grpc.use_local_subchannel_pool", 1)]
ASKED = pb.InferRequest(model="tiny", sequences=[pb.Sequence(text=pb.TextInput(text="the cat"))])
OK = grpc.StatusCode.OK


@contextmanager
def started(repository: Path, folder: Path, isolation: str) -> Iterator[tuple[int, int, Tokens]]:
    """A server whose runs take 50 ms longer. Yields its ports and its tokens."""
    tokens = Tokens(folder / "tokens.txt")
    for name in ("greedy", "canary"):
        tokens.add(name, "infer,metrics")
    (folder / "slow").touch()
    process = {"none": "attnserve-server", "process": "processes.engine"}[isolation]
    line = [command("attnserve-server"), "serve", "--repository", str(repository), "--models", "tiny/2"]
    line += ["--grpc-port", "0", "--http-port", "0", "--ports-file", str(folder / "ports.json")]
    line += ["--isolation", isolation, "--fronts", "1", "--instances", "1", "--max-batch-size", "1"]
    line += ["--tokens-file", str(folder / "tokens.txt"), "--wide-threads", "1", "--drain-grace-s", "1"]
    variables = environment(folder / "code", folder / "slow", process=process, seconds=RUN_S, once=True)
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(line, stdout=log, stderr=log, env=variables)
    try:
        until = time.monotonic() + 60
        while not (folder / "ports.json").exists():
            assert server.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < until
            time.sleep(0.05)
        ports = json.loads((folder / "ports.json").read_text())
        yield ports["grpc"], ports["http"], tokens
    finally:
        server.terminate()
        server.wait(20)


def refusal_quantile(http_port: int, quantile: float, authorization: str) -> tuple[float, float]:
    """The upper bound of the bucket that holds a quantile of the refusals, and their number."""
    request = urllib.request.Request(f"http://127.0.0.1:{http_port}/metrics", headers={"authorization": authorization})
    with urllib.request.urlopen(request, timeout=10) as reply:
        families = list(text_string_to_metric_families(reply.read().decode()))
    buckets = {
        float(sample.labels["le"]): sample.value
        for family in families
        for sample in family.samples
        if sample.name == "attnserve_refusal_seconds_bucket"
    }
    count = max(buckets.values())
    return min(bound for bound, below in buckets.items() if below >= quantile * count), count


class Load:
    """Open-loop Poisson load of one caller, with the codes and the end of each call."""

    def __init__(self, port: int, authorization: str, timeout_s: float) -> None:
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=SEPARATE)
        self._stub = InferenceServiceStub(self._channel)
        self._metadata = (("authorization", authorization),)
        self._timeout_s = timeout_s
        self.codes: list[grpc.StatusCode] = []

    async def one(self) -> grpc.StatusCode:
        try:
            await self._stub.Infer(ASKED, timeout=self._timeout_s, metadata=self._metadata)
            code = OK
        except grpc.aio.AioRpcError as error:
            code = error.code()
        self.codes.append(code)
        return code

    async def run(self, rate: float, seconds: float) -> None:
        chance, began, due_s, calls = random.Random(7), time.monotonic(), 0.0, []
        while due_s < seconds:
            await asyncio.sleep(max(0.0, began + due_s - time.monotonic()))
            calls.append(asyncio.create_task(self.one()))
            due_s += chance.expovariate(rate)
        await asyncio.gather(*calls)

    async def close(self) -> None:
        await self._channel.close()


def shown_of(*loads: Load) -> list[dict[str, int]]:
    return [Counter(code.name for code in load.codes) for load in loads]


@pytest.mark.parametrize("isolation", ["none", "process"])
async def test_a_greedy_caller_leaves_another_its_answers(
    tiny_repository: Path, tmp_path: Path, isolation: str
) -> None:
    with started(tiny_repository, tmp_path, isolation) as (port, http_port, tokens):
        greedy = Load(port, f"Bearer {tokens.secrets['greedy']}", DEADLINE_S)
        canary = Load(port, f"Bearer {tokens.secrets['canary']}", DEADLINE_S)
        same = Load(port, f"Bearer {tokens.secrets['greedy']}", DEADLINE_S)
        health = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=SEPARATE)
        slowest_s = 0.0

        async def probe() -> None:
            nonlocal slowest_s
            for _ in range(round(LOAD_S / 0.1)):
                began = time.monotonic()
                await health_pb2_grpc.HealthStub(health).Check(health_pb2.HealthCheckRequest(), timeout=5)
                slowest_s = max(slowest_s, time.monotonic() - began)
                await asyncio.sleep(0.1)

        assert await canary.one() is OK
        canary.codes.clear()
        await asyncio.gather(greedy.run(10 * CAPACITY, LOAD_S), canary.run(5, LOAD_S), same.run(5, LOAD_S), probe())
        ended = time.monotonic()
        while await canary.one() is not OK:
            assert time.monotonic() - ended < 5, shown_of(greedy, canary, same)
        recovered_s = time.monotonic() - ended
        await asyncio.gather(greedy.close(), canary.close(), same.close(), health.close())
        shown = shown_of(greedy, canary, same)
        assert canary.codes.count(OK) >= 0.99 * len(canary.codes) - 1, shown
        assert same.codes.count(OK) < 0.8 * len(same.codes), "the control: a caller that shares the greedy one's turns"
        goodput = sum(load.codes.count(OK) for load in (greedy, canary, same)) / LOAD_S
        assert goodput >= 0.6 * CAPACITY, "each run takes a little more than its wait"
        assert set(shown[0]) <= {"OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
        assert recovered_s < 1, shown
        assert slowest_s < 1, "health"
        bound_s, refused = refusal_quantile(http_port, 0.99, f"Bearer {tokens.secrets['greedy']}")
        assert refused > 100
        assert bound_s <= 0.1, "row 14 of `python -m faults` has the limit of an idle machine, 25 ms"
