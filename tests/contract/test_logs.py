"""The log of a real server: it delays no answer, and every line is JSON: its own, a library's, native code's.

Servers are run as commands over the tiny repository, of one process and of several. One that does not start, or answer,
raises AssertionError.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from attnserve.v1 import inference_service_pb2 as pb
from attnserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from processes import CODE, children

IN_PLACE = (
    "import contextlib; from attnserve_server.cli import serve; from attnserve_server.observability import logs; "
    "serve.serving = lambda level, process: contextlib.nullcontext(logs.configure(level)); "
)
"""Makes a server write its log in place, as the control."""
REFUSALS = 1600
"""At level debug, each is a line of about 300 bytes: seven times what a pipe holds, and more than the queue does."""


@dataclass
class Server:
    """A server process and its ports."""

    process: subprocess.Popen[bytes]
    grpc_port: int
    http_port: int

    def dropped(self) -> float:
        """The counter of dropped lines."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/metrics", timeout=10) as reply:
            lines = reply.read().decode().splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith("attnserve_log_lines_dropped_total "))

    @contextlib.contextmanager
    def stub(self) -> Iterator[InferenceServiceStub]:
        with grpc.insecure_channel(f"127.0.0.1:{self.grpc_port}") as channel:
            yield InferenceServiceStub(channel)


@contextlib.contextmanager
def server(
    repository: Path, folder: Path, *flags: str, stderr: int, before: str = "", **options: Any
) -> Iterator[Server]:
    ports = folder / "ports.json"
    line = [
        sys.executable,
        "-P",
        "-c",
        before + CODE,
        "serve",
        "--repository",
        str(repository),
        "--ports-file",
        str(ports),
    ]
    process = subprocess.Popen([*line, "--grpc-port", "0", "--http-port", "0", *flags], stderr=stderr, **options)
    try:
        until = time.monotonic() + 60
        while not ports.exists():
            assert process.poll() is None, "the server ended at its start"
            assert time.monotonic() < until, "the server did not start"
            time.sleep(0.05)
        found = json.loads(ports.read_text())
        yield Server(process, found["grpc"], found["http"])
    finally:
        if process.poll() is None:
            for one, _ in children(process.pid):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            process.kill()
        process.wait(10)


def ended(running: Server) -> int:
    """Send SIGTERM, and return the exit code."""
    running.process.send_signal(signal.SIGTERM)
    return running.process.wait(30)


def text(content: str, **fields: Any) -> pb.InferRequest:
    return pb.InferRequest(model="tiny", sequences=[pb.Sequence(text=pb.TextInput(text=content))], **fields)


def refused(stub: InferenceServiceStub, request: pb.InferRequest, timeout_s: float = 10) -> grpc.StatusCode:
    """Send a request, and return the code of its refusal."""
    with pytest.raises(grpc.RpcError) as caught:
        stub.Infer(request, timeout=timeout_s)
    return caught.value.code()  # type: ignore[attr-defined]


def events(read: str) -> list[dict[str, Any]]:
    """The lines of a log, each of which must be one JSON object."""
    lines = read.splitlines()
    assert lines
    found = [json.loads(line) for line in lines]
    assert all({"event", "level", "timestamp"} <= set(line) for line in found)
    return found


@pytest.mark.parametrize("isolation", ["none", "process"])
def test_a_log_that_is_not_read_delays_no_answer(tiny_repository: Path, tmp_path: Path, isolation: str) -> None:
    read, write = os.pipe()
    flags = ("--log-level", "debug", "--isolation", isolation, "--fronts", "1")
    with server(tiny_repository, tmp_path, *flags, stderr=write) as running, running.stub() as stub:
        os.close(write)
        for number in range(REFUSALS):
            assert refused(stub, text("", request_id=str(number))) is grpc.StatusCode.INVALID_ARGUMENT
        assert stub.Infer(text("the cat sat"), timeout=10).results
        dropped = running.dropped()
        assert dropped > 0
        chunks: list[bytes] = []
        reader = threading.Thread(target=lambda: chunks.extend(iter(lambda: os.read(read, 65536), b"")))
        reader.start()  # the log is read again
        assert ended(running) == 0
        reader.join(10)
    os.close(read)
    lines = events(b"".join(chunks).decode())
    assert lines[-1]["event"] == "stopped"
    assert sum(line["dropped"] for line in lines if line["event"] == "log lines were dropped") >= dropped


def test_a_server_that_writes_its_log_in_place_stops_answering(tiny_repository: Path, tmp_path: Path) -> None:
    """The control of the test above."""
    read, write = os.pipe()
    stopped = grpc.StatusCode.DEADLINE_EXCEEDED
    flags = ("--log-level", "debug")
    with server(tiny_repository, tmp_path, *flags, stderr=write, before=IN_PLACE) as running, running.stub() as stub:
        os.close(write)
        codes = (refused(stub, text("", request_id=str(number)), 2) for number in range(REFUSALS))
        assert stopped in codes
    os.close(read)


