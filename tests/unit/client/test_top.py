"""The command `top`: figures between two metrics pages, which a small HTTP server on loopback serves."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from attnserve_client.cli._app import app
from attnserve_client.cli._top import _default_url, parse, quantile, rows_of
from typer.testing import CliRunner

LABELS = 'model="m",version="1"'


def page(sequences: int, waits: tuple[int, int, int], computed: int = 0, padding: int = 0) -> str:
    """A page with so many sequences, and cumulative counts of waits up to 0.1 s, 0.2 s and any."""
    lines = [
        "# HELP attnserve_sequences_total Sequences.",
        f"attnserve_sequences_total{{{LABELS}}} {sequences}.0",
        f"attnserve_queue_depth{{{LABELS}}} 3.0",
        f"attnserve_computed_tokens_total{{{LABELS}}} {computed}",
        f"attnserve_padding_tokens_total{{{LABELS}}} {padding}",
        f'attnserve_attention_bytes_total{{form="dense",{LABELS}}} {1024 * sequences}',
        f'attnserve_attention_bytes_total{{form="windowed",{LABELS}}} {1024 * sequences}',
        f'attnserve_model_state{{{LABELS},state="loading"}} 0.0',
        f'attnserve_model_state{{{LABELS},state="ready"}} 1.0',
    ]
    for name in ("attnserve_queue_seconds", "attnserve_compute_seconds"):
        for bound, count in zip(("0.1", "0.2", "+Inf"), waits, strict=True):
            lines.append(f'{name}_bucket{{le="{bound}",{LABELS}}} {count}.0')
        lines += [f"{name}_count{{{LABELS}}} {waits[-1]}", f"{name}_sum{{{LABELS}}} {0.1 * waits[-1]}"]
    lines += [f"attnserve_batch_size_count{{{LABELS}}} 10", f"attnserve_batch_size_sum{{{LABELS}}} 40"]
    return "\n".join(lines) + "\n"


def test_figures_are_those_between_the_readings() -> None:
    (row,) = rows_of(parse(page(10, (10, 10, 10))), parse(page(30, (20, 30, 30), 100, 25)), 2.0)
    assert (row.model, row.version, row.state, row.queue) == ("m", "1", "ready", 3)
    assert (row.rate, row.padding, row.attention_bytes) == (10.0, 0.25, 20 * 2048 / 2)
    assert row.queue_s == pytest.approx(0.1, abs=1e-12)
    assert row.latency_p50_s == pytest.approx(0.2, abs=1e-12), "10 of 20 waits are up to 0.1 s, twice"
    assert row.batch is None, "no run ended in between"


def test_counters_of_a_server_that_started_again_count_from_zero() -> None:
    (row,) = rows_of(parse(page(30, (30, 30, 30))), parse(page(8, (8, 8, 8))), 4.0)
    assert row.rate == 2.0


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        ((4, 8, 8), 0.5, 0.1),
        ((4, 8, 8), 0.75, 0.15),
        ((0, 0, 8), 0.5, 0.2),
        ((0, 0, 0), 0.5, None),
        ((8, 8, 8), 1, 0.1),
    ],
)
def test_quantile_is_linear_within_its_bucket(counts: tuple[int, ...], share: float, expected: float | None) -> None:
    found = quantile(list(zip((0.1, 0.2, float("inf")), counts, strict=True)), share)
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-12))


def test_labels_are_unescaped_and_other_lines_left_out() -> None:
    found = parse('# TYPE a counter\na{model="x\\"y\\\\z"} 1\nnot a sample\nb 2e3\n')
    assert found == {"a": {(("model", 'x"y\\z'),): 1.0}, "b": {(): 2000.0}}


@pytest.mark.parametrize(
    ("server", "url"),
    [
        ("localhost:8001", "http://localhost:8002/metrics"),
        ("10.0.0.1,10.0.0.2:1", "http://10.0.0.1:8002/metrics"),
        ("dns:///service:8001", "http://service:8002/metrics"),
        ("[::1]:8001", "http://[::1]:8002/metrics"),
    ],
)
def test_page_is_on_port_8002_of_the_first_server(server: str, url: str) -> None:
    assert _default_url(server, encrypted=False) == url
    assert _default_url(server, encrypted=True).startswith("https://")


class Pages(BaseHTTPRequestHandler):
    answers: list[tuple[int, str]]
    tokens: list[str]

    def do_GET(self) -> None:
        self.tokens.append(self.headers.get("Authorization", ""))
        code, text = self.answers.pop(0)
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def pages() -> Iterator[tuple[str, type[Pages]]]:
    handler = type("Handler", (Pages,), {"answers": [], "tokens": []})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/metrics", handler
        server.shutdown()
        thread.join()


def run(*line: str) -> Any:
    return CliRunner().invoke(app, [*line], env={"COLUMNS": "100"})


def test_top_prints_one_interval_as_a_table_and_as_json(pages: tuple[str, type[Pages]]) -> None:
    url, handler = pages
    handler.answers += [(200, page(10, (5, 5, 5))), (200, page(20, (9, 9, 9), 10, 1))] * 2
    shown = run("--token", "secret", "top", "--metrics", url, "--once", "--interval", "0.1")
    assert shown.exit_code == 0, shown.output
    assert "m 1" in shown.stdout
    assert "10%" in shown.stdout
    assert handler.tokens == ["Bearer secret"] * 2
    found = json.loads(run("top", "--metrics", url, "--once", "--interval", "0.1", "--json").stdout)
    assert found["models"][0]["padding"] == 0.1
    assert found["models"][0]["rate"] == pytest.approx(10 / found["seconds"], rel=1e-9)


@pytest.mark.parametrize(("status", "code"), [(401, 13), (403, 14), (404, 8)])
def test_page_that_is_refused_ends_with_its_exit_code(pages: tuple[str, type[Pages]], status: int, code: int) -> None:
    url, handler = pages
    handler.answers.append((status, ""))
    failed = run("top", "--metrics", url, "--once")
    assert failed.exit_code == code
    assert f"answers {status}" in failed.stderr


def test_missing_page_names_the_option() -> None:
    failed = run("top", "--metrics", "http://127.0.0.1:1/metrics", "--once")
    assert failed.exit_code == 8
    assert "cannot read http://127.0.0.1:1/metrics" in failed.stderr
    assert run("top", "--metrics", "file:///etc/passwd", "--once").exit_code == 2
