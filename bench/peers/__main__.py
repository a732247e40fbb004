"""Load every peer, the bare runtime and this server in interleaved rounds, and print a table: `python -m bench.peers`.

A peer is another serving system, over the same model. Each round starts it, warms it up, loads it with callers in a
closed loop, and ends it. `--only` selects peers. One that does not run is listed with the reason. Exit code 1 if the
repository has no bundle of MiniLM or this server does not start; 2 if `--only` matches no peer; 143 after SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from bench import service
from bench.peers.install import PEERS, installed, version
from bench.peers.load import Measured, drive
from bench.peers.servers import DidNotStart, Running, serving
from bench.peers.wires import WIRES
from bench.runtime import BareSession, minilm_of, untapped
from bench.workload import sequences, sorted_batches

CALLERS = 64
VOCABULARY_SIZE = 30_522
REFERENCES = 256
LIMIT_S = 120.0
ATTEMPTS = 2
"""Attempts to start a peer: some fail once without a message, and start the next time."""
ATTNSERVE, BARE = "attnserve", "bare runtime"


class Comparison:
    """The runs of all rounds, by system and form."""

    def __init__(self, repository: Path, requests: int, console: Console) -> None:
        self._repository = repository
        self._console = console
        self.items = sequences(requests, VOCABULARY_SIZE)
        self._model = untapped(minilm_of(repository))
        self._bare = BareSession(self._model)
        self._batches = sorted_batches(self.items)
        self._references = [self._bare.hidden(ids[None])[0] for ids in self.items[:REFERENCES]]
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}

    def bare(self) -> dict[str, float]:
        """Measure two threads over batches sorted by length: the limit of the machine, right before each load."""
        self._bare.cpu_seconds_of_two_threads(self._batches[::8])
        cpu, wall = self._bare.cpu_seconds_of_two_threads(self._batches)
        run = {"rate": len(self.items) / wall, "server_s": cpu / len(self.items)}
        row = self._row(BARE, "sorted batches", f"onnxruntime {metadata.version('onnxruntime')}")
        row["runs"].append({**run, "bare_rate": run["rate"], "bare_s": run["server_s"]})
        return run

    def attnserve(self, form: str) -> None:
        """Measure this server: with its defaults as `dynamic`, with batching off as `single`."""
        flags = ("--max-batch-size", "1") if form == "single" else ()
        row = self._row(ATTNSERVE, "defaults" if form == "dynamic" else form, metadata.version("attnserve"))
        with service.running(self._repository, *flags) as server:
            port = int(server.target.rpartition(":")[2])
            self._load(row, Running(port, WIRES["attnserve"], server.process))

    def peer(self, peer: Any, form: str, model: Path) -> None:
        """Measure one peer in one form, or record why it does not run."""
        row = self._row(peer.name, form, version(peer))
        for _ in range(ATTEMPTS):
            try:
                with serving(peer, form, model, self.items[0]) as running:
                    return self._load(row, running)
            except DidNotStart as error:
                row["why_not"] = str(error)
        return None

    def write_model(self, path: Path) -> None:
        """Write the graph that all systems serve."""
        path.write_bytes(self._model)

    def _load(self, row: dict[str, Any], running: Running) -> None:
        self._drive(running, self.items[: max(CALLERS, len(self.items) // 4)])
        bare = self.bare()
        before = running.cpu_seconds()
        measured = self._drive(running, self.items)
        # By the number of answers: callers stop at their time limit, and requests that were not sent cost nothing.
        each_s = (running.cpu_seconds() - before) / max(1, measured.answered)
        beside = {"bare_rate": bare["rate"], "bare_s": bare["server_s"]}
        row["runs"].append({**asdict(measured), "server_s": each_s, **beside})

    def _drive(self, running: Running, items: list[Any]) -> Measured:
        return asyncio.run(drive(running.port, running.wire, items, self._references, CALLERS, LIMIT_S))

    def _row(self, name: str, form: str, version_: str) -> dict[str, Any]:
        self._console.print(f"{name}, {form}", style="dim")
        return self.rows.setdefault((name, form), {"name": name, "form": form, "version": version_, "runs": []})


def summed_up(rows: dict[tuple[str, str], dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a summary of each system: medians over its rounds, and over those of the bare runtime.

    The bare runtime is measured right before each load. The fastest system is first.
    """
    summary = []
    for row in rows.values():
        runs = row["runs"]
        facts = {key: row[key] for key in ("name", "form", "version")}
        facts["why_not"] = "" if runs else row.get("why_not", "")
        if runs:
            facts |= {
                "per_s": statistics.median(run["rate"] for run in runs),
                "per_s_least": min(run["rate"] for run in runs),
                "per_s_greatest": max(run["rate"] for run in runs),
                "rate_over_bare": statistics.median(run["rate"] / run["bare_rate"] for run in runs),
                "server_ms": 1e3 * statistics.median(run["server_s"] for run in runs),
                "cpu_over_bare": statistics.median(run["server_s"] / run["bare_s"] for run in runs),
            }
            for key, unit in (("p50_s", 1e3), ("p99_s", 1e3), ("client_cores", 1.0)):
                if key in runs[0]:
                    facts[key.replace("_s", "_ms")] = unit * statistics.median(run[key] for run in runs)
            facts["errors"] = sum(run.get("errors", 0) for run in runs)
            facts["wrong"] = sum(run.get("wrong", 0) for run in runs)
            facts["first_error"] = next((run["first_error"] for run in runs if run.get("first_error")), "")
        summary.append(facts)
    return sorted(summary, key=lambda facts: -facts.get("per_s", 0.0))


