"""Processor time of the service itself, a call, beside a bare grpc.aio server: `python -m bench.calls`.

The null model is an identity of 128 int64 ids. The rounds are interleaved: unary calls to the bare server, unary calls
to the service, and stream messages of 32 sequences to the service, each from 64 callers. The bare server answers as
many bytes. Reported is the user and system time of the servers' processes over calls, and the ratios.

Exit code 1 if a ratio exceeds its limit or a server does not start; a failed call raises `grpc.aio.AioRpcError`, and a
failed conversion of the model `subprocess.CalledProcessError`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
from attnserve.v1 import inference_service_pb2, tensor_pb2
from onnx import TensorProto
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import echo, service
from bench.finding import Finding

IDS = 128
CALLERS = 64
PER_MESSAGE = 32
UNARY_LIMIT = 2.0
"""The limit of a unary call over a bare one."""
STREAM_LIMIT = 0.4
"""The limit of a sequence of a stream message over a unary call."""


def request(sequences: int, request_id: str = "") -> inference_service_pb2.InferRequest:
    """Return a request of that many sequences."""
    ids = np.arange(IDS, dtype="<i8")
    tensor = tensor_pb2.Tensor(name="ids", dtype=tensor_pb2.DATA_TYPE_INT64, shape=[IDS], data=ids.tobytes())
    one = inference_service_pb2.Sequence(tensors=inference_service_pb2.TensorInput(tensors=[tensor]))
    return inference_service_pb2.InferRequest(model="null", sequences=[one] * sequences, request_id=request_id)


def cpu_s(process: psutil.Process) -> float:
    """Return the user and system time of a process and of its living children, in seconds."""
    return sum(sum(one.cpu_times()[:2]) for one in (process, *process.children(recursive=True)))


async def unary(target: str, asked: bytes, calls: int) -> int:
    """Make unary calls from `CALLERS` closed loops on one channel, and return their number."""
    left = iter(range(calls))
    async with grpc.aio.insecure_channel(target) as channel:
        call = channel.unary_unary(echo.UNARY)

        async def caller() -> None:
            for _ in left:
                await call(asked)

        await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return calls


async def streamed(target: str, asked: list[bytes], calls: int) -> int:
    """Send messages through one stream, as many in flight as `asked` has, and return the number of their sequences."""
    count = calls // PER_MESSAGE
    async with grpc.aio.insecure_channel(target) as channel:
        call = channel.stream_stream("/attnserve.v1.InferenceService/StreamInfer")()
        room = asyncio.Semaphore(len(asked) // 2)

        async def write() -> None:
            for message in itertools.islice(itertools.cycle(asked), count):
                await room.acquire()
                await call.write(message)
            await call.done_writing()

        writer = asyncio.create_task(write())
        answered = 0
        async for answer in call:
            found = inference_service_pb2.StreamInferResponse.FromString(answer)
            assert len(found.response.results) == PER_MESSAGE, found.status
            answered += len(found.response.results)
            room.release()
        await writer
    return answered


def measure(rounds: int, calls: int, console: Console, *flags: str) -> dict[str, list[dict[str, float]]]:
    """Return, by kind of call, the milliseconds of processor time a call and the calls a second, for each round."""
    found: dict[str, list[dict[str, float]]] = {"bare": [], "unary": [], "stream": []}
    asked = request(1).SerializeToString()
    messages = [
        inference_service_pb2.StreamInferRequest(request=request(PER_MESSAGE, str(number))).SerializeToString()
        for number in range(8)
    ]
    with tempfile.TemporaryDirectory() as folder:
        echo.write_identity(Path(folder), "null", ("ids", "same"), TensorProto.INT64, ["batch", IDS])
        with service.running(Path(folder), *flags) as server:
            answered = len(asyncio.run(_one(server.target, asked)))
            with echo.bare(answered) as (bare, bare_process):
                kinds: dict[str, tuple[psutil.Process, Callable[[], Any]]] = {
                    "bare": (bare_process, lambda: unary(bare, asked, calls)),
                    "unary": (server.process, lambda: unary(server.target, asked, calls)),
                    "stream": (server.process, lambda: streamed(server.target, messages, calls)),
                }
                for number in track(range(rounds + 1), description="calls", console=console, transient=True):
                    for kind, (process, drive) in kinds.items():
                        before, began = cpu_s(process), time.perf_counter()
                        done = asyncio.run(drive())
                        took, used = time.perf_counter() - began, cpu_s(process) - before
                        if number:  # the first round is the warm-up
                            found[kind].append({"ms": 1e3 * used / done, "per_s": done / took})
    return found


async def _one(target: str, asked: bytes) -> bytes:
    async with grpc.aio.insecure_channel(target) as channel:
        answer: bytes = await channel.unary_unary(echo.UNARY)(asked)
        return answer


def findings(found: dict[str, list[dict[str, float]]]) -> list[Finding]:
    """Return the two ratios with their limits, each round by itself."""

    def ratios(one: str, other: str) -> list[float]:
        return [first["ms"] / second["ms"] for first, second in zip(found[one], found[other], strict=True)]

    return [
        Finding("a unary call / a bare call", ratios("unary", "bare"), UNARY_LIMIT),
        Finding(
            f"a sequence of a stream message of {PER_MESSAGE} / a unary call", ratios("stream", "unary"), STREAM_LIMIT
        ),
    ]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=4000, help="in each round and kind")
    parser.add_argument("--flags", default="", help="flags of the server, separated by spaces")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    found = measure(options.rounds, options.calls, Console(stderr=True), *options.flags.split())
    results = findings(found)
    if options.json:
        facts = {"grpcio": metadata.version("grpcio"), "rounds": found, "findings": [one.facts() for one in results]}
        print(json.dumps(facts, indent=2))
    else:
        table = Table("", "ms a call", "calls/s", title=f"grpcio {metadata.version('grpcio')}", title_justify="left")
        for kind, rounds in found.items():
            ms, per_s = (statistics.median(one[figure] for one in rounds) for figure in ("ms", "per_s"))
            table.add_row(kind, f"{ms:.3f}", f"{per_s:,.0f}")
        Console().print(table)
        for one in results:
            print(f"{one.what}: {one.median:.2f} ({min(one.values):.2f} to {max(one.values):.2f}), limit {one.limit:g}")
    if not all(one.holds for one in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
