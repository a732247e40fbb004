"""Runs other people's clients, unmodified, against real servers: `make clients`.

A client is a script, `NAME.py`, and its pins for pip, `NAME.txt`; NAME is not that of its package, which the script
would hide. Each has a separate environment in `.clients/NAME`, because clients exclude each other's releases. It is
made once, and again when the pins change. The script gets `--grpc PORT --http PORT --isolation none|process`, and the
ports of other protocols in the same way. It exits with 0 if all that it checks holds. A client that fails, or takes
longer than `TIME_LIMIT_S`, is printed with its output, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PLACE = ROOT / ".clients"
SERVERS: dict[str, tuple[str, ...]] = {
    "none": ("--isolation", "none", "--admin"),
    "process": ("--isolation", "process", "--fronts", "1", "--admin"),
}
"""Flags of each server that every client calls, by the value of `--isolation`."""
TIME_LIMIT_S = 120.0
START_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one client's script ended against one server. `output`: all that it printed."""

    client: str
    server: str
    passed: bool
    seconds: float
    output: str = ""


def known() -> list[str]:
    """Return the names of all clients."""
    return sorted(path.stem for path in HERE.glob("*.txt"))


def say(text: str) -> None:
    """Print a line of progress, which is no part of the result."""
    print(text, file=sys.stderr, flush=True)


def environment_of(client: str) -> str:
    """Make a client's environment, unless it was made with these pins; return why that failed, or an empty text."""
    place, pins = PLACE / client, (HERE / f"{client}.txt").read_text(encoding="utf-8")
    stamp = place / ".pins"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == pins:
        return ""
    begun = time.monotonic()
    say(f"{client}: installing into .clients/{client}")
    packages = any(line.strip() and not line.startswith("#") for line in pins.splitlines())
    venv.create(place, with_pip=packages, clear=True)
    if not packages:
        stamp.write_text(pins, encoding="utf-8")
        return ""
    pip = [place / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    done = subprocess.run(
        [*pip, "--requirement", HERE / f"{client}.txt"], capture_output=True, text=True, check=False, env=clean()
    )
    if done.returncode:
        return done.stdout + done.stderr
    stamp.write_text(pins, encoding="utf-8")
    say(f"{client}: installed in {time.monotonic() - begun:.0f} s")
    return ""


def clean() -> dict[str, str]:
    """Return the environment's variables for a client, which must not import this project."""
    return {
        name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    }


@contextlib.contextmanager
def servers(folder: Path) -> Iterator[dict[str, dict[str, int]]]:
    """Run the servers on free loopback ports until the block ends; yield the ports of each by protocol."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from served_clients import write_clients_repository  # noqa: PLC0415 - from the folder that was just added

    repository = write_clients_repository(folder / "models", folder)
    program = Path(sys.executable).with_name("attnserve-server")
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, flags in SERVERS.items():
            line = [
                program,
                "serve",
                "--repository",
                repository,
                "--host",
                "127.0.0.1",
                *ports_of(folder / name),
                *flags,
            ]
            with (folder / f"{name}.log").open("wb") as log:
                running[name] = subprocess.Popen(line, stdout=log, stderr=log)
        yield {name: ports_when_ready(process, folder / name) for name, process in running.items()}
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def ports_of(place: Path) -> list[str]:
    """Return the flags that let a server choose its ports and write them to a file."""
    return ["--grpc-port", "0", "--http-port", "0", "--rest-port", "0", "--ports-file", f"{place}.json"]


def ports_when_ready(process: subprocess.Popen[bytes], place: Path) -> dict[str, int]:
    """Return the ports of a server once it has written them. Raises SystemExit, with its log, if it does not."""
    path, until = Path(f"{place}.json"), time.monotonic() + START_TIMEOUT_S
    while not (path.exists() and path.stat().st_size):
        if process.poll() is not None or time.monotonic() > until:
            sys.exit(f"the server did not start:\n{Path(f'{place}.log').read_text(encoding='utf-8')}")
        time.sleep(0.05)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {name: number for name, number in found.items() if isinstance(number, int)}


def run(client: str, server: str, ports: dict[str, int]) -> Outcome:
    """Run one client's script against one server."""
    ports = {name: number for name, number in ports.items() if number}
    arguments = [word for name, number in ports.items() for word in (f"--{name}", str(number))]
    line = [PLACE / client / "bin" / "python", HERE / f"{client}.py", *arguments, "--isolation", server]
    begun = time.monotonic()
    try:
        done = subprocess.run(
            line,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIME_LIMIT_S,
            check=False,
            env=clean(),
        )
        passed, output = done.returncode == 0, done.stdout
    except subprocess.TimeoutExpired as late:
        passed, output = False, f"{late.stdout or ''}\nkilled: it ran over {TIME_LIMIT_S:.0f} s"
    outcome = Outcome(client, server, passed, time.monotonic() - begun, output)
    say(f"{client} against --isolation {server}: {'passed' if passed else 'FAILED'} in {outcome.seconds:.1f} s")
    return outcome


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes as a table, with the output of those that failed below it."""
    rows = [("client", "server", "result", "seconds")]
    rows += [(one.client, one.server, "passed" if one.passed else "FAILED", f"{one.seconds:.1f}") for one in outcomes]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    failed = [f"\n{one.client} against --isolation {one.server}:\n{one.output}" for one in outcomes if not one.passed]
    return "\n".join([*lines, *failed])


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python tests/clients/run.py curl --json",
    )
    parser.add_argument("clients", nargs="*", metavar="NAME", help=f"which to run; default: all ({', '.join(known())})")
    parser.add_argument("--json", action="store_true", help="print the outcomes as JSON")
    arguments = parser.parse_args()
    chosen = arguments.clients or known()
    if unknown := set(chosen) - set(known()):
        parser.error(f"no client {', '.join(sorted(unknown))}; there are {', '.join(known())}")
    with ThreadPoolExecutor(max_workers=4) as pool:
        made = dict(zip(chosen, pool.map(environment_of, chosen), strict=True))
    outcomes = [Outcome(client, "", passed=False, seconds=0.0, output=why) for client, why in made.items() if why]
    with tempfile.TemporaryDirectory() as folder, servers(Path(folder)) as ports:
        ready = [client for client, why in made.items() if not why]
        outcomes += [run(client, server, found) for client in ready for server, found in ports.items()]
    print(json.dumps([asdict(one) for one in outcomes], indent=2) if arguments.json else table(outcomes))
    return 0 if all(one.passed for one in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
