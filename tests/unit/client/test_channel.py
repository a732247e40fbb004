"""Targets and options of gRPC channels.

`target_of` turns one or more addresses into a name that gRPC resolves. It raises ValueError for no address, for several
host names, for a member with several addresses, and for a mixture of IPv4 and IPv6.
"""

from __future__ import annotations

from typing import Any

import pytest
from attnserve_client._channel import options_of, target_of


def test_channel_options_have_defaults_that_callers_override() -> None:
    options = dict(options_of({"grpc.keepalive_time_ms": 1}))
    assert "round_robin" in str(options["grpc.service_config"])
    assert '"healthCheckConfig": {"serviceName": ""}' in str(options["grpc.service_config"])
    assert options["grpc.enable_retries"] == 0
    assert options["grpc.max_receive_message_length"] == options["grpc.max_send_message_length"] == 64 << 20
    assert options["grpc.keepalive_permit_without_calls"] == 0
    assert options["grpc.keepalive_time_ms"] == 1, "the caller's own options win"
    assert dict(options_of({}))["grpc.keepalive_time_ms"] == 30_000


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("localhost:8001", "localhost:8001"),
        ("dns:///service:8001", "dns:///service:8001"),
        (["localhost:8001"], "localhost:8001"),
        (["10.0.0.1:8001"], "ipv4:10.0.0.1:8001"),
        (["ipv4:10.0.0.1:8001", "10.0.0.2:8001"], "ipv4:10.0.0.1:8001,10.0.0.2:8001"),
        (["[::1]:1", "[::2]:2"], "ipv6:[::1]:1,[::2]:2"),
        (["ipv6:[::1]:1"], "ipv6:[::1]:1"),
        (["ipv6:[::1]:1", "[::2]:2"], "ipv6:[::1]:1,[::2]:2"),
        ("ipv4:10.0.0.1:1,10.0.0.2:2", "ipv4:10.0.0.1:1,10.0.0.2:2"),
    ],
)
def test_target_resolves_to_a_grpc_name(target: Any, name: str) -> None:
    assert target_of(target) == name


@pytest.mark.parametrize("target", ["", [], ["a:1", "b:2"], ["10.0.0.1:1", "[::1]:1"], ["a:1", ""]])
def test_invalid_targets_are_refused(target: Any) -> None:
    with pytest.raises(ValueError, match="target"):
        target_of(target)


@pytest.mark.parametrize("more", [[], ["10.0.0.3:3"]])
def test_member_with_several_addresses_is_refused(more: list[str]) -> None:
    with pytest.raises(ValueError, match=r"has the member .* several addresses"):
        target_of(["ipv4:10.0.0.1:1,10.0.0.2:2", *more])
