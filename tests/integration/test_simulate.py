"""The policy, simulated over recorded costs: it forms small batches on a processor and large ones on a GPU.

The policy chooses which pending sequences share a run. `bench.simulate` runs it over costs of runs recorded on each
device; no GPU is needed. Its figures count only runs that ended.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench.simulate import FirstCome, simulate  # noqa: E402

SERVER = "this server"


@pytest.fixture(scope="module")
def devices() -> dict[str, Any]:
    line = [sys.executable, "-m", "bench.simulate", "--rounds", "12", "--json"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=True, cwd=ROOT)
    return dict(json.loads(done.stdout))


def over_sorted(device: dict[str, Any], policy: str) -> list[float]:
    return [figures["busy_s"] / device["sorted_s"] for figures in device["policies"][policy].values()]


def test_longer_queue_makes_runs_cheaper_and_never_dearer(devices: dict[str, Any]) -> None:
    for device in devices.values():
        costs = over_sorted(device, SERVER)
        assert costs == sorted(costs, reverse=True)
    # The control: first come, first served wastes as much at any length of the queue, or more.
    first_come = over_sorted(devices["cpu-minilm-fp32"], "first come, 5 ms delay")
    assert first_come[-1] > first_come[0]


def test_small_tight_batches_on_a_processor(devices: dict[str, Any]) -> None:
    device = devices["cpu-minilm-fp32"]
    figures = device["policies"][SERVER]["64"]
    assert figures["busy_s"] <= 1.1 * device["sorted_s"]
    assert figures["computed_over_useful"] <= 1.1
    assert figures["rows"] < 8
    assert figures["p99_s"] <= 1.5 * device["policies"]["one at a time"]["64"]["p99_s"]


def test_large_batches_where_launches_dominate(devices: dict[str, Any]) -> None:
    for name in ("h200-minilm-fp32", "h200-minilm-fp16"):
        figures = devices[name]["policies"]
        assert figures[SERVER]["256"]["rows"] > 32
        for other in figures:
            if other != SERVER:
                assert figures[SERVER]["256"]["rate"] > figures[other]["256"]["rate"]
        # Few callers leave little to choose from, so the policy is about as good as first come, first served.
        assert figures[SERVER]["16"]["rate"] > 0.9 * figures["first come, 16,384 tokens"]["16"]["rate"]


def test_only_runs_that_ended_are_counted() -> None:
    costs: Any = SimpleNamespace(instances=2, seconds=lambda _size, tokens: tokens / 8)
    # The last answers come while the other instance still runs a long sequence.
    figures = simulate(FirstCome(1, 0.0), costs, [8, 8, 8, 80], callers=2, rounds=2)
    assert (figures.busy_s, figures.rows, figures.computed_over_useful) == (1.0, 1.0, 1.0)


def test_single_round_is_refused() -> None:
    line = [sys.executable, "-m", "bench.simulate", "--rounds", "1"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert "--rounds is 1; give 2 or more" in done.stderr
