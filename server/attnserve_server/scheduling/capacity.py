"""What a replica carries: a simulation of its queue, its policy and its instances over the cost model. Pure.

Arrivals are a Poisson process, and each sequence is a call. The queue and the plan are the server's own, so that
batches are those that it would make. Runs take what the cost model predicts, and longer while more threads are busy
than there are cores. Deadlines, priorities and several callers are left out.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from attnserve_server.engine.cost import CostModel
from attnserve_server.scheduling.policy import Candidate, SchedulingSettings, plan
from attnserve_server.scheduling.queue import Entry, Queue

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

_MOST_BUSY: Final = 0.95
"""Share of its time that the event loop is busy, at most: beyond it, the wait for the loop has no bound."""
_ROUNDS: Final = 2
"""Simulations of the peak: the rate of the first determines how busy the event loop is in the next."""


@dataclass(frozen=True, slots=True)
class Replica:
    """One server, as the simulation needs it.

    Args:
        cost: of a run on one instance, in processor seconds.
        instances: runs at a time.
        cores: that the runs and the event loop share.
        call_s: processor seconds of a call outside its run, on the event loop.
        wide: time of a run that is alone and uses all cores, over that on one; 1: no such runs.
        attention_s: seconds that a selection adds to a sequence's run.
        attention_pair_s: the same for each pair of positions.
    """

    cost: CostModel
    instances: int
    cores: int
    call_s: float
    wide: float = 1.0
    attention_s: float = 0.0
    attention_pair_s: float = 0.0

    def run_s(self, size: int, tokens: int, selecting: int) -> float:
        """Return the processor seconds of a run of `size` rows of `tokens` positions, some `selecting` attention."""
        more_s = self.attention_s + self.attention_pair_s * tokens * tokens
        return self.cost.seconds(size, tokens) + selecting * more_s


@dataclass(frozen=True, slots=True)
class Load:
    """Sequences in the order of their arrival: seconds, tokens, and whether each selects attention; arrays (N,)."""

    arrived_s: Floats
    tokens: Integers
    selects: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Carried:
    """Results of a simulation.

    Args:
        latency_s: from arrival to answer, (N,), in the order of arrival.
        wait_s: from arrival to the start of the run, (N,).
        rate: sequences a second, from the first arrival to the last answer.
        rows: sequences in a run, the mean.
        busy: share of the instances' time that is spent in runs.
    """

    latency_s: Floats
    wait_s: Floats
    rate: float
    rows: float
    busy: float

    def quantile_s(self, share: float) -> float:
        """Return a quantile of the latency, without the first tenth, which meets an empty server."""
        return float(np.quantile(self.latency_s[len(self.latency_s) // 10 :], share))


def lengths(quantiles: Mapping[float, int], count: int, random: np.random.Generator) -> Integers:
    """Draw lengths whose quantiles are those given, (count,): log-linear between neighbouring ones.

    Args:
        quantiles: tokens by share of the sequences, from 0 (the shortest) to 1 (the longest); they must not fall.
        count: of lengths.
        random: source of randomness.
    """
    shares = sorted(quantiles)
    logs = np.log([quantiles[share] for share in shares])
    drawn = np.exp(np.interp(random.random(count), shares, logs))
    return np.maximum(1, np.rint(drawn)).astype(np.int64)


def poisson(tokens: Integers, selecting: float, rate: float, random: np.random.Generator) -> Load:
    """Return a load of these lengths, `rate` a second, of which the share `selecting` selects attention."""
    gaps_s = random.exponential(1 / rate, len(tokens))
    return Load(np.cumsum(gaps_s), tokens, random.random(len(tokens)) < selecting)


def simulate(replica: Replica, load: Load, settings: SchedulingSettings, loop_busy: float = 0.0) -> Carried:
    """Serve a load.

    Args:
        replica: the server.
        load: one or more sequences.
        settings: the bounds of runs.
        loop_busy: share of its time that the event loop is busy.
    """
    line = _Line(replica.cost.with_overhead(settings.run_overhead_tokens), settings)
    ends: list[tuple[float, int, list[int]]] = []  # of runs: time, number, their sequences
    count, at, free, runs = len(load.tokens), 0, replica.instances, 0
    started, ended = np.zeros(count), np.zeros(count)
    busy_s = now = 0.0
    loop_busy = min(loop_busy, _MOST_BUSY)
    while at < count or ends or len(line):
        upcoming = load.arrived_s[at] if at < count else math.inf
        if not (free and len(line)):  # wait for the next event
            now = min(float(upcoming), ends[0][0] if ends else math.inf)
        while at < count and load.arrived_s[at] <= now:
            line.push(at, now, int(load.tokens[at]))
            at += 1
        while ends and ends[0][0] <= now:
            _, _, done = heapq.heappop(ends)
            ended[done] = now
            free += 1
        if not (free and len(line)):
            continue
        chosen = line.take(now)
        free -= 1
        running = replica.instances - free
        seconds = replica.run_s(len(chosen), int(load.tokens[chosen].max()), int(load.selects[chosen].sum()))
        if running == 1 and not len(line):
            seconds *= replica.wide
        seconds *= max(1.0, (running + loop_busy) / replica.cores)
        started[chosen], busy_s, runs = now, busy_s + seconds, runs + 1
        heapq.heappush(ends, (now + seconds, runs, chosen))
    call_s = replica.call_s / (1 - loop_busy)
    took_s = max(float(ended.max() - load.arrived_s[0]), 1e-9)
    return Carried(
        latency_s=ended - load.arrived_s + call_s,
        wait_s=started - load.arrived_s,
        rate=count / took_s,
        rows=count / runs,
        busy=busy_s / took_s / replica.instances,
    )


def peak_rate(
    replica: Replica, tokens: Integers, selecting: float, settings: SchedulingSettings, random: np.random.Generator
) -> float:
    """Return the sequences a second that a replica answers while its queue is never empty."""
    selects = random.random(len(tokens)) < selecting
    load, rate = Load(np.zeros(len(tokens)), tokens, selects), 0.0
    for _ in range(_ROUNDS):
        rate = simulate(replica, load, settings, rate * replica.call_s).rate
    return min(rate, _MOST_BUSY / replica.call_s) if replica.call_s else rate


class _Line:
    """The server's queue and plan, of sequences by number."""

    def __init__(self, cost: CostModel, settings: SchedulingSettings) -> None:
        self._cost, self._settings, self._queue = cost, settings, Queue()

    def __len__(self) -> int:
        return len(self._queue)

    def push(self, number: int, now: float, tokens: int) -> None:
        """Add a sequence."""
        sequence: Any = SimpleNamespace(tokens=tokens)
        request: Any = SimpleNamespace(caller="")
        self._queue.push(Entry(request, 0, number, sequence, Candidate(now, (tokens,)), 0))

    def take(self, now: float) -> list[int]:
        """Remove the sequences of the next run, and return them."""
        front = self._queue.candidates(self._settings.look_ahead)
        planned = plan([entry.candidate for entry in front], now, self._settings, self._cost)
        entries = [front[at] for at in planned.indices]
        for entry in entries:
            self._queue.remove(entry)
        return [entry.number for entry in entries]
