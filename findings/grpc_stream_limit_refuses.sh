#!/usr/bin/env bash
# A gRPC server with grpc.max_concurrent_streams refuses most calls of a client of the same library that keeps to the limit.
#
# Versions: grpcio 1.85.3, Linux; 1.83.2 behaves alike.
# Source: RFC 9113, section 5.1.2 (stream concurrency); GRPC_ARG_MAX_CONCURRENT_STREAMS in
# include/grpc/impl/channel_arg_names.h; streams_allocated in src/core/ext/transport/chttp2/transport/parsing.cc
# Expected by most: a client with more calls than the server's limit holds the rest back until earlier ones end, as gRPC's
# documentation of concurrency states, and every call is answered.
# Observed: the client does hold calls back, and the server answers most of them with RST_STREAM (REFUSED_STREAM), so that
# they fail with UNAVAILABLE: its "overload protection" also counts streams that have ended and are not freed yet. With the
# option grpc.http.overload_protection at 0, which no header or document names, every call is answered, and the limit holds.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check grpcio==1.85.3
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import asyncio
from collections import Counter

import grpc

LIMIT, CALLS = 256, 900


async def codes(options):
    """The codes of calls that are begun at once on one connection, and the most that the server had at a time."""
    running = most = 0

    async def echo(request, context):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.002)
        running -= 1
        return request

    server = grpc.aio.server(options=options)
    handlers = {"echo": grpc.unary_unary_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("service", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    own = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=own) as channel:
        method = channel.unary_unary("/service/echo")
        await method(b"")  # the client has the server's settings

        async def one():
            try:
                await method(b"", timeout=30)
            except grpc.aio.AioRpcError as error:
                return error.code().name
            return "OK"

        found = Counter(await asyncio.gather(*(one() for _ in range(CALLS))))
    await server.stop(None)
    return found, most


limit = [("grpc.max_concurrent_streams", LIMIT)]
cases = {"limit": limit, "limit without overload protection": [*limit, ("grpc.http.overload_protection", 0)], "no limit": []}
found = {name: asyncio.run(codes(options)) for name, options in cases.items()}
for name, (counts, most) in found.items():
    print(f"{name}: {dict(counts)}, at most {most} at a time")
assert found["no limit"][0] == {"OK": CALLS}, "the control: all calls are answered"
without, most = found["limit without overload protection"]
assert without == {"OK": CALLS} and most <= LIMIT, "the control: the client keeps to the limit"
if found["limit"][0] == {"OK": CALLS}:
    raise SystemExit("all calls are answered: the behaviour is no longer there")
PYTHON