def show(console: Console, summary: list[dict[str, Any]]) -> None:
    """Print a table, then the peers that did not run."""
    columns = ("sequences/s", "/ bare", "server ms", "/ bare", "p50 ms", "p99 ms", "client cores", "wrong, errors")
    table = Table("", "form", "version", *columns)
    for facts in summary:
        if "per_s" in facts:
            spread = f"{facts['per_s']:.1f} ({facts['per_s_least']:.1f} to {facts['per_s_greatest']:.1f})"
            latency = [f"{facts[key]:.0f}" if key in facts else "" for key in ("p50_ms", "p99_ms")]
            client = f"{facts['client_cores']:.2f}" if "client_cores" in facts else ""
            ratios = f"{facts['rate_over_bare']:.2f}", f"{facts['server_ms']:.1f}", f"{facts['cpu_over_bare']:.2f}"
            faults = f"{facts['wrong']}, {facts['errors']}"
            table.add_row(facts["name"], facts["form"], facts["version"], spread, *ratios, *latency, client, faults)
    console.print(table)
    for facts in summary:
        if facts["why_not"]:
            console.print(f"{facts['name']}, {facts['form']}: {facts['why_not']}", markup=False)
        elif facts.get("first_error"):
            console.print(f"{facts['name']}, {facts['form']}: {facts['first_error']}", markup=False)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--repository", type=Path, default=Path(".demo/models"), help="folder of bundles, with MiniLM as minilm"
    )
    parser.add_argument("--only", default="", help="parts of names of peers, with commas; default: all")
    parser.add_argument("--rounds", type=int, default=3, help="loads of each system")
    parser.add_argument("--requests", type=int, default=600, help="sequences in a round")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    # SIGTERM leaves through the blocks that end the started processes, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    wanted = {name.strip().lower() for name in options.only.split(",") if name.strip()}
    names = ", ".join(peer.name for peer in PEERS)
    for name in sorted(wanted):
        if not any(name in peer.name.lower() for peer in PEERS):
            parser.error(f"--only has {name!r}, which is part of no peer's name; the peers are {names}")
    peers = [peer for peer in PEERS if not wanted or any(name in peer.name.lower() for name in wanted)]
    console = Console(stderr=True)
    comparison = Comparison(options.repository, options.requests, console)
    why = {peer.name: installed(peer) for peer in peers}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model.onnx")
        comparison.write_model(model)
        loads: list[Callable[[], None]] = [
            lambda: comparison.attnserve("dynamic"),
            lambda: comparison.attnserve("single"),
        ]
        able = [peer for peer in peers if not why[peer.name]]
        loads += [partial(comparison.peer, peer, form, model) for peer in able for form in peer.forms]
        for number in range(options.rounds):
            # Each round starts at another peer, so that drift affects all equally.
            start = number * len(loads) // options.rounds
            for load in loads[start:] + loads[:start]:
                load()
    for peer in peers:
        for form in {"single", "dynamic"} - set(peer.forms if not why[peer.name] else ()):
            comparison.rows[peer.name, form] = {"name": peer.name, "form": form, "version": "", "runs": []} | {
                "why_not": why[peer.name] or peer.why_not
            }
    summary = summed_up(comparison.rows)
    if options.json:
        facts = {
            "cores": psutil.cpu_count(),
            "callers": CALLERS,
            "requests": options.requests,
            "rounds": options.rounds,
        }
        print(json.dumps({**facts, "systems": summary}, indent=2))
    else:
        show(Console(), summary)


if __name__ == "__main__":
    main()
