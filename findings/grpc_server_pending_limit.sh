#!/usr/bin/env bash
# A gRPC server in Python cancels calls of a burst once 1,000 wait to be accepted; the clients get CANCELLED without a
# word.
#
# Versions: grpcio 1.85.1. Needs two free processors' time for some seconds; prints counts that vary.
# Source: https://github.com/grpc/grpc/pull/34782 (the limit; not in the public list of channel arguments),
# https://github.com/grpc/grpc/issues/38164
# Expected by most: without maximum_concurrent_rpcs a server accepts every call; an overloaded one answers
# RESOURCE_EXHAUSTED or UNAVAILABLE, which clients retry. CANCELLED means that the caller cancelled.
# Observed: of 5,000 calls at once to an idle server, part fail with CANCELLED, details "CANCELLED", though no client
# cancelled and no handler ran. With grpc.server.max_pending_requests and its _hard_limit at 65,536, all succeed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check grpcio==1.85.1
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import asyncio
import collections
import multiprocessing

import grpc

CALLS = 5000
RAISED = [(f"grpc.server.max_pending_requests{suffix}", 65536) for suffix in ("", "_hard_limit")]


async def answer(request, context):
    return b""


def serve(ports, options):
    async def main():
        server = grpc.aio.server(options=options)
        handlers = {"call": grpc.unary_unary_rpc_method_handler(answer)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("service", handlers),))
        ports.put(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        await server.wait_for_termination()

    asyncio.run(main())


async def burst(port):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await channel.channel_ready()
        method = channel.unary_unary("/service/call")

        async def code():
            try:
                await method(b"", timeout=60)
            except grpc.RpcError as error:
                return f"{error.code().name}, details {error.details()!r}"
            return "OK"

        return collections.Counter(await asyncio.gather(*(code() for _ in range(CALLS))))


def measure(options):
    """The server runs in another process, so that the client's work does not delay it."""
    context = multiprocessing.get_context("fork")
    ports = context.Queue()
    server = context.Process(target=serve, args=(ports, options))
    server.start()
    try:
        return asyncio.run(burst(ports.get(timeout=60)))
    finally:
        server.kill()
        server.join()


plain, raised = measure([]), measure(RAISED)
print("as installed:", dict(plain))
print("limits raised:", dict(raised))
assert raised == {"OK": CALLS}, "the control: with raised limits every call succeeds"
if plain == {"OK": CALLS}:
    raise SystemExit("no call was cancelled: the behaviour is no longer there, or this machine accepts calls too fast")
assert set(plain) == {"OK", "CANCELLED, details 'CANCELLED'"}, plain
PYTHON
