"""Processor time, memory and descriptors of each process of a server, under the usual names `process_*`.

prometheus_client reads them from /proc, where the system has it, and reports nothing elsewhere. A label `process` is
added, because a server may consist of several.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Final

from prometheus_client import ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

WHOLE: Final = "server"
"""The name of the process that is the whole server."""
LABEL: Final = "process"


class ProcessMetrics(Collector):
    """The processes of one server, by name."""

    def __init__(self) -> None:
        """Begin with this process, as the whole server."""
        self._pids = {WHOLE: os.getpid()}

    def rename(self, name: str) -> None:
        """Name this process, which is not the whole server."""
        self._pids[name] = self._pids.pop(WHOLE)

    def add(self, name: str, pid: int) -> None:
        """Report another process, from now on and until it ends."""
        self._pids[name] = pid

    def remove(self, name: str, pid: int) -> None:
        """Report a process no more, unless another has its name now."""
        if self._pids.get(name) == pid:
            del self._pids[name]

    def collect(self) -> Iterator[Metric]:
        """Yield the families, for prometheus_client's registry."""
        families: dict[str, Metric] = {}
        for name, pid in self._pids.items():
            for one in ProcessCollector(pid=partial(int, pid), registry=None).collect():
                family = families.setdefault(one.name, Metric(one.name, one.documentation, one.type))
                for sample in one.samples:
                    family.add_sample(sample.name, {LABEL: name}, sample.value)
        yield from families.values()
