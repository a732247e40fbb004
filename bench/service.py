"""This server in a separate process, requests to it, and callers in closed loops. Other benchmarks import it.

`running` and `started` raise SystemExit with a message, so code 1, in the benchmark's process if the server ends or
writes no ports in 60 s. They kill a server that runs 30 s after SIGTERM, and raise `subprocess.TimeoutExpired`. A
failed call in `drive` cancels the other callers, and raises an ExceptionGroup of `grpc.aio.AioRpcError`.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy.typing as npt
import psutil
from attnserve.v1 import attention_pb2, inference_service_pb2, inference_service_pb2_grpc, tensor_pb2

Array = npt.NDArray[Any]
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0


MAIN = "main"
ROLES = ("front", "engine")


@dataclass(frozen=True, slots=True)
class Server:
    """A running server: its main process, which may have started fronts and engines."""

    target: str
    http: str
    process: psutil.Process

    def processes(self) -> list[tuple[str, psutil.Process]]:
        """Return its processes with their roles: `main`, `front` or `engine`."""
        found = [(MAIN, self.process)]
        for child in self.process.children():
            words = " ".join(child.cmdline())
            found += [(role, child) for role in ROLES if f"attnserve_server.processes.{role}" in words]
        return found

    def cpu_by_role(self) -> dict[str, float]:
        """Return the user and system time of its processes so far, by role."""
        total = dict.fromkeys((MAIN, *ROLES), 0.0)
        for role, process in self.processes():
            times = process.cpu_times()
            total[role] += times.user + times.system
        return total

    def engine_loop_seconds(self) -> float:
        """Return the time of the engines' main threads, which do everything but runs; 0 where there is no engine."""
        threads = [(one.pid, each) for role, one in self.processes() if role == "engine" for each in one.threads()]
        return sum(each.user_time + each.system_time for pid, each in threads if each.id == pid)

    def cpu_seconds(self) -> float:
        """Return the user and system time of all its processes so far."""
        return sum(self.cpu_by_role().values())

    def resident_mb(self) -> dict[str, float]:
        """Return the resident memory of each process in MB, by its role and id."""
        return {f"{role} {one.pid}": one.memory_info().rss / 1e6 for role, one in self.processes()}


@contextmanager
def running(repository: Path, *flags: str) -> Iterator[Server]:
    """Run `attnserve-server serve` on free loopback ports until the block ends, with defaults except for `flags`.

    The command is the one beside this Python's executable.
    """
    command = [str(Path(sys.executable).with_name("attnserve-server"))]
    with tempfile.TemporaryDirectory() as folder, started(command, repository, Path(folder), *flags) as server:
        yield server


@contextmanager
def started(command: list[str], repository: Path, folder: Path, *flags: str) -> Iterator[Server]:
    """Run another command that takes the server's flags, until the block ends. `folder` is for files of the run."""
    ports_file = folder / "ports.json"
    line = [
        *command,
        "serve",
        "--repository",
        str(repository),
        "--grpc-port",
        "0",
        "--http-port",
        "0",
        "--rest-port",
        "0",
    ]
    process = subprocess.Popen(
        [*line, "--ports-file", str(ports_file), "--log-level", "warning", *flags], stdout=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + START_TIMEOUT_S
        while not (ports_file.exists() and ports_file.stat().st_size):
            if process.poll() is not None:
                sys.exit(f"the server ended with code {process.returncode} at its start; its log is on standard error")
            if time.monotonic() > until:
                sys.exit(f"the server did not start within {START_TIMEOUT_S:g} s; its log is on standard error")
            time.sleep(0.05)
        ports = json.loads(ports_file.read_text())
        targets = (f"127.0.0.1:{ports[kind]}" for kind in ("grpc", "http"))
        yield Server(*targets, psutil.Process(process.pid))
    finally:
        process.terminate()
        try:
            process.wait(timeout=STOP_TIMEOUT_S)
        finally:  # neither a server that ignores the signal nor Ctrl-C while waiting may leave it running
            process.kill()
            process.wait()


def request(ids: Array, attention: attention_pb2.AttentionSelection | None = None) -> Any:
    """Return a request to the model `minilm` for `last_hidden_state` of one sequence of int64 ids.

    It is made before the measurement, so that the callers' own work stays small.
    """
    tensor = tensor_pb2.Tensor(
        name="input_ids", dtype=tensor_pb2.DATA_TYPE_INT64, shape=[len(ids)], data=ids.astype("<i8").tobytes()
    )
    sequence = inference_service_pb2.Sequence(tensors=inference_service_pb2.TensorInput(tensors=[tensor]))
    outputs = inference_service_pb2.OutputSelection(names=["last_hidden_state"])
    return inference_service_pb2.InferRequest(
        model="minilm", sequences=[sequence], outputs=outputs, attention=attention
    )


async def drive(target: str, requests: list[Any], callers: int) -> list[Any]:
    """Send all requests through `callers` closed loops on one channel. Answers are in the requests' order.

    Raises:
        ExceptionGroup: A call failed: a group of `grpc.aio.AioRpcError`.
    """
    options = [("grpc.max_receive_message_length", 64 << 20)]
    answers: list[Any] = [None] * len(requests)
    waiting = iter(enumerate(requests))
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        stub = inference_service_pb2_grpc.InferenceServiceStub(channel)

        async def caller() -> None:
            for index, message in waiting:
                answers[index] = await stub.Infer(message, timeout=60)

        async with asyncio.TaskGroup() as group:
            for _ in range(callers):
                group.create_task(caller())
    return answers


def wire_selections() -> dict[str, attention_pb2.AttentionSelection | None]:
    """Return selections for one text, from nothing to everything."""
    selection = attention_pb2.AttentionSelection
    return {
        "no attention": None,
        "top-16 links of one row": selection(
            layers=[-1], head_reduction=attention_pb2.HEAD_REDUCTION_MEAN, queries=[0], top_k=16
        ),
        "one layer's mean": selection(layers=[-1], head_reduction=attention_pb2.HEAD_REDUCTION_MEAN),
        "all maps": selection(),
    }
