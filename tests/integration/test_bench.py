"""The benchmark runs, and its figures that do not depend on time are right. Failed processes are reported, and all end.

Needs `bench` of this checkout and torch. Tests of `minilm_repository`, a bundle of MiniLM, fail without its package. A
limit on time that is exceeded fails no test.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from attnserve_server.domain.machine import cores
from onnx import TensorProto

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench import calls, echo, feeding, fronts, service  # noqa: E402
from bench.encoders import encoder  # noqa: E402
from bench.finding import Finding  # noqa: E402
from bench.gpu import chosen_of, kinds_of, outputs_of  # noqa: E402
from bench.memory import leaking, load  # noqa: E402


def test_small_answers_have_a_fraction_of_the_bytes_of_all_maps(minilm_repository: Path) -> None:
    line = [sys.executable, "-m", "bench.run", "--repository", str(minilm_repository)]
    line += ["--rounds", "1", "--sequences", "24", "--json"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    # One short round is too noisy for the limit on the tap's cost; only `make bench` may fail by a time.
    assert done.returncode == 0 or "unused taps take" in done.stderr, done.stderr
    report = json.loads(done.stdout[done.stdout.index("{") :])
    wire = report["bytes_on_wire"]
    all_maps = 6 * 12 * 128 * 128 * 4
    assert all_maps < wire["all maps"] < all_maps * 1.01
    assert wire["no attention"] < wire["top-16 links of one row"] < wire["one layer's mean"] < wire["all maps"] / 50


@pytest.fixture(scope="module")
def null_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The identity of 128 ids, as the bundle `null`."""
    folder = tmp_path_factory.mktemp("null")
    echo.write_identity(folder, "null", ("ids", "same"), TensorProto.INT64, ["batch", calls.IDS])
    return folder


def test_an_engine_is_measured_with_all_of_its_requests_answered(null_repository: Path) -> None:
    found = feeding.measure(null_repository, "null", 2000)
    assert 0 < found["main thread"] <= found["all"]


def test_each_process_of_a_server_is_measured(null_repository: Path) -> None:
    with service.running(null_repository, "--isolation", "process", "--fronts", "2") as server:
        assert sorted(role for role, _ in server.processes()) == ["engine", "front", "front", "main"]
        by_role = server.cpu_by_role()
        assert all(seconds > 0 for seconds in by_role.values())
        assert len(server.resident_mb()) == 4


@pytest.mark.skipif(cores() < fronts.LEAST_CORES, reason=f"two fronts need {fronts.LEAST_CORES} cores")
def test_two_fronts_answer_more_than_one() -> None:
    assert fronts.measure(1, 4000).median > 1.2  # the benchmark has the limit; a test may share its machine


