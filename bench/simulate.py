"""Batching policies compared over recorded costs of runs: `python -m bench.simulate`.

The simulation covers the queue alone, without transport: callers in a closed loop, instances that take a policy's
batches, and runs that take their recorded time. `ServerLine` is the server's own queue and `plan`. The other policies
follow the documentation of other servers. `--record` times runs on this machine instead, and exits with a message and
code 1 if the repository has no bundle of MiniLM. Exit code 2 for fewer than two rounds. A file of costs raises OSError
if it is missing, ValueError if it is no JSON, and KeyError if it lacks an entry. `--plot` needs matplotlib.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import platform
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
from attnserve_server.engine.cost import CostModel, TimedRun, fit
from attnserve_server.scheduling.policy import Candidate, SchedulingSettings, plan
from attnserve_server.scheduling.queue import Entry, Queue
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.runtime import BareSession, minilm_of
from bench.workload import sequences

COSTS = Path(__file__).parent / "costs"
CALLERS = (16, 64, 256, 1024)
VOCABULARY_SIZE = 30_522
RECORDED = tuple(itertools.product((1, 2, 4, 8, 16, 32), (4, 8, 16, 32, 64, 128, 256)))
MOST_RECORDED_TOKENS = 4096


class Costs:
    """The cost of runs on one device: the fitted model, corrected by recordings of nearby shapes."""

    def __init__(self, path: Path) -> None:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        self.name = path.stem
        self.device: str = recorded["device"]
        self.instances: int = recorded["instances"]
        self.max_batch_size: int = recorded["max_batch_size"]
        runs = [TimedRun(*run) for run in recorded["runs"]]
        self.model: CostModel = fit(tuple(runs))
        self._shapes = np.log([[run.size, run.tokens] for run in runs])
        self._off = np.log([run.seconds / self.model.seconds(run.size, run.tokens) for run in runs])

    def seconds(self, size: int, tokens: int) -> float:
        """Return the seconds of a run of `size` rows of `tokens` positions. Policies do not know them exactly."""
        distances = ((self._shapes - (math.log(size), math.log(tokens))) ** 2).sum(axis=1)
        nearness = 1 / (distances + 1e-3) ** 2
        return self.model.seconds(size, tokens) * math.exp(float(nearness @ self._off / nearness.sum()))


@dataclass(frozen=True, slots=True)
class Arrival:
    """One pending sequence: its caller, its tokens, and when it arrived."""

    caller: int
    tokens: int
    came_s: float


class Line(Protocol):
    """A queue with its policy."""

    def push(self, arrival: Arrival) -> None:
        """Add a sequence."""
        ...

    def take(self, now: float) -> list[Arrival] | float:
        """Return the next run, or the time of the next attempt: `inf` for the next arrival."""
        ...


class ServerLine:
    """The server's queue and plan."""

    def __init__(self, cost: CostModel, max_batch_size: int, look_ahead: int | None = None) -> None:
        self._settings = SchedulingSettings(max_batch_size=max_batch_size, look_ahead=look_ahead or 128)
        self._cost = cost.with_overhead(None)
        self._queue = Queue()
        self._arrivals: dict[int, Arrival] = {}
        self._numbers = itertools.count()

    def push(self, arrival: Arrival) -> None:
        """Add a sequence."""
        number = next(self._numbers)
        sequence: Any = SimpleNamespace(tokens=arrival.tokens)
        request: Any = SimpleNamespace(caller="")
        self._arrivals[number] = arrival
        self._queue.push(Entry(request, 0, number, sequence, Candidate(arrival.came_s, (arrival.tokens,)), 0))

    def take(self, now: float) -> list[Arrival] | float:
        """Return the next run, or the time of the next attempt."""
        if not len(self._queue):
            return math.inf
        front = self._queue.candidates(self._settings.look_ahead)
        planned = plan([entry.candidate for entry in front], now, self._settings, self._cost)
        chosen = [front[at] for at in planned.indices]
        for entry in chosen:
            self._queue.remove(entry)
        return [self._arrivals.pop(entry.number) for entry in chosen]


