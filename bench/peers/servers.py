"""Start and end peers, the serving systems that the benchmark compares: process trees, ready at a first answer.

Each app reads its form, port and model from `PEER_FORM`, `PEER_PORT` and `PEER_MODEL`, which `serving` sets. A system
that ends or gives no answer in time raises `DidNotStart`; one whose program is missing raises OSError.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.peers.install import APPS, Peer, last_line
from bench.peers.load import drive
from bench.peers.wires import WIRES, Wire

START_TIMEOUT_S = 120.0
MARK = "PEER_RUN"
"""An environment variable of all processes of a run, with a unique value. It identifies orphans of a tree without a
root."""
PORTS = 3
"""Adjacent ports for a peer: some need one for HTTP and one for metrics."""


class DidNotStart(Exception):
    """A peer did not start. The message is the last line of its log."""


@dataclass(frozen=True, slots=True)
class Running:
    """A peer that answers."""

    port: int
    wire: Wire
    process: psutil.Process

    def cpu_seconds(self) -> float:
        """Return the processor time of the process and of its descendants that still live."""
        total = 0.0
        for each in (self.process, *self.process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = each.cpu_times()
                total += times.user + times.system
        return float(total)

    def memory_mb(self) -> float:
        """Return the memory of the process and of its descendants, in MiB; pages that they share count once."""
        total = 0.0
        for each in (self.process, *self.process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += each.memory_full_info().pss
        return total / 2**20


def wire_of(peer: Peer, form: str) -> Wire:
    """Return the protocol of a form of a peer."""
    return WIRES.get(f"{peer.wire} {form}", WIRES[peer.wire])


@contextmanager
def serving(peer: Peer, form: str, model: Path, item: Any) -> Iterator[Running]:
    """Run a peer with the model until the block ends.

    Raises:
        DidNotStart: It gave no answer in time, or ended.
    """
    port = _free_ports()
    bin_folder = peer.python.parent
    command = [str(bin_folder / peer.command[0]), *peer.command[1:], str(port)] if peer.command else []
    if peer.command:
        command += ["--host", "127.0.0.1"]
    mark = uuid.uuid4().hex
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))},
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        MARK: mark,
        "PEER_FORM": form,
        "PEER_PORT": str(port),
        "PEER_MODEL": str(model),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(APPS),
        "PYTHONDONTWRITEBYTECODE": "1",
        "BENTOML_DO_NOT_TRACK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "ORT_DISABLE_TELEMETRY": "1",
        # Triton's stub links against Python's own library, which a virtual environment does not contain.
        "LD_LIBRARY_PATH": str(sysconfig.get_config_var("LIBDIR") or ""),
    }
    with tempfile.TemporaryDirectory() as folder, Path(folder, "log").open("w+") as log:
        line = command or [str(peer.python), str(APPS / peer.app)]
        process = subprocess.Popen(
            line, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=APPS, start_new_session=True
        )
        tree = psutil.Process(process.pid)
        family = {tree}
        try:
            running = Running(port, wire_of(peer, form), tree)
            _await(running, process, item, Path(folder, "log"))
            family |= _family(tree)
            yield running
        finally:
            _end(tree, family, mark)


def _await(running: Running, process: subprocess.Popen[Any], item: Any, log: Path) -> None:
    until, why = time.monotonic() + START_TIMEOUT_S, ""
    while time.monotonic() < until:
        if process.poll() is not None:
            raise DidNotStart(last_line(log.read_text(errors="replace")))
        measured = asyncio.run(drive(running.port, running.wire, [item], [], 1, 20.0))
        if not measured.errors:
            return
        why = measured.first_error
        time.sleep(0.5)
    raise DidNotStart(f"no answer in {START_TIMEOUT_S:g} s: {why}")


def _end(tree: psutil.Process, known: set[psutil.Process], mark: str) -> None:
    """End a process and its descendants by their ids: by a signal first, then by force, orphans included."""
    family = known | _family(tree) | _marked(mark)
    try:
        with contextlib.suppress(psutil.NoSuchProcess):
            tree.send_signal(signal.SIGTERM)
        psutil.wait_procs(list(family), timeout=8)
    finally:  # Ctrl-C while waiting must not leave them
        for each in family | _marked(mark):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    psutil.wait_procs(list(family), timeout=5)


def _family(tree: psutil.Process) -> set[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return {tree, *tree.children(recursive=True)}
    return set()


def _marked(mark: str) -> set[psutil.Process]:
    """Return the processes of a run by the mark in their environment, which most keep."""
    found = set()
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if each.environ().get(MARK) == mark:
                found.add(each)
    return found


def _free_ports() -> int:
    """Return the first of adjacent free ports."""
    while True:
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            with contextlib.suppress(OSError, OverflowError):
                for offset in range(1, PORTS):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port + offset))
                return port
