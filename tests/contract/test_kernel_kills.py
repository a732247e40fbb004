"""Where memory runs out, the kernel ends an engine: the server lives on, and replaces it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from attnserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from attnserve_server.engine.failpoints import VARIABLE
from processes import Running, ids, started

pytestmark = pytest.mark.slow

GROUPS = Path("/sys/fs/cgroup")
LIMIT_BYTES = 768 * 2**20
"""Above what the server takes, and far below what a run with the fault takes."""


@pytest.fixture(scope="module")
def running(tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose engines have no separate limit."""
    flags = ["--models", "plain", "--engine-memory-bytes", "0"]
    one = started(tiny_repository, tmp_path_factory.mktemp("killed"), *flags, variables={VARIABLE: "1"})
    yield one
    one.process.terminate()
    assert one.process.wait(30) == 0


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group with a limit of memory. Source: Linux, Documentation/admin-guide/cgroup-v2.rst."""
    own = [line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")]
    if not own or not (GROUPS / "cgroup.controllers").exists():
        pytest.skip("needs control groups of version 2")
    parent = GROUPS / own[0].strip("/")
    made = parent / f"attnserve-{os.getpid()}"
    try:
        if "memory" not in (parent / "cgroup.subtree_control").read_text().split():
            (parent / "cgroup.subtree_control").write_text("+memory")
        made.mkdir()
        (made / "memory.max").write_text(str(LIMIT_BYTES))
    except OSError as error:
        pytest.skip(f"needs a control group that limits memory: {error.strerror}")
    yield made
    for line in (made / "cgroup.procs").read_text().split():
        (parent / "cgroup.procs").write_text(line)
    made.rmdir()


def scores(running: Running) -> dict[str, list[int]]:
    """What the kernel adds to the score of each process, by its role; the greatest is ended first."""
    found: dict[str, list[int]] = {"engine": [], "front": [], "supervisor": []}
    for process in (psutil.Process(running.process.pid), *psutil.Process(running.process.pid).children()):
        role = next(
            (one for one in ("engine", "front") if f"attnserve_server.processes.{one}" in process.cmdline()), ""
        )
        value = int(Path(f"/proc/{process.pid}/oom_score_adj").read_text())
        found[role or "supervisor"].append(value)
    return found


def test_engines_are_ended_before_all_other_processes(running: Running) -> None:
    found = scores(running)
    assert len(found["engine"]) >= 1
    assert min(found["engine"]) >= max(found["front"] + found["supervisor"]) + 400
    own = int(Path("/proc/self/oom_score_adj").read_text())
    assert set(found["front"] + found["supervisor"]) == {own}


async def test_server_survives_an_engine_that_the_kernel_ends(running: Running, group: Path) -> None:
    crashes = running.sample("attnserve_engine_restarts_total", reason="crash")
    for process in (psutil.Process(running.process.pid), *psutil.Process(running.process.pid).children()):
        (group / "cgroup.procs").write_text(str(process.pid))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{running.grpc_port}") as channel:
        stub = InferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Infer(ids(5, request_id="fail:memory:1"), timeout=60)
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert len((await stub.Infer(ids(5), timeout=60)).results) == 1
    events = dict(line.split() for line in (group / "memory.events").read_text().splitlines())
    assert int(events["oom_kill"]) >= 1, "the control: the kernel ended a process"
    assert running.process.poll() is None
    assert running.sample("attnserve_engine_restarts_total", reason="crash") - crashes == int(events["oom_kill"])
