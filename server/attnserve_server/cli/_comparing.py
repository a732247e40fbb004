"""The comparison of `recommend`: every way to serve some bundles, measured one after another, and its table.

A way that does not serve here is listed with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from attnserve_server.cli._measuring import Measured, Refused, Way, agreement, measured_apart
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.domain.machine import cores
from attnserve_server.engine.cost_file import machine
from attnserve_server.engine.providers import visible_gpus

_FEATURES: Final = {
    "AMX": ("amx_bf16", "amx_tile"),
    "AVX512_BF16": ("avx512_bf16",),
    "VNNI": ("avx512_vnni", "avx_vnni"),
}
"""Instructions that decide how fast bfloat16 and int8 are, by their names in /proc/cpuinfo."""
_IDLE: Final = 0.3
"""Load for each core up to which the machine counts as idle."""
_PROVIDER_MISSING: Final = "ProviderUnavailable"


@dataclass(frozen=True, slots=True)
class Row:
    """One way with its measures, and how far its answers are from those of the first bundle on the CPU provider.

    Args:
        measured: the measures.
        cosine: mean cosine of the outputs.
        top1: share of rows of attention with the same strongest key; None: no weights to compare.
        same: whether provider and precision are to give equal answers: it is the first bundle in its own precision.
    """

    measured: Measured
    cosine: float
    top1: float | None
    same: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """The ways that were measured, the others with reasons, and the processor."""

    rows: tuple[Row, ...]
    refused: tuple[Refused, ...]
    features: dict[str, bool]
    load: float
    """Load of the machine before the first measurement, as processes that run or wait."""

    def fastest(self, *, same: bool) -> int | None:
        """Return the row with the most sequences a second: of the first bundle in its own precision, or of others."""
        of = [at for at, row in enumerate(self.rows) if row.same is same]
        return max(of, key=lambda at: self.rows[at].measured.sequences_s, default=None)

    def quickest(self) -> int | None:
        """Return the row of the first bundle in its own precision in which a sequence alone takes the least time."""
        of = [at for at, row in enumerate(self.rows) if row.same]
        return min(of, key=lambda at: self.rows[at].measured.alone_ms, default=None)

    def as_json(self) -> dict[str, Any]:
        """Return everything that the table has, and the flags of each row."""
        rows = [
            {
                "model": row.measured.model,
                "provider": row.measured.way.provider,
                "precision": row.measured.precision,
                "threads": row.measured.way.threads,
                "instances": row.measured.way.instances,
                "sequences_s": round(row.measured.sequences_s, 2),
                "alone_ms": round(row.measured.alone_ms, 3),
                "cosine": row.cosine,
                "top1": row.top1,
                "memory_bytes": row.measured.memory_bytes,
                "left_to_other_providers": row.measured.others,
                "flags": row.measured.way.flags,
            }
            for row in self.rows
        ]
        refused = [
            {
                "bundle": one.way.bundle.name,
                "provider": one.way.provider,
                "precision": one.way.precision,
                "why": one.why,
            }
            for one in self.refused
        ]
        best = {
            "most_sequences": self.fastest(same=True),
            "least_time_alone": self.quickest(),
            "most_sequences_of_others": self.fastest(same=False),
        }
        shown = {"processor": machine(), "cores": cores(), "instructions": self.features, "load": round(self.load, 2)}
        return {**shown, "rows": rows, "not_measured": refused, "recommended": best}


def ways(bundles: Sequence[Path], count: int, gpus: int) -> list[Way]:
    """Return the ways to measure, those of the first bundle on the CPU provider first.

    Args:
        bundles: folders; the first one is the reference.
        count: cores that the process may use.
        gpus: visible NVIDIA GPUs.
    """
    layouts = dict.fromkeys(((1, count), (max(1, count // 2), 2 if count > 1 else 1), (count, 1)))
    providers = [("cpu", "bundle"), ("openvino", "bundle"), ("openvino", "bf16")]
    made = [
        Way(bundle, provider, precision, threads, instances)
        for bundle in bundles
        for provider, precision in providers
        for threads, instances in layouts
    ]
    on_gpu = [Way(bundle, "cuda", "bundle", 1, instances) for bundle in bundles for instances in (1, 3)] if gpus else []
    return made + on_gpu


def compared(bundles: Sequence[Path], seconds: float, steps: Steps) -> Comparison:
    """Measure every way. After a refusal, the rest of its kind is left out."""
    rows: list[Row] = []
    refused: list[Refused] = []
    true, load = None, os.getloadavg()[0]
    every = ways(bundles, cores(), visible_gpus())
    with steps.shown(len(every)):
        for way in every:
            if any(_covers(one, way) for one in refused):
                continue
            kind = f"{way.bundle.parent.name}/{way.bundle.name} on {way.provider}, {way.precision}"
            steps.begin(f"{kind}: {way.threads} threads x {way.instances} instances")
            found = measured_apart(way, seconds)
            if isinstance(found, Refused):
                refused.append(found)
                continue
            true = true or found.answered
            cosine, top1 = agreement(found.answered, true)
            same = way.bundle == bundles[0] and way.precision == "bundle"
            rows.append(Row(found, cosine, top1, same))
    return Comparison(tuple(rows), tuple(refused), instructions(), load)


def _covers(refused: Refused, way: Way) -> bool:
    """Whether a refusal holds for another way too: that of a provider for all bundles."""
    one = refused.way
    if one.provider != way.provider:
        return False
    return refused.kind == _PROVIDER_MISSING or (one.bundle, one.precision) == (way.bundle, way.precision)


def instructions(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, bool]:
    """Return which instructions for bfloat16 and int8 the processor has; empty if the system does not report it."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    flags = next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), None)
    if flags is None:
        return {}
    return {name: not flags.isdisjoint(of) for name, of in _FEATURES.items()}


