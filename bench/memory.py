"""Memory: one copy of the weights for any number of instances, and no growth over many requests; a control leaks.

`bench.acceptance` calls it. `copies` raises SystemExit, so code 1, if the repository has no bundle of MiniLM, and all
functions that start a server do if it does not start. `load` raises the client's AttnserveError if the server refuses
the first requests; later refusals are not counted.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attnserve_client.bench.run import Plan, measure
from attnserve_client.bench.workload import Workload

from bench import service
from bench.finding import Finding
from bench.runtime import minilm_of
from bench.workload import sequences

REQUESTS = 20_000
LIMIT_MB = 16.0
COPIES_LIMIT = 0.25
"""The limit of the memory of seven more instances, as a share of the weights' file: their threads, and buffers of runs,
a megabyte or so each. A copy of the weights would be 1 for each."""
_CONTROL_SHARE = 0.25
VOCABULARY_SIZE = 30_522


def copies(repository: Path) -> Finding:
    """Measure the memory of eight instances beyond one, relative to the size of the weights."""
    weights = minilm_of(repository).stat().st_size / 1e6
    taken = []
    for instances in (1, 8):
        with service.running(repository, "--instances", str(instances), "--remember-costs", "false") as server:
            load(server, 200)
            taken.append(sum(server.resident_mb().values()))
    detail = {"one_MB": taken[0], "eight_MB": taken[1], "weights_MB": weights}
    return Finding(
        "eight instances beyond one / weights", [(taken[1] - taken[0]) / weights], COPIES_LIMIT, detail=detail
    )


def growth(repository: Path, requests: int = REQUESTS) -> list[Finding]:
    """Measure growth over random-length requests after a warm-up, and the growth of a server that leaks."""
    with service.running(repository) as server:
        found = _growth(server, requests)
    with leaking(repository) as server:
        control = _growth(server, int(requests * _CONTROL_SHARE))
    kept = "the control, which keeps every request: MB, a quarter of the requests"
    return [
        Finding(
            f"MB of growth over {requests:,} requests, of the process that grew most",
            [max(found.values())],
            LIMIT_MB,
            detail=found,
        ),
        Finding(kept, [max(control.values())], LIMIT_MB, most=False),
    ]


def _growth(server: service.Server, requests: int) -> dict[str, float]:
    """Return the growth of each process, in MB."""
    load(server, 3000)  # until buffers and caches have their final size for this traffic
    before = server.resident_mb()
    load(server, requests)
    time.sleep(1.0)
    after = server.resident_mb()
    return {process: after[process] - mb for process, mb in before.items()}


def load(server: service.Server, requests: int) -> None:
    """Send requests of random length for the embedding only, a quarter with a map of attention."""
    attention = service.wire_selections()["one layer's mean"]
    made = []
    for index, ids in enumerate(sequences(1000, VOCABULARY_SIZE)):
        message = service.request(ids[:64], attention if index % 4 == 3 else None)
        message.outputs.names[:] = ["embedding"]
        made.append(message)
    plan = Plan(callers=64, duration_s=3600.0, requests=requests, warm_up_s=0.0)
    asyncio.run(measure(server.target, Workload(tuple(made), 1, None), plan, lambda phase, sample: None))  # noqa: ARG005


@contextmanager
def leaking(repository: Path) -> Iterator[service.Server]:
    """Run the server as one process with a planted leak: it keeps the bytes of every request, forty times over."""
    code = (
        "import sys, attnserve_server.transport.servicer as servicer\n"
        "kept, receive = [], servicer.receive\n"
        "def receive_and_keep(kind, data, *more):\n"
        "    kept.append(bytes(data) * 40)\n"
        "    return receive(kind, data, *more)\n"
        "servicer.receive = receive_and_keep\n"
        "from attnserve_server.cli import main\n"
        "sys.argv[0] = 'attnserve-server'\n"
        "main()\n"
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        service.started([sys.executable, "-c", code], repository, Path(folder), "--isolation", "none") as server,
    ):
        yield server
