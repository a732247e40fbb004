"""Processor time of the service itself, a call, beside a bare grpc.aio server: `python -m bench.calls`.

The null model is an identity of 128 int64 ids. The rounds are interleaved: unary calls to the bare server, unary calls
to the service, and stream messages of 32 sequences to the service, each from 64 callers. The bare server answers as
many bytes. Reported is the user and system time of the servers' processes over calls, that of the client, and the
ratios; where the service has fronts and engines, also the time of each; and what one engine takes when six fronts feed
it (`bench.feeding`), so how many fronts it can feed. An engine's main thread does everything but runs.

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
from attnserve.v1 import inference_service_pb2, tensor_pb2
from onnx import TensorProto
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import echo, feeding, service
from bench.finding import Finding

IDS = 128
CALLERS = 64
PER_MESSAGE = 32
IN_FLIGHT = 4
"""Stream messages in flight."""
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


NAMES = {
    "bare": "bare", "unary": "unary", "stream": "stream", "engine": f"an engine fed by {feeding.FRONTS} fronts",
}  # fmt: skip
ENGINE_LIMIT = 0.3
"""The limit of the engine's main thread, a unary call, over a bare call."""


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
    """Send messages through one stream, `IN_FLIGHT` at a time, and return the number of their sequences.

    `asked` has many times as many, because those in flight must have different ids, and one may be overtaken.
    """
    count = calls // PER_MESSAGE
    async with grpc.aio.insecure_channel(target) as channel:
        call = channel.stream_stream("/attnserve.v1.InferenceService/StreamInfer")()
        room = asyncio.Semaphore(IN_FLIGHT)

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
    """Return, by kind of call and for each round, ms of processor time a call by parts, and the calls a second."""
    found: dict[str, list[dict[str, float]]] = {"bare": [], "unary": [], "stream": [], "engine": []}
    asked = request(1).SerializeToString()
    messages = [
        inference_service_pb2.StreamInferRequest(request=request(PER_MESSAGE, str(number))).SerializeToString()
        for number in range(64)
    ]
    with tempfile.TemporaryDirectory() as folder:
        echo.write_identity(Path(folder), "null", ("ids", "same"), TensorProto.INT64, ["batch", IDS])
        with service.running(Path(folder), *flags) as server:
            answered = len(asyncio.run(_one(server.target, asked)))
            with echo.bare(answered) as (bare, bare_process):
                kinds: dict[str, tuple[Callable[[], dict[str, float]], Callable[[], Any]]] = {
                    "bare": (lambda: {"all": sum(bare_process.cpu_times()[:2])}, lambda: unary(bare, asked, calls)),
                    "unary": (lambda: _times(server), lambda: unary(server.target, asked, calls)),
                    "stream": (lambda: _times(server), lambda: streamed(server.target, messages, calls)),
                }
                for number in track(range(rounds + 1), description="calls", console=console, transient=True):
                    for kind, (times, drive) in kinds.items():
                        before, own, began = times(), time.process_time(), time.perf_counter()
                        done = asyncio.run(drive())
                        took, own, after = time.perf_counter() - began, time.process_time() - own, times()
                        if number:  # the first round is the warm-up
                            ms = {part: 1e3 * (seconds - before[part]) / done for part, seconds in after.items()}
                            found[kind].append({**ms, "client": 1e3 * own / done, "per_s": done / took})
                    if number:
                        found["engine"].append(feeding.measure(Path(folder), "null", 2 * calls))
    return found


def _times(server: service.Server) -> dict[str, float]:
    """Return the seconds of all processes, and of parts of a server of several."""
    by_role = server.cpu_by_role()
    times = {"all": sum(by_role.values())}
    if by_role["engine"]:
        loop = server.engine_loop_seconds()
        times |= {"fronts": by_role["front"], "engine": by_role["engine"], "main thread of the engine": loop}
    return times


async def _one(target: str, asked: bytes) -> bytes:
    async with grpc.aio.insecure_channel(target) as channel:
        answer: bytes = await channel.unary_unary(echo.UNARY)(asked)
        return answer


def findings(found: dict[str, list[dict[str, float]]]) -> list[Finding]:
    """Return the ratios with their limits, each round by itself."""

    def ratios(one: str, other: str, part: str = "all") -> list[float]:
        return [first[part] / second["all"] for first, second in zip(found[one], found[other], strict=True)]

    results = [
        Finding("a unary call / a bare call", ratios("unary", "bare"), UNARY_LIMIT),
        Finding(
            f"a sequence of a stream message of {PER_MESSAGE} / a unary call", ratios("stream", "unary"), STREAM_LIMIT
        ),
    ]
    fed = Finding(
        f"a unary call in the main thread of an engine of {feeding.FRONTS} fronts / a bare call",
        ratios("engine", "bare", "main thread"),
        ENGINE_LIMIT,
    )
    return [*results, fed]


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
            medians = {figure: statistics.median(one[figure] for one in rounds) for figure in rounds[0]}
            for part in (figure for figure in medians if figure != "per_s"):
                rate = f"{medians['per_s']:,.0f}" if part == "all" and "per_s" in medians else ""
                table.add_row(NAMES[kind] if part == "all" else f"  {part}", f"{medians[part]:.3f}", rate)
        Console().print(table)
        if "fronts" in found["unary"][0]:
            fronts, engine = (
                statistics.median(one[part] for one in found[kind])
                for kind, part in (("unary", "fronts"), ("engine", "all"))
            )
            print(f"fronts that take as much as one engine: {fronts / engine:.1f}")
        for one in results:
            print(f"{one.what}: {one.median:.2f} ({min(one.values):.2f} to {max(one.values):.2f}), limit {one.limit:g}")
    if not all(one.holds for one in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
