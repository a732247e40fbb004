"""The harness of `make faults` runs a row on a real server, and its oracle finds a server that misbehaves.

Each control is a row whose server leaks, answers late, answers wrongly, or refuses, under the same oracle.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from faults import bundles  # noqa: E402
from faults.lab import Bench, Lab, Plan, Row, Setup, Share, run_row  # noqa: E402
from faults.rows.inputs import of_text  # noqa: E402


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-m", "faults", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_row_prints_one_line_and_writes_its_figures(tmp_path: Path) -> None:
    done = command("--rows", "10,26", "--json", str(tmp_path / "found.json"), "--folder", str(tmp_path / "folder"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 holds" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    names, floods = found["rows"]
    assert (names["row"], names["result"], names["problems"]) == (10, "holds", [])
    assert names["injected"]["names"] > 100
    assert names["measured"]["canary"]["calls"] > 20
    assert (floods["row"], floods["injected"]["pings"] >= 4) == (26, True)


def test_rows_are_listed_and_unknown_ones_refused() -> None:
    listed = command("--list").stdout.splitlines()
    assert [int(line[:2]) for line in listed] == list(range(1, 44))
    unknown = command("--rows", "5,44")
    assert (unknown.returncode, "no row 44" in unknown.stdout) == (2, True)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with Bench(Setup(failpoints=("leak", "unavailable")), Plan(1, True, "none", tmp_path)) as made:
        yield made


@pytest.mark.slow
async def test_oracle_finds_what_a_server_does_wrong(bench: Bench) -> None:
    async def quiet(lab: Lab) -> None:
        await asyncio.sleep(0.2)

    async def leaking(lab: Lab) -> None:
        async with lab.caller("load", "UNAVAILABLE") as wire:
            for _ in range(300):
                await wire.send(of_text(bundles.TINY, "the cat"))

    async def stopping(lab: Lab) -> None:
        lab.server.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(1.0)
        lab.server.process.send_signal(signal.SIGCONT)

    async def refusing(lab: Lab) -> None:
        async with lab.caller("load") as wire:
            await wire.infer(bundles.TINY, "the cat")

    async def uncounted(lab: Lab) -> None:
        lab.caller("load")
        lab.checker.codes["load"] = lab.checker.codes.get("load", type(lab.injected)()) + type(lab.injected)(OK=3)

    async def failing_control(lab: Lab) -> None:
        lab.control(False, "nothing happened")

    loose = Share(0.999, None)  # this machine may be busy: only one control is about time
    found = {}
    for run in (quiet, leaking, stopping, refusing, uncounted, failing_control):
        row = Row(0, run.__name__, bench.setup, run, loose if run is not stopping else Share(0.999, 0.0), memory_mb=8.0)
        found[run.__name__] = (await run_row(row, bench)).problems
    assert found["quiet"] == []
    assert any("memory grew" in one for one in found["leaking"])
    assert any("the canary's p99" in one for one in found["stopping"])
    assert any("status: load#1: UNAVAILABLE" in one for one in found["refusing"])
    assert any("counters" in one for one in found["uncounted"])
    assert found["failing_control"] == ["control: nothing happened"]

    right = bench.service.reference
    bench.service.reference = lambda *key: {name: np.asarray(value) + 1e-2 for name, value in right(*key).items()}
    wrong = await run_row(Row(0, "wrong", bench.setup, quiet, loose), bench)
    assert any(one.startswith("answer: canary#") for one in wrong.problems)
