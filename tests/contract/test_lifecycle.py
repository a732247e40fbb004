"""Models are loaded, replaced and unloaded while the server answers, and no call fails or gets a stale answer.

Two sets of files of the tiny model have different answers and digests, so that each answer shows which files gave it.
Needs the fixtures of tests/contract/conftest.py.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import shutil
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import pytest
from attnserve.v1 import inference_service_pb2 as pb
from attnserve.v1 import model_service_pb2 as admin
from attnserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from attnserve.v1.model_service_pb2_grpc import ModelServiceStub
from attnserve_client import errors
from attnserve_client.data_types import ModelChange
from attnserve_server import lifecycle
from attnserve_server.app import Application
from attnserve_server.config import Settings
from attnserve_server.domain.errors import ModelNotFound, NotServing
from attnserve_server.domain.machine import resident_bytes
from attnserve_server.local_models import LocalModel, LocalModels
from attnserve_server.model.repository import write_bundle
from attnserve_server.scheduling.catalog import ModelState
from attnserve_server.scheduling.queue import Request
from attnserve_server.transport.admin import Change, Outcome
from attnserve_server.transport.wire import receive
from callers import Caller
from gated import until
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from serving import command, serve
from tiny_bundle import tiny_manifest
from versions import hide, put, scaled_files, show, take_away

TEXT = "the cat sat on a mat"


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
def here(settings: Settings, root: Path) -> Settings:
    return settings.model_copy(update={"repository": root, "admin": True})


@pytest.fixture
async def server(here: Settings) -> AsyncIterator[Application]:
    application = Application(here)
    await application.start()
    yield application
    await application.aclose()


@pytest.fixture
async def stub(channel: grpc.aio.Channel) -> InferenceServiceStub:
    return InferenceServiceStub(channel)


@pytest.fixture
async def models(channel: grpc.aio.Channel) -> ModelServiceStub:
    return ModelServiceStub(channel)


def asking(version: str = "", text: str = TEXT) -> pb.InferRequest:
    return pb.InferRequest(model="tiny", version=version, sequences=[pb.Sequence(text=pb.TextInput(text=text))])


def embedding(answer: pb.InferResponse) -> np.ndarray:
    (found,) = [each for each in answer.results[0].outputs if each.name == "embedding"]
    return np.frombuffer(found.data, np.float32)


async def code_of(call) -> tuple[str, str]:
    """Code and message of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code().name, caught.value.details()


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


@asynccontextmanager
async def load(target: str, callers: int = 4) -> AsyncIterator[Load]:
    """Unary calls and a stream until the block ends. Each answer is compared with others of the same files."""
    found, ended = Load(), asyncio.Event()

    async def unary(stub: InferenceServiceStub) -> None:
        while not ended.is_set():
            try:
                found.note(await stub.Infer(asking()))
            except grpc.aio.AioRpcError as error:
                found.failures.append(f"{error.code().name}: {error.details()}")

    async def streamed(stub: InferenceServiceStub) -> None:
        number = 0
        stream = stub.StreamInfer()
        while not ended.is_set():
            request = asking()
            request.request_id = str(number)
            number += 1
            await stream.write(pb.StreamInferRequest(request=request))
            answer = await stream.read()
            if answer.HasField("response"):
                found.note(answer.response)
            else:
                status = status_pb2.Status.FromString(answer.status)
                found.failures.append(f"{status.code}: {status.message}")
        await stream.done_writing()

    async with grpc.aio.insecure_channel(target) as channel:
        stub = InferenceServiceStub(channel)
        tasks = [asyncio.create_task(unary(stub)) for _ in range(callers)] + [asyncio.create_task(streamed(stub))]
        try:
            yield found
        finally:
            ended.set()
            await asyncio.gather(*tasks)


# Replacing files


