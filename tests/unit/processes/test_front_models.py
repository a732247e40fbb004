"""The models of a front: what it is sent is done in order, and a model ends after its requests.

The engine is a `Host` in the same process, with a scheduler that holds each request until the test releases it.
"""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import pytest
from attnserve_server.config import Settings
from attnserve_server.domain.clock import MonotonicClock
from attnserve_server.domain.errors import ModelNotFound, NotServing
from attnserve_server.domain.values import PreparedSequence, SequenceResult
from attnserve_server.isolation.arena import Arena, LoadBoard
from attnserve_server.isolation.descriptors import DescriptorReceiver, DescriptorSender, descriptor_pair
from attnserve_server.isolation.host import Host
from attnserve_server.observability.metrics import Metrics
from attnserve_server.processes.control import (
    ARENA_BYTES,
    Add,
    Changed,
    Connect,
    Equip,
    Refused,
    Removed,
    Retired,
    Sync,
    Synced,
)
from attnserve_server.processes.front_models import FrontModels
from attnserve_server.scheduling.catalog import Catalog, ModelState, ServedModel
from attnserve_server.scheduling.queue import Request
from attnserve_server.transport.health import Health
from gated import Gate, until
from tiny_bundle import tiny_manifest

MANIFEST = tiny_manifest(text=False)


@dataclass
class Front:
    """A front's models, and the supervisor's side of them."""

    models: FrontModels
    catalog: Catalog
    health: Health
    metrics: Metrics
    packages: DescriptorSender
    forgotten: list[ServedModel]
    sent: list[msgspec.Struct]
    gates: list[Gate] = field(default_factory=list)
    hosts: list[Host] = field(default_factory=list)
    asked: dict[int, int] = field(default_factory=dict)

    def add(self, serial: int, version: str = "1") -> None:
        manifest = tiny_manifest(version=version, text=False).model_dump_json().encode()
        self.models.receive(Add(serial, "tiny", version, manifest))

    def equip(self, serial: int, *files: int) -> None:
        self.asked[serial], load = Arena.create_descriptor(ARENA_BYTES), Arena.create_descriptor(LoadBoard.SIZE)
        self.models.receive(Equip(serial, self.packages.send(self.asked[serial], load, *files)))
        os.close(load)

    async def connect(self, serial: int) -> Gate:
        """Start an engine, and connect the front's model to it. Return its scheduler."""
        board, answers = Arena.create_descriptor(LoadBoard.SIZE), Arena.create_descriptor(ARENA_BYTES)
        here, there = socket.socketpair()
        self.gates.append(Gate(MANIFEST))
        self.hosts.append(Host(self.gates[-1], LoadBoard(board)))
        own = Arena(answers, ARENA_BYTES), Arena(self.asked[serial], ARENA_BYTES)
        await self.hosts[-1].attach(there, own, 1)
        self.models.receive(Connect(serial, self.packages.send(here.fileno(), answers)))
        here.close()
        os.close(board)
        os.close(answers)
        return self.gates[-1]

    def state(self, serial: int, state: ModelState = ModelState.READY, reason: str = "") -> None:
        self.models.receive(Changed(serial, state.value, reason, "cpu", "fp32"))

    async def sync(self, number: int) -> None:
        """Wait until all messages before this one are done."""
        self.models.receive(Sync(number))
        await until(lambda: Synced(number) in self.sent)

    async def served(self, serial: int, version: str = "1") -> Gate:
        """Add a model that is ready. Return its scheduler."""
        self.add(serial, version)
        self.equip(serial)
        gate = await self.connect(serial)
        self.state(serial)
        await self.sync(1000 + serial)
        return gate

    def ask(self) -> asyncio.Future[list[SequenceResult]]:
        model = self.catalog.get("tiny")
        assert model.scheduler is not None
        ids = PreparedSequence({"input_ids": np.zeros(4, np.int64)}, {"seq": 4}, ("hidden",))
        return model.scheduler.submit(Request("id", None, 10), (ids,))  # type: ignore[call-arg]

    def close(self) -> None:
        self.models.close()
        for host in self.hosts:
            host.close()
        for descriptor in self.asked.values():
            os.close(descriptor)
        self.packages.close()


@pytest.fixture
async def front() -> AsyncIterator[Front]:
    here, there = descriptor_pair()
    catalog, health, metrics = Catalog(), Health(), Metrics()
    forgotten: list[ServedModel] = []
    sent: list[msgspec.Struct] = []
    receiver = DescriptorReceiver(there)
    settings = Settings(drain_grace_s=0.5)
    models = FrontModels(
        settings, MonotonicClock(), metrics, catalog, health, receiver, forget=forgotten.append, send=sent.append
    )
    working = asyncio.create_task(models.work())
    made = Front(models, catalog, health, metrics, DescriptorSender(here), forgotten, sent)
    yield made
    working.cancel()
    made.close()
    receiver.close()
    await asyncio.sleep(0.01)


def opened() -> int:
    """Descriptors of this process, and with it of both sides; maps of memory have one each."""
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_a_model_is_shown_by_its_first_state_and_not_before(front: Front) -> None:
    front.add(1)
    front.equip(1)
    await front.sync(1)
    with pytest.raises(ModelNotFound):
        front.catalog.find("tiny")
    front.state(1, ModelState.LOADING)
    await front.sync(2)
    assert front.catalog.find("tiny").state is ModelState.LOADING
    assert not front.health.serving("tiny")
    front.state(1)
    await front.sync(3)
    found = front.catalog.get("tiny")
    assert (found.provider, found.manifest and found.manifest.precision) == ("cpu", "fp32")
    assert front.health.serving("tiny")
    assert front.health.serving()


