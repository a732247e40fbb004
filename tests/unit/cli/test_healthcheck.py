"""The health check against a real HTTP server: an orchestrator reads its exit code only.

The fixture `probe` is the server. Its address comes from `--http-port`, or from ATTNSERVE_HOST and ATTNSERVE_HTTP_PORT.
The exit code is 0 if the server is ready, and 1 if it answers otherwise, or does not answer.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import typer
from attnserve_server.cli import serve
from attnserve_server.observability import probe as health
from typer.testing import CliRunner


class _Probe(BaseHTTPRequestHandler):
    status = 200
    asked: tuple[str, ...] = ()

    def do_GET(self) -> None:
        type(self).asked += (self.path,)
        self.send_response(type(self).status)
        self.end_headers()
        self.wfile.write(b"minilm/1 is loading")

    def log_message(self, *args: object) -> None:
        """Log nothing."""


@pytest.fixture
def probe() -> Iterator[tuple[type[_Probe], int]]:
    class Probe(_Probe):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Probe)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield Probe, server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(serve.healthcheck)
    return app


def test_ready_server_gives_exit_code_0(probe: tuple[type[_Probe], int], app: typer.Typer) -> None:
    handler, port = probe
    result = CliRunner().invoke(app, ["--http-port", str(port)])
    assert (result.exit_code, handler.asked) == (0, ("/readyz",))


def test_unready_server_gives_exit_code_1_and_its_reason(probe: tuple[type[_Probe], int], app: typer.Typer) -> None:
    handler, port = probe
    handler.status = 503
    result = CliRunner().invoke(app, ["--http-port", str(port)])
    assert result.exit_code == 1
    assert "/readyz answered 503: minilm/1 is loading" in result.output


def test_closed_port_gives_exit_code_1(probe: tuple[type[_Probe], int], app: typer.Typer) -> None:
    # Port 1 on loopback: no server listens there.
    result = CliRunner().invoke(app, ["--http-port", "1"])
    assert result.exit_code == 1
    assert "no answer from port 1" in result.output


def test_address_comes_from_the_server_s_variables(probe: tuple[type[_Probe], int], app: typer.Typer) -> None:
    _, port = probe
    settings = {"ATTNSERVE_HOST": "0.0.0.0", "ATTNSERVE_HTTP_PORT": str(port)}
    assert CliRunner(env=settings).invoke(app, []).exit_code == 0


@pytest.mark.parametrize(
    ("listens", "asked"),
    [("0.0.0.0", "127.0.0.1"), ("::", "::1"), ("127.0.0.1", "127.0.0.1"), ("10.1.2.3", "10.1.2.3"), ("box", "box")],
)
def test_server_on_all_addresses_is_checked_on_loopback(listens: str, asked: str) -> None:
    assert health.reachable_host(listens) == asked


def test_probe_module_reads_the_address_from_variables(
    probe: tuple[type[_Probe], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    handler, port = probe
    monkeypatch.setenv("ATTNSERVE_HOST", "0.0.0.0")
    monkeypatch.setenv("ATTNSERVE_HTTP_PORT", str(port))
    assert health.main() == 0
    handler.status = 503
    assert health.main() == 1
    assert capsys.readouterr().out == "ready\nnot ready: /readyz answered 503: minilm/1 is loading\n"


def test_probe_module_loads_the_standard_library_only() -> None:
    """It runs every few seconds and shares the server's cores."""
    code = "import sys, attnserve_server.observability.probe; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, env=_bare(), check=True)
    assert set(done.stdout.split()) - sys.stdlib_module_names - {"__main__"} == {"attnserve_server"}


def _bare() -> dict[str, str]:
    return {"PYTHONPATH": str(Path(health.__file__).parents[2])}
