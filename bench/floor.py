"""What a unary call costs before anything is computed: `python -m bench.floor`, a bare grpc.aio server.

It answers 65 kB. Told are its processor time a call and the caller's median latency, for one caller and for 64.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import time

import grpc
import psutil
from rich.console import Console
from rich.table import Table

METHOD = "/bench.Floor/Call"
ASKED, ANSWERED = b"a" * 400, b"a" * 65_000
"""As many bytes as a sequence of ids has, and its hidden states."""
CALLERS = (1, 64)


async def serve() -> None:
    """The server, in a process of its own; prints its port."""

    async def answer(_: bytes, __: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        return ANSWERED

    server = grpc.aio.server()
    service, method = METHOD[1:].split("/")
    handler = grpc.unary_unary_rpc_method_handler(answer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


async def drive(port: int, callers: int, calls: int) -> list[float]:
    """Seconds of each call, from so many callers in a closed loop."""
    waits: list[float] = []
    left = iter(range(calls))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(METHOD)

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
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve())
        return
    table = Table("callers", "server's ms a call", "p50 in ms", "calls/s")
    line = [sys.executable, "-m", "bench.floor", "--serve"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port, server = int(process.stdout.readline()), psutil.Process(process.pid)
        for callers in CALLERS:
            rounds = []
            for _ in range(3):
                before, began = sum(server.cpu_times()[:2]), time.perf_counter()
                waits = asyncio.run(drive(port, callers, options.calls))
                took, cpu = time.perf_counter() - began, sum(server.cpu_times()[:2]) - before
                rounds.append((1e3 * cpu / len(waits), 1e3 * statistics.median(waits), len(waits) / took))
            told = (statistics.median(values) for values in zip(*rounds, strict=True))
            table.add_row(str(callers), *(f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in told))
        process.terminate()
    Console().print(table)


if __name__ == "__main__":
    main()
