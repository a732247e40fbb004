"""Load every peer, bare runtimes and this server in interleaved rounds, and print tables: `python -m bench.peers`.

A peer is another serving system, over the same model. Each round starts it, warms it up, loads it with callers in a
closed loop, and ends it. `--only` selects systems; this server in float32 and bare onnxruntime always run. One that
does not run is listed with the reason. Exit code 1 if the repository has no bundle of MiniLM or this server does not
start; 2 if `--only` matches no system; 143 after SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console

from bench import service
from bench.peers.install import BARE, PEERS, Peer, installed, version
from bench.peers.load import Measured, Same, alike, drive, equal
from bench.peers.runtimes import measured
from bench.peers.servers import DidNotStart, Running, serving
from bench.peers.tables import ATTNSERVE, Rows, against, show, summed_up
from bench.peers.variants import BF16, INT8, SINGLE, Variant, variants
from bench.peers.wires import WIRES
from bench.runtime import BareSession, minilm_of, untapped
from bench.workload import sequences, sorted_batches

CALLERS = 64
VOCABULARY_SIZE = 30_522
REFERENCES = 256
LIMIT_S = 120.0
ATTEMPTS = 2
"""Attempts to start a peer: some fail once without a message, and start the next time."""
FORMS = ("single", "dynamic")
NAMES = (
    *(f"{ATTNSERVE} {form}" for form in (INT8, BF16, SINGLE)),
    *(runtime.name for runtime in BARE),
    *(f"{peer.name} {form}" for peer in PEERS for form in FORMS),
)


class Comparison:
    """The runs of all rounds, by system and form."""

    def __init__(self, repository: Path, requests: int, console: Console, folder: Path) -> None:
        self._repository = repository
        self._console = console
        self.items = sequences(requests, VOCABULARY_SIZE)
        model = untapped(minilm_of(repository))
        self.model = folder / "model.onnx"
        self.model.write_bytes(model)
        self._bare = BareSession(model)
        self._batches = sorted_batches(self.items)
        self._stored = folder / "batches.npz"
        np.savez(self._stored, *self._batches)
        self._references = [self._bare.hidden(ids[None])[0] for ids in self.items[:REFERENCES]]
        self.rows: Rows = {}
        self.round = 0

    def bare(self) -> dict[str, float]:
        """Measure two threads over batches sorted by length: the limit of the machine, right before each load."""
        self._bare.cpu_seconds_of_two_threads(self._batches[::8])
        cpu, wall = self._bare.cpu_seconds_of_two_threads(self._batches)
        return {"bare_rate": len(self.items) / wall, "bare_s": cpu / len(self.items)}

    def attnserve(self, variant: Variant) -> None:
        """Measure this server in one form."""
        row = self._row(ATTNSERVE, variant.form, metadata.version("attnserve"))
        with service.running(variant.repository or self._repository, *variant.flags) as server:
            port = int(server.target.rpartition(":")[2])
            self._load(row, Running(port, WIRES["attnserve"], server.process), variant.same)

    def peer(self, peer: Peer, form: str) -> None:
        """Measure one peer in one form, or record why it does not run."""
        row = self._row(peer.name, form, version(peer))
        for _ in range(ATTEMPTS):
            try:
                with serving(peer, form, self.model, self.items[0]) as running:
                    return self._load(row, running, equal)
            except DidNotStart as error:
                row["why_not"] = str(error)
        return None

    def runtime(self, peer: Peer, precision: str) -> None:
        """Measure a runtime without a server in a separate process, or record why it does not run."""
        row = self._row(f"{peer.name} bare", precision, version(peer))
        bare = self.bare()
        try:
            ran = measured(peer, precision, self.model, self._stored)
        except DidNotStart as error:
            row["why_not"] = str(error)
            return
        same = equal if precision == "fp32" else alike
        wrong = 0
        for ids, hidden in zip(self._batches, ran.answers, strict=False):
            wrong += not same(hidden[ids != 0], self._bare.hidden(ids)[ids != 0])
        count = len(self.items)
        run = {"rate": count / ran.wall_s, "server_s": ran.cpu_s / count, "memory_mb": ran.memory_mb, "wrong": wrong}
        row["runs"].append({**run, "round": self.round, **bare})

    def _load(self, row: dict[str, Any], running: Running, same: Same) -> None:
        self._drive(running, self.items[: max(CALLERS, len(self.items) // 4)], same)
        bare = self.bare()
        before = running.cpu_seconds()
        load = self._drive(running, self.items, same)
        # By the number of answers: callers stop at their time limit, and requests that were not sent cost nothing.
        each_s = (running.cpu_seconds() - before) / max(1, load.answered)
        beside = {"memory_mb": running.memory_mb(), "round": self.round, **bare}
        row["runs"].append({**asdict(load), "server_s": each_s, **beside})

    def _drive(self, running: Running, items: list[Any], same: Same) -> Measured:
        return asyncio.run(drive(running.port, running.wire, items, self._references, CALLERS, LIMIT_S, same))

    def _row(self, name: str, form: str, version_: str) -> dict[str, Any]:
        self._console.print(f"round {self.round + 1}: {name}, {form}", style="dim")
        return self.rows.setdefault((name, form), {"name": name, "form": form, "version": version_, "runs": []})

    def absent(self, name: str, form: str, why_not: str) -> None:
        """Record why a system does not run."""
        self.rows[name, form] = {"name": name, "form": form, "version": "", "runs": [], "why_not": why_not}


def loads_of(comparison: Comparison, chosen: Callable[[str], bool]) -> list[Callable[[], None]]:
    """Return the loads of a round, of the systems that are chosen and can run. The others are recorded as absent.

    mosec is beside this server, because the limits compare the two.
    """
    own = variants(lambda form: chosen(f"{ATTNSERVE} {form}"))
    loads: list[Callable[[], None]] = []
    for variant in own:
        if variant.why_not:
            comparison.absent(ATTNSERVE, variant.form, variant.why_not)
        else:
            loads.append(partial(comparison.attnserve, variant))
    for runtime in BARE:
        if chosen(runtime.name) or not runtime.package:
            why = installed(runtime)
            for precision in runtime.forms:
                if why:
                    comparison.absent(f"{runtime.name} bare", precision, why)
                else:
                    loads.append(partial(comparison.runtime, runtime, precision))
    for peer in sorted(PEERS, key=lambda peer: peer.name != "mosec"):
        forms = [form for form in FORMS if chosen(f"{peer.name} {form}")]
        why = installed(peer) if forms else ""
        able = [form for form in forms if form in peer.forms and not why]
        beside = 1 if peer.name == "mosec" else len(loads)
        loads[beside:beside] = [partial(comparison.peer, peer, form) for form in able]
        for form in set(forms) - set(able):
            comparison.absent(peer.name, form, why or peer.why_not)
    return loads


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python -m bench.peers --only 'mosec single,attnserve int8,openvino' --rounds 5",
    )
    parser.add_argument(
        "--repository", type=Path, default=Path(".demo/models"), help="folder of bundles, with MiniLM as minilm"
    )
    parser.add_argument("--only", default="", help="parts of names of systems, with commas; default: all")
    parser.add_argument("--rounds", type=int, default=3, help="loads of each system")
    parser.add_argument("--requests", type=int, default=600, help="sequences in a round")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    # SIGTERM leaves through the blocks that end the started processes, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    parts = {name.strip().lower() for name in options.only.split(",") if name.strip()}
    for part in sorted(parts):
        if not any(part in name.lower() for name in NAMES):
            parser.error(f"--only has {part!r}, which is part of no system's name; the systems are {', '.join(NAMES)}")
    with tempfile.TemporaryDirectory() as folder:
        comparison = Comparison(options.repository, options.requests, Console(stderr=True), Path(folder))
        loads = loads_of(comparison, lambda name: not parts or any(part in name.lower() for part in parts))
        for number in range(options.rounds):
            comparison.round = number
            # Each round starts at another system, so that drift affects all equally.
            start = number * len(loads) // options.rounds
            for load in loads[start:] + loads[:start]:
                load()
    summary, findings = summed_up(comparison.rows), against(comparison.rows)
    if options.json:
        facts = {
            "cores": psutil.cpu_count(),
            "callers": CALLERS,
            "requests": options.requests,
            "rounds": options.rounds,
        }
        ratios = [finding.facts() for finding in findings]
        print(json.dumps({**facts, "systems": summary, "over_mosec": ratios}, indent=2))
    else:
        show(Console(), summary, findings)


if __name__ == "__main__":
    main()
