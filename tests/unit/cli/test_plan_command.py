"""`attnserve-server plan`: the file of traffic, the table, the JSON with values of the chart, and the exit codes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import typer
from attnserve_server.cli._app import app
from attnserve_server.cli._planning import Traffic, planned, read_traffic, show
from attnserve_server.model.repository import Repository
from rich.console import Console
from tiny_bundle import write_tiny_files, write_tiny_repository
from typer.testing import CliRunner

GOOD = "rate: 50\nlengths: {min: 4, p50: 8, max: 24}\n"


def file_of(folder: Path, text: str) -> Path:
    path = folder / "traffic.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Repository(write_tiny_repository(tmp_path / "models", write_tiny_files(tmp_path))).bundle("tiny", "1").path


def test_defaults_are_stated_in_the_help_and_hold(tmp_path: Path) -> None:
    found = read_traffic(file_of(tmp_path, GOOD))
    assert (found.attention, found.p99_ms, found.load, found.spare) == (0.0, None, 0.6, 1)
    assert found.quantiles(32) == {0.0: 4, 0.5: 8, 1.0: 24}


def test_shortest_and_longest_are_those_of_the_model_where_they_are_left_out() -> None:
    assert Traffic(rate=1, lengths={"p99.9": 20}).quantiles(32) == {0.0: 1, 0.999: 20, 1.0: 32}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rate: 0\nlengths: {p50: 8}\n", ["rate: "]),
        ("lengths: {p50: 8}\nattention: 2\n", ["rate: ", "attention: "]),
        ("rate: 1\nlengths: {p50: 8, p90: 4}\n", ["lengths fall", "[1, 8, 4"]),
        ("rate: 1\nlengths: {median: 8}\n", ["lengths.median", "name a quantile"]),
        ("rate: 1\nlengths: {}\n", ["lengths is empty"]),
        ("rate: 1\nlengths: {p50: 8}\nrates: 1\n", ["rates: "]),
        ("rate: [\n", ["traffic.yaml is no YAML"]),
        ("- 1\n", ["file: "]),
    ],
)
def test_wrong_traffic_is_refused_with_every_fault(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(typer.BadParameter) as refused:
        read_traffic(file_of(tmp_path, text))
    assert [word for word in words if word not in str(refused.value)] == []


@pytest.mark.slow
def test_plan_of_a_bundle_is_consistent_and_readable(tmp_path: Path, bundle: Path) -> None:
    def invoked(text: str, *flags: str) -> Any:
        line = ["plan", str(bundle), "--traffic", str(file_of(tmp_path, text)), "--instances", "2", *flags]
        return CliRunner().invoke(app, line)

    done = invoked(GOOD + "attention: 0.5\nspare: 2\n", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["replicas"] == found["needed_for_load"] + 2
    assert found["load_of_peak"] == pytest.approx(50 / found["replicas"] / found["peak_rate"], abs=1e-3)
    assert 0 < found["expected"]["p50_ms"] <= found["expected"]["p99_ms"]
    values = found["values"]
    assert values["settings"]["instances"] == 2
    assert int(values["resources"]["limits"]["memory"].removesuffix("Mi")) >= found["memory"]["total_mib"]

    refused = invoked(GOOD + "p99_ms: 0.001\n")
    assert refused.exit_code == 2
    assert "p99_ms is 0.001" in " ".join(refused.output.split())

    many = invoked("rate: 1000000\nlengths: {p50: 32}\nload: 0.5\nspare: 0\n", "--json")
    assert json.loads(many.stdout)["replicas"] > 50


@pytest.mark.slow
def test_table_is_readable_at_80_columns(bundle: Path) -> None:
    steps: list[str] = []
    found = planned(bundle, Traffic(rate=123456, lengths={"p50": 8}, spare=3), 2, steps.append)
    printed = io.StringIO()
    show(found, Console(file=printed, width=80))
    lines = printed.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert any("that may fail" in line for line in lines)
    assert steps


def test_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["plan", str(tmp_path), "--traffic", str(file_of(tmp_path, GOOD))])
    assert done.exit_code == 2
    assert "the folder has no manifest.json" in " ".join(done.output.split())
