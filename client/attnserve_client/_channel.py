"""Targets, options and metadata of channels, the same for both clients. Each address has separate channels."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping, Sequence
from typing import Final

DEFAULT_PORT: Final = 8001
DEFAULT_TARGET: Final = f"localhost:{DEFAULT_PORT}"
MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024
"""Largest message in either direction, equal to the server's limit. Larger responses arrive in pieces on a stream."""
MAX_CONNECTIONS: Final = 512
"""Most connections to one address: half of the file descriptors that a process may usually open, 1,024."""

_SERVICE_CONFIG: Final = {
    "loadBalancingConfig": [{"round_robin": {}}],
    # A draining server reports it here first, so that round_robin avoids it before it refuses a request.
    "healthCheckConfig": {"serviceName": ""},
}

_RESOLVED: Final = ("dns", "ipv4", "ipv6")
"""Schemes of gRPC whose names have a port."""
_OTHER_SCHEMES: Final = ("unix", "unix-abstract", "vsock", "xds", "google-c2p")

_DEFAULTS: Final[dict[str, int | str]] = {
    "grpc.service_config": json.dumps(_SERVICE_CONFIG),
    "grpc.service_config_disable_resolution": 1,
    # The client's policy retries, under one budget and one deadline; gRPC's retries would multiply the attempts.
    "grpc.enable_retries": 0,
    # A peer that stops answering is noticed within 8 + 5 s, which leaves time for a retry within a deadline of 20 s.
    # The server permits pings 5 s apart. gRPC waits for the answer to a ping for ping_timeout, of 60 s by default,
    # and ignores keepalive_timeout (findings/grpc_keepalive_timeout_ignored.sh).
    "grpc.keepalive_time_ms": 8_000,
    "grpc.keepalive_timeout_ms": 5_000,
    "grpc.http2.ping_timeout_ms": 5_000,
    # Otherwise gRPC stops after two pings in a long call.
    "grpc.http2.max_pings_without_data": 0,
    # Servers treat pings without calls as abuse. The watch of the server's health is a call, so pings never pause.
    "grpc.keepalive_permit_without_calls": 0,
    "grpc.max_send_message_length": MAX_MESSAGE_BYTES,
    "grpc.max_receive_message_length": MAX_MESSAGE_BYTES,
    # Reconnect to a restarted server within about a second.
    "grpc.initial_reconnect_backoff_ms": 100,
    # gRPC's limit on the time to open a connection: two round trips, more with TLS, to a busy machine.
    "grpc.min_reconnect_backoff_ms": 2_000,
    "grpc.max_reconnect_backoff_ms": 2_000,
    # Channels with equal arguments would share one connection, and with it one process of a server of several, and one
    # reconnect back-off.
    "grpc.use_local_subchannel_pool": 1,
}


def options_of(more: Mapping[str, int | str]) -> list[tuple[str, int | str]]:
    """Return the channel options: the defaults, overridden by `more`."""
    return list({**_DEFAULTS, **more}.items())


def unchecked(options: Sequence[tuple[str, int | str]]) -> list[tuple[str, int | str]]:
    """Return the options of a channel that sends calls to a server that is not ready, too."""
    without = {key: value for key, value in _SERVICE_CONFIG.items() if key != "healthCheckConfig"}
    return list({**dict(options), "grpc.service_config": json.dumps(without)}.items())


def targets_of(target: str | Sequence[str]) -> tuple[str, ...]:
    """Return the name that gRPC resolves for each address.

    Args:
        target: `host:port`, any gRPC name such as `dns:///service:8001`, or several of them: a list, or one text with
            commas between them. Without a port, 8001.

    Raises:
        ValueError: `target` is empty or has an empty member, a member of a list holds several addresses, or a member
            is a URL or no address.
    """
    given = [target] if isinstance(target, str) else list(target)
    for each in () if isinstance(target, str) else given:
        if "," in each:
            raise ValueError(f"target has the member {each!r}, several addresses; give each address as a member")
    members = [part.strip() for each in given for part in each.split(",")]
    if not members or not all(members):
        raise ValueError(f"target {target!r} is empty or has an empty member; give `host:port`")
    return tuple(_name_of(each) for each in members)


def check_connections(connections: int) -> int:
    """Return a number of connections to each address.

    Raises:
        ValueError: It is out of range.
    """
    if not 1 <= connections <= MAX_CONNECTIONS:
        raise ValueError(
            f"connections is {connections}; it must be from 1 to {MAX_CONNECTIONS}: "
            "a few for each front process of the server are enough"
        )
    return connections


def metadata_of(token: str | None, more: Sequence[tuple[str, str | bytes]]) -> tuple[tuple[str, str | bytes], ...]:
    """Return the metadata of every call: the bearer token, if there is one, then `more`."""
    authorization = (("authorization", f"Bearer {token}"),) if token else ()
    return (*authorization, *more)


def _name_of(member: str) -> str:
    """Return a member as gRPC resolves it, with a port: `ipv4:` or `ipv6:` before an address of numbers.

    Raises:
        ValueError: The member is a URL, or no address.
    """
    scheme, colon, rest = member.partition(":")
    if colon and scheme in _OTHER_SCHEMES:
        return member
    if not (colon and scheme in _RESOLVED):
        if rest.startswith("//"):
            encrypted = ", and pass credentials=Tls() for an encrypted connection" if scheme.endswith("s") else ""
            host = rest[2:].partition("/")[0].partition(":")[0] or "localhost"
            raise ValueError(
                f"target {member!r} is a URL; give `host:port`, such as '{host}:{DEFAULT_PORT}'{encrypted}"
            )
        scheme, rest = "", member
    authority, slash, name = rest.rpartition("/")
    host, port = _host_and_port(member, name)
    if scheme == "dns" or not (scheme or _version(host)):
        return f"{scheme}{':' if scheme else ''}{authority}{slash}{host}:{port}"
    return f"{scheme or f'ipv{_version(host)}'}:{host}:{port}"


def _host_and_port(member: str, name: str) -> tuple[str, str]:
    """Split a name; without a port, the default one. IPv6 addresses get brackets."""
    bare = name.strip("[]")
    if _version(bare) == 6 and name in {bare, f"[{bare}]"}:
        return f"[{bare}]", str(DEFAULT_PORT)
    host, colon, port = name.rpartition(":")
    if not colon:
        host, port = name, str(DEFAULT_PORT)
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ValueError(f"target {member!r} is no address; give `host:port` with a port from 1 to 65535")
    return host, port


def _version(host: str) -> int:
    """Return 4 or 6 for an IP address, and 0 for any other name."""
    try:
        return ipaddress.ip_address(host.strip("[]")).version
    except ValueError:
        return 0
