"""`attnserve-server recommend`: what it measures, its table, its JSON and its exit codes.

Each way to serve a bundle is measured in its own process. A way that does not serve here is listed with the reason.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from attnserve_server.cli import _comparing as command
from attnserve_server.cli._app import app
from attnserve_server.cli._comparing import Comparison, Row, instructions, ways
from attnserve_server.cli._measuring import Answered, Measured, Refused, Way, agreement
from attnserve_server.model.repository import write_bundle
from openvino_here import why_absent
from rich.console import Console
from tiny_bundle import tiny_manifest, write_tiny_files
from typer.testing import CliRunner

HERE = Way(Path("models/tiny/1"), "cpu", "bundle", 1, 2)
ANSWERED = Answered("embedding", (np.array([1.0, 0.0]),), ({0: np.array([[0, 1, 1]])},), "one sequence")


def row(way: Way, sequences_s: float, alone_ms: float, *, same: bool = True, **others: int) -> Row:
    measured = Measured(way, "all-MiniLM/12", "fp32", sequences_s, alone_ms, 2**28, others, ANSWERED)
    return Row(measured, 0.99996, 0.991, same)


def test_first_way_is_the_first_bundle_on_the_cpu_provider() -> None:
    every = ways([Path("a/1"), Path("b/2")], count=8, gpus=0)
    assert (every[0].bundle, every[0].provider, every[0].precision) == (Path("a/1"), "cpu", "bundle")
    layouts = {(way.threads, way.instances) for way in every}
    assert layouts == {(1, 8), (4, 2), (8, 1)}
    assert {(way.provider, way.precision) for way in every} == {
        ("cpu", "bundle"),
        ("openvino", "bundle"),
        ("openvino", "bf16"),
    }
    assert len(every) == 2 * 3 * 3
    assert {way.provider for way in ways([Path("a/1")], count=1, gpus=1)} == {"cpu", "openvino", "cuda"}


def test_one_core_has_one_layout() -> None:
    assert {(way.threads, way.instances) for way in ways([Path("a/1")], count=1, gpus=0)} == {(1, 1)}


def test_flags_are_those_of_serve() -> None:
    assert HERE.flags == "--provider cpu --instances 2"
    rounded = Way(HERE.bundle, "openvino", "bf16", 4, 1)
    assert rounded.flags == "--provider openvino --precision bf16 --instances 1 --intra-op-threads 4"


def test_agreement_is_of_outputs_and_of_strongest_keys() -> None:
    other = Answered("embedding", (np.array([1.0, 1.0]),), ({0: np.array([[0, 1, 2]])},), "")
    cosine, top1 = agreement(other, ANSWERED)
    assert cosine == pytest.approx(0.5**0.5)
    assert top1 == pytest.approx(2 / 3)
    assert agreement(ANSWERED, ANSWERED) == (1.0, 1.0)
    assert agreement(Answered("embedding", ANSWERED.values, ({},), ""), ANSWERED)[1] is None


def test_refusal_of_a_provider_holds_for_all_bundles_and_of_a_precision_for_one() -> None:
    on = Way(Path("a/1"), "openvino", "bundle", 1, 2)
    other = Way(Path("b/1"), "openvino", "bf16", 1, 2)
    missing, bad = Refused(on, "ProviderUnavailable", ""), Refused(on, "GoldenMismatch", "")
    assert command._covers(missing, other)
    assert not command._covers(bad, other)
    assert command._covers(bad, Way(on.bundle, "openvino", "bundle", 2, 1))
    assert not command._covers(missing, HERE)


@pytest.mark.parametrize(
    ("flags", "there"),
    [
        ("fpu avx2", []),
        ("fpu avx_vnni", ["VNNI"]),
        ("amx_tile amx_bf16 avx512_bf16 avx512_vnni", ["AMX", "AVX512_BF16", "VNNI"]),
    ],
)
def test_instructions_are_read_from_the_system(flags: str, there: list[str], tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: X\nflags\t\t: {flags}\n\n")
    assert [name for name, has in instructions(tmp_path / "cpuinfo").items() if has] == there
    assert instructions(tmp_path / "absent") == {}


def test_fastest_rows_are_chosen_apart_from_those_with_other_answers() -> None:
    rows = (row(HERE, 100, 9), row(HERE, 150, 12), row(HERE, 400, 3, same=False))
    found = Comparison(rows, (), {}, 0.0)
    assert (found.fastest(same=True), found.quickest(), found.fastest(same=False)) == (1, 0, 2)
    assert Comparison((), (), {}, 0.0).fastest(same=True) is None


def test_table_is_readable_at_80_columns() -> None:
    way = Way(Path("models/minilm/1"), "openvino", "bf16", 16, 16)
    rows = (row(HERE, 123.4, 10.9), row(way, 12345.6, 123.4, same=False, Attention=6))
    refused = (Refused(way, "PrecisionUnavailable", "precision is bf16, but this processor cannot"),)
    printed = io.StringIO()
    command.show(Comparison(rows, refused, {"AMX": False, "AVX512_BF16": False}, 99.0), Console(file=printed, width=80))
    lines = printed.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    (fast,) = (line for line in lines if line.startswith("2 "))
    assert " ".join(fast.split()) == "2 all-MiniLM/12 openvino fp32 16 x 16 12346 123.4 0.99996 99.10% 256"
    text = " ".join(printed.getvalue().split())
    assert "no AMX, no AVX512_BF16" in text
    assert "has no instructions for bfloat16" in text
    assert "6 Attention run on another provider" in text
    assert "Other work was running here (load 99.0)" in text
    assert "most sequences a second: row 1 --provider cpu --instances 2" in text


@pytest.mark.slow
def test_bundle_is_measured_on_each_provider_that_serves_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "cores", lambda: 1)
    bundle = write_bundle(tmp_path / "models", tiny_manifest(), write_tiny_files(tmp_path))
    done = CliRunner().invoke(app, ["recommend", str(bundle.path), "--seconds", "0.1", "--json"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    first = found["rows"][0]
    assert (first["model"], first["provider"], first["precision"]) == ("tiny/1", "cpu", "fp32")
    assert first["flags"] == "--provider cpu --instances 1"
    assert first["sequences_s"] > 0
    assert first["alone_ms"] > 0
    for measured in found["rows"]:
        # float32 on another provider: sums in another order
        assert measured["cosine"] == pytest.approx(1.0, abs=1e-6)
        assert measured["top1"] > 0.99
    providers = [measured["provider"] for measured in found["rows"]]
    assert providers[:2] == (["cpu"] if why_absent() else ["cpu", "openvino"])
    assert not why_absent() or found["not_measured"][0]["why"] == why_absent()
    assert "tiny on cpu" in done.stderr.replace("/1", "")


@pytest.mark.slow
def test_folder_that_is_no_bundle_is_refused_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "cores", lambda: 1)
    place = tmp_path / "models" / "tiny" / "1"
    place.mkdir(parents=True)
    done = CliRunner().invoke(app, ["recommend", str(place), "--seconds", "0.1"])
    assert done.exit_code == 2
    assert "the folder has no manifest.json" in " ".join(done.stdout.split())
