#!/usr/bin/env bash
# The asyncio server of grpcio 1.84 and later takes more processor time for a unary call than that of 1.83.
#
# Versions: grpcio 1.83.2, 1.84.0 and 1.85.3; Python 3.11, Linux x86-64. Prints times that vary; the ratio is the point.
# Source: https://github.com/grpc/grpc/issues/43092 (an earlier loss of throughput, from 1.75.1 on)
# Expected by most: a minor release costs a call nothing, or little beside the work of the call.
# Observed: with 64 callers and answers of 1 kB, 1.84.0 takes 1.12 and 1.16, and 1.85.3 takes 1.16 and 1.21 times the
# server time of 1.83.2: medians of 7 interleaved rounds in two runs on two busy cores, where single rounds were 0.85 to
# 1.47. Use a quiet machine. A comparison of servers must use one release of grpcio for all of them.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 1.83.2 1.84.0 1.85.3; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install --quiet --disable-pip-version-check "grpcio==$version"
done
cd "$work"
cat > server.py <<'SERVER'
import asyncio
import sys

import grpc


async def answer(request, context):
    return request


async def main():
    server = grpc.aio.server()
    handlers = {"call": grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("service", handlers),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


asyncio.run(main())
SERVER
# The client is of one release, so that only the server differs.
1.83.2/bin/python - <<'PYTHON'
import asyncio
import os
import statistics
import subprocess
import time

import grpc

VERSIONS, ROUNDS, CALLS, CALLERS = ("1.83.2", "1.84.0", "1.85.3"), 7, 4000, 64
TICKS = os.sysconf("SC_CLK_TCK")


def seconds_of(process):
    fields = open(f"/proc/{process.pid}/stat").read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


async def load(port, calls):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        method = channel.unary_unary("/service/call")
        left = iter(range(calls))

        async def caller():
            for _ in left:
                await method(b"x" * 1024, timeout=60)

        await asyncio.gather(*(caller() for _ in range(CALLERS)))


servers = {}
try:
    for version in VERSIONS:
        process = subprocess.Popen([f"{version}/bin/python", "server.py"], stdout=subprocess.PIPE, text=True)
        servers[version] = process, int(process.stdout.readline())
    for _, port in servers.values():
        asyncio.run(load(port, 1000))
    times = {version: [] for version in VERSIONS}
    for turn in range(ROUNDS):
        for version in VERSIONS[turn % 3 :] + VERSIONS[: turn % 3]:
            process, port = servers[version]
            before = seconds_of(process)
            asyncio.run(load(port, CALLS))
            times[version].append(1e3 * (seconds_of(process) - before) / CALLS)
finally:
    for process, _ in servers.values():
        process.kill()
        process.wait()
base = times[VERSIONS[0]]
ratios = {}
for version in VERSIONS:
    found = [after / before for after, before in zip(times[version], base)]
    ratios[version] = statistics.median(found)
    print(
        f"grpcio {version}: {statistics.median(times[version]):.3f} ms a call, {ratios[version]:.2f} of {VERSIONS[0]}"
        f" ({min(found):.2f} to {max(found):.2f})"
    )
if max(ratios["1.84.0"], ratios["1.85.3"]) < 1.05:
    raise SystemExit("the releases take the same time: the behaviour is no longer there")
assert min(ratios["1.84.0"], ratios["1.85.3"]) > 1.05, "not both of them take more"
PYTHON
