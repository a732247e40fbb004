"""A server as its operator has it: processes with memory, descriptors and threads, metrics, a log, and signals."""

from __future__ import annotations

import contextlib
import json
import ssl
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families
from serving import RunningServer

SCRAPE_TIMEOUT_S = 10.0
MAIN = "main"
SAME_START_S = 0.015
"""Both sides round the start of a process to the kernel's ticks of 10 ms."""


def eventually(holds: Callable[[], bool], timeout_s: float = 10.0, step_s: float = 0.05) -> bool:
    """Return whether this holds within `timeout_s`."""
    until = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(step_s)
    return True


def held_mb(pid: int) -> float:
    """Return the proportional set size of a process in MB, without pages of files.

    Pages of libraries count for all processes of the machine that use them: they would grow when another one ends.
    Raises OSError if the process has ended. Source: Linux, Documentation/filesystems/proc.rst, smaps_rollup.
    """
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
    return (sizes["Pss"] - sizes.get("Pss_File", 0)) / 1024


@dataclass(frozen=True, slots=True)
class Usage:
    """What a server holds: the sum of `held_mb` of its processes, descriptors and threads."""

    memory_mb: float = 0.0
    descriptors: int = 0
    threads: int = 0

    def __add__(self, other: Usage) -> Usage:
        """Return the sum, over several servers or processes."""
        return Usage(
            self.memory_mb + other.memory_mb, self.descriptors + other.descriptors, self.threads + other.threads
        )


@dataclass
class Server:
    """A running server.

    Args:
        running: its process and ports.
        context: of TLS; None: the server has none.
        token: a token with all scopes; empty: the server needs none.
    """

    running: RunningServer
    context: ssl.SSLContext | None = None
    token: str = ""

    @property
    def target(self) -> str:
        """The address of its gRPC port."""
        # Certificates of tests name the host.
        return f"{'localhost' if self.context else '127.0.0.1'}:{self.running.grpc_port}"

    @property
    def process(self) -> psutil.Process:
        """Its main process."""
        return psutil.Process(self.running.process.pid)

    @property
    def lives(self) -> bool:
        """Whether its main process runs."""
        return self.running.process.poll() is None

    def processes(self) -> dict[str, psutil.Process]:
        """Return its processes by the names with which they were started: `main`, `front 0`, `engine tiny/1`."""
        found = {MAIN: self.process}
        for child in self.process.children(recursive=True):
            with contextlib.suppress(psutil.Error, IndexError):
                name = child.cmdline()[-1]
                found[name if name not in found else f"{name} {child.pid}"] = child
        return found

    def engine(self, model: str) -> psutil.Process | None:
        """Return the engine process of a model's highest version; None while there is none.

        A process in reserve becomes an engine without another command line. Metrics have its name and its start.
        """
        prefix, starts = f"engine {model}/", {}
        for name, labels, value in self.samples():
            if name == "process_start_time_seconds" and labels.get("process", "").startswith(prefix):
                starts[int(labels["process"].removeprefix(prefix))] = value
        begun = starts[max(starts)] if starts else 0.0
        for child in self.process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if abs(child.create_time() - begun) < SAME_START_S and child.status() != psutil.STATUS_ZOMBIE:
                    return child
        return None

    def memory(self) -> dict[str, float]:
        """Return the proportional set size of each process in MB, with pages of files."""
        found = {}
        for name, process in self.processes().items():
            with contextlib.suppress(psutil.Error):
                found[name] = process.memory_full_info().pss / 2**20
        return found

    def usage(self) -> Usage:
        """Return what all its processes hold."""
        total = Usage()
        for process in self.processes().values():
            with contextlib.suppress(psutil.Error, OSError, KeyError):
                total += Usage(held_mb(process.pid), process.num_fds(), process.num_threads())
        return total

    def cpu_s(self) -> float:
        """Return the user and system time of its processes so far."""
        times = [process.cpu_times() for process in self.processes().values()]
        return sum(each.user + each.system for each in times)

    def page(self, path: str) -> str:
        """Return a page of its HTTP port. Raises OSError if there is no answer, or a status of an error."""
        scheme = "https" if self.context else "http"
        headers = {"authorization": f"Bearer {self.token}"} if self.token else {}
        address = f"{scheme}://localhost:{self.running.http_port}{path}"
        request = urllib.request.Request(address, headers=headers)
        with urllib.request.urlopen(request, timeout=SCRAPE_TIMEOUT_S, context=self.context) as reply:
            return str(reply.read().decode())

    def samples(self) -> list[tuple[str, Mapping[str, str], float]]:
        """Return all samples of one scrape: name, labels and value."""
        families = text_string_to_metric_families(self.page("/metrics"))
        return [(one.name, one.labels, one.value) for family in families for one in family.samples]

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of the samples of this name with these labels."""
        return sum(value for named, given, value in self.samples() if named == name and labels.items() <= given.items())

    def calls(self) -> tuple[dict[str, float], float]:
        """Return the inference calls that it ended, by code, and the number of those that it started.

        Calls of other methods are part of both if they failed: callers record the errors of those, too.
        """
        codes: defaultdict[str, float] = defaultdict(float)
        started = 0.0
        for name, labels, value in self.samples():
            inference = labels.get("grpc_method") in {"Infer", "StreamInfer"}
            if name == "grpc_server_handled_total" and (inference or labels["grpc_code"] != "OK"):
                codes[labels["grpc_code"]] += value
                started += 0.0 if inference else value
            elif name == "grpc_server_started_total" and inference:
                started += value
        return codes, started

    def settled_calls(self, timeout_s: float = 5.0) -> tuple[dict[str, float], float]:
        """Return `calls` once all that started have ended, or after `timeout_s`.

        The server counts a call just after its caller has the answer.
        """
        found: list[tuple[dict[str, float], float]] = []

        def settled() -> bool:
            found[:] = [self.calls()]
            return sum(found[0][0].values()) == found[0][1]

        eventually(settled, timeout_s)
        return found[0]

    def log_lines(self, start: int = 0) -> Iterator[str]:
        """Yield the lines of its log, from a place in bytes."""
        with self.running.log.open("rb") as file:
            file.seek(start)
            yield from (line.decode("utf-8", "replace").rstrip("\n") for line in file)

    def log_size(self) -> int:
        """Return the bytes of its log so far."""
        return self.running.log.stat().st_size

    def events(self, start: int = 0) -> list[dict[str, Any]]:
        """Return the lines of its log as objects. Raises ValueError if one is no JSON."""
        return [json.loads(line) for line in self.log_lines(start)]


def folder_of(root: Path, name: str) -> Path:
    """Make and return a folder of this name, with a number if there is one."""
    number = 0
    while True:
        folder = root / (f"{name}-{number}" if number else name)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return folder