async def test_a_broken_bundle_is_shown_with_its_reason(front: Front) -> None:
    front.models.receive(Add(1, "tiny", "1"))
    front.state(1, ModelState.FAILED, "no manifest")
    await front.sync(1)
    found = front.catalog.find("tiny")
    assert (found.state, found.state_reason, found.manifest) == (ModelState.FAILED, "no manifest", None)
    front.models.receive(Removed(1))
    await until(lambda: Retired(1) in front.sent)


async def test_a_request_ends_on_the_model_that_it_began_with(front: Front) -> None:
    old = await front.served(1)
    answer = front.ask()
    await until(lambda: len(old.waiting) == 1)
    new = await front.served(2)
    assert front.models._entries.keys() == {1, 2}
    front.models.receive(Removed(1))
    await front.sync(1)
    assert len(front.forgotten) == 1
    later = front.ask()
    await until(lambda: len(new.waiting) == 1)
    assert Retired(1) not in front.sent, "it has a request"
    old.release()
    assert len(await answer) == 1
    await until(lambda: Retired(1) in front.sent)
    assert not later.done()
    new.release()
    await later


async def test_a_removed_model_whose_engine_is_replaced_answers_from_the_next_one(front: Front) -> None:
    old = await front.served(1)
    answer = front.ask()
    await until(lambda: len(old.waiting) == 1)
    await front.served(2)
    front.models.receive(Removed(1))
    await front.sync(1)
    front.hosts[0].close()
    front.models.receive(Changed(1, "loading", "engine crashed", expected_s=0.1))
    next_ = await front.connect(1)
    await until(lambda: len(next_.waiting) == 1)
    assert front.catalog.get("tiny").state is ModelState.READY, "the state is that of the model that serves"
    next_.release()
    assert len(await answer) == 1
    await until(lambda: Retired(1) in front.sent)


async def test_what_is_left_of_a_removed_model_is_refused_after_the_grace_period(front: Front) -> None:
    old = await front.served(1)
    answer = front.ask()
    await until(lambda: len(old.waiting) == 1)
    front.models.receive(Removed(1))
    with pytest.raises(NotServing):
        await answer
    await until(lambda: Retired(1) in front.sent)


async def test_a_prepared_request_keeps_its_model(front: Front) -> None:
    await front.served(1)
    model = front.catalog.get("tiny")
    model.prepared += 1
    front.models.receive(Removed(1))
    await front.sync(1)
    await asyncio.sleep(0.1)
    assert Retired(1) not in front.sent
    model.prepared -= 1
    await until(lambda: Retired(1) in front.sent)


async def test_a_front_that_cannot_use_a_model_answers_why(front: Front, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("no tokenizer")
    manifest = tiny_manifest().model_copy(update={"files": {"tokenizer.json": "0" * 64}})
    front.models.receive(Add(1, "tiny", "1", manifest.model_dump_json().encode()))
    with (tmp_path / "tokenizer.json").open("rb") as file:
        front.equip(1, file.fileno())
    await front.sync(1)
    (refused,) = [one for one in front.sent if isinstance(one, Refused)]
    assert refused.serial == 1
    assert "tokenizer.json: sha256" in refused.why
    await front.connect(1)
    await front.sync(2)


async def test_a_model_that_fails_gives_its_memory_back_and_stays_listed(front: Front) -> None:
    before = opened()
    await front.served(1)
    answer = front.ask()
    front.state(1, ModelState.FAILED, "its files have changed")
    with pytest.raises(NotServing):
        await answer
    await front.sync(1)
    found = front.catalog.find("tiny")
    assert (found.state_reason, found.scheduler) == ("its files have changed", None)
    del answer
    front.gates.pop()
    front.hosts.pop().close()
    os.close(front.asked.pop(1))
    await until(lambda: opened() == before)


async def test_replacements_leave_nothing_behind(front: Front) -> None:
    await front.served(1)
    counts: list[Callable[[], int]] = [opened, lambda: Path("/proc/self/maps").read_text().count("memfd:attnserve")]
    before = [count() for count in counts]
    for serial in range(2, 12):
        await front.served(serial)
        front.models.receive(Removed(serial - 1))
        await until(lambda serial=serial: Retired(serial - 1) in front.sent)
        front.hosts.pop(0).close()
        front.gates.pop(0)
        os.close(front.asked.pop(serial - 1))
        await asyncio.sleep(0.01)
    await until(lambda: all(count() <= then + 2 for count, then in zip(counts, before, strict=True)))
    assert len(front.models._entries) == 1


async def test_series_go_with_the_last_model_of_a_version(front: Front) -> None:
    def series() -> bool:
        return any("tiny" in labels for values in front.metrics.snapshot().values() for labels, *_ in values)

    await front.served(1)
    await front.served(2)
    front.models.receive(Removed(1))
    await until(lambda: Retired(1) in front.sent)
    assert series()
    front.models.receive(Removed(2))
    await until(lambda: Retired(2) in front.sent)
    assert not series()
    assert front.health._serving.keys() >= {""}
    assert "tiny" not in front.health._serving


async def test_a_draining_front_shows_no_model_again(front: Front) -> None:
    await front.served(1)
    front.models.drain()
    front.catalog.drain()
    front.state(1)
    await front.sync(1)
    assert front.catalog.find("tiny").state is ModelState.DRAINING
