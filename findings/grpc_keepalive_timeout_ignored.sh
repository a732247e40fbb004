#!/usr/bin/env bash
# A client with grpc.keepalive_timeout_ms of 1 s notices a dead peer after 60 s: another option sets how long it waits.
#
# Versions: grpcio 1.85.3, Linux; 1.76.0 and 1.83.2 behave alike.
# Source: https://github.com/grpc/grpc/blob/master/doc/keepalive.md, GRPC_ARG_KEEPALIVE_TIMEOUT_MS and
# GRPC_ARG_PING_TIMEOUT_MS in include/grpc/impl/channel_arg_names.h
# Expected by most: with keepalive_time 2 s and keepalive_timeout 1 s, a call to a process that is stopped fails with
# UNAVAILABLE after about 3 s, as the documentation of keepalive describes.
# Observed: nothing happens for the 12 s of this script; gRPC waits grpc.http2.ping_timeout_ms, 60 s by default, for the
# answer to any ping. With that option at 1 s too, the call fails after 3 s. So failover takes a minute in clients, and
# servers keep the state of dead peers as long, unless both options are set.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check grpcio==1.85.3
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import os
import signal
import subprocess
import sys
import threading
import time

import grpc

SERVER = """
import threading
from concurrent import futures
import grpc

def wait(request, context):
    threading.Event().wait(60)
    return request

options = [("grpc.http2.min_recv_ping_interval_without_data_ms", 1000)]
server = grpc.server(futures.ThreadPoolExecutor(4), options=options)
handlers = {"wait": grpc.unary_unary_rpc_method_handler(wait)}
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("service", handlers),))
print(server.add_insecure_port("127.0.0.1:0"), flush=True)
server.start()
server.wait_for_termination()
"""
KEEPALIVE = [("grpc.keepalive_time_ms", 2000), ("grpc.keepalive_timeout_ms", 1000)]
WATCHED_S = 12.0
found = {}


def seconds_to_failure(name, options, stop):
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    try:
        port = int(server.stdout.readline())
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            call = channel.unary_unary("/service/wait").future(b"", timeout=WATCHED_S)
            grpc.channel_ready_future(channel).result(timeout=10)
            time.sleep(0.5)
            begun = time.monotonic()
            if stop:
                os.kill(server.pid, signal.SIGSTOP)
            error = call.exception()
            found[name] = error.code().name, time.monotonic() - begun
    finally:
        server.kill()
        server.wait()


cases = {
    "keepalive": (KEEPALIVE, True),
    "keepalive and ping_timeout": ([*KEEPALIVE, ("grpc.http2.ping_timeout_ms", 1000)], True),
    "both, at a server that runs": ([*KEEPALIVE, ("grpc.http2.ping_timeout_ms", 1000)], False),
}
threads = [threading.Thread(target=seconds_to_failure, args=(name, *case)) for name, case in cases.items()]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
for name in cases:
    print(f"{name}: {found[name][0]} after {found[name][1]:.1f} s")
assert found["keepalive and ping_timeout"][0] == "UNAVAILABLE", "the control: with both options the peer is noticed"
assert found["both, at a server that runs"][0] == "DEADLINE_EXCEEDED", "the control: a living peer is no dead one"
if found["keepalive"][0] == "UNAVAILABLE":
    raise SystemExit("keepalive_timeout has an effect by itself: the behaviour is no longer there")
PYTHON
