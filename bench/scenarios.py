"""The server under load and the bare runtime, in interleaved rounds of one run. Each function returns findings.

The client runs on the machine's own cores, as for the figures of docs/reference/benchmarks.md. Its processor time is
reported and, where sequences a second are compared, deducted. A missing bundle of MiniLM, and a server that does not
start, raise SystemExit with a message, so code 1. A server that refuses the first request of a load raises the client's
AttnserveError.
"""

from __future__ import annotations

import asyncio
import statistics
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from attnserve.v1 import attention_pb2
from attnserve_client.bench.report import Report
from attnserve_client.bench.run import Plan, measure
from attnserve_client.bench.workload import Workload
from rich.console import Console
from rich.progress import track

from bench import echo, service
from bench.finding import Finding
from bench.runtime import BareSession, minilm_of, untapped
from bench.workload import sequence, sequences, sorted_batches

CALLERS = 64
CORES = psutil.cpu_count() or 1
VOCABULARY_SIZE = 30_522
LONGEST = 256
DEADLINE_S = 3.0


@dataclass(frozen=True, slots=True)
class Options:
    """The options that all scenarios share."""

    repository: Path
    rounds: int
    requests: int
    console: Console

    @property
    def model(self) -> Path:
        """The newest MiniLM's graph."""
        return minilm_of(self.repository)

    def rounds_of(self, what: str) -> Iterator[int]:
        """Yield the numbers of the rounds, with a progress bar on a terminal."""
        yield from track(range(self.rounds), description=what, console=self.console, transient=True)


def workload(
    items: list[Any], attention: attention_pb2.AttentionSelection | None = None, share: float = 0.0
) -> Workload:
    """Return requests of one sequence each. Every 1/share-th selects attention."""
    every = round(1 / share) if share else 0
    asks = [bool(every) and index % every == every - 1 for index in range(len(items))]
    requests = [service.request(ids, attention if ask else None) for ids, ask in zip(items, asks, strict=True)]
    return Workload(tuple(requests), 1, tuple(map(len, items)))


def load(server: service.Server, sent: Workload, plan: Plan) -> tuple[Report, float, list[float]]:
    """Return a report, the server's processor seconds during it, and the latencies of answered requests."""
    latencies: list[float] = []

    def note(phase: str, sample: Any) -> None:
        if phase == "measuring" and not sample.outcome.error:
            latencies.append(sample.latency_s)

    before = server.cpu_seconds()
    report = asyncio.run(measure(server.target, sent, plan, note))
    return report, server.cpu_seconds() - before, latencies


def closed(requests: int, **more: Any) -> Plan:
    """Return a plan of 64 callers until all requests are done."""
    return Plan(callers=CALLERS, duration_s=600.0, requests=requests, warm_up_s=0.0, **more)


