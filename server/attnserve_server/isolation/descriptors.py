"""Descriptors for a process that runs: packages of them over a separate Unix socket, each with a number.

A message on another link names the number of a package, so that the two may arrive in either order. Event loop only.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections import deque
from collections.abc import Sequence
from itertools import count
from typing import Final

_NUMBER: Final = struct.Struct("<Q")
MOST: Final = 64
"""The most descriptors of one package."""


def descriptor_pair() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a socket that keeps packages apart."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class DescriptorSender:
    """Sends packages. A package that does not fit now is sent as soon as the receiver reads."""

    def __init__(self, end: socket.socket) -> None:
        """Take one end of `descriptor_pair`."""
        end.setblocking(False)
        self._end = end
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[int, list[int]]] = deque()
        self._numbers = count(1)

    def send(self, *descriptors: int) -> int:
        """Send copies of descriptors, and return the number of the package. It is dropped if the receiver has ended."""
        number = next(self._numbers)
        self._waiting.append((number, [os.dup(one) for one in descriptors]))
        if len(self._waiting) == 1:
            self._flush()
        return number

    def close(self) -> None:
        """Close the socket, and drop what waits."""
        if self._end.fileno() >= 0:
            self._loop.remove_writer(self._end)
            self._end.close()
        while self._waiting:
            _close(self._waiting.popleft()[1])

    def _flush(self) -> None:
        while self._waiting:
            number, descriptors = self._waiting[0]
            try:
                socket.send_fds(self._end, [_NUMBER.pack(number)], descriptors)
            except BlockingIOError:
                self._loop.add_writer(self._end, self._flush)
                return
            except OSError:  # the receiver has ended
                self.close()
                return
            self._waiting.popleft()
            _close(descriptors)
        self._loop.remove_writer(self._end)


class DescriptorReceiver:
    """Receives packages, which `take` returns by their numbers."""

    def __init__(self, end: socket.socket) -> None:
        """Take the other end of `descriptor_pair`."""
        end.setblocking(False)
        self._end = end
        self._loop = asyncio.get_running_loop()
        self._packages: dict[int, asyncio.Future[list[int]]] = {}
        self._loop.add_reader(end, self._read)

    async def take(self, number: int) -> list[int]:
        """Wait for a package, and return its descriptors, which the caller closes. Each is taken once."""
        try:
            return await self._package(number)
        finally:
            self._packages.pop(number, None)

    def close(self) -> None:
        """Close the socket."""
        self._loop.remove_reader(self._end)
        self._end.close()

    def _package(self, number: int) -> asyncio.Future[list[int]]:
        return self._packages.setdefault(number, self._loop.create_future())

    def _read(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._end, _NUMBER.size, MOST)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        if not data:
            self.close()
            return
        self._package(_NUMBER.unpack(data)[0]).set_result(descriptors)


def _close(descriptors: Sequence[int]) -> None:
    for one in descriptors:
        os.close(one)
