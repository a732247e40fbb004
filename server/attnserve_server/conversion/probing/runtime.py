"""Runs graphs for probes and checks through the server's own session, with a time limit, and times them.

A tap is the nodes that return attention weights; its input lists the rows whose weights they return. A graph that does
not load or run raises BuildRefused.
"""

from __future__ import annotations

import re
import statistics
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.rewrite.taps import ITEMS_PREFIX
from attnserve_server.domain.values import Array
from attnserve_server.engine.providers import CPU
from attnserve_server.engine.session import LoadFailed, RunFailed, RunHandle, RunTerminated, RuntimeSession


class GraphRunner:
    """A graph in one session, with one thread. Its taps select all rows of the batch, or none."""

    limit_s: ClassVar[float] = 600.0
    """The most seconds that one run may take."""

    def __init__(self, path: Path, left_out: Sequence[str] | None = None, provider: str = CPU) -> None:
        """Open a graph.

        Args:
            path: the ONNX file.
            left_out: names of the runtime's graph rewritings that are disabled; None: those that the server disables.
            provider: the execution provider.

        Raises:
            BuildRefused: the runtime cannot load the graph.
            ProviderUnavailable: the provider is not available.
        """
        self.path = path
        try:
            self._session = RuntimeSession.load(path, provider=provider, left_out=left_out, intra_op_threads=1)
        except LoadFailed as fault:
            raise BuildRefused(f"the runtime cannot load the model: {_runtime_message(fault, path)}") from None
        self.output_names = self._session.output_names
        self.nodes_by_provider = self._session.nodes_by_provider()
        self._items = [name for name in self._session.input_names if name.startswith(ITEMS_PREFIX)]

    def run(
        self,
        feeds: Mapping[str, Array],
        fetches: Collection[str],
        *,
        tap: bool = True,
        limit_s: float | None = None,
    ) -> dict[str, Array]:
        """Run the graph and return the fetched outputs by name, (B, ...).

        Args:
            feeds: each input, (B, ...), without those of the taps.
            fetches: names of outputs.
            tap: whether the taps select every row; else they select none.
            limit_s: the most seconds that the run may take; None: `GraphRunner.limit_s`.

        Raises:
            BuildRefused: the run failed; the message holds the runtime's own, without paths of this machine.
        """
        allowed_s = self.limit_s if limit_s is None else limit_s
        rows = next(iter(feeds.values())).shape[0] if tap else 0
        items = np.arange(rows, dtype=np.int64)
        names = list(fetches)
        handle = RunHandle()
        # A loop in an untrusted file may never end. The runtime checks the handle between nodes.
        watch = threading.Timer(allowed_s, handle.terminate)
        watch.daemon = True
        watch.start()
        try:
            outputs = self._session.run({**feeds, **dict.fromkeys(self._items, items)}, names, handle)
        except RunTerminated:
            raise BuildRefused(f"the model does not run: one run took more than {allowed_s:g} s") from None
        except RunFailed as fault:
            raise BuildRefused(f"the model does not run: {_runtime_message(fault)}") from None
        finally:
            watch.cancel()
        for name, output in zip(names, outputs, strict=True):
            if not isinstance(output, np.ndarray):
                raise BuildRefused(f"output {name!r} is not a tensor")
        return dict(zip(names, outputs, strict=True))


def time_ratio(tapped: GraphRunner, source: GraphRunner, feeds: Mapping[str, Array], fetches: Collection[str]) -> float:
    """Return the CPU time of a graph with unselected taps over its source's: medians of interleaved runs."""
    tapped_s, source_s = paired_seconds(tapped, source, feeds, fetches, budget_s=0)
    return round(statistics.median(tapped_s) / max(statistics.median(source_s), 1e-9), 3)


def paired_seconds(
    one: GraphRunner, other: GraphRunner, feeds: Mapping[str, Array], fetches: Collection[str], *, budget_s: float = 0.3
) -> tuple[list[float], list[float]]:
    """Return the CPU seconds of alternating runs of two graphs with unselected taps.

    There are at least 9 rounds, and up to 60 within `budget_s`. A round before them warms both up and is not counted.
    """
    spent: tuple[list[float], list[float]] = ([], [])
    for turn in range(61):
        for runner, times in zip((one, other), spent, strict=True):
            begun = time.process_time()
            runner.run(feeds, fetches, tap=False)
            if turn:
                times.append(time.process_time() - begun)
        if turn >= 9 and sum(map(sum, spent)) >= budget_s:
            break
    return spent


def _runtime_message(fault: Exception, path: Path | None = None) -> str:
    """Return the runtime's message in one line, without the model's path and places in the runtime's source."""
    words = " ".join(str(fault.__cause__ or fault).split())
    if path is not None:
        words = words.replace(str(path), "the file")
    words = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", words.rpartition("Status Message: ")[2])
    # A file and line of the runtime's source, then the whole signature of a function.
    words = re.sub(r"/\S+\.(?:h|cc|cpp):\d+ (?:.*?\)(?: const)?(?: \[with [^\]]*\])? )?", "", words)
    return words[:300]
