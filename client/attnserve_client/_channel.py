"""Targets, options and metadata of channels, the same for both clients."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping, Sequence
from typing import Final

DEFAULT_TARGET: Final = "localhost:8001"
MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024
"""Largest message in either direction, equal to the server's limit. Larger responses arrive in pieces on a stream."""

_SERVICE_CONFIG: Final = {
    "loadBalancingConfig": [{"round_robin": {}}],
    # A draining server reports it here first, so that round_robin avoids it before it refuses a request.
    "healthCheckConfig": {"serviceName": ""},
}

_DEFAULTS: Final[dict[str, int | str]] = {
    "grpc.service_config": json.dumps(_SERVICE_CONFIG),
    "grpc.service_config_disable_resolution": 1,
    # The client's policy retries, under one budget and one deadline; gRPC's retries would multiply the attempts.
    "grpc.enable_retries": 0,
    "grpc.keepalive_time_ms": 30_000,
    "grpc.keepalive_timeout_ms": 10_000,
    # Servers treat pings without calls as abuse.
    "grpc.keepalive_permit_without_calls": 0,
    "grpc.max_send_message_length": MAX_MESSAGE_BYTES,
    "grpc.max_receive_message_length": MAX_MESSAGE_BYTES,
    # Reconnect to a restarted server within about a second.
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.min_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 2_000,
    # Clients share no connections, so that the reconnect back-off of one does not delay another.
    "grpc.use_local_subchannel_pool": 1,
}


def options_of(more: Mapping[str, int | str]) -> list[tuple[str, int | str]]:
    """Return the channel options: the defaults, overridden by `more`."""
    return list({**_DEFAULTS, **more}.items())


def target_of(target: str | Sequence[str]) -> str:
    """Return the name that gRPC resolves.

    Args:
        target: `host:port`, any gRPC name such as `dns:///service:8001`, a list of `address:port` of one IP version, or
            a list of one name.

    Raises:
        ValueError: `target` is empty or has an empty member, a member holds several addresses, or several members are
            not all `address:port` of one IP version.
    """
    targets = (
        [target] if isinstance(target, str) else [each.removeprefix("ipv4:").removeprefix("ipv6:") for each in target]
    )
    if not targets or not all(targets):
        raise ValueError(f"target {target!r} is empty or has an empty member; give `host:port`")
    for each in () if isinstance(target, str) else targets:
        if "," in each:
            raise ValueError(f"target has the member {each!r}, several addresses; give each address as a member")
    if len(targets) == 1:
        return (
            targets[0]
            if isinstance(target, str) or _version(targets[0]) is None
            else f"ipv{_version(targets[0])}:{targets[0]}"
        )
    versions = {_version(each) for each in targets}
    if None in versions or len(versions) > 1:
        raise ValueError(
            f"target {targets!r}: several targets must be `address:port` of one IP version; "
            "for host names, use one DNS name that resolves to all of them"
        )
    return f"ipv{versions.pop()}:{','.join(targets)}"


def metadata_of(token: str | None, more: Sequence[tuple[str, str | bytes]]) -> tuple[tuple[str, str | bytes], ...]:
    """Return the metadata of every call: the bearer token, if there is one, then `more`."""
    authorization = (("authorization", f"Bearer {token}"),) if token else ()
    return (*authorization, *more)


def _version(target: str) -> int | None:
    """Return the IP version of `address:port`; None for anything else."""
    host, _, port = target.rpartition(":")
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None
    return address.version if port.isdecimal() else None
