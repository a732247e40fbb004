#!/usr/bin/env bash
# Channels of one process with equal arguments share one connection: of four server processes, 64 channels reach one.
#
# Versions: grpcio 1.85.3, Linux (four processes listen on one port by SO_REUSEPORT).
# Source: GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, https://grpc.github.io/grpc/core/group__grpc__arg__keys.html
# Expected by most: each channel has its own connection, so that a pool of channels spreads calls over the processes
# behind one address, and one slow stream delays only its channel.
# Observed: all channels use one subchannel, so one connection and one process. The option
# grpc.use_local_subchannel_pool gives each channel its own, and all four processes answer. Any other difference in the
# arguments does so too, such as another value of an option without a meaning.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check grpcio==1.85.3
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import asyncio
import collections
import multiprocessing
import os
import socket

import grpc

SERVERS, CHANNELS = 4, 64


async def answer(request, context):
    return str(os.getpid()).encode()


def serve(port, ready):
    async def main():
        server = grpc.aio.server(options=[("grpc.so_reuseport", 1)])
        handlers = {"call": grpc.unary_unary_rpc_method_handler(answer)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("service", handlers),))
        server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        ready.put(os.getpid())
        await server.wait_for_termination()

    asyncio.run(main())


async def reached(port, options_of):
    """The number of calls that each server process answered, one call a channel."""
    channels = [
        grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options_of(number)) for number in range(CHANNELS)
    ]
    try:
        calls = [channel.unary_unary("/service/call")(b"", timeout=30, wait_for_ready=True) for channel in channels]
        return collections.Counter(await asyncio.gather(*calls))
    finally:
        for channel in channels:
            await channel.close()


# Held, so that no other program takes the port before all servers listen; the socket itself does not listen.
holder = socket.socket()
holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
holder.bind(("127.0.0.1", 0))
port = holder.getsockname()[1]
context = multiprocessing.get_context("fork")
ready = context.Queue()
servers = [context.Process(target=serve, args=(port, ready)) for _ in range(SERVERS)]
for server in servers:
    server.start()
try:
    for _ in servers:
        ready.get(timeout=60)

    async def main():
        return (
            await reached(port, lambda number: []),
            await reached(port, lambda number: [("grpc.use_local_subchannel_pool", 1)]),
            await reached(port, lambda number: [("made.up", number)]),
        )

    plain, local, unequal = asyncio.run(main())
finally:
    for server in servers:
        server.kill()
        server.join()
for what, found in (("default", plain), ("local subchannel pool", local), ("unequal arguments", unequal)):
    print(f"{CHANNELS} channels, {what}: calls by process {sorted(found.values())}")
assert len(local) > 1, "the control: with separate connections, several processes answer"
if len(plain) > 1:
    raise SystemExit("channels have their own connections: the behaviour is no longer there")
assert len(unequal) > 1
PYTHON
