"""The canary: a client in a separate process that calls at a steady rate while a fault happens, and records each call.

It is the SDK with its defaults. `Canary` starts and steers the process; `python -m faults.canary` is the process, which
reads `go`, `pause` and the end of file from its standard input, and writes `paused` once no call is open. Beside it,
it writes how late its own timers were: the machine's part of every delay.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from attnserve_client import AsyncClient
from attnserve_client.data_types import Tls

from faults.bundles import CANARY, MAP, texts
from faults.check import percentile
from faults.history import Event, Journal, Recorder, events_of
from faults.sdk import infer

RATE: Final = 50.0
"""Calls a second."""
TIMEOUT_S: Final = 5.0
BUSY_TIMEOUT_S: Final = 20.0
"""The same in a reduced run, whose machine may do other work."""
KINDS: Final = 16
STOP_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Options:
    """What the canary calls. `ca` and `token`: of a server with TLS and tokens; empty: none."""

    targets: tuple[str, ...]
    out: str
    model: str = CANARY
    rate: float = RATE
    timeout_s: float = TIMEOUT_S
    ca: str = ""
    token: str = ""
    seed: int = 0


@dataclass
class Canary:
    """The process of a canary, for the harness."""

    options: Options
    taken: int = 0
    """Bytes of its record that were read."""
    late_s: float = 0.0
    """The 99th percentile of how late its timers were before the last pause."""
    _process: asyncio.subprocess.Process | None = field(default=None, init=False)

    async def start(self) -> None:
        """Start the process, paused."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "faults.canary", json.dumps(asdict(self.options)),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        await self._paused()

    def go(self) -> None:
        """Let it call."""
        self._write(b"go\n")

    async def pause(self) -> list[Event]:
        """Stop its calls, wait until none is open, and return the events since the last pause."""
        self._write(b"pause\n")
        self.late_s = await self._paused()
        return self._events()

    async def stop(self) -> None:
        """End the process."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(STOP_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        self._process = None

    def _write(self, command: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(command)

    async def _paused(self) -> float:
        assert self._process is not None
        assert self._process.stdout is not None
        async with asyncio.timeout(STOP_S + self.options.timeout_s):
            line = await self._process.stdout.readline()
        if not line.startswith(b"paused "):
            raise RuntimeError("the canary ended by itself; its traceback is on standard error")
        return float(line.split()[1])

    def _events(self) -> list[Event]:
        found = list(events_of(Path(self.options.out), self.taken))
        self.taken = Path(self.options.out).stat().st_size
        return found


def keys(seed: int) -> list[str]:
    """Return the inputs that a canary sends in turns; every fourth selects attention."""
    made = texts(np.random.default_rng(seed), KINDS)
    return [MAP + text if at % 4 == 3 else text for at, text in enumerate(made)]


class _Calls:
    """Inside the process: calls at a steady rate. Event loop only."""

    def __init__(self, options: Options, client: AsyncClient, journal: Journal) -> None:
        self._options, self._client, self._journal = options, client, journal
        self._recorder = Recorder(CANARY, journal)
        self._keys = keys(options.seed)
        self._running: set[asyncio.Task[None]] = set()
        self._late_s: list[float] = []
        self.going = asyncio.Event()

    async def send(self) -> None:
        """Call at the times of the rate while `going`, without a hurry after a delay."""
        number = 0
        while True:
            await self.going.wait()
            if not self.going.is_set():
                continue  # it was set and cleared before this task ran
            due = time.monotonic() + 1 / self._options.rate
            task = asyncio.create_task(self._one(self._keys[number % KINDS]))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            number += 1
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            self._late_s.append(time.monotonic() - due)

    async def drained(self) -> float:
        """Wait until no call is open, and write all events. Return how late timers were."""
        self.going.clear()
        while self._running:
            await asyncio.wait(set(self._running))
        self._journal.flush()
        late_s = percentile(self._late_s, 0.99)
        self._late_s.clear()
        return late_s

    async def _one(self, key: str) -> None:
        await infer(self._client, self._recorder, self._options.model, key, self._options.timeout_s)


async def _serve(options: Options) -> None:
    tls = Tls(ca=Path(options.ca)) if options.ca else None
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    gc.freeze()
    async with AsyncClient(list(options.targets), credentials=tls, token=options.token or None) as client:
        with Journal(Path(options.out)) as journal:
            calls = _Calls(options, client, journal)
            sending = asyncio.create_task(calls.send())
            late_s = 0.0
            while True:
                print(f"paused {late_s}", flush=True)
                command = await reader.readline()
                if command == b"go\n":
                    calls.going.set()
                    command = await reader.readline()
                late_s = await calls.drained()
                if not command:
                    break
            sending.cancel()


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("options", help="a JSON object with the fields of `Options`")
    given = json.loads(parser.parse_args().options)
    asyncio.run(_serve(Options(**{**given, "targets": tuple(given["targets"])})))


if __name__ == "__main__":
    main()
