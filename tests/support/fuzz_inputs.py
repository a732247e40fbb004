"""Mutated inputs against every reader of foreign bytes: `make fuzz-short`, and `make fuzz` for longer.

The targets are requests, an engine's messages, manifests, tokenizers and ONNX files (`fuzz_targets`). For each input:
only declared exceptions, the same answer from both readers of requests, and memory and time within bounds. Prints
progress and, for each failure, the command that repeats it. Exit code 1 where something fails.

Inputs are read by worker processes. Native code of others, which parses ONNX files and tokenizers, can end one. That is
counted and fails no run, because the commands that read such files do so in a child process. An input follows from its
target, seed and number, so that no file is kept.

    python tests/support/fuzz_inputs.py --counts requests=20000,models=2000
    python tests/support/fuzz_inputs.py --seconds 600 --seed 7
    python tests/support/fuzz_inputs.py --one requests:7:1234
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import secrets
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

COUNTS = {"requests": 20_000, "engine": 4_000, "manifests": 2_000, "tokenizers": 1_000, "models": 2_000}
"""Inputs of `make fuzz-short`."""
CHUNK = 2500
"""Inputs of one worker, which takes two seconds to start; a thousand requests take two."""
MEMORY_BASE, MEMORY_FACTOR = 48 * 2**20, 64
"""An input may take this much resident memory, and this many times its size."""
MOST_S = 5.0
"""Processor time that one input may take. The usual is a millisecond."""
ADDRESS_SPACE = 8 * 2**30


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@dataclass
class Results:
    """What was found, over all workers."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)

    def add(self, target: str, outcome: str, count: int = 1) -> None:
        with self.lock:
            self.outcomes.setdefault(target, Counter())[outcome] += count

    def fail(self, what: str) -> None:
        with self.lock:
            self.failures.append(what)
            say(what)


def peak_of(made: bytes, target: object) -> tuple[str, int, float]:
    """Read an input. Return its outcome, the growth of resident memory at its peak, and the processor time."""
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins again at the resident memory
    before, begun = memory("VmRSS"), time.process_time()
    outcome = target.outcome(made)  # type: ignore[attr-defined]
    return outcome, memory("VmHWM") - before, time.process_time() - begun


