#!/usr/bin/env bash
# A grpc.aio server keeps the request of an aborted call in memory until the garbage collector runs.
#
# Versions: grpcio 1.83.2, 1.85.1.
# Expected by most: once a call has ended, nothing refers to its message, so reference counting frees it at once, as it
# does after an answer.
# Observed: `context.abort` raises AbortError, and its traceback is part of a circle with the call's own state. The
# frames of the handler, with the request among their variables, stay until the garbage collector runs, which counts
# objects and not bytes. Twenty refused messages of 1 MiB keep 20 MiB, and answered ones none.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
for version in 1.83.2 1.85.1; do
    "$work/venv/bin/pip" install --quiet --disable-pip-version-check "grpcio==$version"
    "$work/venv/bin/python" - <<'PYTHON'
import asyncio
import gc

import grpc

CALLS = 20


class Message:
    """A request that can be counted."""

    def __init__(self, data):
        self.data = data


async def handle(message, context):
    if message.data.startswith(b"refuse"):
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no")
    return b""


async def kept(data):
    server = grpc.aio.server()
    handlers = {"call": grpc.unary_unary_rpc_method_handler(handle, request_deserializer=Message)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("service", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        gc.collect()
        gc.disable()
        for _ in range(CALLS):
            try:
                await channel.unary_unary("/service/call")(data)
            except grpc.RpcError:
                pass
        await asyncio.sleep(0.2)
        found = sum(isinstance(one, Message) for one in gc.get_objects())
        gc.enable()
    await server.stop(0)
    return found


refused, answered = (asyncio.run(kept(word + bytes(2**20))) for word in (b"refuse", b"answer"))
print(f"grpcio {grpc.__version__}: messages in memory after {CALLS} refusals {refused}, after {CALLS} answers {answered}")
assert answered == 0, "the control: messages of answered calls are freed"
if refused == 0:
    raise SystemExit("messages of aborted calls are freed too: the behaviour is no longer there")
PYTHON
done
