"""Messages between two processes over a Unix socket: many in one write, and one wake-up for all that have arrived.

A message is bytes; four bytes before it hold its length. The end of the other process is the end of the link. Event
loop only.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Final, cast

_LENGTH: Final = struct.Struct("<I")


class Link(asyncio.Protocol):
    """One end of a link."""

    def __init__(self, receive: Callable[[memoryview], None], lost: Callable[[], None]) -> None:
        """Store the callbacks.

        Args:
            receive: called with each message; its memory is valid until it returns.
            lost: called once when the other end or this one is closed.
        """
        self._receive = receive
        self._lost = lost
        self._parts: list[bytes] = []
        self._missing = 0  # the least number of bytes without which no further message is whole
        self._outgoing: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def open(cls, end: socket.socket, receive: Callable[[memoryview], None], lost: Callable[[], None]) -> Link:
        """Open a link on one end of a socket pair."""
        end.setblocking(False)
        loop = asyncio.get_running_loop()
        _, link = await loop.create_connection(lambda: cls(receive, lost), sock=end)
        return link

    def send(self, message: bytes) -> None:
        """Send a message in this turn of the loop, with all others of the turn. It is dropped if the link is lost."""
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing.append(_LENGTH.pack(len(message)))
        self._outgoing.append(message)

    def close(self) -> None:
        """Send what was queued, and close."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def _flush(self) -> None:
        outgoing, self._outgoing = self._outgoing, []
        if outgoing and self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(outgoing))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport (asyncio.Protocol)."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's has the methods and not the class

    def data_received(self, data: bytes) -> None:
        """Pass on each whole message (asyncio.Protocol)."""
        if self._parts:  # of a message that has not arrived as a whole
            self._parts.append(data)
            self._missing -= len(data)
            if self._missing > 0:
                return
            data, self._parts = b"".join(self._parts), []
        view, at, end = memoryview(data), 0, len(data)
        self._missing = 0
        while at < end:
            begin = at + _LENGTH.size
            if begin > end:
                self._missing = begin - end
                break
            (length,) = _LENGTH.unpack_from(data, at)
            if begin + length > end:
                self._missing = begin + length - end
                break
            self._receive(view[begin : begin + length])
            at = begin + length
        if self._missing:
            self._parts = [data[at:]]

    def connection_lost(self, error: Exception | None) -> None:
        """Report the end of the link (asyncio.Protocol)."""
        del error
        self._transport = None
        self._lost()
