#!/usr/bin/env bash
# Closing a grpc.aio channel raises CancelledError in the tasks that wait for its calls, though no task was cancelled.
#
# Versions: grpcio 1.85.1.
# Source: https://grpc.github.io/grpc/python/grpc_asyncio.html#grpc.aio.Channel.close;
# https://github.com/grpc/grpc/pull/21819
# Expected by most: a call that the channel's end breaks off fails with an AioRpcError, as a call that the server
# cancels does.
# Observed: the waiting task gets asyncio.CancelledError, which `except Exception` and `except grpc.RpcError` let
# through. The task ends as cancelled although task.cancelling() is 0. A supervisor that restarts failed tasks takes it
# for a shutdown, and a TaskGroup goes on without the result. A status CANCELLED from the server does raise
# AioRpcError.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check grpcio==1.85.1
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import asyncio

import grpc


async def wait(request, context):
    await asyncio.sleep(60)


async def refuse(request, context):
    await context.abort(grpc.StatusCode.CANCELLED, "the server cancels")


async def main():
    server = grpc.aio.server()
    handlers = {"wait": wait, "refuse": refuse}
    handlers = {name: grpc.unary_unary_rpc_method_handler(handler) for name, handler in handlers.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("service", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")

    async def call(name):
        try:
            await channel.unary_unary(f"/service/{name}")(b"")
        except Exception as error:
            return f"{type(error).__name__} {error.code().name}"

    refused = await call("refuse")
    print("the server cancels:", refused)
    assert refused == "AioRpcError CANCELLED", "the control"
    task = asyncio.create_task(call("wait"))
    await asyncio.sleep(0.5)
    await channel.close()
    done, _ = await asyncio.wait([task], timeout=10)
    assert done, "the call goes on after its channel was closed"
    print(f"the channel is closed: task.cancelled() {task.cancelled()}, task.cancelling() {task.cancelling()}")
    await server.stop(None)
    if not task.cancelled():
        raise SystemExit("the task gets an error that it can catch: the behaviour is no longer there")
    assert task.cancelling() == 0, "something cancelled the task"


asyncio.run(main())
PYTHON
