"""How the rate of calls grows with fronts: `python -m bench.fronts`.

Calls to the null model of `bench.calls`, of 128 ids, from separate processes with several connections each, to a server
with one front and to one with two, in interleaved rounds. The system gives each connection to one front, so the
connections are many. Two fronts need four cores: two for them, and two for the engine and the callers. With fewer, the
figures are printed, and the limit does not count.

Exit code 1 if the limit counts and does not hold, or a server does not start.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import grpc
from attnserve_server.domain.machine import cores
from onnx import TensorProto

from bench import calls, echo, service
from bench.finding import Finding

LIMIT = 1.7
LEAST_CORES = 4
CONNECTIONS = 8
"""Of each process of callers."""


async def _drive(target: str, count: int) -> None:
    asked = calls.request(1).SerializeToString()
    left = iter(range(count))
    options = [("grpc.use_local_subchannel_pool", 1)]  # else equal channels share one connection
    channels = [grpc.aio.insecure_channel(target, options=options) for _ in range(CONNECTIONS)]

    async def caller(channel: grpc.aio.Channel) -> None:
        call = channel.unary_unary(echo.UNARY)
        for _ in left:
            await call(asked)

    await asyncio.gather(*(caller(channel) for channel in channels for _ in range(calls.CALLERS // CONNECTIONS)))
    for channel in channels:
        await channel.close()


def drive(target: str, count: int) -> None:
    """Make unary calls from 64 closed loops."""
    asyncio.run(_drive(target, count))


def measure(rounds: int, count: int) -> Finding:
    """Return the ratio of the rates of two fronts and of one, with the rates themselves."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(2, mp_context=get_context("spawn")) as callers:
        echo.write_identity(Path(folder), "null", ("ids", "same"), TensorProto.INT64, ["batch", calls.IDS])
        with (
            service.running(Path(folder), "--isolation", "process", "--fronts", "1") as one,
            service.running(Path(folder), "--isolation", "process", "--fronts", "2") as two,
        ):
            for number in range(rounds + 1):
                for fronts, server in ((1, one), (2, two)):
                    began = time.perf_counter()
                    list(callers.map(drive, [server.target] * 2, [count // 2] * 2))
                    if number:  # the first round is the warm-up
                        rates[fronts].append(count / (time.perf_counter() - began))
    ratios = [more / less for less, more in zip(rates[1], rates[2], strict=True)]
    detail = {f"{fronts}_fronts_per_s": statistics.median(values) for fronts, values in rates.items()}
    return Finding("calls/s of two fronts / of one", ratios, LIMIT, most=False, detail=detail)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=4000, help="in each round")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    found = measure(options.rounds, options.calls)
    counts = cores() >= LEAST_CORES
    if options.json:
        print(json.dumps({"cores": cores(), "limit_counts": counts, **found.facts()}, indent=2))
    else:
        one, two = found.detail.values()
        print(f"one front: {one:,.0f} calls/s, two: {two:,.0f}")
        print(f"{found.what}: {found.median:.2f} ({min(found.values):.2f} to {max(found.values):.2f}), limit {LIMIT:g}")
        if not counts:
            print(f"The limit does not count here: {cores()} cores, and it needs {LEAST_CORES}.")
    if counts and not found.holds:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
