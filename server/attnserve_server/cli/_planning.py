"""The plan of `attnserve-server plan`: traffic and a bundle to replicas, memory and latency.

The bundle's costs are those that a server stored beside it on this machine, or are measured here. What a selection
adds, and what a run on all cores saves, is measured here. A bundle that cannot be served raises its AttnserveError.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from rich.console import Console
from rich.table import Table

from attnserve_server.config import Settings
from attnserve_server.config_bounds import MIB
from attnserve_server.domain.clock import ThreadCpuClock
from attnserve_server.domain.machine import cores
from attnserve_server.domain.values import HeadReduction
from attnserve_server.engine import warmup
from attnserve_server.engine.cost import fit
from attnserve_server.engine.cost_file import machine, read_costs
from attnserve_server.engine.session import CPU, RuntimeSession
from attnserve_server.loading import Opened, cost_key, instances_of, open_bundle
from attnserve_server.model.repository import Bundle, BundleInvalid, Repository
from attnserve_server.observability.logs import configure
from attnserve_server.scheduling.capacity import Carried, Replica, lengths, peak_rate, poisson, simulate
from attnserve_server.scheduling.policy import SchedulingSettings
from attnserve_server.transport.peak import Peak, peak_of, run_bytes
from attnserve_server.transport.receiving import ReceiveBounds
from attnserve_server.wanted import under_policy

_CALL_S: Final = 6e-4
"""Processor seconds of a call outside its run: docs/reference/benchmarks.md has 0.4 to 0.7 ms."""
_SIMULATED: Final = 6000
"""Sequences of a simulation: the 99th percentile is then that of sixty."""
_MOST_REPLICAS: Final = 1000
_BOUNDS: Final = {"max_queue_bytes": 128 * MIB, "max_unread_bytes": 128 * MIB, "max_batch_bytes": 256 * MIB}
"""Bounds of memory, as in deploy/compose.yaml and the Helm chart; more where one sequence needs more."""
_REPEATS: Final = 5


class Traffic(BaseModel):
    """The file of traffic."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rate: Annotated[float, Field(gt=0, le=1e6)]
    """Sequences a second at the busiest time."""
    lengths: dict[str, Annotated[int, Field(ge=1)]]
    """Tokens by quantile: min, p50, p99, max."""
    attention: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the sequences that select attention."""
    p99_ms: Annotated[float, Field(gt=0)] | None = None
    """Objective for the latency; None: none."""
    load: Annotated[float, Field(gt=0, le=0.95)] = 0.6
    """Share of its peak that a replica carries."""
    spare: Annotated[int, Field(ge=0, le=100)] = 1
    """Replicas that may fail while the rest carries the load."""

    @model_validator(mode="after")
    def _quantiles_rise(self) -> Traffic:
        self.quantiles(1)
        return self

    def quantiles(self, longest: int) -> dict[float, int]:
        """Return tokens by share of the sequences. Without `min` and `max`, from 1 to the model's `longest`."""
        found: dict[float, int] = {}
        for name, tokens in self.lengths.items():
            number = {"min": "0", "max": "100"}.get(name, name.removeprefix("p"))
            if not number.replace(".", "", 1).isdigit() or float(number) > 100:
                raise ValueError(f"lengths.{name}: name a quantile, such as min, p50, p99.9 or max")
            found[round(float(number) / 100, 9)] = tokens
        if not found:
            raise ValueError("lengths is empty: give one quantile or more, such as p50 and p99")
        found.setdefault(0.0, 1)
        found.setdefault(1.0, max(longest, *found.values()))
        ordered = [found[share] for share in sorted(found)]
        if ordered != sorted(ordered):
            raise ValueError(f"lengths fall from one quantile to the next: {ordered}")
        return found


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run, and what to expect of it."""

    model: str
    traffic: Traffic
    replica: Replica
    peak_rate: float
    needed: int
    """Replicas that carry the load, without the spare ones."""
    expected: Carried
    """Of one replica, with all replicas there."""
    failing: Carried
    """Of one replica, with the spare ones missing."""
    memory: Peak
    files_mib: int
    sequence_mib: int
    settings: dict[str, int]

    @property
    def replicas(self) -> int:
        """Replicas in all."""
        return self.needed + self.traffic.spare

    @property
    def limit_mib(self) -> int:
        """Limit of memory of a container: the peak, rounded up to 256 MiB."""
        return -(-self.memory.total // (256 * MIB)) * 256

    def as_json(self) -> dict[str, Any]:
        """Return all of it as JSON. `values` are those of the Helm chart."""

        def latency(carried: Carried) -> dict[str, float]:
            shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
            return {f"{name}_ms": round(1e3 * carried.quantile_s(share), 3) for name, share in shares.items()}

        carried = self.traffic.rate / self.replicas
        limit = f"{self.limit_mib}Mi"
        models = {"count": 1, "filesMiB": self.files_mib, "sequenceMiB": self.sequence_mib}
        return {
            "model": self.model,
            "machine": {"name": machine(), "cores": cores()},
            "traffic": self.traffic.model_dump(),
            "cost": asdict(self.replica),
            "replicas": self.replicas,
            "needed_for_load": self.needed,
            "instances": self.replica.instances,
            "peak_rate": round(self.peak_rate, 3),
            "load_of_peak": round(carried / self.peak_rate, 4),
            "expected": {**latency(self.expected), "rows_per_run": round(self.expected.rows, 2)},
            "without_spare": latency(self.failing),
            "memory": self.memory.as_fields(),
            "values": {
                "replicas": self.replicas,
                "models": models,
                "settings": self.settings,
                "resources": {
                    "requests": {"cpu": str(self.replica.cores), "memory": limit},
                    "limits": {"memory": limit},
                },
            },
        }


def read_traffic(path: Path) -> Traffic:
    """Read a file of traffic.

    Raises:
        typer.BadParameter: it is no YAML, or a value is missing, unknown or out of its range; all are named.
        OSError: it cannot be read.
    """
    import yaml  # noqa: PLC0415 - only this command needs it

    try:
        return Traffic.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise typer.BadParameter(f"{path.name} is no YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, one['loc'])) or 'file'}: {one['msg']}" for one in error.errors()]
        raise typer.BadParameter(f"{path.name}: {'; '.join(faults)}") from None


def planned(place: Path, traffic: Traffic, instances: int, note: Callable[[str], object]) -> Plan:
    """Plan for one bundle.

    Args:
        place: the bundle's folder.
        traffic: what it must carry.
        instances: runs at a time in a replica; 0: one per core, or three per GPU.
        note: gets a line about each step.

    Raises:
        typer.BadParameter: no number of replicas reaches the objective.
        AttnserveError: the bundle cannot be served here.
    """
    configure("error")
    place = place.resolve()
    if not (place / "manifest.json").is_file():
        raise BundleInvalid(place.parent.name, place.name, "the folder has no manifest.json")
    settings = Settings.load({"repository": place.parents[1], "instances": instances, "isolation": "none", **_BOUNDS})
    bundle = under_policy(Repository(place.parents[1]).bundle(place.parent.name, place.name), settings)
    note("loading the bundle")
    opened = open_bundle(bundle, settings)
    quantiles = traffic.quantiles(max((axis.max_length for axis in bundle.manifest.axes), default=1))
    replica = _measured(opened, settings, round(_middle(quantiles)), note)
    batches = SchedulingSettings(max_batch_size=bundle.manifest.max_batch_size)
    note("simulating")
    tokens = lengths(quantiles, _SIMULATED, np.random.default_rng(0))
    peak = peak_rate(replica, tokens, traffic.attention, batches, np.random.default_rng(1))

    def carried(replicas: int) -> Carried:
        rate = traffic.rate / replicas
        load = poisson(tokens, traffic.attention, rate, np.random.default_rng(2))
        return simulate(replica, load, batches, rate * replica.call_s)

    needed = math.ceil(traffic.rate / (traffic.load * peak))
    while traffic.p99_ms and (found := carried(needed).quantile_s(0.99)) > traffic.p99_ms / 1e3:
        least = simulate(replica, poisson(tokens, traffic.attention, 0.1, np.random.default_rng(2)), batches)
        if needed >= _MOST_REPLICAS or least.quantile_s(0.99) > traffic.p99_ms / 1e3:
            raise typer.BadParameter(
                f"p99_ms is {traffic.p99_ms:g}; the model needs {1e3 * min(found, least.quantile_s(0.99)):.0f} ms "
                "on an idle machine: raise p99_ms, shorten the texts, or use a faster machine or provider"
            )
        needed += 1
    sizes = _sizes(bundle, settings)
    loaded = Settings.load(
        {"repository": place.parents[1], "isolation": "none", "instances": replica.instances, **sizes}
    )
    memory = peak_of([bundle], loaded, ReceiveBounds.of(loaded, [(bundle.manifest, 0)]))
    return Plan(
        f"{bundle.manifest.name}/{bundle.manifest.version}",
        traffic,
        replica,
        peak,
        needed,
        carried(needed + traffic.spare),
        carried(needed),
        memory,
        -(-memory.weights // (2 * MIB)),
        -(-run_bytes(bundle.manifest.model_copy(update={"max_batch_size": 1}), loaded) // MIB),
        {"instances": replica.instances, **sizes},
    )


def show(found: Plan, console: Console) -> None:
    """Print the plan."""
    traffic, report = found.traffic, found.as_json()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    spare = f" ({found.needed} for the load, {traffic.spare} that may fail)" if traffic.spare else ""
    expected, failing = report["expected"], report["without_spare"]
    rows = [
        ("replicas", f"{found.replicas}{spare}"),
        ("instances", f"{found.replica.instances} in each, on {found.replica.cores} cores"),
        ("peak of a replica", f"{found.peak_rate:.1f} sequences/s"),
        ("its load", f"{report['load_of_peak']:.0%}, {expected['rows_per_run']:.1f} sequences in a run"),
        ("memory limit", f"{found.limit_mib} MiB, of which callers can take {found.memory.total // MIB} MiB"),
        ("latency", "  ".join(f"{q} {expected[f'{q}_ms']:.1f} ms" for q in ("p50", "p90", "p99"))),
    ]
    if traffic.spare:
        rows.append(("without the spare", "  ".join(f"{q} {failing[f'{q}_ms']:.1f} ms" for q in ("p50", "p90", "p99"))))
    for name, text in rows:
        table.add_row(name, text)
    console.print(f"{found.model}, {traffic.rate:g} sequences/s, on {machine()}", highlight=False, markup=False)
    console.print(table)
    flags = "\n".join(f"  --{name.replace('_', '-')} {value}" for name, value in found.settings.items())
    console.print(f"each replica:\n{flags}", highlight=False, markup=False)


def _middle(quantiles: dict[float, int]) -> float:
    shares = sorted(quantiles)
    return float(np.exp(np.interp(0.5, shares, np.log([quantiles[share] for share in shares]))))


def _sizes(bundle: Bundle, settings: Settings) -> dict[str, int]:
    """The bounds of memory: those of the chart, or more where a request of the model needs more."""
    probe = settings.model_copy(update={"receive_budget_bytes": 2**40})
    message = ReceiveBounds.of(probe, [(bundle.manifest, 0)]).message
    return {**_BOUNDS, "receive_budget_bytes": max(256 * MIB, 4 * message)}


def _measured(opened: Opened, settings: Settings, tokens: int, note: Callable[[str], object]) -> Replica:
    """Return the costs of a bundle on this machine."""
    session, manifest = opened.sessions[0], opened.bundle.manifest
    warmup.touch(session, manifest)
    runs = read_costs(opened.bundle, cost_key(session, manifest, settings)) if settings.remember_costs else ()
    if not runs:
        note("measuring runs")
        runs = warmup.measure(session, manifest, ThreadCpuClock())
    cost = fit(runs)
    attention_s, pair_s = _attention(session, opened)
    wide = 1.0
    if opened.wide is not None and session.provider == CPU:
        alone, all_cores = (_wall_s(one, opened, tokens) for one in (session, opened.wide))
        wide = min(1.0, all_cores / alone)
    instances = instances_of(opened.sessions, settings)
    here = cores() if session.provider == CPU else max(cores(), instances + 1)
    return Replica(cost, instances, here, _CALL_S, wide, attention_s, pair_s)


def _attention(session: RuntimeSession, opened: Opened) -> tuple[float, float]:
    """What selecting every layer's mean over heads adds: seconds, and seconds for each pair of positions."""
    manifest = opened.bundle.manifest
    everything = warmup.selection_of_all(manifest, HeadReduction.MEAN)
    if everything is None:
        return 0.0, 0.0
    longest = max((axis.max_length for axis in manifest.axes), default=1)
    added: list[tuple[float, float]] = []
    for length in sorted({min(16, longest), min(128, longest)}):
        plain = warmup.synthetic(manifest, length)
        clock = time.thread_time if session.provider == CPU else time.perf_counter
        both = [
            _least_s(partial(warmup.run, session, manifest, [one]), clock)
            for one in (plain, replace(plain, attention=everything))
        ]
        added.append((float(plain.tokens) ** 2, max(0.0, both[1] - both[0])))
    (short, short_s), (long, long_s) = added[0], added[-1]
    pair_s = max(0.0, (long_s - short_s) / (long - short)) if long > short else 0.0
    return max(0.0, short_s - pair_s * short), pair_s


def _wall_s(session: RuntimeSession, opened: Opened, tokens: int) -> float:
    one = warmup.synthetic(opened.bundle.manifest, tokens)
    return _least_s(partial(warmup.run, session, opened.bundle.manifest, [one]), time.perf_counter)


def _least_s(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """The least of a few times, after a run that prepares the shape."""
    work()
    spent = []
    for _ in range(_REPEATS):
        began = clock()
        work()
        spent.append(clock() - began)
    return min(spent)
