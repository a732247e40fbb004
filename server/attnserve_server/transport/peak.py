"""The most memory that a server takes, from its settings and models: a bound that the start logs.

    weights x 2                              the file, and the copy that the runtime packs
    + instances x the largest run            arrays of a run, with whole maps, of each model
    + queue x 9/8                            sequences that wait, and their answers, of each model
    + unread answers                         computed and not read
    + messages being received                the budget
    + lines of the audit log that wait       with `--audit-log`, in each process that serves or writes it
    + a constant for each process            libraries, connections, pools
    + arenas between processes               with `--isolation process`

It is a bound for callers that take all that they may; usual load stays far below it. A run's arrays include the answers
that it makes, and memory between a burst and its return (`engine.shrinking`) is that of its runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Final

from attnserve_server.config import Settings
from attnserve_server.config_bounds import MIB
from attnserve_server.domain.machine import cores, memory_bytes
from attnserve_server.engine.cost import Footprint
from attnserve_server.model.manifest import Manifest
from attnserve_server.model.repository import Bundle
from attnserve_server.observability.audit import queue_bytes
from attnserve_server.observability.logs import logger
from attnserve_server.transport.receiving import ReceiveBounds

_log = logger(__name__)

ARENAS_BYTES: Final = 128 * MIB
"""Arenas of a front and an engine, in both directions."""
FRONT_BYTES: Final = 96 * MIB
ENGINE_BYTES: Final = 192 * MIB
"""Resident bytes of a process without models: measured 60 and 110 MB, with room for threads and pools."""


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes by cause."""

    weights: int
    runs: int
    queues: int
    unread: int
    received: int
    audit: int
    processes: int

    @property
    def total(self) -> int:
        """The most bytes that the server takes."""
        return sum(asdict(self).values())

    def as_fields(self) -> dict[str, int]:
        """Return all of it in MiB, rounded up, for a log line."""
        return {f"{name}_mib": -(-size // MIB) for name, size in {**asdict(self), "total": self.total}.items()}


def peak_of(bundles: Sequence[Bundle], settings: Settings, bounds: ReceiveBounds, fronts: int = 0) -> Peak:
    """Return the most memory that a server takes.

    Args:
        bundles: its models.
        settings: of the server.
        bounds: of messages, of each process that serves gRPC.
        fronts: processes that serve gRPC; 0: one process does everything.
    """
    instances = settings.instances or cores()
    weights = sum(2 * one.stat().st_size for bundle in bundles for one in bundle.path.rglob("*") if one.is_file())
    runs = sum(instances * run_bytes(bundle.manifest, settings) for bundle in bundles)
    received = max(1, fronts) * (bounds.messages * bounds.message + bounds.calls * 65_536 + bounds.bodies)
    processes = ENGINE_BYTES
    if fronts:
        engines = len(bundles)
        processes = (fronts + 1) * FRONT_BYTES + engines * ENGINE_BYTES + fronts * engines * ARENAS_BYTES
    queues = len(bundles) * settings.max_queue_bytes * 9 // 8
    audit = queue_bytes(settings) * (fronts + 1)
    return Peak(weights, runs, queues, settings.max_unread_bytes, received, audit, processes)


def run_bytes(manifest: Manifest, settings: Settings) -> int:
    """Return the bytes of the arrays of the largest run of a model: its inputs, outputs and whole maps."""
    lengths = {axis.symbol: axis.max_length for axis in manifest.axes}
    terms = Footprint(manifest).largest()
    longest = tuple(lengths.values())
    alone = sum(prod(longest[at] for at in axes) * size for axes, size in terms.items())
    most = min(settings.max_batch_size or manifest.max_batch_size, manifest.max_batch_size)
    return max(alone, min(settings.max_batch_bytes, most * alone))


def log_peak(bundles: Sequence[Bundle], settings: Settings, bounds: ReceiveBounds, fronts: int = 0) -> Peak:
    """Log the peak, and warn with the remedy if it exceeds the memory that there is. Arguments as `peak_of`."""
    peak = peak_of(bundles, settings, bounds, fronts)
    _log.info("memory", **peak.as_fields())
    remedy = why_above(peak)
    if remedy:
        limit = memory_bytes() // MIB
        _log.warning("callers can take more memory than there is", limit_mib=limit, remedy=remedy)
    return peak


def why_above(peak: Peak, available: int | None = None) -> str:
    """Return the remedy if the peak exceeds the memory that there is; empty if it does not."""
    if peak.total <= (available or memory_bytes()):
        return ""
    largest = max(asdict(peak).items(), key=lambda item: item[1])[0]
    return {
        "weights": "serve fewer models with --models",
        "runs": "lower --instances or --max-batch-bytes",
        "queues": "lower --max-queue-bytes",
        "unread": "lower --max-unread-bytes",
        "received": "lower --receive-budget-bytes",
        "audit": "lower --max-request-bytes, or leave out --audit-log",
        "processes": "lower --fronts, or set --isolation none",
    }[largest]
