"""A server ends by its grace period during any run, at once at a second signal, and while it loads.

The runs wait in native code, where the runtime cannot stop them either.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import psutil
import pytest
from attnserve.v1 import inference_service_pb2 as pb
from attnserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from serving import command
from stuck_runs import environment

GRACE_S = 1.0
BUSY_S = 5.0
"""Seconds after which the end is late on a machine that other tests keep busy; on an idle one it takes 0.6 to 1 s."""
PROCESSES = {"none": "attnserve-server", "process": "processes.engine"}
ASKED = pb.InferRequest(model="tiny", sequences=[pb.Sequence(text=pb.TextInput(text="the cat"))])


@contextmanager
def started(
    repository: Path, folder: Path, isolation: str, *, seconds: float = 600.0
) -> Iterator[subprocess.Popen[bytes]]:
    """A server whose runs wait while `folder/stuck` exists. Its children are killed with it."""
    line = [command("attnserve-server"), "serve", "--repository", str(repository), "--models", "tiny/2"]
    line += ["--grpc-port", "0", "--http-port", "0", "--ports-file", str(folder / "ports.json")]
    line += ["--isolation", isolation, "--fronts", "1", "--instances", "1", "--drain-grace-s", str(GRACE_S)]
    variables = environment(folder / "code", folder / "stuck", process=PROCESSES[isolation], seconds=seconds)
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(line, stdout=log, stderr=log, env=variables)
    children: list[psutil.Process] = []
    try:
        yield server
    finally:
        if server.poll() is None:
            children = psutil.Process(server.pid).children(recursive=True)
            server.kill()
            server.wait()
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()


def port_of(server: subprocess.Popen[bytes], folder: Path) -> int:
    until = time.monotonic() + 60
    while not (folder / "ports.json").exists():
        assert server.poll() is None, (folder / "server.log").read_text()
        assert time.monotonic() < until
        time.sleep(0.02)
    return int(json.loads((folder / "ports.json").read_text())["grpc"])


def ended_after(server: subprocess.Popen[bytes]) -> tuple[int, float]:
    began = time.monotonic()
    return server.wait(30), time.monotonic() - began


@pytest.mark.parametrize("isolation", PROCESSES)
def test_a_run_that_cannot_be_stopped_ends_with_the_grace_period(
    tiny_repository: Path, tmp_path: Path, isolation: str
) -> None:
    with started(tiny_repository, tmp_path, isolation) as server:
        with grpc.insecure_channel(f"127.0.0.1:{port_of(server, tmp_path)}") as channel:
            stub = InferenceServiceStub(channel)
            assert stub.Infer(ASKED, timeout=20).results
            children = psutil.Process(server.pid).children(recursive=True)
            (tmp_path / "stuck").touch()
            call = stub.Infer.future(ASKED, timeout=20)
            time.sleep(0.3)
            assert not call.done(), "the control: the run waits"
            server.send_signal(signal.SIGTERM)
            code, seconds = ended_after(server)
            assert call.exception().code() is grpc.StatusCode.UNAVAILABLE
        assert code == 0, (tmp_path / "server.log").read_text()
        assert GRACE_S <= seconds < GRACE_S + BUSY_S, (tmp_path / "server.log").read_text()
        assert psutil.wait_procs(children, timeout=2)[1] == []
        events = [json.loads(line)["event"] for line in (tmp_path / "server.log").read_text().splitlines()]
        assert "draining" in events, "the log was written"


@pytest.mark.parametrize("isolation", PROCESSES)
def test_a_second_signal_ends_a_run_that_cannot_be_stopped(
    tiny_repository: Path, tmp_path: Path, isolation: str
) -> None:
    with (
        started(tiny_repository, tmp_path, isolation) as server,
        grpc.insecure_channel(f"127.0.0.1:{port_of(server, tmp_path)}") as channel,
    ):
        (tmp_path / "stuck").touch()
        call = InferenceServiceStub(channel).Infer.future(ASKED, timeout=20)
        time.sleep(0.3)
        server.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert server.poll() is None, "the control: the first signal waits for the run"
        server.send_signal(signal.SIGTERM)
        code, seconds = ended_after(server)
        assert call.exception() is not None
    assert code == 1
    assert seconds < BUSY_S, (tmp_path / "server.log").read_text()


@pytest.mark.parametrize("isolation", PROCESSES)
def test_a_signal_ends_a_server_that_loads(tiny_repository: Path, tmp_path: Path, isolation: str) -> None:
    (tmp_path / "stuck").touch()  # the first run of the warm-up waits
    with started(tiny_repository, tmp_path, isolation) as server:
        until = time.monotonic() + 60
        while "listening" not in (tmp_path / "server.log").read_text() and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(1.5)
        assert server.poll() is None
        assert not (tmp_path / "ports.json").exists(), "the control: it loads"
        server.send_signal(signal.SIGTERM)
        code, seconds = ended_after(server)
    assert code == 0
    assert seconds < BUSY_S, (tmp_path / "server.log").read_text()


def test_a_signal_before_any_library_is_imported_ends_the_process_with_0(tmp_path: Path) -> None:
    code = "import sys; sys.argv = ['attnserve-server', 'serve']; import attnserve_server.cli as cli\n"
    code += "def wait():\n    print('here', flush=True)\n    import time\n    time.sleep(60)\n"
    code += "cli._run_command = wait\ncli.main()"
    for number, expected in ((signal.SIGTERM, 0), (signal.SIGINT, 0)):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=tmp_path) as process:
            assert process.stdout is not None
            process.stdout.readline()
            process.send_signal(signal.SIGHUP)  # ignored
            time.sleep(0.05)
            assert process.poll() is None
            process.send_signal(number)
            assert process.wait(10) == expected
