"""Changes of models that callers of a front make: the supervisor carries them out, and answers the front.

A change goes on if its caller, or its front, ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import count

import msgspec

from attnserve_server.domain.errors import AttnserveError, NotServing
from attnserve_server.isolation.messages import error_of, failure
from attnserve_server.observability.logs import logger
from attnserve_server.processes.control import ChangeModels, Done
from attnserve_server.scheduling.catalog import Catalog, ServedModel
from attnserve_server.transport.admin import Change, Lifecycle, Outcome

_log = logger(__name__)


class RemoteLifecycle:
    """`transport.admin.Lifecycle` for a front: the supervisor changes the models. Event loop only."""

    def __init__(self, catalog: Catalog, send: Callable[[msgspec.Struct], None]) -> None:
        """Store the parts.

        Args:
            catalog: of the front, which has a model before its load is reported.
            send: sends a message to the supervisor.
        """
        self._catalog = catalog
        self._send = send
        self._numbers = count(1)
        self._waiting: dict[int, asyncio.Future[Done]] = {}

    async def load(self, name: str, version: str = "") -> ServedModel:
        """Return a version that is ready, loaded if it was not."""
        done = await self._change(ChangeModels(next(self._numbers), "load", name, version))
        return self._catalog.find(name, done.version)

    async def unload(self, name: str, version: str) -> None:
        """Unload a version until it is loaded by its name, or the server starts again."""
        await self._change(ChangeModels(next(self._numbers), "unload", name, version))

    async def reload(self) -> list[Change]:
        """Compare the repository with what is loaded, and return what was changed."""
        done = await self._change(ChangeModels(next(self._numbers), "reload"))
        return [Change(name, version, Outcome(outcome), reason) for name, version, outcome, reason in done.changes]

    def done(self, message: Done) -> None:
        """Take what became of a change."""
        waiting = self._waiting.pop(message.number, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(message)

    def close(self) -> None:
        """Fail what still waits: the front ends."""
        for number in tuple(self._waiting):
            self.done(Done(number, error=failure(number, NotServing("", "draining"))))

    async def _change(self, message: ChangeModels) -> Done:
        waiting = self._waiting[message.number] = asyncio.get_running_loop().create_future()
        self._send(message)
        try:
            done: Done = await waiting
        finally:
            self._waiting.pop(message.number, None)
        if done.error is not None:
            raise error_of(done.error)
        return done


async def change(lifecycle: Lifecycle, message: ChangeModels) -> Done:
    """Make a change in the supervisor, and return what became of it."""
    try:
        if message.what == "load":
            served = await lifecycle.load(message.name, message.version)
            return Done(message.number, served.version)
        if message.what == "unload":
            await lifecycle.unload(message.name, message.version)
            return Done(message.number)
        changes = await lifecycle.reload()
        found = [(one.name, one.version, one.outcome.value, one.reason) for one in changes]
        return Done(message.number, changes=found)
    except AttnserveError as error:
        return Done(message.number, error=failure(message.number, error))
    except Exception as error:  # noqa: BLE001 - the boundary of a change: its caller gets an internal error
        _log.error("a change of models failed", what=message.what, exc_info=error)
        return Done(message.number, error=failure(message.number, error))
