"""The cost of a unary call before anything is computed: `python -m bench.floor`, a bare grpc.aio server.

It answers 65 kB. Reported are its processor time a call and the caller's median latency, for one caller and for 64.
Exit code 1 if the server does not start; a failed call raises `grpc.aio.AioRpcError`.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time

import grpc
from rich.console import Console
from rich.table import Table

from bench import echo

ASKED = b"a" * 400
"""A request of as many bytes as a sequence of ids has."""
CALLERS = (1, 64)


async def drive(target: str, callers: int, calls: int) -> list[float]:
    """Return the seconds of each call, from `callers` in a closed loop."""
    waits: list[float] = []
    left = iter(range(calls))
    async with grpc.aio.insecure_channel(target) as channel:
        call = channel.unary_unary(echo.UNARY)

        async def caller() -> None:
            for _ in left:
                began = time.perf_counter()
                await call(ASKED)
                waits.append(time.perf_counter() - began)

        await asyncio.gather(*(caller() for _ in range(callers)))
    return waits


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=3000, help="in each of three rounds")
    options = parser.parse_args()
    table = Table("callers", "server's ms a call", "p50 in ms", "calls/s")
    with echo.bare() as (target, server):
        for callers in CALLERS:
            rounds = []
            for _ in range(3):
                before, began = sum(server.cpu_times()[:2]), time.perf_counter()
                waits = asyncio.run(drive(target, callers, options.calls))
                took, cpu = time.perf_counter() - began, sum(server.cpu_times()[:2]) - before
                rounds.append((1e3 * cpu / len(waits), 1e3 * statistics.median(waits), len(waits) / took))
            medians = (statistics.median(values) for values in zip(*rounds, strict=True))
            table.add_row(str(callers), *(f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in medians))
    Console().print(table)


if __name__ == "__main__":
    main()
