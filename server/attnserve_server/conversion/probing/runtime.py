"""Running graphs in probes and checks, through the server's own session. Judges nothing."""

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
from attnserve_server.engine.session import LoadFailed, RunFailed, RunHandle, RunTerminated, RuntimeSession


class GraphRunner:
    """A graph on the CPU, one thread. Taps are fed with all rows of the batch, or with none."""

    limit_s: ClassVar[float] = 600.0
    """How long one run may take."""

    def __init__(self, path: Path, left_out: Sequence[str] | None = None) -> None:
        """Opens it, without those of the runtime's rewritings that are named; None: as the server does."""
        try:
            self._session = RuntimeSession.load(
                path, provider="CPUExecutionProvider", left_out=left_out, intra_op_threads=1
            )
        except LoadFailed as fault:
            raise BuildRefused(f"the runtime cannot load the model: {_own_words(fault, path)}") from None
        self.output_names = self._session.output_names
        self._items = [name for name in self._session.input_names if name.startswith(ITEMS_PREFIX)]

    def run(
        self,
        feeds: Mapping[str, Array],
        fetches: Collection[str],
        *,
        tap: bool = True,
        limit_s: float | None = None,
    ) -> dict[str, Array]:
        """The fetched outputs by name, (B, ...); with `tap` the taps are asked for every row, else for none.

        Args:
            feeds: each input, (B, ...), without those of the taps.
            fetches: names of outputs.
            tap: whether every row's weights are computed.
            limit_s: seconds that the run may take; None: `GraphRunner.limit_s`.

        Raises:
            BuildRefused: the run failed; the message has the runtime's own words, which name no file here.
        """
        allowed_s = self.limit_s if limit_s is None else limit_s
        rows = next(iter(feeds.values())).shape[0] if tap else 0
        items = np.arange(rows, dtype=np.int64)
        names = list(fetches)
        handle = RunHandle()
        # A loop in a file that anybody made may have no end. The runtime looks at the handle between nodes.
        watch = threading.Timer(allowed_s, handle.terminate)
        watch.daemon = True
        watch.start()
        try:
            outputs = self._session.run({**feeds, **dict.fromkeys(self._items, items)}, names, handle)
        except RunTerminated:
            raise BuildRefused(f"the model does not run: one run took more than {allowed_s:g} s") from None
        except RunFailed as fault:
            raise BuildRefused(f"the model does not run: {_own_words(fault)}") from None
        finally:
            watch.cancel()
        for name, output in zip(names, outputs, strict=True):
            if not isinstance(output, np.ndarray):
                raise BuildRefused(f"output {name!r} is no tensor")
        return dict(zip(names, outputs, strict=True))


def time_ratio(tapped: GraphRunner, source: GraphRunner, feeds: Mapping[str, Array], fetches: Collection[str]) -> float:
    """CPU time of a tapped graph that nobody asks, over its source's: ratio of medians of interleaved runs."""
    tapped_s, source_s = paired_seconds(tapped, source, feeds, fetches, budget_s=0)
    return round(statistics.median(tapped_s) / max(statistics.median(source_s), 1e-9), 3)


def paired_seconds(
    one: GraphRunner, other: GraphRunner, feeds: Mapping[str, Array], fetches: Collection[str], *, budget_s: float = 0.3
) -> tuple[list[float], list[float]]:
    """CPU seconds of two graphs that run in turns, taps unasked: 9 rounds or more, up to 60 within the budget."""
    spent: tuple[list[float], list[float]] = ([], [])
    for turn in range(61):
        for runner, times in zip((one, other), spent, strict=True):
            begun = time.process_time()
            runner.run(feeds, fetches, tap=False)
            if turn:  # the first round warms both up
                times.append(time.process_time() - begun)
        if turn >= 9 and sum(map(sum, spent)) >= budget_s:
            break
    return spent


def _own_words(fault: Exception, path: Path | None = None) -> str:
    """The runtime's message, one line, without the model's place and those in its own source that it likes to name."""
    words = " ".join(str(fault.__cause__ or fault).split())
    if path is not None:
        words = words.replace(str(path), "the file")
    words = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", words.rpartition("Status Message: ")[2])
    # A file and line of its source, then the whole signature of a function of it.
    words = re.sub(r"/\S+\.(?:h|cc|cpp):\d+ (?:.*?\)(?: const)?(?: \[with [^\]]*\])? )?", "", words)
    return words[:300]
