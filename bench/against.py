"""Latency and rate of MiniLM beside another checkout of the project: `python -m bench.against TREE --callers 1`.

TREE is, for example, a worktree of a release. Its server and the one of this checkout run at the same time, and the
rounds are interleaved. With `--flags`, a third one has these flags. All use this environment's packages. The requests
are those of `bench.acceptance`: one sequence of lognormal length each, the whole `last_hidden_state` comes back.

A missing bundle of MiniLM, and a server that does not start, raise SystemExit with a message, so code 1. A failed call
raises `grpc.aio.AioRpcError`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from attnserve.v1 import inference_service_pb2_grpc
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import service
from bench.runtime import minilm_of
from bench.scenarios import VOCABULARY_SIZE
from bench.workload import sequences

HERE = Path(__file__).parent.parent
_COMMAND = "import sys; sys.argv[0] = 'attnserve-server'; from attnserve_server.cli import main; main()"
_OPTIONS = [("grpc.max_receive_message_length", 64 << 20)]
BASE = "base"


@contextmanager
def started(tree: Path, repository: Path, *flags: str) -> Iterator[service.Server]:
    """Run the server of a checkout until the block ends."""
    path = ":".join(str(tree / folder) for folder in ("proto", "server", "client"))
    command = ["env", f"PYTHONPATH={path}", sys.executable, "-P", "-c", _COMMAND]
    with (
        tempfile.TemporaryDirectory() as folder,
        service.started(command, repository, Path(folder), *flags) as server,
    ):
        yield server


async def load(target: str, requests: list[Any], callers: int) -> tuple[float, float]:
    """Send all from closed loops on one channel, and return the median latency in ms, and the requests a second."""
    latencies: list[float] = []
    left = iter(requests)
    async with grpc.aio.insecure_channel(target, options=_OPTIONS) as channel:
        stub = inference_service_pb2_grpc.InferenceServiceStub(channel)

        async def caller() -> None:
            for request in left:
                begun = time.perf_counter()
                await stub.Infer(request)
                latencies.append(time.perf_counter() - begun)

        began = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(callers)))
        took = time.perf_counter() - began
    return 1e3 * statistics.median(latencies), len(requests) / took


def measure(options: argparse.Namespace, console: Console) -> dict[str, list[dict[str, float]]]:
    """Return, by server and for each round, `p50_ms` and `per_s`."""
    minilm_of(options.repository)
    requests = [service.request(ids) for ids in sequences(options.requests, VOCABULARY_SIZE)]
    servers: dict[str, tuple[Path, list[str]]] = {BASE: (options.base.resolve(), []), "this": (HERE, [])}
    if options.flags:
        servers[f"this {options.flags}"] = (HERE, options.flags.split())
    found: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
    with contextlib.ExitStack() as stack:
        targets = {
            name: stack.enter_context(started(tree, options.repository, *flags)).target
            for name, (tree, flags) in servers.items()
        }
        for number in track(range(options.rounds + 1), description="rounds", console=console, transient=True):
            for name, target in targets.items():
                p50_ms, per_s = asyncio.run(load(target, requests, options.callers))
                if number:  # the first round is the warm-up
                    found[name].append({"p50_ms": p50_ms, "per_s": per_s})
    return found


def ratios(found: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """Return each server's figures over those of the base in the same round."""
    return {
        name: {
            figure: [one[figure] / other[figure] for one, other in zip(rounds, found[BASE], strict=True)]
            for figure in rounds[0]
        }
        for name, rounds in found.items()
        if name != BASE
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, metavar="TREE", help="another checkout")
    parser.add_argument("--repository", type=Path, default=Path(".demo/models"))
    parser.add_argument("--callers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=150, help="in each round")
    parser.add_argument("--flags", default="", help="of a further server of this checkout, separated by spaces")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    found = measure(options, Console(stderr=True))
    over = ratios(found)
    if options.json:
        print(json.dumps({"rounds": found, "over_base": over}, indent=2))
        return
    table = Table("", "p50 ms", "a second", "p50 / base", "rate / base")
    for name, rounds in found.items():
        cells = [f"{statistics.median(one[figure] for one in rounds):.1f}" for figure in ("p50_ms", "per_s")]
        cells += [
            f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
            for values in over.get(name, {}).values()
        ]
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
