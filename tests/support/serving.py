"""A real server process for one test or module, by the command `attnserve-server` beside the tests' interpreter.

`serve` raises AssertionError with the log of a server that does not start or does not end cleanly.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

STALLED_S = 120.0
"""Seconds without processor time of a starting server, its children included, after which it counts as stuck."""


class Progress:
    """Whether a process still works: on a busy machine a start may take minutes, but it takes processor time.

    Args:
        pid: the process; its children count too.
        patience_s: seconds without as much as a tick of processor time.
    """

    def __init__(self, pid: int, patience_s: float) -> None:
        self._process, self._patience_s = psutil.Process(pid), patience_s
        self._spent, self._since = -1.0, time.monotonic()

    def stalled(self) -> bool:
        """Return whether no processor time was spent for longer than the patience."""
        spent = 0.0
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in (self._process, *self._process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    times = each.cpu_times()
                    spent += times.user + times.system
        if spent != self._spent:
            self._spent, self._since = spent, time.monotonic()
        return time.monotonic() - self._since > self._patience_s


def run_while_it_works(line: Sequence[str], patience_s: float = STALLED_S) -> tuple[int, str]:
    """Run a command however long it takes, as long as it takes processor time. Return its exit code and output.

    Raises:
        AssertionError: It stalled. It is killed.
    """
    with tempfile.TemporaryFile("w+") as output:
        with subprocess.Popen(line, stdout=output, stderr=output) as process:
            progress = Progress(process.pid, patience_s)
            try:
                while process.poll() is None:
                    assert not progress.stalled(), f"{line[:2]} took no processor time for {patience_s:g} s"
                    time.sleep(0.05)
            finally:
                process.kill()
        output.seek(0)
        return process.returncode, output.read()


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server process and its ports."""

    process: subprocess.Popen[bytes]
    grpc_port: int
    http_port: int
    log: Path
    rest_port: int = 0

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of the samples of this name with these labels, from one scrape."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/metrics", timeout=10) as reply:
            families = list(text_string_to_metric_families(reply.read().decode()))
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def settled(self, method: str, timeout_s: float = 5.0) -> bool:
        """Return whether all calls of a method end within `timeout_s`.

        The server counts a call just after its caller has the answer.
        """
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            started = self.metric("grpc_server_started_total", grpc_method=method)
            if started == self.metric("grpc_server_handled_total", grpc_method=method):
                return True
            time.sleep(0.05)
        return False


def command(name: str) -> str:
    """Return the path of a command of the project, in the environment that runs the tests."""
    return str(Path(sys.executable).with_name(name))


@contextlib.contextmanager
def serve(
    repository: Path,
    folder: Path,
    *arguments: str,
    exit_code: int | None = 0,
    program: Sequence[str] = (),
    **options: Any,
) -> Iterator[RunningServer]:
    """Runs `attnserve-server serve` on free loopback ports until the block ends, then expects a clean exit.

    Args:
        repository: the models.
        folder: for the server's log and the file of its ports; one server at a time.
        arguments: further flags of the command.
        exit_code: the expected code; -9 where the test kills the server; None for any.
        program: what to run in the place of the command `attnserve-server`.
        options: of the process, as for `subprocess.Popen`.

    Raises:
        AssertionError: with the log, if the server starts no further, ends early, or exits with another code.
        TimeoutExpired: it runs 60 s after SIGTERM. It is killed.
    """
    ports_file, log = folder / "ports.json", folder / "server.log"
    line = [*(program or [command("attnserve-server")]), "serve", "--repository", str(repository)]
    line += ["--grpc-port", "0", "--http-port", "0", "--rest-port", "0", "--ports-file", str(ports_file), *arguments]
    with log.open("wb") as stream:
        process = subprocess.Popen(line, **{"stdout": stream, "stderr": stream, **options})
    try:
        progress = Progress(process.pid, STALLED_S)
        while not (ports_file.exists() and ports_file.stat().st_size):
            assert process.poll() is None, log.read_text()
            assert not progress.stalled(), log.read_text()
            time.sleep(0.02)
        ports = json.loads(ports_file.read_text())
        yield RunningServer(process, ports["grpc"], ports["http"], log, ports["rest"])
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == exit_code or exit_code is None, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