async def test_no_call_fails_and_none_is_stale_over_reloads_under_load(
    server: Application, root: Path, sets: list[dict[str, Path]], stub: InferenceServiceStub
) -> None:
    count = int(os.environ.get("RELOADS", "12"))
    resources: list[tuple[int, int, int]] = []
    async with load(f"127.0.0.1:{server.grpc_port}") as found:
        for number in range(count):
            bundle = put(root, sets[(number + 1) % 2], "1")
            changes = await server.lifecycle.reload()
            assert changes == [Change("tiny", "1", Outcome.REPLACED)]
            answered = await stub.Infer(asking())
            assert answered.receipt.digest == bundle.manifest.digest, "the new files answer from then on"
            resources.append(_resources())
    assert found.failures == []
    assert len(found.by_digest) == 2
    assert [len(each) for each in found.by_digest.values()] == [1, 1], "each set of files has one answer"
    one, two = (each[0] for each in found.by_digest.values())
    assert np.abs(one - two).max() > 0.01, "the control: answers of the two differ"
    assert found.calls > 5 * count
    await until(lambda: not server.lifecycle._retiring)
    threads, descriptors, memory = zip(*resources, strict=True)
    assert threads[-1] <= threads[1] + 2, "threads of a session that ends may live for a moment"
    assert descriptors[-1] <= descriptors[1] + 2
    assert memory[-1] - memory[2] < 24 * 2**20, "a set of files with its sessions takes some 4 MB"
    assert len(server.plane._readers) == 1


def _resources() -> tuple[int, int, int]:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return threading.active_count(), sum(1 for _ in Path("/proc/self/fd").iterdir()), resident_bytes()