def saturated(options: Options) -> list[Finding]:
    """64 callers: processor time, rate and padding against the bare runtime, the tail against the unbatched server."""
    items = sequences(options.requests, VOCABULARY_SIZE)
    sent, batches = workload(items), sorted_batches(items)
    bare = BareSession(untapped(options.model))
    bare.cpu_seconds_of_two_threads(batches)
    ratios, rates, padding, clients, tails = [], [], [], [], ([], [])  # type: ignore[var-annotated]
    figures: dict[str, list[float]] = {"server_cpu_ms": [], "bare_cpu_ms": [], "server_per_s": [], "bare_per_s": []}
    with (
        service.running(options.repository) as server,
        service.running(options.repository, "--max-batch-size", "1") as unbatched,
    ):
        for each in (server, unbatched):
            load(each, sent, closed(options.requests // 2))
        for _ in options.rounds_of("64 callers"):
            bare_cpu, bare_wall = bare.cpu_seconds_of_two_threads(batches)
            report, cpu, latencies = load(server, sent, closed(options.requests))
            ratios.append(cpu / bare_cpu)
            # The part of the bare runtime's rate that the client's share of the cores leaves.
            left = 1 - report.client_cores / CORES
            rates.append(report.sequences_per_s / (left * len(items) / bare_wall))
            padding.append(report.computed_over_useful or 0.0)
            clients.append(report.client_cores)
            tails[0].append(float(np.quantile(latencies, 0.99)))
            tails[1].append(float(np.quantile(load(unbatched, sent, closed(options.requests))[2], 0.99)))
            figures["server_cpu_ms"].append(1e3 * cpu / len(items))
            figures["bare_cpu_ms"].append(1e3 * bare_cpu / len(items))
            figures["server_per_s"].append(report.sequences_per_s)
            figures["bare_per_s"].append(len(items) / bare_wall)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    medians["client_cores"] = statistics.median(clients)
    over = [one / other for one, other in zip(*tails, strict=True)]
    return [
        Finding("64 callers: server's processor time a sequence / bare runtime's best", ratios, 1.10, detail=medians),
        Finding("64 callers: sequences/s / what the client leaves of the bare runtime's", rates, 0.90, most=False),
        Finding("64 callers: computed / useful tokens", padding, 1.10),
        Finding("64 callers: p99 / that of the same server with batching off", over, 1.5),
    ]


def alone(options: Options) -> list[Finding]:
    """One caller: the median latency against `session.run` of the same sequences, one thread each."""
    items = sequences(options.requests // 2, VOCABULARY_SIZE)
    bare = BareSession(untapped(options.model))
    over, details = [], {"server_p50_ms": 0.0, "bare_p50_ms": 0.0}
    with service.running(options.repository) as server:
        plan = Plan(callers=1, duration_s=600.0, requests=len(items), warm_up_s=0.0)
        load(server, workload(items), plan)
        for _ in options.rounds_of("one caller"):
            times = []
            for ids in items:
                begun = time.perf_counter()
                bare.run(ids[None])
                times.append(time.perf_counter() - begun)
            report, _, _ = load(server, workload(items), plan)
            p50, bare_p50 = report.latency_s["p50"], statistics.median(times)
            over.append(1e3 * (p50 - 1.05 * bare_p50))
            details = {"server_p50_ms": 1e3 * p50, "bare_p50_ms": 1e3 * bare_p50}
    return [Finding("one caller: p50 beyond 1.05 x a bare run, in ms", over, 1.0, detail=details)]


def open_loop(options: Options) -> list[Finding]:
    """At 80% of the peak the tail; beyond it, the rate of answers, and the runs for callers who had left."""
    items = sequences(options.requests, VOCABULARY_SIZE)
    sent = workload(items)
    bare = BareSession(untapped(options.model))
    longest = sequence(LONGEST, VOCABULARY_SIZE, np.random.default_rng(0))[None]
    for _ in range(5):
        bare.run(longest)
    tails, errors, kept, wasted = [], [], {1.5: [], 3.0: []}, []  # type: ignore[var-annotated]
    with service.running(options.repository) as server:
        load(server, sent, closed(options.requests // 2))
        for number in options.rounds_of("open loop"):
            times = []
            for _ in range(9):
                begun = time.perf_counter()
                bare.run(longest)
                times.append(time.perf_counter() - begun)
            peak = load(server, sent, closed(options.requests))[0].sequences_per_s
            seconds = max(5.0, 2 * options.requests / peak)
            report, _, latencies = load(
                server, sent, Plan(rate=0.8 * peak, duration_s=seconds, warm_up_s=1.0, seed=number)
            )
            tails.append(float(np.quantile(latencies, 0.99)) / statistics.median(times))
            errors.append(float(sum(report.errors.values())))
            for share, values in kept.items():
                ran = sequences_run(server)
                plan = Plan(
                    rate=share * peak, duration_s=seconds, warm_up_s=0.0, timeout_s=DEADLINE_S, seed=number + 1000
                )
                report, _, latencies = load(server, sent, plan)
                time.sleep(0.5)  # runs for callers who have left end
                values.append(report.sequences_per_s / peak)
                wasted.append((sequences_run(server) - ran - 1) / max(1, report.answered) - 1)
    return [
        Finding("80% of the peak: p99 / a bare run of the longest sequence", tails, 4.0),
        Finding("80% of the peak: errors", errors, 0.0),
        Finding("150% of the peak, 3 s deadlines: answered / peak", kept[1.5], 0.95, most=False),
        Finding("300% of the peak, 3 s deadlines: answered / peak", kept[3.0], 0.95, most=False),
        Finding("150% and 300%: sequences run for callers who had left / answered", wasted, 0.01),
    ]


def sequences_run(server: service.Server) -> float:
    """Return the server's own count of sequences that the runtime has run."""
    with urllib.request.urlopen(f"http://{server.http}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("attnserve_sequences_total{"))


def attention(options: Options) -> list[Finding]:
    """A quarter selects the last layer's mean; all select everything, which costs what its bytes cost."""
    items = sequences(options.requests, VOCABULARY_SIZE)
    selections = service.wire_selections()
    quarter = workload(items, selections["one layer's mean"], 0.25)
    everything = workload(items[: max(CALLERS, options.requests // 2)], selections["all maps"], 1.0)
    plain = workload(items)
    ratios, excess = [], []
    detail: dict[str, float] = {}
    with service.running(options.repository) as server:
        load(server, plain, closed(options.requests // 2))
        for number in options.rounds_of("attention"):
            # Three pairs a round: the bound is nearer to 1 than two loads of the same kind are to each other. The order
            # alternates, so that drift affects both equally.
            for pair in range(3):
                order = [plain, quarter] if (number + pair) % 2 else [quarter, plain]
                loads = {id(each): load(server, each, closed(options.requests)) for each in order}
                (without, without_cpu, _), (asked, _, _) = loads[id(plain)], loads[id(quarter)]
                ratios.append(asked.sequences_per_s / without.sequences_per_s)
            report, cpu, _ = load(server, everything, closed(len(everything.requests)))
            detail = {
                "plain_ms": 1e3 * without_cpu / without.answered,
                "everything_ms": 1e3 * cpu / report.answered,
                "plain_MB": 1e-6 * without.bytes_per_s / without.sequences_per_s,
                "everything_MB": 1e-6 * report.bytes_per_s / report.sequences_per_s,
                "compute_ms": computing_weights_ms(options, items[: len(everything.requests)]),
                "send_ms_per_MB": sending_ms_per_mb(),
                "handle_ms_per_MB": handling_ms_per_mb(),
                "rate_over_plain": report.sequences_per_s / without.sequences_per_s,
            }
            more_mb = detail["everything_MB"] - detail["plain_MB"]
            explained = detail["compute_ms"] + more_mb * (detail["send_ms_per_MB"] + detail["handle_ms_per_MB"])
            excess.append((detail["everything_ms"] - detail["plain_ms"]) / explained)
    what = (
        "all requests select everything: server's ms more a sequence / "
        "computing the weights, cropping and sending their bytes"
    )
    return [
        Finding(
            "a quarter of the requests selects the last layer's mean: rate / no attention", ratios, 0.97, most=False
        ),
        Finding(what, excess, 1.5, detail=detail),
    ]


def computing_weights_ms(options: Options, items: list[Any]) -> float:
    """Return the bare runtime's additional time for all weights of a sequence, in batches sorted by length."""
    session = BareSession(str(options.model))
    more_s = 0.0
    for batch in sorted_batches(items):
        quickest = {session.run: float("inf"), session.run_asked: float("inf")}
        for run in 3 * tuple(quickest):
            begun = time.thread_time()
            run(batch)
            quickest[run] = min(quickest[run], time.thread_time() - begun)
        more_s += quickest[session.run_asked] - quickest[session.run]
    return 1e3 * max(0.0, more_s) / len(items)


def sending_ms_per_mb() -> float:
    """Return the processor time of a bare grpc.aio stream that echoes a megabyte, for each megabyte in or out."""
    sent = echo.messages(32, 1, [640])
    with echo.bare() as (target, process):
        asyncio.run(echo.rate(target, sent, 0.5))
        before, seconds = sum(process.cpu_times()[:2]), 1.5
        per_s, _ = asyncio.run(echo.rate(target, sent, seconds))
        took = sum(process.cpu_times()[:2]) - before
    return float(1e3 * took / (2 * per_s * seconds * len(sent[0]) / 1e6))


def handling_ms_per_mb() -> float:
    """Return the processor time of checking, cropping and joining a megabyte of weights."""
    weights = np.random.default_rng(0).random((8, 12, 80, 80), np.float32)
    times = []
    for _ in range(50):
        begun = time.thread_time()
        np.isfinite(weights).all()
        answers = [b"".join((b"head", np.array(one[:, :70, :70], order="C"))) for one in weights]  # type: ignore[arg-type]
        times.append(time.thread_time() - begun)
    return 1e3 * statistics.median(times) / (1e-6 * sum(map(len, answers)))


def eight_bits(options: Options, repository: Path) -> list[Finding]:
    """The int8 bundle against the server's own float32, 64 callers, in interleaved rounds."""
    items = sequences(options.requests, VOCABULARY_SIZE)
    sent = workload(items)
    ratios, processor = [], []
    with service.running(options.repository) as wide, service.running(repository) as narrow:
        for server in (wide, narrow):
            load(server, sent, closed(options.requests // 2))
        for _ in options.rounds_of("int8"):
            slow, slow_cpu, _ = load(wide, sent, closed(options.requests))
            quick, quick_cpu, _ = load(narrow, sent, closed(options.requests))
            ratios.append(quick.sequences_per_s / slow.sequences_per_s)
            processor.append(slow_cpu / quick_cpu)
    detail = {"processor_time": statistics.median(processor)}
    return [Finding("int8: sequences/s / float32's", ratios, 1.9, most=False, detail=detail)]
