"""A long mixed load on one server, with faults in between: `python -m faults.soak`.

    python -m faults.soak --seconds 1800               # all ingredients that the server has
    python -m faults.soak --seconds 60 --without bursts,slow-readers
    python -m faults.soak --json soak.json --plot soak.svg

Callers send random lengths and selections, some leave before their answer, and some do not read it. Versions are
loaded and unloaded, engines are killed, and bursts of 1.5 times the peak come in between. A canary calls throughout.
Every call is checked as it ends (`check`). Each 30 s a line is printed. At the end, wrong answers and lost calls must
be 0, and memory (the sum of the proportional set sizes) within 32 MB of that of the first minute after the warm-up.

Exit code 1 if one of these does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
import psutil
from attnserve.v1 import attention_pb2
from attnserve.v1 import inference_service_pb2 as pb
from attnserve_client.bench.load import poisson

from faults import bundles
from faults.check import Checker, Problem, Rules, Serving
from faults.history import Event
from faults.lab import CANARY_STATUSES, Bench, Plan, Setup, absent
from faults.system import eventually
from faults.wire import SERVICE, Wire, states_of

STEP_S: Final = 30.0
WARM_UP_S: Final = 30.0
FIRST_S: Final = 60.0
"""Seconds after the warm-up whose memory is the reference."""
GROWTH_MB: Final = 32.0
CALLERS: Final = 8
TICK_S: Final = 0.05
NEAR_S: Final = 1.0
BURST: Final = 1.5
"""Load of a burst, as a multiple of the rate that the callers in loops reach."""
STATUSES: Final = frozenset(
    {"OK", "CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED:OVERLOADED", "UNAVAILABLE", "INTERNAL:ENGINE_CRASHED"}
)
INGREDIENTS: Final[Mapping[str, Setup]] = {
    "cancellations": Setup(),
    "slow-readers": Setup(),
    "bursts": Setup(),
    "reloads": Setup(needs=("admin",)),
    "kills": Setup(needs=("watchdog_floor_s",)),
}


@dataclass
class Soak:
    """One long run. Event loop only."""

    bench: Bench
    seconds: float
    ingredients: frozenset[str]
    checker: Checker
    begun: float = field(default_factory=time.monotonic)
    memory: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    """Seconds since the begin, and the MB of each process."""
    done: Counter[str] = field(default_factory=Counter)
    answered: int = 0
    told: int = 0
    """Problems of which some were printed."""
    ticks: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=round(60 / TICK_S)))
    """When timers of the last minute were due, and the seconds by which they were late."""

    def __post_init__(self) -> None:
        """Draw from the seed."""
        self.chance = random.Random(self.bench.plan.seed)
        self.random = np.random.default_rng(self.bench.plan.seed)
        self.over = asyncio.Event()

    @property
    def now(self) -> float:
        """Seconds since the begin."""
        return time.monotonic() - self.begun

    def sink(self, event: Event) -> None:
        """Check one event."""
        self.bench.last(event)
        self.checker.take(event)
        self.answered = sum(codes["OK"] for codes in self.checker.codes.values())
        for seconds in self.checker.latencies_s.values():
            seconds.clear()

    async def timed(self) -> None:
        """Measure how late the timers of this process are, for `late_s`."""
        while not self.over.is_set():
            due = time.monotonic() + TICK_S
            await asyncio.sleep(TICK_S)
            self.ticks.append((due, time.monotonic() - due))

    def late_s(self, at_s: float) -> float:
        """Return how late the timers of this process were at most within `NEAR_S` of a time, among the latest."""
        return max((late for due, late in self.ticks if due - NEAR_S <= at_s <= due + late + NEAR_S), default=0.0)

    def caller(self, name: str) -> Wire:
        """Return a recorded caller."""
        return Wire(self.sink, name, self.bench.servers[0].target, **self.bench.channel_options())

    def keys(self, count: int) -> list[str]:
        """Return inputs of random lengths, all with a selection of attention or all without."""
        prefix = bundles.MAP if self.chance.random() < 0.4 else ""
        return [
            prefix + " ".join(self.chance.choices(bundles.WORDS, k=self.chance.randint(1, 30))) for _ in range(count)
        ]

    async def pause(self, low: float, high: float) -> bool:
        """Wait a random time. Return False if the run is over."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.over.wait(), self.chance.uniform(low, high))
        return not self.over.is_set()

    async def steady(self, number: int) -> None:
        """Call in a loop, with one to four sequences; some calls are left before their answer."""
        async with self.caller(f"steady {number}") as wire:
            while not self.over.is_set():
                model = self.chance.choice((bundles.TINY, bundles.TINY, bundles.TINY, bundles.HEAVY))
                leaves = "cancellations" in self.ingredients and self.chance.random() < 0.05
                after = self.chance.uniform(0, 0.03) if leaves else None
                self.done["calls that are left"] += leaves
                end = await wire.infer(
                    model, *self.keys(self.chance.randint(1, 4)), leave_after_s=after, timeout_s=20.0
                )
                if end.code not in {"OK", "CANCELLED"}:
                    await asyncio.sleep(0.05)

    async def bursts(self) -> None:
        """Send 1.5 times the present rate for three seconds, now and then."""
        async with self.caller("burst") as wire:
            while await self.pause(5, 20):
                before, begun = self.answered, time.monotonic()
                await asyncio.sleep(1.0)
                rate = max(20.0, BURST * (self.answered - before) / (time.monotonic() - begun))
                calls, due = [], time.monotonic()
                until, gaps = due + 3.0, poisson(rate, self.random)
                while (due := due + next(gaps)) < until:
                    await asyncio.sleep(max(0.0, due - time.monotonic()))
                    calls.append(asyncio.create_task(wire.infer(bundles.TINY, *self.keys(1), timeout_s=5.0)))
                await asyncio.gather(*calls)
                self.done["bursts"] += 1

    async def slow_readers(self) -> None:
        """Open streams whose answers are not read, and leave them after a while."""
        options = [("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]
        while await self.pause(5, 15):
            async with grpc.aio.insecure_channel(self.bench.servers[0].target, options) as channel:
                request = pb.InferRequest(model=bundles.TINY, attention=attention_pb2.AttentionSelection())
                for _ in range(8):
                    request.sequences.add().text.text = "cat " * 30
                call: Any = channel.stream_stream(f"{SERVICE}/StreamInfer")(timeout=30)
                # A write waits as soon as the server reads no more from a caller that does not read.
                with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError):
                    for number in range(32):
                        request.request_id = str(number)
                        await asyncio.wait_for(
                            call.write(pb.StreamInferRequest(request=request).SerializeToString()), 5.0
                        )
                    await self.pause(1, 5)
                call.cancel()
                self.done["streams that are not read"] += 1

    async def kills(self) -> None:
        """Kill an engine, now and then."""
        server = self.bench.servers[0]
        while await self.pause(5, 20):
            with contextlib.suppress(psutil.Error):
                model = self.chance.choice((bundles.TINY, bundles.HEAVY))
                engine = await asyncio.to_thread(server.engine, model)
                if engine is None:
                    continue
                service = self.bench.service
                service.pause(model, time.monotonic())  # lower versions may answer until the next engine is ready
                engine.send_signal(signal.SIGKILL)
                self.done["engines killed"] += 1
                if await self._is_replaced(model, engine.pid):
                    service.resume(model, time.monotonic())
                else:
                    self.checker.problems.append(Problem("kill", "", f"{model} has no other engine after 30 s"))

    async def _is_replaced(self, model: str, old: int) -> bool:
        """Return whether another engine of a model is ready within 30 s."""
        server = self.bench.servers[0]

        def other() -> bool:
            with contextlib.suppress(psutil.Error):
                found = server.engine(model)
                return found is not None and found.pid != old
            return False

        replaced = await asyncio.to_thread(eventually, other, 30.0)
        return replaced and await self._reaches(
            lambda states: not any(name == model and state.endswith("LOADING") for (name, _), state in states.items())
        )

    async def reloads(self) -> None:
        """Load the next version of a model, and unload the one before."""
        servings, version = self.bench.service.servings, 1_000
        while await self.pause(3, 10):
            version += 1
            begun = time.monotonic()
            path = await asyncio.to_thread(bundles.write, self.bench.repository, bundles.TINY, version)
            self.bench.references.add(path)
            servings.append(Serving(bundles.TINY, str(version), since_s=begun, surely_s=float("inf")))
            place = len(servings) - 1
            self.bench.servers[0].process.send_signal(signal.SIGHUP)
            key = bundles.TINY, str(version)
            if not await self._reaches(lambda states, key=key: states.get(key, "").endswith("READY")):
                self.checker.problems.append(Problem("reload", "", f"version {version} is not ready after 30 s"))
                return
            servings[place] = replace(servings[place], surely_s=time.monotonic())
            self.done["reloads"] += 1
            for at, one in enumerate(servings):
                if one.model == bundles.TINY and int(one.version) > 1_000 and at < place and one.gone_s == float("inf"):
                    servings[at] = replace(one, until_s=time.monotonic(), gone_s=time.monotonic() + 30.0)
                    await asyncio.to_thread(bundles.remove, self.bench.repository, bundles.TINY, int(one.version))
            self.bench.servers[0].process.send_signal(signal.SIGHUP)

    async def _reaches(self, holds: Callable[[dict[tuple[str, str], str]], bool]) -> bool:
        until = time.monotonic() + 30.0
        async with self.caller("lister") as wire:
            while time.monotonic() < until:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    if holds(await states_of(wire)):
                        return True
                await asyncio.sleep(0.1)
        return False

    async def measure(self) -> None:
        """Measure memory each five seconds, take the canary's events, and print a line each 30 s."""
        canary = self.bench.canary
        assert canary is not None
        printed = 0.0
        while True:
            self.memory.append((self.now, await asyncio.to_thread(self.bench.servers[0].memory)))
            self.checker.excuse(self.late_s)
            if self.now - printed >= STEP_S or self.over.is_set():
                printed = self.now
                for event in await canary.pause():
                    self.sink(event)
                print(self.line(), flush=True)
                for problem in self.checker.problems[self.told : self.told + 3]:
                    print(f"         {problem}", flush=True)
                self.told = len(self.checker.problems)
                if self.over.is_set():
                    return
                canary.go()
            await self.pause(5, 5)

    def line(self) -> str:
        """Return one line of progress."""
        codes: Counter[str] = Counter()
        for each in self.checker.codes.values():
            codes.update(each)
        total = sum(self.memory[-1][1].values())
        wrong = {kind: count for kind, count in self.checker.count.items() if count}
        return f"{self.now:6.0f} s | {dict(codes)} | problems {wrong or 0} | PSS {total:.1f} MB | {dict(self.done)}"

    async def run(self) -> None:
        """Run all ingredients for the time."""
        others: dict[str, Callable[[], Awaitable[None]]] = {
            "bursts": self.bursts,
            "slow-readers": self.slow_readers,
            "kills": self.kills,
            "reloads": self.reloads,
        }
        async with asyncio.TaskGroup() as group:
            for number in range(CALLERS):
                group.create_task(self.steady(number))
            for name, ingredient in others.items():
                if name in self.ingredients:
                    group.create_task(ingredient())  # type: ignore[arg-type]
            group.create_task(self.measure())
            group.create_task(self.timed())
            await asyncio.sleep(self.seconds)
            self.over.set()

    def facts(self) -> dict[str, Any]:
        """Return the results in plain types for JSON."""
        codes: Counter[str] = Counter()
        for each in self.checker.codes.values():
            codes.update(each)
        totals = [(at, sum(by.values())) for at, by in self.memory]
        first = [mb for at, mb in totals if WARM_UP_S <= at <= WARM_UP_S + FIRST_S]
        last = [mb for at, mb in totals if at >= self.now - FIRST_S / 2]
        kinds = self.checker.count
        return {
            "seconds": round(self.now),
            "seed": self.bench.plan.seed,
            "ingredients": sorted(self.ingredients),
            "injected": dict(self.done),
            "statuses": dict(codes),
            "wrong_answers": kinds["answer"] + kinds["rows"] + kinds["version"],
            "lost_calls": kinds["lost call"],
            "problems": [str(one) for one in self.checker.problems],
            "first_mb": round(sum(first) / len(first), 1) if first else None,
            "last_mb": round(sum(last) / len(last), 1) if last else None,
            "memory_mb": [[round(at, 1), {name: round(mb, 1) for name, mb in by.items()}] for at, by in self.memory],
        }


def judged(facts: dict[str, Any]) -> list[str]:
    """Return what does not hold."""
    failures = list(facts["problems"])
    if facts["first_mb"] is None:
        failures.append(f"the run is too short for a judgement of memory: it needs {WARM_UP_S + 2 * FIRST_S:.0f} s")
    elif facts["last_mb"] - facts["first_mb"] > GROWTH_MB:
        failures.append(f"memory grew from {facts['first_mb']} to {facts['last_mb']} MB, by more than {GROWTH_MB:g} MB")
    return failures


def svg(facts: dict[str, Any], width: int = 800, height: int = 240) -> str:
    """Return a picture of memory over time: the sum, and each process."""
    samples = facts["memory_mb"]
    names = sorted({name for _, by in samples for name in by})
    lines = {"all": [(at, sum(by.values())) for at, by in samples]}
    lines |= {name: [(at, by[name]) for at, by in samples if name in by] for name in names}
    most_s, most_mb = max(at for at, _ in samples) or 1.0, 1.1 * max(mb for _, mb in lines["all"])
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">']
    for at, (name, points) in enumerate(lines.items()):
        colour = f"hsl({at * 360 // len(lines)} 60% 40%)"
        placed = " ".join(
            f"{40 + (width - 60) * seconds / most_s:.1f},{height - 20 - (height - 40) * mb / most_mb:.1f}"
            for seconds, mb in points
        )
        parts.append(f'<polyline points="{placed}" fill="none" stroke="{colour}"/>')
        parts.append(f'<text x="{width - 120}" y="{14 + 12 * at}" font-size="10" fill="{colour}">{name}</text>')
    parts.append(f'<text x="4" y="12" font-size="10">{most_mb:.0f} MB</text>')
    parts.append(f'<text x="{width - 60}" y="{height - 6}" font-size="10">{most_s:.0f} s</text></svg>')
    return "\n".join(parts) + "\n"


async def soak(plan: Plan, seconds: float, ingredients: frozenset[str]) -> dict[str, Any]:
    """Run a soak, and return its results."""
    flags = ("--admin",) if "reloads" in ingredients else ()
    isolation = "process" if "kills" in ingredients else plan.isolation
    models = (bundles.CANARY, bundles.TINY, bundles.HEAVY)
    async with Bench(Setup(models=models, flags=flags, isolation=isolation), plan) as bench:
        await bench.watch()
        assert bench.canary is not None
        allowed = {bundles.CANARY: CANARY_STATUSES}
        checker = Checker(bench.service, Rules(allowed, others=STATUSES, private=(str(plan.folder), sys.prefix)))
        counted = bench.servers[0].settled_calls()
        run = Soak(bench, seconds, ingredients, checker)
        bench.canary.go()
        await run.run()
        checker.finish()
        checker.excuse(run.late_s)
        codes, started = await asyncio.to_thread(bench.servers[0].settled_calls)
        since = {code: value - counted[0].get(code, 0.0) for code, value in codes.items()}
        # Streams are not among the recorded calls, and calls of the canary may take several attempts.
        attempts = run.done["streams that are not read"] + sum(checker.codes[bundles.CANARY].values()) // 100
        if "kills" not in ingredients:
            checker.reconcile(since, started - counted[1], attempts=attempts)
        return run.facts()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m faults.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1800.0, help="default: 1800")
    parser.add_argument("--without", default="", metavar="LIST", help=f"leave out some of {', '.join(INGREDIENTS)}")
    parser.add_argument("--isolation", choices=("none", "process"), default="none", help="with kills always process")
    parser.add_argument("--seed", type=int, default=1, help="of all that is random; default: 1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw memory over time as SVG")
    options = parser.parse_args()
    left_out = {name for name in options.without.split(",") if name}
    if unknown := left_out - INGREDIENTS.keys():
        parser.error(f"no ingredient {', '.join(sorted(unknown))}; there are {', '.join(INGREDIENTS)}")
    for name, setup in INGREDIENTS.items():
        if name not in left_out and (reason := absent(setup)):
            print(f"without {name}: {reason}")
            left_out.add(name)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65_536)), hard))
    plan = Plan(options.seed, True, options.isolation, Path(tempfile.mkdtemp(prefix="attnserve-soak-")))
    print(f"seed {plan.seed}, {options.seconds:g} s, folder {plan.folder}", flush=True)
    facts = asyncio.run(soak(plan, options.seconds, frozenset(INGREDIENTS.keys() - left_out)))
    failures = judged(facts)
    if options.json:
        options.json.write_text(json.dumps({**facts, "cores": len(os.sched_getaffinity(0))}, indent=2) + "\n")
    if options.plot:
        options.plot.write_text(svg(facts))
    print(f"statuses {facts['statuses']}, wrong answers {facts['wrong_answers']}, lost calls {facts['lost_calls']}")
    print(f"memory {facts['first_mb']} MB in the first minute, {facts['last_mb']} MB at the end")
    for failure in failures[:20]:
        print(f"fails: {failure}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
