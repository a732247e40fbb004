"""The end of one connection to the gRPC port, and the names of peers.

gRPC in Python closes no connection. This process owns its sockets, so that it can shut one down: gRPC then frees all
that belongs to it, as if the peer had left. Linux only; elsewhere nothing is closed, and nothing raised.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Final
from urllib.parse import unquote

_DESCRIPTORS: Final = "/proc/self/fd"

Peer = tuple[str, int]
"""Address and port of the other end."""


class Connections:
    """The connections of one port of this process. Event loop only."""

    def __init__(self, on_dropped: Callable[[str], None]) -> None:
        """Store the part. `on_dropped`: called for each that is shut down, with the cause."""
        self._on_dropped = on_dropped
        self.port = 0
        """The port; 0 before it is known."""

    def drop(self, peer: str, cause: str) -> bool:
        """Shut down the connection of gRPC's `ipv4:ADDRESS:PORT`. Return whether it was found."""
        named = _peer_of(peer)
        for found, connection in _accepted(self.port):
            if found == named:
                with contextlib.suppress(OSError):  # it has ended
                    connection.shutdown(socket.SHUT_RDWR)
                    self._on_dropped(cause)
                    return True
        return False


def _accepted(port: int) -> Iterator[tuple[Peer, socket.socket]]:
    """Yield the peer and the socket of each connection to a port of this process.

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
                yield (_plain(host), number), found


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