class FirstCome:
    """First come, first served: `most` sequences and `most_tokens` computed positions at most, after `delay_s` or full.

    A delay and a size are what Triton, TorchServe, BentoML and others call dynamic batching. text-embeddings-inference
    uses a budget of tokens without a delay.
    """

    def __init__(self, most: int, delay_s: float, most_tokens: float = math.inf) -> None:
        self._most, self._delay_s, self._most_tokens = most, delay_s, most_tokens
        self._line: deque[Arrival] = deque()

    def push(self, arrival: Arrival) -> None:
        """Add a sequence."""
        self._line.append(arrival)

    def take(self, now: float) -> list[Arrival] | float:
        """Return the next run, or the time of the next attempt."""
        if not self._line:
            return math.inf
        count, longest = 0, 0
        for arrival in itertools.islice(self._line, self._most):
            longest = max(longest, arrival.tokens)
            if count and (count + 1) * longest > self._most_tokens:
                break
            count += 1
        due = self._line[0].came_s + self._delay_s
        if count < self._most and count == len(self._line) and now < due:
            return due
        return [self._line.popleft() for _ in range(count)]


@dataclass(frozen=True, slots=True)
class Figures:
    """Results of a policy: an instance's seconds a sequence, answers a second, padding, rows a run, latencies."""

    busy_s: float
    rate: float
    computed_over_useful: float
    rows: float
    p50_s: float
    p99_s: float


def simulate(line: Line, costs: Costs, lengths: list[int], callers: int, rounds: int) -> Figures:
    """Run a closed loop: each caller sends again once it is answered, until `rounds` sequences for each are done."""
    most = callers * rounds
    upcoming = itertools.cycle(lengths)
    events: list[tuple[float, int, Callable[[float], None]]] = []
    order = itertools.count()
    idle = list(range(costs.instances))
    latencies: list[float] = []
    busy = useful = computed = runs = ended = 0.0

    def at(when: float, what: Callable[[float], None]) -> None:
        heapq.heappush(events, (when, next(order), what))

    def serve(now: float) -> None:
        while idle:
            taken = line.take(now)
            if not isinstance(taken, list):
                if taken < math.inf:
                    at(taken, serve)
                return
            instance = idle.pop()
            longest = max(arrival.tokens for arrival in taken)
            seconds = costs.seconds(len(taken), longest)
            at(now + seconds, partial(done, taken=taken, longest=longest, seconds=seconds, instance=instance))

    def done(now: float, taken: list[Arrival], longest: int, seconds: float, instance: int) -> None:
        nonlocal ended, busy, useful, computed, runs
        idle.append(instance)
        ended = now
        # Here and not at the start: a run that has not ended has no answers, over which these figures are divided.
        busy, runs = busy + seconds, runs + 1
        useful, computed = useful + sum(each.tokens for each in taken), computed + len(taken) * longest
        for arrival in taken:
            latencies.append(now - arrival.came_s)
            line.push(Arrival(arrival.caller, next(upcoming), now))
        serve(now)

    for caller in range(callers):
        line.push(Arrival(caller, next(upcoming), 0.0))
    serve(0.0)
    while events and len(latencies) < most:
        when, _, what = heapq.heappop(events)
        what(when)
    # The first answers are from before the queue reached its steady state.
    steady = np.sort(latencies[callers:])
    return Figures(
        busy_s=busy / len(latencies),
        rate=len(latencies) / ended,
        computed_over_useful=computed / useful,
        rows=len(latencies) / runs,
        p50_s=float(np.quantile(steady, 0.5)),
        p99_s=float(np.quantile(steady, 0.99)),
    )


def best(costs: Costs, lengths: list[int]) -> float:
    """Return seconds a sequence of batches sorted by length, at the best size: a bound for every queue."""
    ordered = sorted(lengths)

    def seconds(most_tokens: int) -> float:
        total, batch = 0.0, list[int]()
        for length in [*ordered, 0]:
            full = len(batch) == costs.max_batch_size or length * (len(batch) + 1) > most_tokens
            if batch and (full or not length):
                total, batch = total + costs.seconds(len(batch), batch[-1]), []
            batch.append(length)
        return total / len(lengths)

    return min(seconds(most_tokens) for most_tokens in (64, 128, 256, 384, 512, 1024, 4096, 16_384))


def policies(costs: Costs) -> dict[str, Callable[[], Line]]:
    """Return each policy by its name."""
    size = costs.max_batch_size
    return {
        "this server": lambda: ServerLine(costs.model, size),
        "one at a time": lambda: FirstCome(1, 0.0),
        "first come, 5 ms delay": lambda: FirstCome(size, 5e-3),
        "first come, 100 ms delay": lambda: FirstCome(size, 0.1),
        "first come, 16,384 tokens": lambda: FirstCome(size, 0.0, 16_384),
        "first come, 512 tokens": lambda: FirstCome(size, 0.0, 512),
    }


