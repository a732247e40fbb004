"""What runs were seen to cost, kept beside the bundle, so that a server that starts again need not measure it again.

`<root>/<name>/<version>.costs.json` holds the timed runs of each machine that measured: another processor, provider,
runtime or graph is another entry. It is no part of the bundle: whoever has no right to write there measures each time.
"""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from attnserve_server.engine.cost import TimedRun
from attnserve_server.model.repository import Bundle

_MAX_BYTES: Final = 2**20
"""More than hundreds of machines leave behind; a file that is larger is not one of ours."""
_MAX_ENTRIES: Final = 64
"""Machines that are remembered: the oldest entry gives way."""


class CostKey(BaseModel):
    """What the cost of a run depends on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    provider: str
    runtime: str
    machine: str
    cores: int
    intra_op_threads: int
    max_batch_size: int = 0
    """The most rows of a run, which is 1 where sequences run alone: more were not timed. 0: of an earlier release."""


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    key: CostKey
    runs: tuple[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[float, Field(ge=0)]], ...]
    """(rows, positions of each, seconds)."""


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    entries: tuple[_Entry, ...] = ()


def cost_path(bundle: Bundle) -> Path:
    """The file for a bundle."""
    return bundle.path.with_name(f"{bundle.path.name}.costs.json")


def read_costs(bundle: Bundle, key: CostKey) -> tuple[TimedRun, ...]:
    """The timed runs that this machine left; none where there are none, or the file cannot be used."""
    found = next((entry for entry in _read(bundle).entries if entry.key == key), None)
    return () if found is None else tuple(TimedRun(*run) for run in found.runs)


def write_costs(bundle: Bundle, key: CostKey, runs: tuple[TimedRun, ...]) -> bool:
    """Adds this machine's timed runs, whole or not at all. Whether that could be done."""
    entry = _Entry(key=key, runs=tuple((run.size, run.tokens, run.seconds) for run in runs))
    others = tuple(one for one in _read(bundle).entries if one.key != key)
    path = cost_path(bundle)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(_File(entries=(*others[-_MAX_ENTRIES + 1 :], entry)).model_dump_json() + "\n", "ascii")
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        return False
    return True


def machine() -> str:
    """What computes here, as far as the system tells: the processor's model, and each NVIDIA GPU's."""
    names = [
        value
        for path in (Path("/proc/cpuinfo"), *sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")))
        if (value := _model_in(path))
    ]
    return ", ".join(names) or platform.processor() or platform.machine()


def _read(bundle: Bundle) -> _File:
    path = cost_path(bundle)
    try:
        if path.stat().st_size > _MAX_BYTES:
            return _File()
        return _File.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return _File()  # nothing rests on it: what cannot be read is measured again


def _model_in(path: Path) -> str:
    """The value of the first line `model name: value`, or `Model: value`; empty where there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip().lower() in ("model name", "model"):
            if value.strip().isdigit():
                continue  # the number of a processor's model, which stands before its name
            return value.strip()
    return ""
