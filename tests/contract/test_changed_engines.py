"""Models are loaded, replaced and unloaded in a server of several processes, as `test_lifecycle` has it for one.

`serve` is run as a command, with fronts and an engine for each version. Two sets of files of the tiny model have
different answers and digests, so that each answer shows which files gave it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import urllib.error
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from attnserve.v1 import inference_service_pb2 as pb
from attnserve.v1 import model_pb2
from attnserve.v1 import model_service_pb2 as admin
from attnserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from attnserve.v1.model_service_pb2_grpc import ModelServiceStub
from attnserve_server.loading_failpoints import VARIABLE
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from processes import Running, started
from versions import hide, put, scaled_files, show, take_away

pytestmark = pytest.mark.slow

TIMEOUT_S = 60.0
LOADED, REPLACED = admin.MODEL_OUTCOME_LOADED, admin.MODEL_OUTCOME_REPLACED
UNLOADED, FAILED = admin.MODEL_OUTCOME_UNLOADED, admin.MODEL_OUTCOME_FAILED
RELOADS = int(os.environ.get("RELOADS", "9"))
"""`RELOADS=50 pytest tests/contract/test_changed_engines.py -k load` shows that memory stays flat for longer."""
FLAGS = ("--admin", "--instances", "1", "--wide-threads", "1", "--try-loads", "false", "--drain-grace-s", "10")


@pytest.fixture(scope="module")
def sets(tiny_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Path]]:
    """Two sets of files with different answers."""
    return [tiny_files, scaled_files(tiny_files, 2.0, tmp_path_factory.mktemp("scaled") / "files")]


@pytest.fixture
def root(tmp_path: Path, sets: list[dict[str, Path]]) -> Path:
    """A repository with version 1 of the model `tiny`, of the first set."""
    place = tmp_path / "repository"
    place.mkdir()
    put(place, sets[0], "1")
    return place


@pytest.fixture
def serve(root: Path, tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts a server with these flags, and ends it after the test."""
    made: list[Running] = []

    def start(*flags: str, fronts: int = 2, variables: dict[str, str] | None = None) -> Running:
        made.append(started(root, tmp_path, *FLAGS, "--fronts", str(fronts), *flags, variables=variables))
        return made[0]

    yield start
    for one in made:
        if one.process.poll() is None:  # a second signal would end it at once
            one.process.terminate()
        assert one.process.wait(30) == 0


@dataclass
class Channels:
    """Connections to a server: enough for each of its fronts to have some."""

    all: list[grpc.aio.Channel]

    @property
    def models(self) -> ModelServiceStub:
        return ModelServiceStub(self.all[0])

    def infer(self, number: int, version: str = "") -> object:
        return InferenceServiceStub(self.all[number % len(self.all)]).Infer(
            asking(version), timeout=TIMEOUT_S, wait_for_ready=True
        )

    async def digests(self) -> set[str]:
        """Of the files that answer now, through each connection."""
        return {(await self.infer(number)).receipt.digest for number in range(len(self.all))}

    async def reload(self) -> list[tuple[str, object]]:
        answer = await self.models.ReloadRepository(admin.ReloadRepositoryRequest(), timeout=TIMEOUT_S)
        return [(change.version, change.outcome) for change in answer.changes]

    async def load(self, version: str = "") -> model_pb2.Model:
        request = admin.LoadModelRequest(model="tiny", version=version)
        return (await self.models.LoadModel(request, timeout=TIMEOUT_S)).model

    async def unload(self, version: str) -> None:
        await self.models.UnloadModel(admin.UnloadModelRequest(model="tiny", version=version), timeout=TIMEOUT_S)


@contextlib.asynccontextmanager
async def connected(running: Running, count: int = 8) -> AsyncIterator[Channels]:
    # Channels with the same options would share a connection.
    target = f"127.0.0.1:{running.grpc_port}"
    opened = [grpc.aio.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(count)]
    try:
        yield Channels(opened)
    finally:
        for one in opened:
            await one.close()


def asking(version: str = "") -> pb.InferRequest:
    text = pb.TextInput(text="the cat sat on a mat")
    return pb.InferRequest(model="tiny", version=version, sequences=[pb.Sequence(text=text)])


def embedding(answer: pb.InferResponse) -> np.ndarray:
    (found,) = [each for each in answer.results[0].outputs if each.name == "embedding"]
    return np.frombuffer(found.data, np.float32)


async def code_of(call) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code().name, caught.value.details()