def record(repository: Path, path: Path, repeats: int = 9) -> None:
    """Time runs of MiniLM on one thread of this machine, in processor time, and write them to a file."""
    session = BareSession(str(minilm_of(repository)))
    runs = []
    for size, tokens in track(RECORDED, description="recording", console=Console(stderr=True)):
        if size * tokens > MOST_RECORDED_TOKENS:
            continue
        ids = np.full((size, tokens), 2000, np.int64)
        session.run(ids)
        seconds = statistics.median(session.cpu_seconds([ids]) for _ in range(repeats))
        runs.append([size, tokens, round(seconds, 7)])
    recording = {
        "device": f"{platform.machine()}, one thread, onnxruntime's CPU provider",
        "model": f"MiniLM in float32, processor time, medians of {repeats} runs",
        "instances": 2,
        "max_batch_size": 32,
        "runs": runs,
    }
    path.write_text(json.dumps(recording, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("costs", nargs="*", type=Path, help="recorded costs; without any, those beside this module")
    parser.add_argument("--rounds", type=int, default=30, help="sequences of each caller")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--plot", type=Path, help="draw the figures into this file")
    parser.add_argument(
        "--record", type=Path, help="time runs on this machine, write them to this file, and simulate nothing"
    )
    parser.add_argument("--repository", type=Path, default=Path(".demo/models"), help="where `--record` finds MiniLM")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds is {options.rounds}; give 2 or more, because latencies leave out each caller's first")
    if options.record:
        record(options.repository, options.record)
        return
    lengths = [len(ids) for ids in sequences(4000, VOCABULARY_SIZE)]
    report: dict[str, Any] = {}
    console = Console()
    for path in options.costs or sorted(COSTS.glob("*.json")):
        costs = Costs(path)
        limit = best(costs, lengths)
        rows = {
            name: {callers: simulate(make(), costs, lengths, callers, options.rounds) for callers in CALLERS}
            for name, make in policies(costs).items()
        }
        report[costs.name] = {
            "device": costs.device,
            "cost": {name: getattr(costs.model, name) for name in ("run_s", "sequence_s", "token_s", "pair_s")},
            "sorted_s": limit,
            "policies": {
                name: {callers: {key: getattr(f, key) for key in Figures.__slots__} for callers, f in by.items()}
                for name, by in rows.items()
            },
        }
        if not options.json:
            show(console, costs, limit, rows)
    if options.json:
        print(json.dumps(report, indent=2))
    if options.plot:
        plot(report, options.plot)


def show(console: Console, costs: Costs, limit: float, rows: dict[str, dict[int, Figures]]) -> None:
    """Print a table for one device."""
    title = f"{costs.name}: {costs.device}; sorted batches take {1e3 * limit:.3f} ms a sequence"
    alone = rows["one at a time"]
    table = Table("policy", *(f"{callers:,} callers" for callers in CALLERS), title=title, title_justify="left")
    for name, by in rows.items():
        cells = [
            f"{f.busy_s / limit:.2f}x  pad {f.computed_over_useful:.2f}\n{f.rate:,.0f}/s  {f.rows:.1f} rows\n"
            f"p99 {1e3 * f.p99_s:,.0f} ms ({f.p99_s / alone[callers].p99_s:.2f})"
            for callers, f in by.items()
        ]
        table.add_row(name, *cells)
    console.print(table)
    console.print("x: instances' time a sequence over sorted batches'; (): p99 over that of one at a time", style="dim")


def plot(report: dict[str, Any], path: Path) -> None:
    """Plot time a sequence over that of sorted batches, by callers, with a panel for each device."""
    import matplotlib as mpl  # noqa: PLC0415 - slow to import, and only for the picture

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, panels = plt.subplots(1, len(report), figsize=(4.2 * len(report), 3.8), layout="constrained")
    for panel, (name, device) in zip(np.atleast_1d(panels), report.items(), strict=True):
        for policy, by in device["policies"].items():
            is_server = policy == "this server"
            over = [figures["busy_s"] / device["sorted_s"] for figures in by.values()]
            panel.plot(
                list(by), over, marker="o", lw=2.5 if is_server else 1.2, zorder=3 if is_server else 2, label=policy
            )
        panel.set(xscale="log", yscale="log", xlabel="callers", title=name)
        panel.set_xticks(CALLERS, [str(callers) for callers in CALLERS])
        panel.minorticks_off()
        ticks = [tick for tick in (1, 2, 5, 10, 20, 50) if tick <= 1.2 * panel.get_ylim()[1]]
        panel.set_yticks(ticks, [str(tick) for tick in ticks])
        panel.grid(alpha=0.3)
    np.atleast_1d(panels)[0].set_ylabel("time a sequence, over sorted batches")
    np.atleast_1d(panels)[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
