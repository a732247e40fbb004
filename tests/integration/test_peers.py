"""The benchmark against other servers (peers): those that need no installation run, and clients read answers as sent.

Tables fit 80 columns. Needs `bench` of this checkout. Without the package of MiniLM, the test of `minilm_repository`
fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench.peers import variants, wires  # noqa: E402
from bench.peers.install import BARE, PEERS  # noqa: E402
from bench.peers.load import alike, drive, equal  # noqa: E402
from bench.peers.tables import against, show, summed_up  # noqa: E402


def test_attnserve_and_a_plain_grpc_server_give_right_answers(minilm_repository: Path) -> None:
    line = [sys.executable, "-m", "bench.peers", "--only", "grpc.aio,attnserve single"]
    line += ["--repository", str(minilm_repository), "--requests", "40", "--rounds", "1", "--json"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=True, cwd=ROOT)
    report = json.loads(done.stdout)
    figures = {(each["name"], each["form"]): each for each in report["systems"]}
    served = (("attnserve", "fp32"), ("attnserve", "single"), ("grpc.aio by hand", "single"))
    for key in (*served, ("onnxruntime bare", "fp32")):
        assert figures[key]["per_s"] > 0
        assert figures[key]["memory_mb"] > 80  # MiniLM's float32 weights alone
        assert (figures[key]["wrong"], figures[key]["errors"]) == (0, 0)
    assert figures["grpc.aio by hand", "dynamic"]["why_not"] == "it has no batcher"
    assert report["over_mosec"] == []
    assert len(figures) == 5


def _rows(scale: float) -> dict[tuple[str, str], dict[str, Any]]:
    """All systems with figures of a round, which a machine `scale` times as fast gives."""
    forms = [("attnserve", form) for form in ("fp32", "int8", "bf16", "single")]
    forms += [(f"{peer.name} bare", form) for peer in BARE for form in peer.forms]
    forms += [(peer.name, form) for peer in PEERS for form in ("single", "dynamic")]
    rows = {}
    for number, (name, form) in enumerate(forms):
        runs: list[dict[str, Any]] = []
        for turn in range(3):
            rate = scale * (203.4 + turn + 17 * (name == "attnserve") - 2 * number)
            run = {"rate": rate, "server_s": 1 / rate, "memory_mb": 4321.5, "bare_rate": 261 * scale, "bare_s": 0.007}
            if "bare" not in name:
                run |= {"p50_s": 28 / rate, "p99_s": 56 / rate, "client_cores": 0.11, "errors": 0, "wrong": 0}
            runs.append({**run, "round": turn, "first_error": ""})
        rows[name, form] = {"name": name, "form": form, "version": "2026.4.1", "runs": runs}
    return rows


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_tables_of_all_systems_fit_80_columns_and_no_cell_is_cut(scale: float) -> None:
    rows = _rows(scale)
    summary, ratios = summed_up(rows), against(rows)
    printed: dict[int, list[str]] = {}
    for width in (80, 400):
        written = io.StringIO()
        show(Console(file=written, width=width), summary, ratios)
        printed[width] = written.getvalue().split("\n\n")[:4]  # the tables, without the legend
    assert "…" not in "".join(printed[80])
    assert max(len(line) for table in printed[80] for line in table.splitlines()) <= 80
    # The wide console cuts nothing, so every line of a table must be the same in the narrow one.
    assert [_cells(table) for table in printed[80]] == [_cells(table) for table in printed[400]]
    for name, form in rows:
        assert f"{name}, {form}" in printed[80][0]


def _cells(table: str) -> list[list[str]]:
    return [line.split() for line in table.splitlines()]


def test_a_table_with_more_columns_is_cut_at_80() -> None:
    """The control of the test above: its assertions find a cut cell."""
    table = Table(*(f"column {number}" for number in range(12)))
    table.add_row(*["203.4 (203.0 to 204.1)"] * 12)
    written = io.StringIO()
    Console(file=written, width=80).print(table)
    assert "…" in written.getvalue()


def test_ratios_to_mosec_are_of_the_same_round_and_state_whether_the_limit_is_within_noise() -> None:
    def row(name: str, form: str, runs: list[tuple[int, float, float]]) -> dict[str, Any]:
        made = [{"round": turn, "rate": rate, "p99_s": p99} for turn, rate, p99 in runs]
        return {"name": name, "form": form, "version": "1", "runs": made}

    rows = {
        ("attnserve", "fp32"): row("attnserve", "fp32", [(0, 110, 0.5), (1, 240, 0.5), (2, 130, 0.5)]),
        ("mosec", "single"): row("mosec", "single", [(2, 100, 1.0), (0, 100, 0.5), (1, 200, 0.25)]),
    }
    rate, p99 = against(rows)
    assert sorted(rate.values) == pytest.approx([1.1, 1.2, 1.3])
    assert sorted(p99.values) == pytest.approx([0.5, 1.0, 2.0])
    assert (rate.holds, p99.holds) == (True, True)
    written = io.StringIO()
    show(Console(file=written, width=80), [], [rate, p99])
    assert written.getvalue().count("yes, within noise") == 2
    del rows["mosec", "single"]
    assert against(rows) == []


def test_answers_of_another_precision_are_compared_by_their_direction() -> None:
    random = np.random.default_rng(0)
    hidden = random.normal(size=(9, 384)).astype(np.float32)
    rounded = hidden + 0.1 * random.normal(size=hidden.shape).astype(np.float32)
    assert alike(rounded, hidden)
    assert not equal(rounded, hidden)
    # The control: an answer to another sequence, or of another length, is not taken for the right one.
    assert not alike(random.normal(size=hidden.shape).astype(np.float32), hidden)
    assert not alike(hidden[:8], hidden)


def test_bf16_is_absent_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"precision": None, "openvino_options": None}
    monkeypatch.setattr(variants, "Settings", SimpleNamespace(model_fields={}))
    assert "no --provider openvino" in variants.why_no_bf16(variants.BF16_FLAGS)
    monkeypatch.setattr(variants, "Settings", SimpleNamespace(model_fields=fields))
    assert "neither of amx_bf16, avx512_bf16" in variants.why_no_bf16(frozenset({"avx2"}))
    monkeypatch.setattr(variants, "PLUG_IN", "a-package-that-is-not-installed")
    assert "install the extra" in variants.why_no_bf16(frozenset({"amx_bf16"}))
    monkeypatch.setattr(variants, "PLUG_IN", "onnxruntime")
    assert variants.why_no_bf16(frozenset({"amx_bf16"})) == ""


@pytest.mark.parametrize(
    ("answer", "errors", "wrong"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1536\r\n\r\n" + bytes(1536), 0, 0),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n600\r\n" + bytes(1536) + b"\r\n0\r\n\r\n", 0, 0),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\n\r\nno", 4, 0),
        # The control: the answer to another request counts as wrong.
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1536\r\n\r\n" + np.ones(384, "<f4").tobytes(), 0, 1),
    ],
)
async def test_http_client_reads_both_kinds_of_bodies(answer: bytes, errors: int, wrong: int) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n"):
                await reader.readexactly(8)
                writer.write(answer)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        items = [np.array([7], np.int64)] * 4
        references = [np.zeros((1, 384), np.float32)] * 4
        measured = await drive(port, wires.WIRES["http"], items, references, 2, 30.0)
    assert (measured.errors, measured.wrong) == (errors, wrong)


def test_v2_messages_carry_raw_contents() -> None:
    ids = np.arange(300, dtype=np.int64)
    sent = wires.WIRES["v2 dynamic"].request(ids)
    assert sent.endswith(ids.tobytes())
    hidden = np.random.default_rng(0).normal(size=(3, 384)).astype(np.float32)
    answer = b"\x0a\x06minilm" + b"\x22\x00" + b"\x32" + wires._varint(hidden.nbytes) + hidden.tobytes()
    np.testing.assert_array_equal(wires.WIRES["v2"].hidden(answer), hidden)
