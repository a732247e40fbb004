"""Rows 30 to 34: bundles that are broken, hostile or replaced while the server runs."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import onnx
from attnserve_server.model.repository import MANIFEST_FILE, digest_of, sha256_of
from onnx import TensorProto
from tiny_bundle import tiny_manifest

from faults import bundles
from faults.check import Serving
from faults.lab import Lab, Row, Setup, Share
from faults.wire import states_of

CRASHING: Final = {"crashing": "crash", "hanging": "hang", "spinning": "spin"}
FILLING: Final = {"filling": "allocate", "reserving": "reserve"}
"""Bundles, and what the process that loads them does (`loading_failpoints.py` of the server)."""
FAILPOINTS: Final = ",".join(f"load:{name}/1={action}" for name, action in (CRASHING | FILLING).items())
RELOADING: Final = Setup(
    flags=("--admin", "--load-timeout-s", "12", "--load-memory-bytes", str(2**30)),
    isolation="none",
    needs=("admin", "load_timeout_s", "load_memory_bytes"),
    environment=(("ATTNSERVE_FAILPOINTS", FAILPOINTS),),
)
SWAPPING: Final = Setup(flags=("--admin", "--try-loads", "false"), isolation="none", needs=("admin", "try_loads"))
"""Of many reloads: the process that tries each bundle takes a second to start."""
LOAD_S: Final = 30.0
NEIGHBOURS: Final = Share(0.999, None)
"""A load takes processor time from the canary, which has another model."""


def _reload(lab: Lab) -> None:
    """Let the server read its repository again."""
    lab.server.process.send_signal(signal.SIGHUP)


async def _states(lab: Lab) -> dict[tuple[str, str], str]:
    async with lab.caller("lister") as wire:
        return await states_of(wire)


async def _reaches(lab: Lab, holds: Callable[[dict[tuple[str, str], str]], bool], timeout_s: float = LOAD_S) -> bool:
    until = time.monotonic() + timeout_s
    while not holds(await _states(lab)):
        if time.monotonic() > until:
            return False
        await asyncio.sleep(0.05)
    return True


def _failed(states: dict[tuple[str, str], str], name: str, version: str) -> bool:
    return states.get((name, version), "").endswith("FAILED")


def _broken_bundles(chance: Any) -> dict[str, Callable[[Path], None]]:
    """Return ways to break a bundle that was written whole, by name."""

    def changed(file: str, how: Callable[[bytes], bytes]) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            (folder / file).write_bytes(how((folder / file).read_bytes()))

        return change

    def flipped(data: bytes) -> bytes:
        at = chance.randrange(len(data))
        return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]

    return {
        "truncated graph": changed("model.onnx", lambda data: data[: len(data) // 2]),
        "mutated graph": changed("model.onnx", flipped),
        "empty graph": changed("model.onnx", lambda _: b""),
        "truncated manifest": changed("manifest.json", lambda data: data[: len(data) // 2]),
        "mutated tokenizer": changed("tokenizer.json", flipped),
        "no manifest": lambda folder: (folder / "manifest.json").unlink(),
        "no graph": lambda folder: (folder / "model.onnx").unlink(),
    }


async def broken(lab: Lab) -> None:
    """Row 30."""
    version = 100
    async with lab.caller("usual") as usual, lab.caller("particular", "FAILED_PRECONDITION", "NOT_FOUND") as particular:
        for _ in range(lab.count(1, 20)):
            for what, spoil in _broken_bundles(lab.chance).items():
                version += 1
                folder = bundles.write(lab.bench.folder / "made", bundles.TINY, version)
                spoil(folder)
                folder.rename(lab.bench.repository / bundles.TINY / str(version))
                _reload(lab)
                lab.injected[what] += 1
                failed = await _reaches(lab, lambda states, one=version: _failed(states, bundles.TINY, str(one)))
                lab.control(failed, f"{what}: the version is not FAILED")
                end = await usual.infer(bundles.TINY, "the cat")
                lab.must(end.version == "2", f"{what}: version {end.version} answers, and 2 is the highest whole one")
                await particular.infer(bundles.TINY, "the cat", version=str(version))
                bundles.remove(lab.bench.repository, bundles.TINY, version)
    _reload(lab)


async def crashing(lab: Lab) -> None:
    """Row 31."""
    await _unloadable(lab, CRASHING)


async def gigabytes(lab: Lab) -> None:
    """Row 33."""
    before = lab.server.usage().memory_mb
    await _unloadable(lab, FILLING)
    lab.measured["server_grew_mb"] = round(lab.server.usage().memory_mb - before, 1)


async def _unloadable(lab: Lab, names: Mapping[str, str]) -> None:
    """Add bundles whose load fails by a failpoint, one after the other, and require that each is FAILED meanwhile."""
    async with lab.caller("usual") as usual, lab.caller("particular", "FAILED_PRECONDITION") as particular:
        for name in names:
            folder = bundles.write(lab.bench.repository, name)
            begun = time.monotonic()
            _reload(lab)
            lab.injected[f"loads that {names[name]}"] += 1
            failed = asyncio.create_task(_reaches(lab, lambda states, one=name: _failed(states, one, "1")))
            while not failed.done():
                await usual.infer(bundles.TINY, "the cat")
                await asyncio.sleep(0.02)
            lab.control(failed.result(), f"the bundle {name} is not FAILED")
            lab.measured[f"{name}_failed_s"] = round(time.monotonic() - begun, 1)
            if failed.result():
                await particular.infer(name, "the cat")
            lab.must(lab.server.lives, "the server ended")
            shutil.rmtree(folder.parent)
    _reload(lab)


async def outside(lab: Lab) -> None:
    """Row 32."""
    secret = lab.bench.folder / "outside.onnx"
    shutil.copyfile(lab.bench.repository / bundles.TINY / "1" / "model.onnx", secret)

    def symlink(folder: Path) -> None:
        (folder / "model.onnx").unlink()
        (folder / "model.onnx").symlink_to(secret)

    def hardlink(folder: Path) -> None:
        (folder / "model.onnx").unlink()
        os.link(secret, folder / "model.onnx")

    def external(location: str) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            model = onnx.load(str(folder / "model.onnx"))
            table = next(one for one in model.graph.initializer if one.name == "table")
            (folder / "table.bin").write_bytes(table.raw_data)
            table.ClearField("raw_data")
            table.data_location = TensorProto.EXTERNAL
            table.external_data.add(key="location", value=location)
            onnx.save(model, folder / "model.onnx")

        return change

    ways = {
        "symlink": symlink,
        "hardlink": hardlink,
        "external data in the folder above": external("../outside.bin"),
        "external data by an absolute path": external(str(secret)),
        "external data in the working directory": external("outside.bin"),
    }
    (lab.bench.folder / "outside.bin").write_bytes(secret.read_bytes())
    async with lab.caller("usual") as usual:
        for number, (what, change) in enumerate(ways.items()):
            name = f"outside{number}"
            folder = write_sealed(lab, name, change)
            _reload(lab)
            lab.injected[what] += 1
            failed = await _reaches(lab, lambda states, one=name: _failed(states, one, "1"))
            lab.must(failed, f"{what}: the model is not FAILED")
            await usual.infer(bundles.TINY, "the cat")
            shutil.rmtree(folder.parent)
    _reload(lab)


def write_sealed(lab: Lab, name: str, change: Callable[[Path], None]) -> Path:
    """Write a bundle with a changed file, whose manifest holds the right digests; return its folder."""
    made = lab.bench.folder / "sealed" / name
    shutil.copytree(lab.bench.repository / bundles.TINY / "1", made)
    change(made)
    digests = {one.name: sha256_of(one) for one in made.iterdir() if one.name != MANIFEST_FILE}
    manifest = tiny_manifest(name).model_copy(update={"files": digests, "digest": digest_of(digests)})
    (made / MANIFEST_FILE).write_text(manifest.model_dump_json() + "\n", encoding="utf-8")
    (lab.bench.repository / name).mkdir()
    return made.rename(lab.bench.repository / name / "1")


async def reloads(lab: Lab) -> None:
    """Row 34."""
    count, done = lab.count(100, 1_000), asyncio.Event()
    lab.injected["reloads"] = 0

    async def load(name: str, prefix: str) -> None:
        async with lab.caller(name) as wire:
            while not done.is_set():
                for text in lab.texts(8):
                    await wire.infer(bundles.TINY, prefix + text)

    loads = [asyncio.create_task(load(f"load {number}", bundles.MAP * (number % 2))) for number in range(4)]
    servings = lab.bench.service.servings
    try:
        for version in range(1_001, 1_001 + count):
            if version == 1_001 + count // 3:  # by now, pools of threads and their memory have their size
                lab.before = await lab.blocking(lab.bench.usage)
            begun = time.monotonic()
            path = bundles.write(lab.bench.repository, bundles.TINY, version)
            lab.bench.references.add(path)
            servings.append(Serving(bundles.TINY, str(version), since_s=begun, surely_s=float("inf")))
            _reload(lab)
            ready = await _reaches(
                lab, lambda states, one=version: states.get((bundles.TINY, str(one)), "").endswith("READY")
            )
            lab.control(ready, f"version {version} is not ready")
            if not ready:
                break
            lab.injected["reloads"] += 1
            servings[-1] = replace(servings[-1], surely_s=time.monotonic())
            if version > 1_001:
                await _unload(lab, version - 1)
        await asyncio.sleep(0.3)
    finally:
        done.set()
        await asyncio.gather(*loads)
    lab.control(len({one.version for one in servings}) > count, "versions were replaced")


async def _unload(lab: Lab, version: int) -> None:
    """Remove a version from the repository, and record until when it may answer."""
    servings = lab.bench.service.servings
    place = next(at for at, one in enumerate(servings) if (one.model, one.version) == (bundles.TINY, str(version)))
    servings[place] = replace(servings[place], until_s=time.monotonic())
    bundles.remove(lab.bench.repository, bundles.TINY, version)
    _reload(lab)
    gone = await _reaches(lab, lambda states: (bundles.TINY, str(version)) not in states)
    lab.must(gone, f"version {version} is not unloaded")
    if gone:
        servings[place] = replace(servings[place], gone_s=time.monotonic())


ROWS: Final = (
    Row(30, "truncated, mutated and half-written bundles", RELOADING, broken, NEIGHBOURS),
    Row(31, "models that crash, hang or spin while they load", RELOADING, crashing, NEIGHBOURS),
    Row(32, "bundles whose files are links, or lie outside", RELOADING, outside, NEIGHBOURS),
    Row(33, "models that take gigabytes while they load", RELOADING, gigabytes, NEIGHBOURS),
    Row(34, "reloads under load", SWAPPING, reloads, NEIGHBOURS, memory_mb=32.0),
)
