"""Answers that their callers have not read yet: their bytes over all calls, and the end of callers that do not read.

gRPC holds an answer until its caller has read it. Answers of up to `SMALL_BYTES` do not count: so a caller of small
ones is served while others hold all that may be held. A caller that does not read for `timeout_s` loses its connection,
because gRPC in Python can free the answer in no other way; a quarter of that is enough where others wait for room.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from attnserve_server.domain.clock import Clock
from attnserve_server.domain.errors import Overloaded

SMALL_BYTES: Final = 65_536
"""As much of an answer as HTTP/2 takes before the caller reads (RFC 9113, section 6.9.2)."""
_RETRY_S: Final = 1.0
_LOOKS: Final = 8
"""Looks at waiting calls in the least time that one may wait."""


@dataclass(slots=True, eq=False)
class Held:
    """What one call holds. Event loop only."""

    unread: Unread
    peer: str
    bytes: int = 0
    since_s: float | None = None
    """When the message that its caller has not taken was handed to gRPC; None: there is none."""

    def take(self, count: int) -> bool:
        """Reserve bytes for an answer, as `Unread.take`."""
        return self.unread.take(self, count)

    def give(self, count: int) -> None:
        """Give back what `take` reserved."""
        self.unread.give(self, count)

    def call_later(self, retry: Callable[[], None]) -> None:
        """Call `retry` once bytes were given back."""
        self.unread.call_later(retry)

    def sent(self) -> None:
        """Note that a message was handed to gRPC, which takes the next one once the caller has room for it."""
        self.since_s = self.unread.now()

    def taken(self) -> None:
        """Note that gRPC took the message."""
        self.since_s = None


class Unread:
    """The unread answers of one process. Event loop only."""

    def __init__(self, limit: int, timeout_s: float, clock: Clock, drop: Callable[[str, str], object]) -> None:
        """Store the parts.

        Args:
            limit: bytes, over all calls.
            timeout_s: seconds that a call may wait for its caller.
            clock: measures them.
            drop: ends the connection of gRPC's name of a peer, for a cause.
        """
        self._limit, self._timeout_s, self._clock, self._drop = limit, timeout_s, clock, drop
        self._taken = 0
        self._held: set[Held] = set()
        self._waiting: deque[Callable[[], None]] = deque()
        self._wanted_s = -1e9  # when room was last missing
        self._looking: asyncio.TimerHandle | None = None

    @property
    def bytes(self) -> int:
        """Bytes that calls hold, or have reserved for answers that are being computed."""
        return self._taken

    def hold(self, peer: str) -> Held:
        """Return what a call holds, for `release` at its end."""
        held = Held(self, peer)
        self._held.add(held)
        self._look_soon()
        return held

    def release(self, held: Held) -> None:
        """Forget a call that has ended."""
        self._held.discard(held)
        self._taken -= held.bytes
        held.bytes = 0
        self._wake()

    def take(self, held: Held, count: int) -> bool:
        """Reserve `count` bytes for an answer, unless that exceeds the limit; return whether they were."""
        if count <= SMALL_BYTES:
            return True
        if self._taken and self._taken + count > self._limit:
            self._wanted_s = self._clock.now()
            return False
        self._taken += count
        held.bytes += count
        return True

    def take_or_refuse(self, held: Held, count: int) -> None:
        """Reserve `count` bytes. Raises Overloaded if they exceed the limit."""
        if not self.take(held, count):
            raise Overloaded("unread_bytes", self._limit, self._taken + count, _RETRY_S)

    def give(self, held: Held, count: int) -> None:
        """Give back what `take` reserved for an answer that was read, and let others try again."""
        if count <= SMALL_BYTES:
            return
        held_now = min(count, held.bytes)  # none of a call that was released
        self._taken -= held_now
        held.bytes -= held_now
        self._wake()

    def _wake(self) -> None:
        for _ in range(len(self._waiting)):
            self._waiting.popleft()()

    def call_later(self, retry: Callable[[], None]) -> None:
        """Call `retry` once bytes were given back."""
        self._waiting.append(retry)

    def now(self) -> float:
        """Return the time."""
        return self._clock.now()

    def _look_soon(self) -> None:
        if self._looking is None:
            after_s = self._timeout_s / (4 * _LOOKS)
            self._looking = asyncio.get_running_loop().call_later(after_s, self._look)

    def _look(self) -> None:
        """End the connections of callers that do not read."""
        self._looking = None
        now = self._clock.now()
        full = now - self._wanted_s < self._timeout_s / 4
        late = [held for held in self._held if held.since_s is not None and now - held.since_s >= self._timeout_s]
        if full and not late:
            slow = [one for one in self._held if one.since_s is not None and now - one.since_s >= self._timeout_s / 4]
            late = [max(slow, key=lambda one: one.bytes)] if slow else []
        for peer in dict.fromkeys(held.peer for held in late):
            self._drop(peer, "unread")
        if self._held:
            self._look_soon()

    def close(self) -> None:
        """Look no more."""
        if self._looking is not None:
            self._looking.cancel()


def on_end(held: Held) -> None:
    """Release what a call holds once gRPC has sent its answer, or the call has ended: at the end of the call's task."""
    task: asyncio.Task[Any] | None = asyncio.current_task()
    assert task is not None
    task.add_done_callback(lambda _: held.unread.release(held))
