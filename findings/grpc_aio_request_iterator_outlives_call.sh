#!/usr/bin/env bash
# grpc.aio goes on reading a stream's request iterator after the call has ended, and neither
# call.cancel() nor channel.close() stops it.
#
# Versions: grpcio 1.85.1.
# Source: https://grpc.github.io/grpc/python/grpc_asyncio.html#grpc.aio.StreamStreamMultiCallable;
# https://github.com/grpc/grpc/issues/25339, https://github.com/grpc/grpc/issues/29518
# Expected by most: once the server has ended the call with OK, the client's generator is closed, and its `finally`
# runs.
# Observed: the task that reads the generator goes on waiting for the next request. Reading all answers, call.cancel()
# and channel.close() leave it as it is. A client that yields requests as they come in keeps one task, and what its
# generator holds, for each stream that the server ended first. The generator itself must watch for the end of the
# call.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check grpcio==1.85.1
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import asyncio

import grpc


async def answer_once(requests, context):
    yield b"the only answer"


async def main():
    server = grpc.aio.server()
    handlers = {"stream": grpc.stream_stream_rpc_method_handler(answer_once)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("service", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    closed, more = asyncio.Event(), asyncio.Event()

    async def requests():
        try:
            yield b"the only request"
            await more.wait()
        finally:
            closed.set()

    async def is_closed():
        await asyncio.sleep(0.5)
        return closed.is_set()

    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
    call = channel.stream_stream("/service/stream")(requests())
    answers = [answer async for answer in call]
    code = await call.code()
    assert (answers, code) == ([b"the only answer"], grpc.StatusCode.OK), "the control: the call succeeds"
    found = {"the call ended with OK": await is_closed()}
    call.cancel()
    found["call.cancel()"] = await is_closed()
    await channel.close()
    found["channel.close()"] = await is_closed()
    for after, state in found.items():
        print(f"{after}: the generator is {'closed' if state else 'open'}")
    readers = [task for task in asyncio.all_tasks() if "request_iterator" in task.get_coro().__qualname__]
    for task in readers:
        task.cancel()
    await asyncio.wait(readers or [asyncio.create_task(asyncio.sleep(0))])
    await server.stop(None)
    if any(found.values()):
        raise SystemExit("the generator is closed: the behaviour is no longer there")
    assert len(readers) == 1, readers


asyncio.run(main())
PYTHON
