"""Changes that a front's callers make: passed to the supervisor, and answered with what became of them there."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from attnserve_server.domain.errors import InternalFault, ModelFailed, ModelNotFound, NotServing, RepositoryUnusable
from attnserve_server.observability.metrics import Metrics
from attnserve_server.processes.changing import RemoteLifecycle, change
from attnserve_server.processes.control import ENCODER, TO_CHILD, TO_SUPERVISOR, ChangeModels
from attnserve_server.scheduling.catalog import Catalog, ServedModel
from attnserve_server.transport.admin import Change, Outcome


class Supervised:
    """A lifecycle with one outcome, and the calls that it got."""

    def __init__(self, outcome: object = None) -> None:
        self.outcome = outcome
        self.calls: list[tuple[str, ...]] = []

    def _end(self, *call: str) -> Any:
        self.calls.append(call)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    async def load(self, name: str, version: str = "") -> ServedModel:
        return self._end("load", name, version)

    async def unload(self, name: str, version: str) -> None:
        self._end("unload", name, version)

    async def reload(self) -> Sequence[Change]:
        return self._end("reload")


def between(catalog: Catalog, supervised: Supervised) -> RemoteLifecycle:
    """A front's lifecycle, with the supervisor's behind it; messages are encoded both ways."""
    tasks = set()

    def send(message: msgspec.Struct) -> None:
        async def answer() -> None:
            received = TO_SUPERVISOR.decode(ENCODER.encode(message))
            front.done(TO_CHILD.decode(ENCODER.encode(await change(supervised, received))))

        tasks.add(asyncio.ensure_future(answer()))

    front = RemoteLifecycle(catalog, send)
    return front


def served(version: str) -> ServedModel:
    return ServedModel("tiny", version, Metrics().model("tiny", version))


async def test_a_load_returns_the_front_s_own_model() -> None:
    catalog, own = Catalog(), served("2")
    catalog.add(own)
    supervised = Supervised(served("2"))
    assert await between(catalog, supervised).load("tiny") is own
    assert supervised.calls == [("load", "tiny", "")]


async def test_an_unload_and_a_reload_are_passed_on() -> None:
    supervised = Supervised([Change("tiny", "1", Outcome.REPLACED), Change("tiny", "2", Outcome.FAILED, "no room")])
    front = between(Catalog(), supervised)
    await front.unload("tiny", "1")
    assert await front.reload() == supervised.outcome
    assert supervised.calls == [("unload", "tiny", "1"), ("reload",)]


@pytest.mark.parametrize(
    "error",
    [ModelNotFound("tiny", "9"), ModelFailed("tiny", "2", "no room"), RepositoryUnusable("empty"), NotServing("", "x")],
    ids=lambda error: type(error).__name__,
)
async def test_errors_keep_their_class_and_fields(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        await between(Catalog(), Supervised(error)).load("tiny")
    assert (str(caught.value), vars(caught.value)) == (str(error), vars(error))


async def test_an_unexpected_error_is_internal() -> None:
    with pytest.raises(InternalFault):
        await between(Catalog(), Supervised(ZeroDivisionError())).reload()


async def test_a_front_that_ends_fails_what_waits() -> None:
    sent: list[ChangeModels] = []
    front = RemoteLifecycle(Catalog(), sent.append)  # type: ignore[arg-type]
    waiting = asyncio.ensure_future(front.reload())
    await asyncio.sleep(0)
    front.close()
    with pytest.raises(NotServing, match="draining"):
        await waiting
    assert [one.what for one in sent] == ["reload"]


async def test_a_caller_that_leaves_leaves_nothing_behind() -> None:
    front = RemoteLifecycle(Catalog(), lambda _: None)
    waiting = asyncio.ensure_future(front.reload())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not front._waiting
