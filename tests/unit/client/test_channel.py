"""Targets and options of gRPC channels.

`targets_of` turns addresses into the name that gRPC resolves for each. It raises ValueError for no address, and for a
member of a list with several addresses.
"""

from __future__ import annotations

from typing import Any

import pytest
from attnserve_client._channel import MAX_CONNECTIONS, check_connections, options_of, targets_of


def test_channel_options_have_defaults_that_callers_override() -> None:
    options = dict(options_of({"grpc.keepalive_time_ms": 1}))
    assert "round_robin" in str(options["grpc.service_config"])
    assert '"healthCheckConfig": {"serviceName": ""}' in str(options["grpc.service_config"])
    assert options["grpc.enable_retries"] == 0
    assert options["grpc.max_receive_message_length"] == options["grpc.max_send_message_length"] == 64 << 20
    assert options["grpc.keepalive_permit_without_calls"] == 0
    assert options["grpc.keepalive_time_ms"] == 1, "the caller's own options win"
    assert dict(options_of({}))["grpc.keepalive_time_ms"] == 8_000


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("localhost:8001", ["localhost:8001"]),
        ("dns:///service:8001", ["dns:///service:8001"]),
        (["localhost:8001"], ["localhost:8001"]),
        (["10.0.0.1:8001"], ["ipv4:10.0.0.1:8001"]),
        (["ipv4:10.0.0.1:8001", "10.0.0.2:8001"], ["ipv4:10.0.0.1:8001", "ipv4:10.0.0.2:8001"]),
        (["[::1]:1", "[::2]:2"], ["ipv6:[::1]:1", "ipv6:[::2]:2"]),
        (["ipv6:[::1]:1"], ["ipv6:[::1]:1"]),
        ("ipv4:10.0.0.1:1,10.0.0.2:2", ["ipv4:10.0.0.1:1", "ipv4:10.0.0.2:2"]),
        ("replica-1:8001, 10.0.0.2:8001", ["replica-1:8001", "ipv4:10.0.0.2:8001"]),
        (["replica-1:8001", "[::1]:8001"], ["replica-1:8001", "ipv6:[::1]:8001"]),
        ("localhost", ["localhost:8001"]),
        ("10.0.0.1, ::1,[::1]", ["ipv4:10.0.0.1:8001", "ipv6:[::1]:8001", "ipv6:[::1]:8001"]),
        ("dns:///service", ["dns:///service:8001"]),
        ("dns:service,ipv4:10.0.0.1,ipv6:[::1]", ["dns:service:8001", "ipv4:10.0.0.1:8001", "ipv6:[::1]:8001"]),
        (["unix:/run/attnserve.sock", "xds:///service"], ["unix:/run/attnserve.sock", "xds:///service"]),
    ],
)
def test_target_resolves_to_a_grpc_name_for_each_address(target: Any, names: list[str]) -> None:
    assert list(targets_of(target)) == names


@pytest.mark.parametrize("target", ["", [], ["a:1", ""], "a:1,", ","])
def test_invalid_targets_are_refused(target: Any) -> None:
    with pytest.raises(ValueError, match="target"):
        targets_of(target)


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("http://server:8000/v2", "give `host:port`, such as 'server:8001'$"),
        ("grpc://10.0.0.1", "such as '10.0.0.1:8001'$"),
        ("https://server", r"such as 'server:8001', and pass credentials=Tls\(\) for an encrypted connection$"),
    ],
)
def test_url_is_refused_with_the_address_to_give(driver_class: Any, url: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=rf"^target '{url}' is a URL; .*{remedy}"):
        driver_class([url])


@pytest.mark.parametrize("target", ["server:", "server:port", ":8001", "server:0", "server:65536", "server:8001/"])
def test_target_without_a_valid_host_and_port_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match=r"is no address; give `host:port` with a port from 1 to 65535$"):
        targets_of(target)


@pytest.mark.parametrize("more", [[], ["10.0.0.3:3"]])
def test_member_with_several_addresses_is_refused(more: list[str]) -> None:
    with pytest.raises(ValueError, match=r"has the member .* several addresses"):
        targets_of(["ipv4:10.0.0.1:1,10.0.0.2:2", *more])


@pytest.mark.parametrize("connections", [0, -1, MAX_CONNECTIONS + 1])
def test_number_of_connections_out_of_range_is_refused_with_its_limit(driver_class: Any, connections: int) -> None:
    with pytest.raises(ValueError, match=rf"^connections is {connections}; it must be from 1 to 512: a few for each"):
        driver_class("localhost:8001", connections=connections)


def test_numbers_of_connections_within_the_limits_are_taken() -> None:
    assert [check_connections(number) for number in (1, MAX_CONNECTIONS)] == [1, MAX_CONNECTIONS]
