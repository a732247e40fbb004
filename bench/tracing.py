"""Processor time of a null call without and with `--tracing`, beside another checkout: `python -m bench.tracing TREE`.

TREE is, for example, a worktree of the commit before the code of traces. The null model is an identity of 128 int64
ids. All servers run at the same time, and are called in interleaved rounds from 64 callers: that of TREE; this one,
without a trace context and with one that is not sampled; this one with `--tracing`, not sampled and sampled. A context
costs by itself, because it is returned. Spans go to a collector in this process. Reported are the user and system time
of the servers' processes over calls, and the ratios to that of TREE.

Exit code 1 if the median ratio of this server without `--tracing` exceeds its limit, or a server does not start; a
failed call raises `grpc.aio.AioRpcError`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from onnx import TensorProto
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import calls, echo
from bench.against import HERE, started

LIMIT = 1.01
"""Of a call without `--tracing`, over one of a server that has no code of traces."""
TREE, OFF, CONTEXT = "without the code", "off", "off, with a trace context"
UNSAMPLED, SAMPLED = "on, not sampled", "on, sampled"
METHOD = "/attnserve.v1.InferenceService/Infer"


class Sink(trace_service_pb2_grpc.TraceServiceServicer):
    """A collector that drops what it receives."""

    def Export(self, request: object, context: object) -> trace_service_pb2.ExportTraceServiceResponse:  # noqa: N802
        """Take spans."""
        del request, context
        return trace_service_pb2.ExportTraceServiceResponse()


async def drive(target: str, asked: bytes, count: int, flags: str) -> None:
    """Make calls from closed loops on one channel. `flags`: of their trace context."""
    left = iter(range(count))
    metadata = (("traceparent", f"00-{'1' * 32}-{'2' * 16}-{flags}"),) if flags else None
    async with grpc.aio.insecure_channel(target) as channel:
        call = channel.unary_unary(METHOD)

        async def caller() -> None:
            for _ in left:
                await call(asked, metadata=metadata)

        await asyncio.gather(*(caller() for _ in range(calls.CALLERS)))


def measure(tree: Path, rounds: int, count: int, console: Console, *flags: str) -> dict[str, list[float]]:
    """Return the ms of processor time a call, by kind and for each round."""
    asked = calls.request(1).SerializeToString()
    collector = grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Sink(), collector)
    os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{collector.add_insecure_port('127.0.0.1:0')}"
    collector.start()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        echo.write_identity(Path(folder), "null", ("ids", "same"), TensorProto.INT64, ["batch", calls.IDS])
        base = stack.enter_context(started(tree, Path(folder), *flags))
        plain = stack.enter_context(started(HERE, Path(folder), *flags))
        traced = stack.enter_context(started(HERE, Path(folder), "--tracing", *flags))
        kinds = {TREE: (base, ""), OFF: (plain, "")}
        kinds |= {CONTEXT: (plain, "00"), UNSAMPLED: (traced, "00"), SAMPLED: (traced, "01")}
        found: dict[str, list[float]] = {kind: [] for kind in kinds}
        for number in track(range(rounds + 1), description="rounds", console=console, transient=True):
            order = list(kinds.items())
            for kind, (server, sampled) in order if number % 2 else reversed(order):
                before = server.cpu_seconds()
                asyncio.run(drive(server.target, asked, count, sampled))
                if number:  # the first round is the warm-up
                    found[kind].append(1e3 * (server.cpu_seconds() - before) / count)
    collector.stop(0).wait()
    return found


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=20, help="interleaved rounds; default: 20")
    parser.add_argument("--calls", type=int, default=2000, help="calls of each kind in a round; default: 2000")
    parser.add_argument("--json", action="store_true", help="print the numbers of all rounds as JSON")
    parser.add_argument("--flags", default="", help="flags of the servers, separated by spaces")
    options = parser.parse_args()
    found = measure(options.tree.resolve(), options.rounds, options.calls, Console(stderr=True), *options.flags.split())
    ratios = {
        kind: [one / base for one, base in zip(values, found[TREE], strict=True)] for kind, values in found.items()
    }
    if options.json:
        print(json.dumps({"ms": found, "ratios": ratios}))
    else:
        table = Table("traces", "median ms a call", "median ratio", "quartiles of the ratio")
        for kind, values in found.items():
            low, _, high = statistics.quantiles(ratios[kind], n=4)
            ratio = statistics.median(ratios[kind])
            table.add_row(kind, f"{statistics.median(values):.4f}", f"{ratio:.3f}", f"{low:.3f} to {high:.3f}")
        Console().print(table)
    sys.exit(statistics.median(ratios[OFF]) > LIMIT)


if __name__ == "__main__":
    main()
