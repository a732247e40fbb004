"""The gRPC port's connections as the system lists them: how many there are, and the end of one.

gRPC in Python neither lists connections nor closes one, and its own cap counts those that have ended too
(findings/grpc_connection_cap_never_frees.sh). This process owns the sockets, so that it can shut one down: gRPC then
frees all that belongs to it, as if the peer had left. Linux only; elsewhere nothing is listed, and nothing raised.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Final
from urllib.parse import unquote

_DESCRIPTORS: Final = "/proc/self/fd"
_EVERY_S: Final = 1.0

Peer = tuple[str, int]
"""Address and port of the other end."""


class Connections:
    """The connections of one port of this process. Event loop only."""

    def __init__(self, most: int, on_dropped: Callable[[str], None]) -> None:
        """Store the parts.

        Args:
            most: connections that stay; younger ones are shut down within a second.
            on_dropped: called for each that is shut down, with the cause: `connections`, or that of `drop`.
        """
        self._most = most
        self._on_dropped = on_dropped
        self._port = 0
        self._seen: dict[Peer, int] = {}  # the number of the look at which each was first there
        self._looks = 0

    async def watch(self, port: int) -> None:
        """Shut down surplus connections each second, until cancelled."""
        self._port = port
        while True:
            await asyncio.sleep(_EVERY_S)
            self.limit()

    def limit(self) -> None:
        """Shut down the youngest connections beyond `most`."""
        with contextlib.suppress(OSError):
            if len(os.listdir(_DESCRIPTORS)) <= self._most // 2:  # noqa: PTH208 - names are enough
                self._seen.clear()
                return
        self._looks += 1
        found = {peer: number for peer, number, _ in _accepted(self._port)}
        self._seen = {peer: self._seen.get(peer, self._looks) for peer in found}
        surplus = set(sorted(found, key=lambda peer: (self._seen[peer], found[peer]))[self._most :])
        if surplus:
            self._shut(surplus, "connections")

    def drop(self, peer: str, cause: str) -> bool:
        """Shut down the connection of gRPC's `ipv4:ADDRESS:PORT`. Return whether it was found."""
        named = _peer_of(peer)
        return named is not None and self._shut({named}, cause) > 0

    def _shut(self, peers: set[Peer], cause: str) -> int:
        count = 0
        for peer, _, connection in _accepted(self._port):
            if peer in peers:
                with contextlib.suppress(OSError):  # it has ended
                    connection.shutdown(socket.SHUT_RDWR)
                    count += 1
                    self._on_dropped(cause)
        return count


def _accepted(port: int) -> Iterator[tuple[Peer, int, socket.socket]]:
    """Yield the peer, the number of the inode and the socket of each connection to a port of this process.

    The sockets are duplicates, which are closed afterwards: no descriptor can change its meaning meanwhile.
    """
    with contextlib.suppress(OSError):
        for name in os.listdir(_DESCRIPTORS):  # noqa: PTH208 - names are enough
            try:
                descriptor = os.dup(int(name))
            except OSError:  # closed meanwhile, or no descriptor is left
                continue
            try:
                found = socket.socket(fileno=descriptor)
            except OSError:  # no socket
                os.close(descriptor)
                continue
            with found:
                try:
                    if found.family not in {socket.AF_INET, socket.AF_INET6} or found.getsockname()[1] != port:
                        continue
                    host, number = found.getpeername()[:2]
                except OSError:  # a socket that listens
                    continue
                yield (_plain(host), number), os.fstat(descriptor).st_ino, found


@lru_cache(4096)
def address_of(peer: str) -> str:
    """Return the address of gRPC's `ipv4:ADDRESS:PORT`; of IPv6 the first 64 bits, which one site has to itself."""
    kind, _, rest = peer.partition(":")
    return site_of(unquote(rest).rpartition(":")[0].strip("[]") if kind in {"ipv4", "ipv6"} else peer)


def site_of(host: str) -> str:
    """Return an address in its usual form, of IPv6 the first 64 bits; a text that is no address as it is."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if address.version == 4:
        return str(address)
    return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))


def _peer_of(peer: str) -> Peer | None:
    kind, _, rest = peer.partition(":")
    host, _, number = unquote(rest).rpartition(":")
    if kind not in {"ipv4", "ipv6"} or not number.isdecimal():
        return None
    return _plain(host.strip("[]")), int(number)


def _plain(host: str) -> str:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    return str(getattr(address, "ipv4_mapped", None) or address)
