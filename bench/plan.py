"""Compare a plan of `attnserve-server plan` with a real server: its peak, and its latency at the planned load.

python -m bench.plan --repository .demo/models [--rounds 5] [--seconds 20] [--json]

One server serves MiniLM on this machine. Rounds alternate between a closed loop of 64 callers, which finds the peak,
and Poisson arrivals at 60 % of the planned peak. Ratios are of medians over the rounds. The client takes processor time
from the server, on the same cores, and so does any other work: the plan rests on costs that are measured just before.
Exit code 1 if a ratio of the peak or of the median latency is off by more than a quarter, 2 for fewer than one round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from attnserve_server.cli._planning import Traffic, planned

from bench.service import running

QUANTILES = {"min": 4, "p10": 11, "p25": 19, "p50": 32, "p75": 55, "p90": 89, "p99": 206, "max": 256}
"""Of the lengths that `attnserve bench` sends by default, which are lognormal."""
LOAD = 0.6
LIMIT = 0.25
INSTANCES = 2


def bench(target: str, *flags: str) -> dict[str, Any]:
    """Return the report of one run of `attnserve bench`."""
    command = [
        str(Path(sys.executable).with_name("attnserve")),
        "bench",
        "minilm",
        "--server",
        target,
        "--json",
        *flags,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.stdout:
        sys.exit(done.stderr)
    return dict(json.loads(done.stdout))


def measured(repository: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """Return planned and measured figures, and their ratios."""
    bundle = max(
        (path.parent for path in (repository / "minilm").glob("*/manifest.json")), key=lambda path: int(path.name)
    )
    traffic = Traffic(rate=1, lengths=QUANTILES, spare=0, load=LOAD)
    first = planned(bundle, traffic, INSTANCES, lambda _: None)
    rate = LOAD * first.peak_rate
    plan = planned(bundle, traffic.model_copy(update={"rate": rate, "load": 0.95}), INSTANCES, lambda _: None).as_json()
    peaks, open_loops = [], []
    with running(repository, "--isolation", "none", "--instances", str(INSTANCES), "--models", "minilm") as server:
        for _ in range(rounds):
            peaks.append(bench(server.target, "--duration", f"{seconds:g}"))
            open_loops.append(bench(server.target, "--rate", f"{rate:.3f}", "--duration", f"{seconds:g}"))
    real = {
        "peak_rate": statistics.median(one["sequences_per_s"] for one in peaks),
        "p50_ms": 1e3 * statistics.median(one["latency_s"]["p50"] for one in open_loops),
        "p99_ms": 1e3 * statistics.median(one["latency_s"]["p99"] for one in open_loops),
    }
    predicted = {"peak_rate": plan["peak_rate"], **{name: plan["expected"][name] for name in ("p50_ms", "p99_ms")}}
    return {
        "rounds": rounds,
        "rate": rate,
        "load_average": os.getloadavg()[0],
        "invalid": sorted({why for one in (*peaks, *open_loops) for why in one["invalid"]}),
        "planned": predicted,
        "measured": real,
        "planned_over_measured": {name: predicted[name] / real[name] for name in real},
    }


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Compare a plan with a real server.")
    parser.add_argument("--repository", type=Path, default=Path(".demo/models"), help="where MiniLM is")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; give 1 or more")
    found = measured(options.repository, options.rounds, options.seconds)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print(
            f"{found['rate']:.1f} sequences/s, medians of {found['rounds']}; load average {found['load_average']:.1f}"
        )
        for name, ratio in found["planned_over_measured"].items():
            planned_one, real = found["planned"][name], found["measured"][name]
            print(f"{name:10} planned {planned_one:8.1f}  measured {real:8.1f}  ({ratio:.2f})")
        for why in found["invalid"]:
            print(f"invalid: {why}")
    ratios = found["planned_over_measured"]
    return int(any(abs(ratios[name] - 1) > LIMIT for name in ("peak_rate", "p50_ms")))


if __name__ == "__main__":
    sys.exit(main())