def memory(name: str) -> int:
    """Return a value of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def read_one(name: str, target: object, seed: int, number: int) -> dict[str, object]:
    """Make and read one input; the result has the outcome, or the failure."""
    made = target.make(random.Random(f"{name}:{seed}:{number}"))  # type: ignore[attr-defined]
    try:
        outcome, peak, seconds = peak_of(made, target)
        excess = peak > MEMORY_BASE + MEMORY_FACTOR * len(made) or seconds > MOST_S
        assert not excess, f"{peak / 2**20:.0f} MiB and {seconds:.1f} s for an input of {len(made)} bytes"
    except BaseException as error:  # noqa: BLE001 - what pyo3 raises for a panic is no Exception
        where = "".join(traceback.format_exception(error)[-4:])
        return {"number": number, "failure": f"{type(error).__name__}: {error}", "where": where}
    return {"number": number, "outcome": outcome}


async def work(name: str, seed: int, first: int, last: int, place: str) -> None:
    """Read a range of inputs; the number of the one in progress is in a file, for the parent of a crashed worker."""
    from fuzz_targets import TARGETS  # noqa: PLC0415 - the parent needs no library

    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    target = TARGETS[name]()
    read_one(name, target, seed, -1)  # imports and caches grow at the first input
    counts: Counter[str] = Counter()
    with Path(place).open("wb", buffering=0) as file:  # noqa: ASYNC230 - nothing else runs in this loop
        for number in range(first, last):
            file.seek(0)
            file.write(number.to_bytes(8, "little"))
            found = read_one(name, target, seed, number)
            await asyncio.sleep(0)  # callbacks of released arrays
            if "failure" in found:
                say(json.dumps(found))
            else:
                counts[str(found["outcome"])] += 1
    say(json.dumps({"counts": counts}))


def run_chunk(name: str, seed: int, first: int, last: int, results: Results) -> None:
    """Run a range of inputs in a worker; after a crash, go on behind the input that caused it."""
    quiet = {**os.environ, "RUST_BACKTRACE": "0"}  # a backtrace of a panic takes 50 MB
    while first < last:
        with tempfile.NamedTemporaryFile() as place:
            line = [sys.executable, __file__, "--work", f"{name}:{seed}:{first}:{last}:{place.name}"]
            done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=900, env=quiet)
            at = int.from_bytes(Path(place.name).read_bytes()[:8], "little")
        for text in done.stdout.splitlines():
            found = json.loads(text)
            for outcome, count in found.get("counts", {}).items():
                results.add(name, outcome, count)
            if "failure" in found:
                again = f"--one {name}:{seed}:{found['number']}"
                results.fail(f"FAILURE {name}: {found['failure']}\n{found['where']}  repeat: {again}")
        if done.returncode == 0:
            return
        if not at:
            results.fail(f"FAILURE {name}: the worker did not start\n{done.stderr[-2000:]}")
            return
        if name in {"models", "tokenizers"} and done.returncode < 0:
            results.add(name, f"native code ended by signal {-done.returncode}")
            say(f"native code ended: --one {name}:{seed}:{at}")
        else:
            results.fail(f"FAILURE {name}: the process ended with {done.returncode}: --one {name}:{seed}:{at}")
        first = at + 1


def chunks(counts: dict[str, int]) -> Iterator[tuple[str, int, int]]:
    """Yield ranges of each target, those of slow targets first."""
    for name in reversed(counts):
        for first in range(1, counts[name] + 1, CHUNK):
            yield name, first, min(first + CHUNK, counts[name] + 1)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--counts", default="", help="inputs by target, as requests=100,models=50; default: fuzz-short's"
    )
    parser.add_argument("--seconds", type=float, default=0, help="repeat with further seeds for this long; 0: once")
    parser.add_argument(
        "--seed", type=int, default=None, help="of the first round; the others follow by one; default: random"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print the counts as JSON at the end")
    parser.add_argument("--one", default="", help="TARGET:SEED:NUMBER: read one input in this process")
    parser.add_argument("--work", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        name, seed, first, last, place = options.work.split(":", 4)
        asyncio.run(work(name, int(seed), int(first), int(last), place))
        return
    if options.one:
        name, seed, number = options.one.split(":")
        asyncio.run(one(name, int(seed), int(number)))
        return
    counts = COUNTS
    if options.counts:
        counts = {name: int(count) for name, _, count in (part.partition("=") for part in options.counts.split(","))}
    results, begun, seed = Results(), time.monotonic(), options.seed
    seed = secrets.randbelow(10**6) if seed is None else seed
    while True:
        say(f"seed {seed}: {', '.join(f'{count} {name}' for name, count in counts.items())}")
        parts = list(chunks(counts))
        with ThreadPoolExecutor(options.workers) as pool:
            runs = [pool.submit(run_chunk, name, seed, first, last, results) for name, first, last in parts]
            for done, run in enumerate(as_completed(runs), 1):
                run.result()
                say(f"  part {done} of {len(parts)}, {time.monotonic() - begun:.0f} s")
        elapsed = time.monotonic() - begun
        say(f"{elapsed:.0f} s, {len(results.failures)} failures")
        seed += 1
        if elapsed >= options.seconds:
            break
    if options.json:
        say(json.dumps({"seconds": round(elapsed, 1), "failures": len(results.failures), "outcomes": results.outcomes}))
    else:
        for name, found in sorted(results.outcomes.items()):
            say(f"{name}: {', '.join(f'{count} {outcome}' for outcome, count in found.most_common(12))}")
    sys.exit(bool(results.failures))


async def one(name: str, seed: int, number: int) -> None:
    """Read one input, and print it and its outcome."""
    from fuzz_targets import TARGETS  # noqa: PLC0415 - as above

    target = TARGETS[name]()
    made = target.make(random.Random(f"{name}:{seed}:{number}"))
    say(repr(made[:4000]))
    say(target.outcome(made))


if __name__ == "__main__":
    main()
