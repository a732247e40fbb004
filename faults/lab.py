"""What a row works with: servers, callers and their history; and the oracle that judges each row in the same way.

A `Bench` holds the servers of a `Setup` and their canary, for all rows that share them. A `Lab` is one row's view of
it: what was injected and measured, and what must hold.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import ssl
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
from attnserve_server.config import Settings
from credentials import Files, Tokens, bearer
from serving import RunningServer, serve

from faults import bundles
from faults.canary import BUSY_TIMEOUT_S, TIMEOUT_S, Canary, Options
from faults.check import LATE_S, Checker, Rules, Service, Serving, percentile
from faults.history import Begin, Event, Last
from faults.system import Server, Usage, eventually, folder_of
from faults.wire import Wire

ROOT: Final = Path(__file__).parents[1]
BASELINE_S: Final = 2.0
FLOOR_S: Final = 0.05
"""The limit of the canary's p99 is at least this, and how late the canary's own timers were is added to it. Server,
canary and injector share a few cores: below this, the machine's scheduler decides."""
BUSY_LATE_S: Final = 1.0
"""Seconds after its deadline until which a call may end in a reduced run, on a machine that others share."""
TICK_S: Final = 0.05
LATE: Final = "the canary's p99 is"
"""Start of the problem of a slow canary. A row without another problem runs once more: of a hundred calls, two that met
other work of the machine decide the p99."""
LEAST_S: Final = 2.0
"""Seconds for which the canary calls during a row at least."""
CANARY_STATUSES: Final = frozenset({"OK", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"})
"""What the canary may get at all; how often is in `Share`."""
MEMORY_MB: Final = 16.0
"""Growth of memory that a row may leave behind, unless it states another limit: pools and caches fill once."""
DESCRIPTORS, THREADS = 4, 8
"""The same for descriptors and threads: gRPC and asyncio keep pools, which grow when they are first used."""
SETTLE_S: Final = 6.0
"""Seconds in which descriptors and threads must return."""


class Skip(Exception):
    """A row cannot run on this machine; the message is the reason."""


class Absent(Exception):
    """The server lacks what the row tests; the message names it."""


@dataclass(frozen=True, slots=True)
class Share:
    """What the canary must get during a row.

    Args:
        answered: the least share of its calls with an OK answer.
        factor: the limit of its p99, as a multiple of its baseline's; None: its deadline alone.
    """

    answered: float = 0.999
    factor: float | None = 3.0


WITHIN_DEADLINE: Final = Share(0.99, None)


@dataclass(frozen=True, slots=True)
class Setup:
    """The servers of some rows.

    Args:
        models: the bundles of the repository.
        flags: further flags.
        replicas: how many servers of the same repository.
        secured: `tokens` for TLS and tokens, `certificates` for TLS with client certificates; empty for neither.
        failpoints: names of `faults.failpoints`, in all of the servers.
        isolation: of the server; empty: the one that the command line gives.
        needs: names of settings without which the server lacks what the rows test.
        starts: whether the harness starts the servers; False: the row does.
        environment: variables of the servers.
    """

    models: tuple[str, ...] = (bundles.CANARY, bundles.TINY)
    flags: tuple[str, ...] = ()
    replicas: int = 1
    secured: str = ""
    failpoints: tuple[str, ...] = ()
    isolation: str = ""
    needs: tuple[str, ...] = ()
    starts: bool = True
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table of faults.

    Args:
        number: its number.
        fault: what happens.
        setup: the servers.
        run: injects the fault, and measures.
        canary: what the canary must get; None: there is none, because the row has no server that lives.
        memory_mb: growth of memory that it may leave behind.
        reconciles: whether the server's counters of inference cover the row's calls, and nothing else does.
        lasts: whether all servers live on, so that what they hold can be compared with before.
    """

    number: int
    fault: str
    setup: Setup
    run: Callable[[Lab], Awaitable[None]]
    canary: Share | None = field(default_factory=Share)
    memory_mb: float = MEMORY_MB
    reconciles: bool = True
    lasts: bool = True


@dataclass
class Outcome:
    """The result of one row."""

    number: int
    fault: str
    result: str
    """`holds`, `fails`, `absent` or `skipped`."""
    injected: dict[str, float] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    seed: int = 0

    def facts(self) -> dict[str, Any]:
        """Return it in plain types for JSON."""
        return {
            "row": self.number,
            "fault": self.fault,
            "result": self.result,
            "injected": self.injected,
            "measured": self.measured,
            "problems": self.problems,
            "seconds": round(self.seconds, 1),
            "seed": self.seed,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """How the rows are run.

    Args:
        seed: of all that is random.
        full: whether counts are those of the table, not reduced ones.
        isolation: of servers whose setup leaves it open.
        folder: for repositories, logs and histories.
    """

    seed: int
    full: bool
    isolation: str
    folder: Path


class Bench:
    """The servers of a setup with their canary. Use `async with`."""

    def __init__(self, setup: Setup, plan: Plan) -> None:
        """Start nothing."""
        self.setup, self.plan = setup, plan
        self.folder = folder_of(plan.folder, "servers")
        self.repository = self.folder / "models"
        self.references = bundles.References()
        self.service = Service(self.references)
        self.servers: list[Server] = []
        self.files = Files(self.folder) if setup.secured else None
        self.tokens = Tokens(self.folder / "tokens.txt") if setup.secured == "tokens" else None
        self.last = Last()
        self.baseline_s = 0.0
        self.canary: Canary | None = None
        self._stack = ExitStack()

    async def __aenter__(self) -> Bench:
        bundles.write_repository(self.repository, *self.setup.models)
        self.references.read(self.repository)
        for model in self.repository.glob("*/*"):
            self.service.servings.append(Serving(model.parent.name, model.name))
        if self.tokens is not None:
            for name, scopes in (("canary", "infer,attention"), ("all", "infer,attention,metrics,admin")):
                self.tokens.add(name, scopes)
        try:
            for _ in range(self.setup.replicas if self.setup.starts else 0):
                await self.start()
        except BaseException:
            self._stack.close()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        if self.canary is not None:
            await self.canary.stop()
        # A server may take seconds to end, and others wait with open connections.
        await asyncio.to_thread(self._stack.__exit__, *error)  # type: ignore[arg-type]

    def flags(self) -> list[str]:
        """Return the flags of its servers."""
        found = ["--isolation", self.setup.isolation or self.plan.isolation, *self.setup.flags]
        if self.files is not None:
            found += ["--tls-cert", str(self.files.cert), "--tls-key", str(self.files.key)]
        if self.setup.secured == "certificates":
            assert self.files is not None
            found += ["--tls-client-ca", str(self.files.client_ca)]
        if self.tokens is not None:
            found += ["--tokens-file", str(self.tokens.path)]
        return found

    async def start(self, *flags: str, failpoints: Sequence[str] = (), **options: Any) -> Server:
        """Start one more server, until the bench ends."""
        failpoints = (*self.setup.failpoints, *failpoints)
        program = [sys.executable, "-m", "faults.failpoints", ",".join(failpoints)] if failpoints else []
        folder = folder_of(self.folder, "server")
        if self.setup.environment:
            options.setdefault("env", {**os.environ, **dict(self.setup.environment)})
        serving = serve(self.repository, folder, *self.flags(), *flags, exit_code=None, program=program, **options)
        running: RunningServer = await asyncio.to_thread(self._stack.enter_context, serving)
        context = None
        if self.files is not None:
            own = self.files.clients.issue_cert("client") if self.setup.secured == "certificates" else None
            context = self.files.context(own)
        server = Server(running, context, self.tokens.secrets["all"] if self.tokens else "")
        self.servers.append(server)
        return server

    def channel_options(self) -> dict[str, Any]:
        """Return credentials and metadata of a caller with all rights, as keywords of `Wire`."""
        found: dict[str, Any] = {}
        if self.files is not None:
            own = self.files.clients.issue_cert("client") if self.setup.secured == "certificates" else None
            found["credentials"] = self.files.channel_credentials(own)
        if self.tokens is not None:
            found["metadata"] = bearer(self.tokens.secrets["all"])
        return found

    async def watch(self) -> None:
        """Start the canary, and measure its baseline."""
        if self.canary is not None or self.setup.secured == "certificates":
            return
        options = Options(
            tuple(one.target for one in self.servers),
            str(self.folder / "canary.jsonl"),
            timeout_s=TIMEOUT_S if self.plan.full else BUSY_TIMEOUT_S,
            seed=self.plan.seed,
        )
        if self.tokens is not None and self.files is not None:
            ca = self.folder / "ca.pem"
            ca.write_bytes(self.files.authority.cert_pem.bytes())
            options = replace(options, ca=str(ca), token=self.tokens.secrets["canary"])
        self.canary = Canary(options)
        await self.canary.start()
        self.canary.go()
        await asyncio.sleep(0.5)  # connections, and first runs of each shape
        await self.canary.pause()
        await self.measured_baseline()

    async def measured_baseline(self) -> float:
        """Measure the canary's p99 without a fault, and return it in seconds: the greatest of all such measurements."""
        assert self.canary is not None
        self.canary.go()
        await asyncio.sleep(BASELINE_S)
        checker = Checker(self.service)
        checker.take(*await self.canary.pause())
        if problems := checker.finish():
            raise RuntimeError(f"the canary failed without a fault: {problems[0]}")
        self.baseline_s = max(self.baseline_s, percentile(checker.latencies_s[bundles.CANARY], 0.99))
        return self.baseline_s

    def usage(self) -> Usage:
        """Return what all its servers that live hold."""
        total = Usage()
        for server in self.servers:
            if server.lives:
                total += server.usage()
        return total


@dataclass
class Lab:
    """One row's view of its bench. Event loop only."""

    row: Row
    bench: Bench
    checker: Checker
    seed: int
    injected: Counter[str] = field(default_factory=Counter)
    measured: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)
    attempts: int = 0
    """The most attempts of callers beyond one a call."""
    allowed: dict[str, frozenset[str]] = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)
    """When the canary began to call."""
    before: Usage = field(default_factory=Usage)
    """What the servers held then."""
    after: list[tuple[dict[str, float], float]] = field(default_factory=list)
    """What the servers had counted at the end."""
    late_s: float = 0.0
    """How late timers of this process were at most."""
    uncounted: tuple[Counter[str], float] = field(default_factory=lambda: (Counter(), 0.0))
    """What they counted of the canary's first calls, in a row that starts it."""

    def __post_init__(self) -> None:
        """Draw from the row's own seed."""
        self.random = np.random.default_rng([self.seed, self.row.number])
        self.chance = random.Random(f"{self.seed}:{self.row.number}")

    @property
    def server(self) -> Server:
        """The first server."""
        return self.bench.servers[0]

    def count(self, reduced: int, full: int) -> int:
        """Return a count: the table's, or a reduced one."""
        return full if self.bench.plan.full else reduced

    def sink(self, event: Event) -> None:
        """Check an event, and keep it for the record of a failure."""
        self.bench.last(event)
        self.checker.take(event)

    def caller(self, name: str, *codes: str, server: Server | None = None, **options: Any) -> Wire:
        """Return a caller that may get these statuses."""
        self.allowed[name] = frozenset(codes or ("OK",))
        found = {**self.bench.channel_options(), **options}
        return Wire(self.sink, name, (server or self.server).target, **found)

    def texts(self, count: int) -> list[str]:
        """Return random texts."""
        return bundles.texts(self.random, count)

    def must(self, holds: bool, what: str) -> None:
        """Record a failure unless this holds."""
        if not holds:
            self.problems.append(what)

    def quick(self, holds: bool, what: str) -> None:
        """Record a failure of speed unless this holds. A reduced run only states it: others share its machine."""
        if self.bench.plan.full:
            self.must(holds, what)
        elif not holds:
            self.measured["slow"] = "; ".join(filter(None, (self.measured.get("slow"), what)))

    def control(self, holds: bool, what: str) -> None:
        """Record a failure unless this shows that the fault took place."""
        self.must(holds, f"control: {what}")

    async def watch(self) -> None:
        """Start the canary, in a row that starts its servers itself. No other call may run."""
        before = _total(await asyncio.to_thread(_counted, self.bench))
        await self.bench.watch()
        self.uncounted = _since(before, _total(await asyncio.to_thread(_counted, self.bench)))
        assert self.bench.canary is not None
        self.before = await asyncio.to_thread(self.bench.usage)
        self.begun = time.monotonic()
        self.bench.canary.go()

    def lacks(self, what: str) -> None:
        """Record that the server lacks what a part of the row tests."""
        self.lacking.append(what)

    async def until(self, holds: Callable[[], bool], timeout_s: float = 10.0) -> bool:
        """Return whether this holds in time; other tasks continue."""
        until = time.monotonic() + timeout_s
        while not await asyncio.to_thread(holds):
            if time.monotonic() > until:
                return False
            await asyncio.sleep(0.05)
        return True

    async def blocking(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function that blocks in a thread."""
        return await asyncio.to_thread(function, *arguments)


def absent(setup: Setup) -> str:
    """Return what the server lacks for a setup; empty: nothing."""
    lacking = [name for name in setup.needs if name not in Settings.model_fields]
    return f"the server has no {', '.join('--' + name.replace('_', '-') for name in lacking)}" if lacking else ""


async def run_row(row: Row, bench: Bench) -> Outcome:
    """Run one row, and judge it."""
    begun = time.monotonic()
    outcome = Outcome(row.number, row.fault, "holds", seed=bench.plan.seed)
    allowed: dict[str, frozenset[str]] = {bundles.CANARY: CANARY_STATUSES}
    private = (str(bench.plan.folder), str(ROOT), sys.prefix)
    checker = Checker(bench.service, Rules(allowed, private=private, late_s=LATE_S if bench.plan.full else BUSY_LATE_S))
    lab = Lab(row, bench, checker, bench.plan.seed, allowed=allowed)
    try:
        if row.canary is not None and bench.servers:
            await bench.watch()
        async with _watched(lab, outcome):
            await row.run(lab)
    except Skip as skip:
        outcome.result, outcome.measured = "skipped", {"reason": str(skip)}
        return outcome
    except Absent as missing:
        outcome.result, outcome.measured = "absent", {"reason": str(missing)}
        return outcome
    except Exception as error:  # noqa: BLE001 - a row that breaks has failed, and the others run
        lab.problems.append(f"the row itself failed: {type(error).__name__}: {error}")
    outcome.injected, outcome.measured = dict(lab.injected), {**lab.measured, **outcome.measured}
    checker.excuse(lambda _: lab.late_s)  # this process ended those calls
    outcome.problems = [*lab.problems, *(str(one) for one in checker.finish())]
    if extra := sum(checker.count.values()) - len(checker.problems):
        outcome.problems.append(f"and {extra} more")
    if lab.lacking:
        outcome.result, outcome.measured["reason"] = "absent", "; ".join(lab.lacking)
    if outcome.problems:
        outcome.result = "fails"
    outcome.seconds = time.monotonic() - begun
    return outcome


@asynccontextmanager
async def _watched(lab: Lab, outcome: Outcome) -> AsyncIterator[None]:
    """Measure before and after a row, with the canary's calls in between."""
    bench, row = lab.bench, lab.row
    lab.before = await asyncio.to_thread(bench.usage)
    counted = await asyncio.to_thread(_counted, bench)
    lab.begun = time.monotonic()
    if bench.canary is not None:
        bench.canary.go()
    timing = asyncio.create_task(_timed(lab))
    try:
        yield
    finally:
        timing.cancel()
        if bench.canary is not None:
            await asyncio.sleep(max(0.0, lab.begun + LEAST_S - time.monotonic()))
            events = await bench.canary.pause()
            lab.after = await asyncio.to_thread(_counted, bench)
            await _judge_canary(lab, outcome, events)
        else:
            lab.after = await asyncio.to_thread(_counted, bench)
    codes = Counter[str]()
    for each in lab.checker.codes.values():
        codes.update(each)
    outcome.measured["statuses"] = dict(codes)
    if row.reconciles and bench.servers:
        _reconcile(lab, counted)
    if bench.servers:
        await asyncio.to_thread(_returned, lab, outcome)


async def _timed(lab: Lab) -> None:
    """Measure how late the timers of this process are."""
    while True:
        due = time.monotonic() + TICK_S
        await asyncio.sleep(TICK_S)
        lab.late_s = max(lab.late_s, time.monotonic() - due)


async def _judge_canary(lab: Lab, outcome: Outcome, events: list[Event]) -> None:
    """Check the canary's calls, and require that enough of them were answered in time."""
    rule, bench = lab.row.canary, lab.bench
    assert bench.canary is not None
    seconds = time.monotonic() - lab.begun
    late_s = bench.canary.late_s
    for event in events:
        bench.last(event)
    lab.checker.take(*events)
    lab.late_s = max(lab.late_s, late_s)
    if rule is None:
        return
    codes = lab.checker.codes.get(bundles.CANARY, Counter[str]())
    calls = sum(isinstance(one, Begin) for one in events)
    failed = calls - codes["OK"]
    p99 = percentile(lab.checker.latencies_s.get(bundles.CANARY, ()), 0.99)
    lab.control(calls >= seconds * 10, f"the canary made {calls} calls only in {seconds:.1f} s")  # a fifth of its rate
    lab.must(failed <= (1 - rule.answered) * calls, f"{failed} of the canary's {calls} calls failed: {dict(codes)}")
    if rule.factor is not None:
        limit_s = max(rule.factor * bench.baseline_s, FLOOR_S) + late_s
        if p99 > limit_s and bench.servers[0].lives:
            # The machine may be slower than it was at the first measurement.
            limit_s = max(rule.factor * await bench.measured_baseline(), FLOOR_S) + late_s
        lab.quick(p99 <= limit_s, f"{LATE} {p99 * 1e3:.1f} ms, above {limit_s * 1e3:.1f} ms")
    outcome.measured["canary"] = {
        "calls": calls,
        "failed": failed,
        "p99_ms": round(p99 * 1e3, 1),
        "baseline_p99_ms": round(bench.baseline_s * 1e3, 1),
        "timers_late_p99_ms": round(late_s * 1e3, 1),
    }


def _counted(bench: Bench) -> list[tuple[dict[str, float], float]]:
    return [server.settled_calls() if server.lives else ({}, 0.0) for server in bench.servers]


def _total(counted: list[tuple[dict[str, float], float]]) -> tuple[Counter[str], float]:
    """Return the sum over servers."""
    codes: Counter[str] = Counter()
    for found, _ in counted:
        codes.update(found)  # type: ignore[arg-type]
    return codes, sum(started for _, started in counted)


def _since(before: tuple[Counter[str], float], after: tuple[Counter[str], float]) -> tuple[Counter[str], float]:
    return Counter({code: value - before[0][code] for code, value in after[0].items()}), after[1] - before[1]


def _reconcile(lab: Lab, before: list[tuple[dict[str, float], float]]) -> None:
    """Compare what callers got during the row with what the servers counted."""
    codes, started = _since(lab.uncounted, _since(_total(before), _total(lab.after)))
    lab.checker.reconcile(codes, started, attempts=lab.attempts)


def _returned(lab: Lab, outcome: Outcome) -> None:
    """Require that memory, descriptors and threads return to where they were."""
    found: list[Usage] = []
    before = lab.before

    def returned() -> bool:
        gc.collect()  # some versions of gRPC close a connection when a client's last call is freed
        found[:] = [lab.bench.usage()]
        grown = found[0].descriptors - before.descriptors, found[0].threads - before.threads
        return (
            grown[0] <= DESCRIPTORS
            and grown[1] <= THREADS
            and found[0].memory_mb - before.memory_mb <= lab.row.memory_mb
        )

    eventually(returned, SETTLE_S, 0.25)
    after = found[0]
    grown = after.memory_mb - before.memory_mb
    outcome.measured["memory_mb"] = [round(before.memory_mb, 1), round(after.memory_mb, 1)]
    if lab.row.lasts:
        lab.must(grown <= lab.row.memory_mb, f"memory grew by {grown:.1f} MB, above {lab.row.memory_mb:g} MB")
        lab.must(
            after.descriptors - before.descriptors <= DESCRIPTORS,
            f"descriptors grew from {before.descriptors} to {after.descriptors}",
        )
        lab.must(after.threads - before.threads <= THREADS, f"threads grew from {before.threads} to {after.threads}")


def credentials_of(bench: Bench, client: Any = None) -> grpc.ChannelCredentials:
    """Return the credentials of a caller that trusts the bench's authority, with a certificate or without."""
    assert bench.files is not None
    return bench.files.channel_credentials(client)


def context_of(bench: Bench, client: Any = None) -> ssl.SSLContext:
    """Return the same for HTTP."""
    assert bench.files is not None
    return bench.files.context(client)


def by_number(rows: Sequence[Row]) -> Mapping[int, Row]:
    """Return rows by their numbers."""
    return {row.number: row for row in rows}
