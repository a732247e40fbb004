"""This server in a separate process, requests for it, and callers in closed loops. Other benchmarks import it.

The process exits with a message and code 1 if the server does not start. A failed call raises `grpc.aio.AioRpcError`.
"""

from __future__ import annotations

import asyncio
import json
import signal
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


@dataclass(frozen=True, slots=True)
class Server:
    """A running server process."""

    target: str
    http: str
    process: psutil.Process

    def cpu_seconds(self) -> float:
        """Return the user and system time of the process so far."""
        times = self.process.cpu_times()
        return float(times.user + times.system)


@contextmanager
def running(repository: Path, *flags: str) -> Iterator[Server]:
    """Run `attnserve-server serve` on free loopback ports until the block ends, with defaults except for `flags`."""
    command = [str(Path(sys.executable).with_name("attnserve-server"))]
    with tempfile.TemporaryDirectory() as folder, started(command, repository, Path(folder), *flags) as server:
        yield server


@contextmanager
def started(command: list[str], repository: Path, folder: Path, *flags: str) -> Iterator[Server]:
    """Run another command that takes the server's flags, until the block ends. `folder` is for files of the run."""
    ports_file = folder / "ports.json"
    line = [*command, "serve", "--repository", str(repository), "--grpc-port", "0", "--http-port", "0"]
    process = subprocess.Popen(
        [*line, "--ports-file", str(ports_file), "--log-level", "warning", *flags], stdout=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + START_TIMEOUT_S
        while not (ports_file.exists() and ports_file.stat().st_size):
            if process.poll() is not None or time.monotonic() > until:
                sys.exit(f"the server did not start within {START_TIMEOUT_S:g} s; its log is on standard error")
            time.sleep(0.05)
        ports = json.loads(ports_file.read_text())
        targets = (f"127.0.0.1:{ports[kind]}" for kind in ("grpc", "http"))
        yield Server(*targets, psutil.Process(process.pid))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


def request(ids: Array, attention: attention_pb2.AttentionSelection | None = None) -> Any:
    """Return a request for one sequence of ids, made beforehand so that the callers' own work stays small."""
    tensor = tensor_pb2.Tensor(
        name="input_ids", dtype=tensor_pb2.DATA_TYPE_INT64, shape=[len(ids)], data=ids.astype("<i8").tobytes()
    )
    sequence = inference_service_pb2.Sequence(tensors=inference_service_pb2.TensorInput(tensors=[tensor]))
    outputs = inference_service_pb2.OutputSelection(names=["last_hidden_state"])
    return inference_service_pb2.InferRequest(
        model="minilm", sequences=[sequence], outputs=outputs, attention=attention
    )


async def drive(target: str, requests: list[Any], callers: int) -> list[Any]:
    """Send all requests through `callers` closed loops on one channel. Answers are in the requests' order."""
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