def test_findings_are_printed_with_their_limits(minilm_repository: Path) -> None:
    line = [sys.executable, "-m", "bench.acceptance", "--repository", str(minilm_repository), "--only", "saturated"]
    done = subprocess.run(
        [*line, "--rounds", "1", "--requests", "48", "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
    )
    # A limit may be exceeded here, because so short a run on a shared machine is not a benchmark.
    assert done.returncode in (0, 1), done.stderr
    findings = {finding["what"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert len(findings) == 4
    computed = findings["64 callers: computed / useful tokens"]
    assert computed["holds"]
    assert 1.0 <= computed["median"] <= 1.1


def test_control_of_the_memory_bench_leaks(minilm_repository: Path) -> None:
    """The server keeps forty copies of each request: 11 MB for 800 requests."""
    with leaking(minilm_repository) as server:
        load(server, 200)
        before = sum(server.resident_mb().values())
        load(server, 800)
        assert sum(server.resident_mb().values()) - before > 6.0


def test_floor_of_a_call_is_printed_for_few_and_many_callers() -> None:
    line = [sys.executable, "-m", "bench.floor", "--calls", "70"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    rows = [line.split("│")[1:-1] for line in done.stdout.splitlines() if line.startswith("│")]
    assert [int(row[0]) for row in rows] == [1, 64]
    assert all(float(latency) > 0 and float(rate) > 0 for _, _, latency, rate in rows)


def test_two_checkouts_are_compared_round_by_round(minilm_repository: Path) -> None:
    """The base is this checkout, too, so that the servers answer alike."""
    line = [sys.executable, "-m", "bench.against", str(ROOT), "--repository", str(minilm_repository)]
    line += ["--rounds", "2", "--requests", "6", "--callers", "2", "--json"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["rounds"]) == {"base", "this"}
    first, base = found["rounds"]["this"][0], found["rounds"]["base"][0]
    assert found["over_base"]["this"]["p50_ms"][0] == first["p50_ms"] / base["p50_ms"]
    assert first["p50_ms"] < 2_000 * 2 / first["per_s"]


def test_random_encoder_has_the_size_and_layers_alike() -> None:
    model = encoder("minilm")
    first, *others = [layer.attention.self.query.weight for layer in model.encoder.layer]
    assert first.shape == (384, 384)
    assert len(others) == 5
    assert all(bool((first == other).all()) for other in others)
    assert 0.01 < first.std().item() < 0.03


def test_finding_holds_by_its_median_and_its_kind_of_limit() -> None:
    assert Finding("", [1.0, 9.0, 2.0], 2.0).holds
    assert not Finding("", [3.0, 1.0, 9.0], 2.0).holds
    assert Finding("", [3.0, 1.0, 2.0], 2.0, most=False).holds
    assert not Finding("", [1.0], 2.0, most=False).holds


def test_server_that_ends_at_once_is_reported_with_its_code(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    with pytest.raises(SystemExit, match="ended with code 3"), service.started(command, tmp_path, tmp_path):
        pass


def test_server_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "STOP_TIMEOUT_S", 0.2)
    code = (
        "import pathlib, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "path = pathlib.Path(sys.argv[sys.argv.index('--ports-file') + 1]); new = path.with_suffix('.new'); "
        """new.write_text('{"grpc": 1, "http": 2}'); new.rename(path); time.sleep(60)"""
    )
    with (
        pytest.raises(subprocess.TimeoutExpired),
        service.started([sys.executable, "-c", code], tmp_path, tmp_path) as server,
    ):
        assert server.target == "127.0.0.1:1"
    assert not psutil.pid_exists(server.process.pid)


def test_callers_are_divided_among_processes_without_a_loss() -> None:
    assert kinds_of("10", 4) == ["3", "3", "2", "2"]
    assert kinds_of("2", 4) == ["1", "1"]
    assert kinds_of("stream", 2) == ["stream", "stream"]


def test_failed_process_of_callers_is_reported_with_its_errors() -> None:
    assert outputs_of([[sys.executable, "-c", f"print({number})"] for number in (1, 2)], 30.0) == ["1\n", "2\n"]
    lines = [[sys.executable, "-c", "import time; time.sleep(60)"], [sys.executable, "-c", "raise ValueError('no')"]]
    with pytest.raises(SystemExit, match=r"code 1: (.|\n)*ValueError: no"):
        outputs_of(lines, 30.0)
    with pytest.raises(SystemExit, match=r"did not end within 0\.2 s"):
        outputs_of(lines[:1], 0.2)


def test_gpu_bench_measures_the_highest_version_of_a_model() -> None:
    bundles: list[Any] = [
        SimpleNamespace(manifest=SimpleNamespace(name=name, version=version))
        for name, version in (("a", "1"), ("b", "9"), ("b", "10"))
    ]
    versions = [(each.manifest.name, each.manifest.version) for each in chosen_of(bundles, None)]
    assert versions == [("a", "1"), ("b", "10")]
    assert chosen_of(bundles, ["b"]) == bundles[2:]
    assert chosen_of(bundles, ["c"]) == []