async def test_control_calls_fail_if_a_replaced_model_ends_at_once(
    server: Application, root: Path, sets: list[dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def at_once(_: LocalModels, running: LocalModel, __: object) -> None:
        await running.started.aclose()

    monkeypatch.setattr(LocalModels, "retire", at_once)
    async with load(f"127.0.0.1:{server.grpc_port}", callers=16) as found:
        number = 0
        while not found.failures and number < 20:
            number += 1
            put(root, sets[number % 2], "1")
            await server.lifecycle.reload()
    assert any(failure.startswith("UNAVAILABLE") for failure in found.failures)


async def test_a_request_ends_on_the_files_that_it_began_with(
    server: Application, root: Path, sets: list[dict[str, Path]], stub: InferenceServiceStub
) -> None:
    """Also one that was read and waits for its turn: replaced files take no request from it."""
    before = await stub.Infer(asking())
    request = Request("r", None, 0)
    prepared = server.plane.prepare(request, receive(pb.InferRequest, asking().SerializeToString()))
    assert prepared is not None
    put(root, sets[1], "1")
    await server.lifecycle.reload()
    assert (await stub.Infer(asking())).receipt.digest != before.receipt.digest
    old = pb.InferResponse.FromString((await server.plane.run(prepared)).joined())
    assert old.receipt.digest == before.receipt.digest
    np.testing.assert_allclose(embedding(old), embedding(before), rtol=1e-5)
    await until(lambda: not server.lifecycle._retiring)
    with pytest.raises(NotServing):  # the control: the earlier scheduler has ended
        prepared.scheduler.check_room(None)


def cut(path: Path) -> None:
    os.truncate(path / "model.onnx", 100)


def mutate(path: Path) -> None:
    content = bytearray((path / "model.onnx").read_bytes())
    content[200] ^= 1
    (path / "model.onnx").write_bytes(content)


def link(path: Path) -> None:
    os.link(path / "model.onnx", path.parent / ".another")


BREAKAGES = {
    "cut short": (cut, "model.onnx: sha256"),
    "one bit": (mutate, "model.onnx: sha256"),
    "half written": (lambda path: (path / "tokenizer.json").unlink(), "tokenizer.json: No such file"),
    "a hard link": (link, "model.onnx has 2 hard links"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json: No such file"),
    "half a manifest": (lambda path: os.truncate(path / "manifest.json", 100), "manifest.json: "),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
@pytest.mark.parametrize("version", ["1", "2"], ids=["in place of a version", "as a new version"])
async def test_files_that_cannot_be_loaded_leave_the_earlier_ones_serving(
    server: Application,
    root: Path,
    sets: list[dict[str, Path]],
    stub: InferenceServiceStub,
    models: ModelServiceStub,
    breakage: str,
    version: str,
) -> None:
    change, words = BREAKAGES[breakage]
    before = await stub.Infer(asking())
    bundle = put(root, sets[1], version)
    change(bundle.path)
    (changed,) = (await models.ReloadRepository(admin.ReloadRepositoryRequest())).changes
    assert (changed.model, changed.version, changed.outcome) == ("tiny", version, admin.MODEL_OUTCOME_FAILED)
    assert words in changed.reason
    assert str(root) not in changed.reason
    code, message = await code_of(models.LoadModel(admin.LoadModelRequest(model="tiny", version=version)))
    assert code == "FAILED_PRECONDITION"
    assert words in message
    after = await stub.Infer(asking())
    same = {"request_id": after.receipt.request_id, "timings": after.receipt.timings}
    assert after.receipt == pb.Receipt(**{**_fields(before.receipt), **same})
    np.testing.assert_allclose(embedding(after), embedding(before), rtol=1e-5)
    held = server.catalog.find("tiny", version)
    assert words in held.state_reason
    if version == "1":
        assert held.state is ModelState.READY
        assert held.state_reason.endswith("the files loaded before serve on")
    else:
        assert await code_of(stub.Infer(asking("2"))) == ("FAILED_PRECONDITION", message)
    shutil.rmtree(bundle.path)
    put(root, sets[1], version)  # repaired
    outcome = admin.MODEL_OUTCOME_REPLACED if version == "1" else admin.MODEL_OUTCOME_LOADED
    (changed,) = (await models.ReloadRepository(admin.ReloadRepositoryRequest())).changes
    assert (changed.outcome, changed.reason) == (outcome, "")
    assert (await stub.Infer(asking())).receipt.digest == bundle.manifest.digest
    assert server.catalog.find("tiny", version).state_reason == ""


def _fields(message) -> dict[str, object]:
    return {descriptor.name: value for descriptor, value in message.ListFields()}


# Versions


async def test_a_new_version_becomes_the_default_once_it_is_ready(
    server: Application, root: Path, sets: list[dict[str, Path]], stub: InferenceServiceStub, monkeypatch
) -> None:
    put(root, sets[1], "2")
    held, go = asyncio.Event(), asyncio.Event()
    begin = LocalModels.begin

    async def slowly(*given: object) -> object:
        held.set()
        await go.wait()
        return await begin(*given)

    monkeypatch.setattr(LocalModels, "begin", slowly)
    reloading = asyncio.create_task(server.lifecycle.reload())
    await held.wait()
    assert (await stub.Infer(asking())).receipt.version == "1"
    assert (await code_of(stub.Infer(asking("2"))))[0] == "UNAVAILABLE"
    go.set()
    assert await reloading == [Change("tiny", "2", Outcome.LOADED)]
    assert (await stub.Infer(asking())).receipt.version == "2"
    assert (await stub.Infer(asking("1"))).receipt.version == "1", "the earlier version serves on"
    take_away(root, "1")
    assert await server.lifecycle.reload() == [Change("tiny", "1", Outcome.UNLOADED)]
    assert (await code_of(stub.Infer(asking("1"))))[0] == "NOT_FOUND"
    assert (await stub.Infer(asking())).receipt.version == "2"


async def test_an_unloaded_version_stays_unloaded_until_it_is_loaded_by_its_name(
    server: Application, root: Path, sets: list[dict[str, Path]], stub: InferenceServiceStub, models: ModelServiceStub
) -> None:
    put(root, sets[1], "2")
    series = _series(server)
    loaded = (await models.LoadModel(admin.LoadModelRequest(model="tiny"))).model
    assert (loaded.version, loaded.state_reason) == ("2", "")
    await stub.Infer(asking())
    await models.UnloadModel(admin.UnloadModelRequest(model="tiny", version="2"))
    assert (await stub.Infer(asking())).receipt.version == "1"
    assert (await code_of(stub.Infer(asking("2"))))[0] == "NOT_FOUND"
    assert (await code_of(models.UnloadModel(admin.UnloadModelRequest(model="tiny", version="2"))))[0] == "NOT_FOUND"
    assert _series(server) - series == set(), "the series of an unloaded model are removed"
    assert await server.lifecycle.reload() == [], "it stays unloaded"
    await models.LoadModel(admin.LoadModelRequest(model="tiny", version="2"))
    assert (await stub.Infer(asking())).receipt.version == "2"
    assert await server.lifecycle.reload() == [], "nothing has changed"


def _series(server: Application) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    """Names and labels of all series of models."""
    return {
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in server.metrics.registry.collect()
        for sample in family.samples
        if "model" in sample.labels and sample.labels.get("version") != "1"
    }


async def test_a_server_without_models_is_not_ready_until_one_is_loaded(
    server: Application, stub: InferenceServiceStub, models: ModelServiceStub, channel: grpc.aio.Channel
) -> None:
    async def health(service: str) -> str:
        return (await code_of(HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))))[0]

    await models.UnloadModel(admin.UnloadModelRequest(model="tiny", version="1"))
    assert not server.health.serving()
    assert await health("tiny") == "NOT_FOUND"
    assert (await code_of(stub.Infer(asking())))[0] == "NOT_FOUND"
    await models.LoadModel(admin.LoadModelRequest(model="tiny"))
    assert server.health.serving()
    assert (await stub.Infer(asking())).results


async def test_an_empty_or_missing_repository_changes_nothing(
    server: Application, root: Path, stub: InferenceServiceStub, models: ModelServiceStub
) -> None:
    hide(root)
    for place in (None, root):
        if place is not None:
            place.mkdir()
        code, message = await code_of(models.ReloadRepository(admin.ReloadRepositoryRequest()))
        assert code == "FAILED_PRECONDITION"
        assert message.startswith("nothing was changed: the repository has no bundle, or cannot be read")
        assert (await stub.Infer(asking())).results
    show(root)
    assert await server.lifecycle.reload() == []


async def test_a_change_goes_on_if_its_caller_leaves(
    server: Application, root: Path, sets: list[dict[str, Path]], models: ModelServiceStub, monkeypatch
) -> None:
    put(root, sets[1], "2")
    held, go = asyncio.Event(), asyncio.Event()
    begin = LocalModels.begin

    async def slowly(*given: object) -> object:
        held.set()
        await go.wait()
        return await begin(*given)

    monkeypatch.setattr(LocalModels, "begin", slowly)
    call = models.LoadModel(admin.LoadModelRequest(model="tiny", version="2"))
    await held.wait()
    call.cancel()
    go.set()
    await until(lambda: server.catalog.find("tiny").version == "2")


async def test_only_selected_models_are_loaded_by_a_reload(
    settings: Settings, root: Path, sets: list[dict[str, Path]]
) -> None:
    application = Application(settings.model_copy(update={"repository": root, "models": ("tiny",)}))
    await application.start()
    try:
        put(root, sets[1], "1", name="other")
        assert await application.lifecycle.reload() == []
        assert (await application.lifecycle.load("other")).version == "1", "one that is named is loaded"
        with pytest.raises(ModelNotFound):
            await application.lifecycle.load("other", "7")
    finally:
        await application.aclose()


async def test_a_drain_answers_requests_of_a_version_that_is_unloaded_and_ends_loads(
    server: Application, root: Path, sets: list[dict[str, Path]], models: ModelServiceStub, monkeypatch
) -> None:
    put(root, sets[1], "2")
    monkeypatch.setattr(LocalModels, "begin", lambda *_: asyncio.Event().wait())
    loading = models.LoadModel(admin.LoadModelRequest(model="tiny"))
    request = Request("r", None, 0)
    prepared = server.plane.prepare(request, receive(pb.InferRequest, asking("1").SerializeToString()))
    assert prepared is not None
    unloading = models.UnloadModel(admin.UnloadModelRequest(model="tiny", version="1"))
    await until(lambda: len(server.lifecycle._retiring) == 1 and len(server.lifecycle._tasks) == 2)
    draining = asyncio.create_task(server.lifecycle.drain())
    await asyncio.sleep(0.05)
    assert not draining.done()
    assert pb.InferResponse.FromString((await server.plane.run(prepared)).joined()).receipt.version == "1"
    await draining
    for call in (loading, unloading):
        assert await code_of(call) == ("UNAVAILABLE", "the server is draining")


async def test_a_draining_server_changes_no_models(server: Application, models: ModelServiceStub) -> None:
    await server.lifecycle.drain()
    code, message = await code_of(models.LoadModel(admin.LoadModelRequest(model="tiny")))
    assert (code, message) == ("UNAVAILABLE", "the server is draining")


# ModelService


@pytest.mark.parametrize(
    ("method", "request_", "code", "words"),
    [
        ("LoadModel", admin.LoadModelRequest(), "INVALID_ARGUMENT", "model: empty"),
        ("LoadModel", admin.LoadModelRequest(model="../x"), "INVALID_ARGUMENT", "is no model name"),
        ("LoadModel", admin.LoadModelRequest(model="tiny", version="x"), "INVALID_ARGUMENT", "version: 'x' is no"),
        ("LoadModel", admin.LoadModelRequest(model="nope"), "NOT_FOUND", "no model 'nope'"),
        ("LoadModel", admin.LoadModelRequest(model="tiny", version="9"), "NOT_FOUND", "of version '9'"),
        ("UnloadModel", admin.UnloadModelRequest(model="tiny"), "INVALID_ARGUMENT", "version: empty; name the version"),
        ("UnloadModel", admin.UnloadModelRequest(model="tiny", version="9"), "NOT_FOUND", "of version '9'"),
    ],
)
async def test_a_wrong_request_changes_nothing(
    server: Application, models: ModelServiceStub, method: str, request_, code: str, words: str
) -> None:
    found, message = await code_of(getattr(models, method)(request_))
    assert found == code
    assert words in message
    assert server.catalog.get("tiny", "1")


@asynccontextmanager
async def closing(opened: Caller) -> AsyncIterator[Caller]:
    try:
        yield opened
    finally:
        await opened.close()


async def test_both_clients_change_models(
    server: Application, root: Path, sets: list[dict[str, Path]], caller: Callable[..., Caller]
) -> None:
    async with closing(caller(f"127.0.0.1:{server.grpc_port}")) as client:
        assert await client.call("reload_repository") == []
        put(root, sets[1], "1")
        cut(put(root, sets[1], "2").path)
        replaced, failed = await client.call("reload_repository")
        assert replaced == ModelChange("tiny", "1", "replaced")
        assert (failed.version, failed.outcome) == ("2", "failed")
        assert "sha256" in failed.reason
        with pytest.raises(errors.ModelFailed) as caught:
            await client.call("load_model", "tiny")
        assert (caught.value.version, caught.value.retry_delay_s) == ("2", None)
        assert caught.value.why.startswith("bundle tiny/2: model.onnx: sha256")
        assert (await client.call("load_model", "tiny", "1")).ready
        await client.call("unload_model", "tiny", "1")
        with pytest.raises(errors.ModelNotFound):
            await client.call("unload_model", "tiny", "1")
        hide(root)
        with pytest.raises(errors.RepositoryUnusable, match="nothing was changed"):
            await client.call("reload_repository")
        show(root)


def test_the_commands_change_models(root: Path, sets: list[dict[str, Path]], tmp_path: Path) -> None:
    def command_(*line: str) -> tuple[int, str]:
        whole = [command("attnserve"), *line, "--server", running.target]
        done = subprocess.run(whole, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout + done.stderr

    with serve(root, tmp_path, "--isolation", "none", "--admin") as running:
        assert command_("reload") == (0, "Nothing has changed.\n")
        put(root, sets[1], "2")
        code, text = command_("load", "tiny", "--json")
        assert (code, json.loads(text)["version"]) == (0, "2")
        assert command_("unload", "tiny", "2") == (0, "tiny 2 is unloaded\n")
        cut(put(root, sets[1], "3").path)
        code, text = command_("reload")
        assert code == 8
        assert "tiny   3        failed" in text
        code, text = command_("load", "tiny", "3")
        assert code == 8
        assert "could not be loaded" in text
    (tmp_path / "ports.json").unlink()
    with serve(root, tmp_path, "--isolation", "none") as running:
        code, text = command_("reload")
        assert code == 5
        assert "--admin" in text


async def test_models_are_fixed_without_the_setting(settings: Settings, root: Path) -> None:
    application = Application(settings.model_copy(update={"repository": root}))
    await application.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{application.grpc_port}") as channel:
            stub = ModelServiceStub(channel)
            for call in (
                stub.LoadModel(admin.LoadModelRequest(model="tiny")),
                stub.UnloadModel(admin.UnloadModelRequest(model="tiny", version="1")),
                stub.ReloadRepository(admin.ReloadRepositoryRequest()),
            ):
                assert (await code_of(call))[0] == "UNIMPLEMENTED"
    finally:
        await application.aclose()


async def test_outcomes_are_counted(server: Application, root: Path, sets: list[dict[str, Path]]) -> None:
    def counted() -> dict[str, float]:
        found = (sample for family in server.metrics.registry.collect() for sample in family.samples)
        return {one.labels["outcome"]: one.value for one in found if one.name == "attnserve_model_loads_total"}

    assert counted() == {"loaded": 1, "replaced": 0, "unloaded": 0, "failed": 0}
    put(root, sets[1], "1")
    cut(put(root, sets[1], "2").path)
    await server.lifecycle.reload()
    await server.lifecycle.unload("tiny", "1")
    assert counted() == {"loaded": 1, "replaced": 1, "unloaded": 1, "failed": 1}


# Watching


@pytest.fixture
async def watched(here: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Application]:
    monkeypatch.setattr(lifecycle, "_LOOK_EVERY_S", 0.05)
    application = Application(here.model_copy(update={"watch_repository": True}))
    await application.start()
    yield application
    await application.aclose()


async def test_a_watched_repository_is_followed(
    watched: Application, root: Path, sets: list[dict[str, Path]], tmp_path: Path
) -> None:
    def versions() -> dict[str, str]:
        return {model.version: model.state.value for model in watched.catalog.all()}

    hidden = write_bundle(tmp_path / "work", tiny_manifest(version="2"), sets[1]).path
    shutil.copytree(hidden, root / "tiny" / ".2.partial")
    await asyncio.sleep(0.3)
    assert versions() == {"1": "ready"}, "hidden folders are ignored"
    (root / "tiny" / ".2.partial").rename(root / "tiny" / "2")
    await until(lambda: versions() == {"1": "ready", "2": "ready"})
    take_away(root, "1")
    await until(lambda: versions() == {"2": "ready"})
    before = watched.catalog.get("tiny").manifest
    put(root, sets[0], "2")
    await until(lambda: watched.catalog.get("tiny").manifest != before)


async def test_a_bundle_that_is_copied_file_by_file_is_loaded_once_it_is_whole(
    watched: Application, root: Path, sets: list[dict[str, Path]], tmp_path: Path
) -> None:
    whole = write_bundle(tmp_path / "work", tiny_manifest(version="2"), sets[1]).path
    (root / "tiny" / "2").mkdir()
    for name in ("manifest.json", "tokenizer.json"):
        shutil.copy(whole / name, root / "tiny" / "2" / name)
    await until(lambda: _state(watched, "2") is ModelState.FAILED)
    assert watched.catalog.find("tiny").version == "1"
    shutil.copy(whole / "model.onnx", root / "tiny" / "2" / "model.onnx")
    await until(lambda: _state(watched, "2") is ModelState.READY)


def _state(server: Application, version: str) -> ModelState | None:
    try:
        return server.catalog.find("tiny", version).state
    except ModelNotFound:
        return None


async def test_a_repository_that_disappears_ends_no_model(watched: Application, root: Path) -> None:
    hide(root)
    await asyncio.sleep(0.4)
    assert watched.catalog.get("tiny", "1")
    show(root)
    await asyncio.sleep(0.2)
    assert watched.catalog.get("tiny", "1")


def test_sighup_reads_the_repository_again(root: Path, sets: list[dict[str, Path]], tmp_path: Path) -> None:
    with serve(root, tmp_path, "--isolation", "none") as running:
        put(root, sets[1], "2")
        running.process.send_signal(signal.SIGHUP)
        until_s = time.monotonic() + 20
        while _ready(running.http_port) != ["1", "2"]:
            assert time.monotonic() < until_s, running.log.read_text()
            time.sleep(0.05)
        assert running.metric("attnserve_model_loads_total", outcome="loaded") == 2


def _ready(port: int) -> list[str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as reply:
        return [model["version"] for model in json.load(reply)["models"] if model["state"] == "ready"]
