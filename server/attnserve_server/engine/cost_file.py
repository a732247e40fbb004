"""Timed runs kept beside the bundle, so that a server that starts again need not measure them.

`<root>/<name>/<version>.costs.json` has one entry for each combination of graph, provider, runtime and machine. The
file is not part of the bundle. If it cannot be read, or the folder cannot be written, the server measures at each
start.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from attnserve_server.engine.cost import TimedRun
from attnserve_server.model.repository import Bundle, write_atomically

_MAX_BYTES: Final = 2**20
"""Maximum size of a file that is read; hundreds of machines leave less behind."""
_MAX_ENTRIES: Final = 64
"""Maximum number of entries; the oldest one is dropped."""


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
    """Maximum number of rows in a timed run: 1 if sequences run alone. 0: written by an earlier release."""


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    key: CostKey
    runs: tuple[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[float, Field(ge=0)]], ...]
    """(rows, positions of each row, seconds)."""


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    entries: tuple[_Entry, ...] = ()


def cost_path(bundle: Bundle) -> Path:
    """Return the path of a bundle's cost file."""
    return bundle.path.with_name(f"{bundle.path.name}.costs.json")


def read_costs(bundle: Bundle, key: CostKey) -> tuple[TimedRun, ...]:
    """Return the timed runs of this key; empty if there are none or the file cannot be read."""
    found = next((entry for entry in _read(bundle).entries if entry.key == key), None)
    return () if found is None else tuple(TimedRun(*run) for run in found.runs)


def write_costs(bundle: Bundle, key: CostKey, runs: tuple[TimedRun, ...]) -> bool:
    """Add the timed runs of this key to the file. Return False if the file could not be written."""
    entry = _Entry(key=key, runs=tuple((run.size, run.tokens, run.seconds) for run in runs))
    others = tuple(one for one in _read(bundle).entries if one.key != key)
    content = _File(entries=(*others[-_MAX_ENTRIES + 1 :], entry)).model_dump_json()
    try:
        with write_atomically(cost_path(bundle)) as partial:
            partial.write_text(content + "\n", "ascii")
    except OSError:
        return False
    return True


def machine() -> str:
    """Return the models of the processor and of each NVIDIA GPU, as far as the system reports them."""
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
        return _File()  # the costs are measured again


def _model_in(path: Path) -> str:
    """The value of the first line `model name: value` or `Model: value`; empty if there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip().lower() in ("model name", "model"):
            if value.strip().isdigit():
                continue  # the line with the processor's model number, which precedes its name
            return value.strip()
    return ""
