"""A real Prometheus over a server, with the configuration and the rules of deploy/, only faster.

Needs the program `prometheus`. What does not happen in time raises AssertionError, and a refused query urllib's
HTTPError.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import watching
import yaml

START_TIMEOUT_S = 30.0


def free_port() -> int:
    """Return an unused loopback port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(happened: Callable[[], bool], what: Callable[[], str], timeout_s: float) -> None:
    """Poll ten times a second until `happened()`. Raises AssertionError with `what()` after `timeout_s`."""
    until = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < until, f"after {timeout_s:g} s: {what()}"
        time.sleep(0.1)


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus, queried through its HTTP API."""

    url: str

    def get(self, path: str, **parameters: str) -> Any:
        """Return the data of an API answer. AssertionError or urllib's HTTPError if Prometheus reports an error."""
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=10) as reply:
            answer = json.load(reply)
        assert answer["status"] == "success", answer
        return answer["data"]

    def values(self, expr: str) -> list[float]:
        """Return the values of an instant query, without NaN."""
        found = [float(sample["value"][1]) for sample in self.get("query", query=expr)["result"]]
        return [value for value in found if not math.isnan(value)]

    def label_values(self, query: str) -> list[str]:
        """Return the result of Grafana's `label_values(selector, label)`."""
        selector, _, label = query.removeprefix("label_values(").removesuffix(")").rpartition(", ")
        return list(self.get(f"label/{label}/values", **{"match[]": selector}))


@contextlib.contextmanager
def prometheus_over(http_port: int, folder: Path, **scrape: Any) -> Iterator[Prometheus]:
    """Runs Prometheus over a server on loopback until the block ends, scraping and evaluating every second.

    Needs the program `prometheus`. Raises AssertionError with its log if it does not start.

    Args:
        http_port: the server's.
        folder: for its files.
        scrape: further settings of its scrapes, such as the scheme and credentials.
    """
    config = yaml.safe_load(watching.PROMETHEUS_CONFIG.read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(watching.RULES)]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{http_port}"]
    config["scrape_configs"][0] |= scrape
    written, log, port = folder / "prometheus.yml", folder / "prometheus.log", free_port()
    written.write_text(yaml.safe_dump(config))
    command = ["prometheus", f"--config.file={written}", f"--storage.tsdb.path={folder / 'data'}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
    try:
        wait_until(
            lambda: process.poll() is not None or _answers(f"http://127.0.0.1:{port}/-/ready"),
            log.read_text,
            START_TIMEOUT_S,
        )
        assert process.poll() is None, log.read_text()
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False
