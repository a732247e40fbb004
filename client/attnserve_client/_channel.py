"""How channels are made: targets, defaults, credentials and metadata, the same for both clients."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping, Sequence
from typing import Final

DEFAULT_TARGET: Final = "localhost:8001"
MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024
"""The server's own bound, both ways; larger answers come in pieces on a stream."""

_SERVICE_CONFIG: Final = {
    "loadBalancingConfig": [{"round_robin": {}}],
    # A server that drains says so here first, so that round_robin leaves it before it refuses anything.
    "healthCheckConfig": {"serviceName": ""},
}

_DEFAULTS: Final[dict[str, int | str]] = {
    "grpc.service_config": json.dumps(_SERVICE_CONFIG),
    "grpc.service_config_disable_resolution": 1,
    # Our own policy retries, under one budget and one deadline; two layers of it would multiply the attempts.
    "grpc.enable_retries": 0,
    "grpc.keepalive_time_ms": 30_000,
    "grpc.keepalive_timeout_ms": 10_000,
    # Pings without calls are what servers count as abuse.
    "grpc.keepalive_permit_without_calls": 0,
    "grpc.max_send_message_length": MAX_MESSAGE_BYTES,
    "grpc.max_receive_message_length": MAX_MESSAGE_BYTES,
    # A server that restarts is found again within a second.
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.min_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 2_000,
    # Two clients share nothing: not even a connection's back-off.
    "grpc.use_local_subchannel_pool": 1,
}


def options_of(more: Mapping[str, int | str]) -> list[tuple[str, int | str]]:
    """The channel options: our defaults, with the caller's own over them."""
    return list({**_DEFAULTS, **more}.items())


def target_of(target: str | Sequence[str]) -> str:
    """The name that gRPC resolves.

    Args:
        target: `host:port`, any gRPC name such as `dns:///service:8001`, or several `address:port` of one IP version.

    Raises:
        ValueError: Several targets that are not addresses of one version, or none.
    """
    targets = [target] if isinstance(target, str) else [each.removeprefix("ipv4:") for each in target]
    if not targets or not all(targets):
        raise ValueError("a target is `host:port`, and there must be at least one")
    if len(targets) == 1:
        return (
            targets[0]
            if isinstance(target, str) or _version(targets[0]) is None
            else f"ipv{_version(targets[0])}:{targets[0]}"
        )
    versions = {_version(each) for each in targets}
    if None in versions or len(versions) > 1:
        raise ValueError(
            "several targets must all be `address:port` of one IP version; give names one DNS name that resolves to all"
        )
    return f"ipv{versions.pop()}:{','.join(targets)}"


def metadata_of(token: str | None, more: Sequence[tuple[str, str | bytes]]) -> tuple[tuple[str, str | bytes], ...]:
    """What every call carries beside its message."""
    own = (("authorization", f"Bearer {token}"),) if token else ()
    return (*own, *more)


def _version(target: str) -> int | None:
    host, _, port = target.rpartition(":")
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None
    return address.version if port.isdecimal() else None
