"""One front, as the supervisor keeps it: started, watched, and replaced at its end. Its connections are lost then."""

from __future__ import annotations

import asyncio
from itertools import count
from typing import Final, Protocol

import msgspec

from attnserve_server.config import Settings
from attnserve_server.domain.clock import Clock
from attnserve_server.engine.pulse import Overdue
from attnserve_server.observability.logs import logger
from attnserve_server.observability.metrics import FRONT_REASONS, FRONT_RESTARTS, Metrics
from attnserve_server.processes.children import Child, Children
from attnserve_server.processes.control import FrontStart, Listening
from attnserve_server.processes.ends import End, pause_s

_log = logger(__name__)

_LEAST_BEAT_S: Final = 10.0
"""The least limit of a front's heartbeat."""
_SETTLED_S: Final = 10.0
"""A front that has listened for so long was no failure."""
_numbers = count(1)


class FrontHost(Protocol):
    """What a front needs of the supervisor."""

    settings: Settings
    clock: Clock

    def front_start(self, front: KeptFront) -> FrontStart:
        """Return the message that starts a front."""

    def front_started(self, front: KeptFront) -> None:
        """Send a front, which has its first message, all models."""

    def front_listens(self) -> None:
        """Take note that one more front takes connections."""

    def front_sent(self, front: KeptFront, message: object) -> None:
        """Take another message of a front."""

    def front_ended(self, number: int, *, started: bool) -> None:
        """Forget a front. `started`: whether it has listened; if not, none can be started."""


class KeptFront:
    """One front. Event loop only."""

    def __init__(self, host: FrontHost, children: Children, name: str, metrics: Metrics) -> None:
        self.name = name
        self.ending = False
        """Set before the server ends it."""
        self.child: Child | None = None
        self.number = next(_numbers)
        """Differs from that of any front before or beside it."""
        self.is_listening = False
        self._host = host
        self._children = children
        self._hung = ""
        self._began_s = 0.0
        self._restarts = {cause: metrics.counter(FRONT_RESTARTS).labels(cause) for cause in FRONT_REASONS}

    async def run(self) -> None:
        """Keep a front running until the server ends."""
        wait_s, failures = 0.0, 0
        while True:
            await asyncio.sleep(wait_s)
            if self._stops():
                return
            try:
                child = await self._children.spawn("front", self.name)
            except OSError as error:
                if not self._began_s:
                    raise
                failures = max(2, failures + 1)
                wait_s = pause_s(failures)
                _log.critical("no front could be started", reason=error.strerror, restart_in_s=wait_s)
                continue
            self._hung = ""
            self._overdue = Overdue(child.pulse, max(_LEAST_BEAT_S, self._host.settings.watchdog_floor_s))
            child.received = self._receive
            self.child = child
            child.send(self._host.front_start(self))
            self._host.front_started(self)
            code = await asyncio.shield(child.ended)
            started, self.child, self.is_listening = self.is_listening, None, False
            child.pulse.close()
            if self._stops():
                return
            end = End("hang", f"front hung: {self._hung}") if self._hung else End.of(code, "front")
            _log.critical("a front is replaced", ended=self.name, reason=end.why)
            number, self.number = self.number, next(_numbers)
            self._host.front_ended(number, started=started)
            self._restarts[end.cause].inc()
            failures = 0 if started and self._host.clock.now() - self._began_s > _SETTLED_S else failures + 1
            wait_s = pause_s(failures)

    @property
    def is_started(self) -> bool:
        """Whether it runs and has its first message: it does what it is sent, in order, before or after it listens."""
        return self.child is not None and self.child.is_started

    def _stops(self) -> bool:
        return self.ending

    def watch(self, now: float) -> None:
        """Kill the front if it hangs. Call it several times a second."""
        if self.child is not None and self.is_listening and not self.ending and not self._hung:
            self._hung = self._overdue.look(now)
            if self._hung:
                self.child.kill()

    def send(self, message: msgspec.Struct) -> None:
        """Send a message, if it runs."""
        if self.child is not None:
            self.child.send(message)

    def _receive(self, message: object) -> None:
        if isinstance(message, Listening):
            self.is_listening = True
            self._began_s = self._host.clock.now()
            self._host.front_listens()
        else:
            self._host.front_sent(self, message)
