"""What the methods of the native API and of the Open Inference Protocol share.

Whose call it is, until when it runs, the room that its answer takes, and all open streams.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

import grpc

from attnserve_server.access.guard import Caller
from attnserve_server.config import Settings
from attnserve_server.domain.clock import Clock
from attnserve_server.domain.errors import NotServing, Overloaded
from attnserve_server.transport.dataplane import DataPlane
from attnserve_server.transport.prepared import Prepared
from attnserve_server.transport.sockets import address_of
from attnserve_server.transport.unread import SMALL_BYTES, Held, Unread, on_end

Context = grpc.aio.ServicerContext[bytes, bytes]

FOREVER_S: Final = 10 * 365 * 24 * 3600.0
"""gRPC reports a call without a deadline as one of many years."""


def remaining_s(context: Context) -> float | None:
    """Return the seconds to the call's deadline; None if it has none."""
    # The declared type omits None, which some versions return.
    remaining: float | None = context.time_remaining()
    return None if remaining is None or remaining > FOREVER_S else max(0.0, remaining)


def turns_of(context: Context, caller: Caller | None) -> str:
    """Return the name under which a caller takes turns: its token's, else its address."""
    return address_of(context.peer()) if caller is None else caller.token.name


class UnaryCalls:
    """The unary calls of inference of one service. Event loop only.

    Args:
        call_timeout_s: of a call without a deadline.
    """

    def __init__(self, plane: DataPlane, clock: Clock, call_timeout_s: float, unread: Unread) -> None:
        self._plane = plane
        self._clock = clock
        self._call_timeout_s = call_timeout_s
        self._unread = unread
        self._received: Callable[[], Any] = _nothing
        self._ended: Callable[[Any], None] = _nothing

    def follow(self, received: Callable[[], Any], ended: Callable[[Any], None]) -> None:
        """Set what each call of inference calls: once it has its message, and with what that returned at its end."""
        self._received, self._ended = received, ended

    async def infer(self, data: bytes, context: Context) -> bytes:
        """Answer one request: a message of the service in, one out, serialized.

        Raises:
            InvalidRequest: The message, its parameters, or its id, are malformed.
            Failure: With the error of the request.
        """
        followed = self._received()
        try:
            return await self._infer(data, context)
        finally:
            self._ended(followed)

    async def _infer(self, data: bytes, context: Context) -> bytes:
        raise NotImplementedError

    def _hold(self, context: Context, prepared: Prepared, answer_bytes: int) -> Held | None:
        """Take room for a large answer until the call has ended; return None for a small one, which needs none.

        Raises:
            Overloaded: Too much is unread.
        """
        if answer_bytes <= SMALL_BYTES:
            return None
        held = self._unread.hold(context.peer())
        on_end(held)
        try:
            self._unread.take_or_refuse(held, answer_bytes)
        except Overloaded:
            self._plane.count_refusal(prepared, "unread_bytes")
            raise
        return held


class Stream(Protocol):
    """One stream of requests."""

    async def serve(self) -> None:
        """Read, run and answer requests until the end. Raises the error that ends the stream."""

    def stop_reading(self) -> None:
        """End the stream once its requests have been answered."""


class Streams:
    """All open streams of one service. Event loop only.

    Args:
        opened: makes one of them, from the arguments of this class and the call's context and place among the unread.
    """

    def __init__(
        self,
        opened: Callable[[DataPlane, Clock, Settings, Context, Held], Stream],
        plane: DataPlane,
        clock: Clock,
        settings: Settings,
        unread: Unread,
    ) -> None:
        self._opened = opened
        self._plane = plane
        self._clock = clock
        self._settings = settings
        self._unread = unread
        self._open: set[Stream] = set()
        self._draining = False

    async def stream_infer(self, _: object, context: Context) -> None:
        """Serve one stream until the caller closes its half and has its answers, or the server drains.

        Raises:
            NotServing: The server drains.
            InvalidRequest: A message cannot be answered, because it has no valid request id.
            ExceptionGroup: A task of the stream failed with another error, which is internal.
        """
        if self._draining:
            raise NotServing("", "draining")
        held = self._unread.hold(context.peer())
        stream = self._opened(self._plane, self._clock, self._settings, context, held)
        self._open.add(stream)
        try:
            await stream.serve()
        finally:
            self._open.discard(stream)
            self._unread.release(held)

    def drain(self) -> None:
        """Stop reading from all streams: each answers its requests and ends with UNAVAILABLE."""
        self._draining = True
        for stream in self._open:
            stream.stop_reading()


def _nothing(*_: object) -> None:
    """Do nothing."""