def show(found: Comparison, console: Console) -> None:
    """Print the table, what was not measured and why, and the flags to set."""

    def line(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("#", "model", "provider", "precision"):
        table.add_column(column, no_wrap=column != "model", overflow="fold")
    for column in ("thr x inst", "seq/s", "ms", "cosine", "top-1", "MiB"):
        table.add_column(column, justify="right", no_wrap=True)
    for at, row in enumerate(found.rows, start=1):
        one = row.measured
        table.add_row(
            str(at),
            one.model,
            one.way.provider,
            one.precision,
            f"{one.way.threads} x {one.way.instances}",
            f"{one.sequences_s:.0f}",
            f"{one.alone_ms:.1f}",
            f"{row.cosine:.5f}",
            "" if row.top1 is None else f"{row.top1:.2%}",
            f"{one.memory_bytes / 2**20:.0f}",
        )
    has = ", ".join(f"{'' if there else 'no '}{name}" for name, there in found.features.items())
    line(f"{machine()}, {cores()} cores{f': {has}' if has else ''}")
    if found.rows:
        line(f"{found.rows[0].measured.answered.inputs}; cosine and top-1 are to row 1")
        console.print(table)
    if found.features and not (found.features["AMX"] or found.features["AVX512_BF16"]):
        line("bf16: this processor has no instructions for bfloat16, so it would gain nothing.")
    for refused in found.refused:
        way = refused.way
        line(f"not measured: {way.bundle.parent.name} on {way.provider}, {way.precision}: {refused.why}")
    left = {
        (row.measured.model, row.measured.way.provider, count, operator): None
        for row in found.rows
        for operator, count in row.measured.others.items()
    }
    for model, provider, count, operator in left:
        line(f"{model} on {provider}: {count} {operator} run on another provider; try a bundle made with --target")
    if found.load > _IDLE * cores():
        line(
            f"Other work was running here (load {found.load:.1f}), so speeds are too low, and may be in another order."
        )
    _show_flags(found, line)


def _show_flags(found: Comparison, line: Any) -> None:
    chosen = (
        ("most sequences a second", found.fastest(same=True)),
        ("least time alone", found.quickest()),
        ("most sequences a second of other bundles and precisions", found.fastest(same=False)),
    )
    for what, at in chosen:
        if at is not None:
            line(f"{what}: row {at + 1}\n  {found.rows[at].measured.way.flags}")