def test_a_server_ends_in_time_if_its_log_is_never_read(tiny_repository: Path, tmp_path: Path) -> None:
    read, write = os.pipe()
    with (
        server(tiny_repository, tmp_path, "--log-level", "debug", stderr=write) as running,
        running.stub() as stub,
    ):
        os.close(write)
        for number in range(REFUSALS):
            refused(stub, text("", request_id=str(number)))
        begun = time.monotonic()
        assert ended(running) == 0
        assert time.monotonic() - begun < 15, "the last lines wait 2 s, and no longer"
    os.close(read)


def test_a_full_disk_delays_no_answer(tiny_repository: Path, tmp_path: Path) -> None:
    """A limit of file size acts as a full disk does: both let a write succeed in part, and then fail."""
    log = tmp_path / "log"
    limit = 50_000

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    with (
        log.open("ab") as file,
        server(
            tiny_repository,
            tmp_path,
            "--log-level",
            "debug",
            "--instances",
            "1",
            stderr=file.fileno(),
            preexec_fn=limited,
        ) as running,
        running.stub() as stub,
    ):
        for number in range(400):
            assert refused(stub, text("", request_id=str(number))) is grpc.StatusCode.INVALID_ARGUMENT
        assert stub.Infer(text("the cat sat"), timeout=10).results
        assert log.stat().st_size == limit
        assert running.dropped() > 0
        assert ended(running) == 0


@pytest.mark.parametrize("isolation", ["none", "process"])
def test_every_line_is_json_with_the_name_of_its_process(tiny_repository: Path, tmp_path: Path, isolation: str) -> None:
    log = tmp_path / "log"
    evil = 'a\r\n{"event": "forged"}\x1b[31m\u2028"'
    flags = ("--isolation", isolation, "--fronts", "1")
    verbose = {**os.environ, "GRPC_VERBOSITY": "DEBUG", "GRPC_TRACE": "http"}
    with (
        log.open("wb") as file,
        server(tiny_repository, tmp_path, *flags, stderr=file.fileno(), env=verbose) as running,
        running.stub() as stub,
    ):
        refused(stub, text("", request_id=evil[:1] + evil))
        refused(stub, pb.InferRequest(model=evil))
        with socket.create_connection(("127.0.0.1", running.grpc_port)) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\n\r\n")  # gRPC's core traces what is no HTTP/2
            connection.recv(64)
        assert ended(running) == 0
    content = log.read_text()
    assert "\x1b" not in content
    lines = events(content)
    assert not any(line["event"] == "forged" for line in lines)
    core = [line for line in lines if line.get("logger") == "stderr" and ".cc:" in line.get("source", "")]
    assert core, "gRPC's core wrote lines"
    expected = {"front 0", "supervisor", "engine tiny/1", "engine tiny/2", "engine plain/1"}
    assert {line.get("process") for line in lines} == (expected if isolation == "process" else {None})
    if isolation == "process":
        assert {line["process"] for line in core} == {"front 0"}


def test_the_stack_of_a_process_that_crashes_is_logged_with_its_name(tiny_repository: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    flags = ("--isolation", "process", "--fronts", "1", "--log-level", "error")
    with log.open("wb") as file, server(tiny_repository, tmp_path, *flags, stderr=file.fileno()) as running:
        engine = next(one for one, words in children(running.process.pid) if words[-1:] == ["engine plain/1"])
        engine.send_signal(signal.SIGSEGV)
        until_s = time.monotonic() + 60
        while "an engine is replaced" not in log.read_text():
            assert time.monotonic() < until_s
            time.sleep(0.05)
    assert "engine crashed: signal 11" in log.read_text()
    lines = [line for line in events(log.read_text()) if line.get("process") == "engine plain/1"]
    assert any(line["event"] == "Fatal Python error: Segmentation fault" for line in lines)
    assert any("asyncio/runners.py" in line["event"] for line in lines)


@pytest.mark.parametrize("refusals", [0, REFUSALS], ids=["read", "not read"])
def test_a_server_that_crashes_writes_its_stack_unless_that_would_wait(
    tiny_repository: Path, tmp_path: Path, refusals: int
) -> None:
    read, write = os.pipe()
    with server(tiny_repository, tmp_path, "--log-level", "debug", stderr=write) as running, running.stub() as stub:
        os.close(write)
        for number in range(refusals):
            refused(stub, text("", request_id=str(number)))
        running.process.send_signal(signal.SIGSEGV)
        assert running.process.wait(10) == -signal.SIGSEGV
    content = b"".join(iter(lambda: os.read(read, 65536), b""))
    os.close(read)
    if not refusals:
        assert b"Fatal Python error: Segmentation fault" in content
        assert b"asyncio/runners.py" in content


def test_an_error_that_nothing_catches_ends_the_server_with_its_traceback(
    tiny_repository: Path, tmp_path: Path
) -> None:
    broken = (
        "from attnserve_server.app import Application\n"
        "async def start(self): raise RuntimeError('broken inside')\n"
        "Application.start = start\n"
    )
    line = [sys.executable, "-P", "-c", broken + CODE, "serve", "--repository", str(tiny_repository)]
    done = subprocess.run(
        [*line, "--grpc-port", "0", "--http-port", "0"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert "RuntimeError: broken inside" in done.stderr
