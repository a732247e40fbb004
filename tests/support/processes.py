"""A server of several processes, run as a command: start it, read its pages, and make requests to the model `plain`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from attnserve.v1 import inference_service_pb2 as pb
from attnserve.v1 import tensor_pb2

CODE = "import sys; sys.argv[0] = 'attnserve-server'; from attnserve_server.cli import main; main()"


@dataclass
class Running:
    """A server process with its ports."""

    process: subprocess.Popen[bytes]
    grpc_port: int
    http_port: int

    def page(self, path: str) -> str:
        """Return a page of the HTTP port."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}{path}", timeout=10) as reply:
            return reply.read().decode()

    def sample(self, name: str, **labels: str) -> float:
        """Return the value of the only series with these labels."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = [line for line in self.page("/metrics").splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
        found = [line for line in lines if all(label in line for label in wanted)]
        assert len(found) == 1, f"one series and not {found}"
        return float(found[0].split()[-1])


def started(repository: Path, folder: Path, *flags: str, variables: Mapping[str, str] | None = None) -> Running:
    """Start a server with free ports. Its variables are those of this process, and `variables`."""
    ports = folder / "ports.json"
    line = [sys.executable, "-P", "-c", CODE, "serve", "--repository", str(repository), "--ports-file", str(ports)]
    line += ["--grpc-port", "0", "--http-port", "0", "--rest-port", "0"]
    line += ["--log-level", "warning", "--isolation", "process"]
    line += [*([] if "--fronts" in flags else ["--fronts", "1"]), *flags]
    process = subprocess.Popen(line, env={**os.environ, **(variables or {})})
    until = time.monotonic() + 60
    while not ports.exists():
        assert process.poll() is None, "the server ended at its start"
        assert time.monotonic() < until, "the server did not start"
        time.sleep(0.05)
    found = json.loads(ports.read_text())
    return Running(process, found["grpc"], found["http"])


def children(pid: int) -> Iterator[tuple[psutil.Process, list[str]]]:
    """The processes that `pid` has started, with their command lines, but for those that have ended meanwhile."""
    for one in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # ended, and perhaps not waited for yet
            yield one, one.cmdline()


def alive(process: psutil.Process) -> bool:
    """Whether a process has not ended. One that has ended, and was not waited for, is not alive."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def ids(count: int, **fields: object) -> pb.InferRequest:
    """A request of one sequence of so many tokens."""
    values = np.arange(count, dtype="<i8") % 10
    tensor = tensor_pb2.Tensor(name="input_ids", dtype=tensor_pb2.DATA_TYPE_INT64, shape=[count], data=values.tobytes())
    return pb.InferRequest(model="plain", sequences=[pb.Sequence(tensors=pb.TensorInput(tensors=[tensor]))], **fields)
