"""What fronts are sent of the models of a server, in order, also one that starts in the middle of a change."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from attnserve_server.config import Settings
from attnserve_server.domain.clock import MonotonicClock
from attnserve_server.engine.instance_thread import Places, SharedOccupancy
from attnserve_server.isolation.arena import Arena
from attnserve_server.observability.metrics import MODEL_STATE, Metrics
from attnserve_server.processes.control import Add, Changed, Removed, Retired, Sync, Synced
from attnserve_server.processes.engines import Engines
from attnserve_server.processes.kept_engine import Surroundings
from attnserve_server.scheduling.catalog import Catalog, ModelState, ServedModel
from tiny_bundle import tiny_manifest


@dataclass
class Front:
    """A front that keeps what it is sent. `answers`: whether it acknowledges at once."""

    number: int
    engines: Engines | None = None
    answers: bool = False
    sent: list[msgspec.Struct] = field(default_factory=list)

    def send(self, message: msgspec.Struct) -> None:
        self.sent.append(message)
        if self.answers and self.engines is not None and isinstance(message, Sync):
            self.engines.front_sent(self, Synced(message.number))  # type: ignore[arg-type]


@dataclass
class Supervised:
    engines: Engines
    fronts: list[Front]
    metrics: Metrics

    def model(self, version: str, state: ModelState, most: int = 0) -> ServedModel:
        metrics = self.metrics.model("tiny", version)
        made = ServedModel("tiny", version, metrics, tiny_manifest(version=version, text=False), most)
        made.move(state)
        self.engines.shown(made)
        return made


@pytest.fixture
def supervised() -> Iterator[Supervised]:
    occupancy = Arena.create_descriptor(SharedOccupancy.SIZE)
    fronts = [Front(1), Front(2)]
    metrics = Metrics()
    unused: Any = None
    around = Surroundings(
        Settings(), MonotonicClock(), unused, unused, occupancy, Places(), Metrics(), lambda: fronts  # type: ignore[arg-type,return-value]
    )  # fmt: skip
    made = Engines(around, metrics, Catalog(), lambda work, _: asyncio.ensure_future(work))
    for front in fronts:
        front.engines = made
    yield Supervised(made, fronts, metrics)
    made.close()
    os.close(occupancy)


async def test_all_fronts_get_a_model_once_and_then_its_states(supervised: Supervised) -> None:
    model = supervised.model("1", ModelState.LOADING, most=16)
    model.move(ModelState.FAILED, "no room")
    supervised.engines.shown(model)
    for front in supervised.fronts:
        added, loading, failed = front.sent
        assert isinstance(added, Add)
        assert (added.serial, added.name, added.version, added.max_request_size) == (1, "tiny", "1", 16)
        assert loading == Changed(1, "loading", precision="fp32")
        assert failed == Changed(1, "failed", "no room", precision="fp32")


async def test_a_front_that_starts_gets_what_the_others_have_and_then_listens(supervised: Supervised) -> None:
    old = supervised.model("1", ModelState.FAILED)
    supervised.model("2", ModelState.READY)
    supervised.engines.forget(old)
    late = Front(3)
    supervised.engines.front_started(late)  # type: ignore[arg-type]
    assert [type(one) for one in late.sent] == [Add, Changed, Sync]
    assert late.sent[1] == Changed(2, "ready", precision="fp32")


async def test_a_change_is_settled_once_every_front_has_answered_or_ended(supervised: Supervised) -> None:
    settling = asyncio.ensure_future(supervised.engines.settle())
    await asyncio.sleep(0)
    one, other = supervised.fronts
    supervised.engines.front_sent(one, Synced(1))  # type: ignore[arg-type]
    await asyncio.sleep(0.01)
    assert not settling.done()
    supervised.engines.front_ended(other.number)
    await settling
    one.answers = other.answers = True
    await supervised.engines.settle()


async def test_a_model_that_is_forgotten_is_removed_from_all_fronts(supervised: Supervised) -> None:
    model = supervised.model("1", ModelState.FAILED)
    supervised.engines.forget(model)
    supervised.engines.forget(model)
    for front in supervised.fronts:
        assert front.sent[2:] == [Removed(1)]
        supervised.engines.front_sent(front, Retired(1))  # type: ignore[arg-type]


async def test_series_stay_while_anything_is_held_of_a_version(supervised: Supervised) -> None:
    def series() -> int:
        return len(supervised.metrics.gauge(MODEL_STATE).series)

    model = supervised.model("1", ModelState.FAILED)
    assert series() == 4
    supervised.engines.left("tiny", "1")
    assert series() == 4
    supervised.engines.forget(model)
    supervised.engines.left("tiny", "1")
    assert series() == 0