def processes(running: Running, role: str) -> list[psutil.Process]:
    """The server's processes of a role, from the oldest; that in reserve is an engine too."""
    found = []
    for child in psutil.Process(running.process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended since
            if f"attnserve_server.processes.{role}" in child.cmdline():
                found.append((child.create_time(), child))
    return [child for _, child in sorted(found, key=lambda one: one[0])]


def state(running: Running) -> dict[str, str]:
    try:
        page = running.page("/readyz")
    except urllib.error.HTTPError as error:  # 503 while it is not ready
        page = error.read().decode()
    return {one["version"]: one["state"] for one in json.loads(page)["models"]}


async def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not await asyncio.to_thread(condition):  # noqa: ASYNC110 - it waits for a server
            await asyncio.sleep(0.05)


def counters(running: Running) -> dict[str, float]:
    """All counters and counts of histograms; a series that is exported twice fails."""
    found: dict[str, float] = {}
    for line in running.page("/metrics").splitlines():
        series, _, value = line.rpartition(" ")
        if line.startswith("attnserve_") and "{" in line:
            assert series not in found
            found[series] = float(value)
    return {series: value for series, value in found.items() if "_total{" in series or "_count{" in series}


@dataclass
class Load:
    """Callers without retries, and what they got."""

    calls: int = 0
    failures: list[str] = field(default_factory=list)
    by_digest: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def note(self, answer: pb.InferResponse) -> None:
        self.calls += 1
        known = self.by_digest.setdefault(answer.receipt.digest, [])
        if not any(np.allclose(embedding(answer), each, rtol=1e-4, atol=1e-6) for each in known):
            known.append(embedding(answer))


@contextlib.asynccontextmanager
async def load(channels: Channels) -> AsyncIterator[Load]:
    """A caller on each connection until the block ends. Each answer is compared with others of the same files."""
    found, ended = Load(), asyncio.Event()

    async def call(number: int) -> None:
        while not ended.is_set():
            try:
                found.note(await channels.infer(number))
            except grpc.aio.AioRpcError as error:
                found.failures.append(f"{error.code().name}: {error.details()}")

    tasks = [asyncio.create_task(call(number)) for number in range(len(channels.all))]
    try:
        yield found
    finally:
        ended.set()
        await asyncio.gather(*tasks)


def held(running: Running) -> dict[str, list[int]]:
    """Descriptors and threads of the supervisor and of each front, and the number of all processes."""
    supervisor = psutil.Process(running.process.pid)
    parts = [supervisor, *processes(running, "front")]
    return {
        "descriptors": [one.num_fds() for one in parts],
        "threads": [one.num_threads() for one in parts],
        "mappings": [len(one.memory_maps(grouped=False)) for one in parts],
        "processes": [len(supervisor.children())],
    }


def private_bytes(running: Running) -> int:
    """Memory of the supervisor and of the fronts that no other process shares."""
    parts = [psutil.Process(running.process.pid), *processes(running, "front")]
    return sum(one.memory_full_info().uss for one in parts)


async def test_no_call_is_lost_or_stale_over_reloads_under_load(serve, root: Path, sets) -> None:
    """Engines are killed in between. What a change took is given back after it."""
    running = serve()
    async with connected(running) as channels:
        await asyncio.sleep(2.5)  # until there is a process in reserve
        resources, memory, before = [], [], counters(running)
        async with load(channels) as found:
            for number in range(RELOADS):
                bundle = put(root, sets[(number + 1) % 2], "1")
                if number % 3 == 1:  # the earlier files, which are not in the repository any more, are loaded again
                    processes(running, "engine")[0].kill()
                assert await channels.reload() == [("1", REPLACED)]
                assert await channels.digests() == {bundle.manifest.digest}, "on every front"
                if number % 3 == 2:
                    processes(running, "engine")[0].kill()
                after = await asyncio.to_thread(counters, running)
                assert all(after[series] >= value for series, value in before.items()), "a counter fell"
                before = after
                await until(lambda: len(processes(running, "engine")) == 2 and state(running) == {"1": "ready"})
                resources.append(await asyncio.to_thread(held, running))
                memory.append(await asyncio.to_thread(private_bytes, running))
        assert found.failures == []
        assert [len(each) for each in found.by_digest.values()] == [1, 1], "each set of files has one answer"
        one, two = (each[0] for each in found.by_digest.values())
        assert np.abs(one - two).max() > 0.01, "the control: answers of the two differ"
        assert found.calls > RELOADS
        first, last = resources[2], resources[-1]
        for kind, now in last.items():  # a model has two mappings of shared memory in a front; the allocator adds some
            slack = RELOADS - 4 if kind == "mappings" else 2
            assert all(a <= b + slack for a, b in zip(now, first[kind], strict=True)), f"{kind}: {first} and {last}"
        sys.stdout.write(f"after 3 and {RELOADS} reloads: {first}, {memory[2]} B; {last}, {memory[-1]} B\n")
        assert memory[-1] - memory[2] < 12 * 2**20, "a model of a front takes some 4 MB"
        total = counters(running)
        assert total['attnserve_model_loads_total{outcome="replaced"}'] == RELOADS
        answered = total['attnserve_requests_total{code="OK",model="tiny",version="1"}']
        assert answered == found.calls + RELOADS * len(channels.all), "each call is counted once"


async def test_versions_come_and_go_on_all_fronts(serve, root: Path, sets) -> None:
    running = serve()
    async with connected(running) as channels:
        assert await channels.reload() == []
        put(root, sets[1], "2")
        loaded = await channels.load()
        assert (loaded.version, loaded.state, loaded.state_reason) == ("2", model_pb2.MODEL_STATE_READY, "")
        assert loaded.execution_provider
        for channel in channels.all:
            stub = InferenceServiceStub(channel)
            assert (await stub.Infer(asking())).receipt.version == "2"
            assert (await stub.Infer(asking("1"))).receipt.version == "1", "the earlier version serves on"
            listed = (await stub.ListModels(pb.ListModelsRequest())).models
            assert [(one.version, one.state) for one in listed] == [("1", loaded.state), ("2", loaded.state)]
        labels = {"model": "tiny", "version": "2"}
        assert running.sample("attnserve_model_state", state="ready", **labels) == 1
        await channels.unload("2")
        for channel in channels.all:
            stub = InferenceServiceStub(channel)
            assert (await stub.Infer(asking())).receipt.version == "1"
            assert (await code_of(stub.Infer(asking("2"))))[0] == "NOT_FOUND"
        assert 'version="2"' not in running.page("/metrics"), "the series of an unloaded version are removed"
        assert state(running) == {"1": "ready"}
        assert await channels.reload() == [], "it stays unloaded"
        assert (await channels.load("2")).version == "2"
        take_away(root, "1")
        assert await channels.reload() == [("1", UNLOADED)]
        assert set(state(running)) == {"2"}
        await channels.unload("2")
        for channel in channels.all:
            request = health_pb2.HealthCheckRequest(service="tiny")
            assert (await code_of(HealthStub(channel).Check(request)))[0] == "NOT_FOUND"
            overall = await HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert overall.status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert (await channels.load("2")).version == "2"
        assert json.loads(running.page("/readyz"))["status"] == "ready"


async def test_files_that_cannot_be_loaded_leave_the_earlier_ones_serving(serve, root: Path, sets) -> None:
    """With their reason, in the words of one process. Repaired files are loaded by a reload."""
    running = serve()
    async with connected(running) as channels:
        before = await channels.digests()
        for version in ("1", "2"):
            os.truncate(put(root, sets[1], version).path / "model.onnx", 100)
        answer = await channels.models.ReloadRepository(admin.ReloadRepositoryRequest())
        assert [(one.version, one.outcome) for one in answer.changes] == [("1", FAILED), ("2", FAILED)]
        assert all("model.onnx: sha256" in one.reason for one in answer.changes)
        assert not any(str(root) in one.reason for one in answer.changes)
        assert answer.changes[0].reason.endswith("the files loaded before serve on")
        assert await channels.digests() == before
        processes(running, "engine")[0].kill()
        assert await channels.digests() == before, "an engine that is replaced has the files of the one before it"
        code, message = await code_of(channels.load("2"))
        assert code == "FAILED_PRECONDITION"
        assert "model.onnx: sha256" in message
        for channel in channels.all:
            assert await code_of(InferenceServiceStub(channel).Infer(asking("2"))) == (code, message)
        assert state(running) == {"1": "ready", "2": "failed"}
        bundle = put(root, sets[1], "1")
        put(root, sets[1], "2")
        assert await channels.reload() == [("1", REPLACED), ("2", LOADED)]
        assert await channels.digests() == {bundle.manifest.digest}
        (root / "tiny" / "2" / "manifest.json").unlink()
        assert await channels.reload() == [("2", FAILED)]
        take_away(root, "2")
        (root / "tiny" / "3").mkdir()
        assert sorted(await channels.reload()) == [("2", UNLOADED), ("3", FAILED)]
        assert state(running) == {"1": "ready", "3": "failed"}
        hide(root)
        code, message = await code_of(channels.reload())
        assert code == "FAILED_PRECONDITION"
        assert message.startswith("nothing was changed: the repository has no bundle, or cannot be read")
        show(root)


async def test_a_bundle_that_crashes_its_trial_fails_alone(serve, root: Path, sets) -> None:
    running = serve("--try-loads", "true", variables={VARIABLE: "load:tiny/2=crash"})
    async with connected(running) as channels:
        put(root, sets[1], "2")
        put(root, sets[1], "3")
        answer = await channels.models.ReloadRepository(admin.ReloadRepositoryRequest())
        assert [(one.version, one.outcome) for one in answer.changes] == [("2", FAILED), ("3", LOADED)]
        assert answer.changes[0].reason.startswith("the process that loaded it ended by SIGSEGV")
        assert (await channels.infer(0)).receipt.version == "3"


async def test_an_engine_that_ends_while_it_loads_leaves_the_earlier_one_serving(serve, root: Path, sets) -> None:
    running = serve("--standby", "false")
    async with connected(running) as channels:
        before = await channels.digests()
        (first,) = processes(running, "engine")
        put(root, sets[1], "1")
        resources = []
        for _ in range(3):
            reloading = asyncio.create_task(channels.reload())
            await until(lambda: len(processes(running, "engine")) == 2)
            processes(running, "engine")[1].kill()
            assert await reloading == [("1", FAILED)]
            assert await channels.digests() == before
            assert processes(running, "engine") == [first]
            resources.append(held(running))
        assert state(running) == {"1": "ready"}
        (reason,) = [one["reason"] for one in json.loads(running.page("/readyz"))["models"]]
        assert reason == "engine crashed: signal 9 while it loaded; the files loaded before serve on"
        for kind in ("descriptors", "processes"):  # the supervisor may start one more of the threads that it keeps
            assert resources[-1][kind] == resources[0][kind], f"{kind}: {resources}"
        assert await channels.reload() == [("1", REPLACED)]
        assert await channels.digests() != before


async def test_a_front_that_ends_during_a_change_comes_back_with_what_is_true_then(serve, root: Path, sets) -> None:
    running = serve("--standby", "false")
    async with connected(running) as channels:
        bundle = put(root, sets[1], "1")
        reloading = asyncio.create_task(channels.reload())
        await until(lambda: len(processes(running, "engine")) == 2)
        for front in processes(running, "front"):
            front.kill()
        assert (await code_of(reloading))[0] == "UNAVAILABLE", "its caller has lost the connection"
        await until(lambda: len(processes(running, "engine")) == 1 and state(running) == {"1": "ready"})
        assert await channels.digests() == {bundle.manifest.digest}, "the change went on"
        assert await channels.reload() == []
        assert len(processes(running, "front")) == 2


async def test_a_reload_loads_a_model_again_whose_engine_could_not_be_replaced(serve, root: Path, sets) -> None:
    running = serve()
    async with connected(running) as channels:
        with (root / "tiny" / "1" / "model.onnx").open("r+b") as file:  # in place: what the next engine loads is wrong
            file.truncate(100)
        processes(running, "engine")[0].kill()
        await until(lambda: state(running) == {"1": "failed"})
        for number in range(8):
            assert (await code_of(channels.infer(number)))[0] == "FAILED_PRECONDITION"
        bundle = put(root, sets[1], "1")
        assert await channels.reload() == [("1", LOADED)]
        assert await channels.digests() == {bundle.manifest.digest}
        assert state(running) == {"1": "ready"}


async def test_a_watched_repository_and_a_signal_change_models_once(serve, root: Path, sets) -> None:
    running = serve("--watch-repository")
    async with connected(running) as channels:
        put(root, sets[1], "2")
        await until(lambda: state(running) == {"1": "ready", "2": "ready"})
        assert (await channels.infer(0)).receipt.version == "2"
        take_away(root, "1")
        await until(lambda: state(running) == {"2": "ready"})
        put(root, sets[0], "3")
        running.process.send_signal(signal.SIGHUP)
        await until(lambda: state(running) == {"2": "ready", "3": "ready"})
        assert running.sample("attnserve_model_loads_total", outcome="loaded") == 3
        assert running.sample("attnserve_model_loads_total", outcome="unloaded") == 1


async def test_a_drain_ends_a_change_and_answers_its_caller(serve, root: Path, sets) -> None:
    running = serve("--standby", "false")
    async with connected(running) as channels:
        put(root, sets[1], "2")
        loading = asyncio.create_task(channels.load("2"))
        await until(lambda: len(processes(running, "engine")) == 2)
        running.process.terminate()
        assert await code_of(loading) == ("UNAVAILABLE", "the server is draining")
        assert await asyncio.to_thread(running.process.wait, 30) == 0


async def test_models_are_fixed_without_the_setting(root: Path, tmp_path: Path) -> None:
    running = started(root, tmp_path, "--standby", "false")
    try:
        async with connected(running, 1) as channels:
            assert (await code_of(channels.reload()))[0] == "UNIMPLEMENTED"
    finally:
        running.process.terminate()
        assert running.process.wait(30) == 0
