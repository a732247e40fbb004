"""A bundle that crashes, hangs or takes too much memory while it loads fails alone, and the server lives.

Faults are injected by `loading_failpoints`, in the process that tries a bundle. Each reason shows that the fault took
place; without failpoints the same bundles serve. Needs the fixtures of tests/contract/conftest.py.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest
from attnserve_server import trial
from attnserve_server.app import Application
from attnserve_server.config import Settings
from attnserve_server.domain.machine import resident_bytes
from attnserve_server.loading_failpoints import VARIABLE
from attnserve_server.model.repository import write_bundle
from attnserve_server.scheduling.catalog import ModelState
from attnserve_server.transport.admin import Change, Outcome
from attnserve_server.trial import Trials
from attnserve_server.wanted import StartFailed, wanted_bundles
from gated import until
from tiny_bundle import tiny_manifest

LIMIT_BYTES = 400 * 2**20
FAULTS = {
    "crash": "the process that loaded it ended by SIGSEGV; the runtime cannot load this file",
    "spin": "loading did not end within 12 s; repair the bundle, or set --load-timeout-s",
    "allocate": f"loading took more than {LIMIT_BYTES} bytes of memory; repair the bundle, or set --load-memory-bytes",
    "reserve": f"loading took more than {LIMIT_BYTES} bytes of memory; repair the bundle, or set --load-memory-bytes",
}


@pytest.fixture
def tried(settings: Settings, tiny_files: dict[str, Path], tmp_path: Path) -> Settings:
    """Settings of a server over the tiny model and one bundle for each fault, which are tried."""
    for name in ("tiny", *FAULTS):
        write_bundle(tmp_path, tiny_manifest(name), tiny_files)
    changes = {"repository": tmp_path, "try_loads": True, "load_memory_bytes": LIMIT_BYTES, "load_timeout_s": 12.0}
    return settings.model_copy(update=changes)


async def test_a_bad_bundle_fails_alone_and_delays_no_other(tried: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, ",".join(f"load:{name}/1={name}" for name in FAULTS))
    monkeypatch.setattr(trial, "_HELD_S", 0.5)  # as with more than two bundles that hang
    application = Application(tried)
    before = resident_bytes()
    starting = asyncio.create_task(application.start())
    try:
        await until(application.catalog.all)
        await until(lambda: starting.done() or _state(application, "tiny") is ModelState.READY, 30)
        assert _state(application, "spin") is ModelState.LOADING, "a bundle that hangs delays no other"
        await starting
        found = {model.name: (model.state.value, model.state_reason) for model in application.catalog.all()}
        assert found.pop("tiny") == ("ready", "")
        assert found.keys() == FAULTS.keys()
        for name, why in FAULTS.items():
            assert found[name][0] == "failed"
            assert found[name][1].startswith(why)
        assert resident_bytes() - before < 200 * 2**20, "memory was taken in another process"
    finally:
        await application.aclose()
    assert not _children(), "no process is left"


async def test_control_without_faults_such_bundles_serve(tried: Settings) -> None:
    application = Application(tried.model_copy(update={"models": ("crash", "spin")}))
    try:
        await application.start()
        assert {model.state for model in application.catalog.all()} == {ModelState.READY}
    finally:
        await application.aclose()


async def test_a_new_version_that_crashes_the_runtime_leaves_the_earlier_one_serving(
    tried: Settings, tiny_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    application = Application(tried.model_copy(update={"models": ("tiny",)}))
    try:
        await application.start()
        write_bundle(tried.repository, tiny_manifest(version="2"), tiny_files)
        monkeypatch.setenv(VARIABLE, "load:tiny/2=crash")
        (failed,) = await application.lifecycle.reload()
        assert (failed.version, failed.outcome) == ("2", Outcome.FAILED)
        assert failed.reason.startswith(FAULTS["crash"])
        assert application.catalog.get("tiny").version == "1"
        monkeypatch.delenv(VARIABLE)
        assert await application.lifecycle.reload() == [Change("tiny", "2", Outcome.LOADED)]
        assert application.catalog.get("tiny").version == "2"
    finally:
        await application.aclose()


async def test_the_end_of_the_server_ends_a_trial(tried: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "load:tiny/1=hang")
    application = Application(tried.model_copy(update={"models": ("tiny",)}))
    starting = asyncio.create_task(application.start())
    await until(lambda: len(_children()) == 1, 30)
    starting.cancel()
    began = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await application.aclose()
    assert not _children()
    assert time.monotonic() - began < 5


async def test_a_trial_states_what_is_wrong_with_a_bundle(tried: Settings) -> None:
    broken = wanted_bundles(tried.model_copy(update={"models": ("tiny",)}))[0][0]
    (broken.path / "model.onnx").write_bytes(b"no model")
    application = Application(tried.model_copy(update={"models": ("tiny",)}))
    with pytest.raises(StartFailed, match=r"bundle tiny/1: model\.onnx: sha256 .* is not the"):
        await application.start()
    await application.aclose()


async def test_a_cancelled_trial_frees_its_place(tried: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = Trials(tried)
    bundles = {bundle.manifest.name: bundle for bundle in wanted_bundles(tried)[0]}
    monkeypatch.setenv(VARIABLE, "load:spin/1=hang")
    for _ in range(3):  # more than there are places on two cores
        running = asyncio.create_task(trials.run(bundles["spin"]))
        await until(lambda: len(_children()) == 1, 30)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    async with asyncio.timeout(30):
        await trials.run(bundles["tiny"])


def _state(application: Application, name: str) -> ModelState:
    return application.catalog.find(name).state


def _children() -> list[str]:
    """The processes that this one started and that try a bundle."""
    found = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in found if Path(f"/proc/{pid}").exists()]
    return [line.decode() for line in lines if b"attnserve_server.trial" in line]
