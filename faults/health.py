"""Checks of a server's health from another process: `python -m faults.health PORT SECONDS`.

A row that sends thousands of calls keeps its interpreter busy, and would measure that. The seconds of each check are
printed as one JSON list.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import urllib.request
from typing import Final

EVERY_S: Final = 0.05


async def checked(port: int, seconds: float) -> list[float]:
    """Ask for `/livez` in another process, 20 times a second. Return the seconds of each answer.

    Raises:
        RuntimeError: a check was not answered within ten seconds, or with an error.
    """
    line = [sys.executable, "-m", "faults.health", str(port), str(seconds)]
    process = await asyncio.create_subprocess_exec(*line, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError("a check of health failed")
    found: list[float] = json.loads(output)
    return found


def _main(port: str, seconds: str) -> None:
    until, took = time.monotonic() + float(seconds), []
    while (begun := time.monotonic()) < until:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/livez", timeout=10) as reply:
            reply.read()
        took.append(time.monotonic() - begun)
        time.sleep(EVERY_S)
    print(json.dumps(took))


if __name__ == "__main__":
    _main(*sys.argv[1:])
