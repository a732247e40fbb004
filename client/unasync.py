"""Generates the client for threads, attnserve_client/_sync, from the client for asyncio, attnserve_client/_async.

python client/unasync.py [--check]

`--check` changes nothing, and exits with 1 if a generated file is out of date. A rule that matches nowhere raises
ValueError. Needs ruff, and raises `subprocess.CalledProcessError` where it fails.

The library unasync does the same for code alone: docstrings and comments would still describe the asyncio client.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent / "attnserve_client"
NOTE = "# Generated from _async/{name} by client/unasync.py: change that file, then run `make client`.\n"

# Applied in this order to the whole text, docstrings included. Each must match somewhere in `_async`.
RULES = (
    # Sentences that differ between the two clients.
    (
        r"for asyncio\. It belongs to the event loop of its first call\. Use `async with`, or await `close`\.",
        "for threads. Any number of threads may share it. Use `with`, or call `close`.",
    ),
    (r"Cancelling a task cancels its request on the server\.", "`close` cancels the running requests of all threads."),
    (
        r"An async iterable, or an iterable that does not block the event loop\.",
        "A separate thread iterates over them.",
    ),
    (r"client for asyncio", "client for threads"),
    # Names and keywords.
    (r"\b_async\.", "_sync."),
    (r"\basync (?=def|with|for)", ""),
    (r"\bawait ", ""),
    (r"\b__a(?=(?:enter|exit)__)", "__"),
    (r"\bAsync(?=[A-Z])", ""),
    (r"\basyncio\b", "time"),
)


def generate(sources: dict[str, str]) -> dict[str, str]:
    """Return the text of each generated file by name.

    Args:
        sources: Texts of the written files by name.

    Raises:
        ValueError: A rule matches in no file.
    """
    unused = [pattern for pattern, _ in RULES if not any(re.search(pattern, text) for text in sources.values())]
    if unused:
        raise ValueError(f"rules that match nowhere in _async; fix or remove them: {', '.join(unused)}")
    return {name: formatted(NOTE.format(name=name) + convert(text)) for name, text in sources.items()}


def convert(text: str) -> str:
    """Apply all rules to one text."""
    for pattern, replacement in RULES:
        text = re.sub(pattern, replacement, text)
    return text


def formatted(source: str) -> str:
    """Return source code as `make format` leaves it: shorter lines may join, and imports change places."""
    for line in (["check", "--select", "I", "--fix", "--quiet"], ["format", "--quiet"]):
        command = [sys.executable, "-m", "ruff", *line, "--stdin-filename", str(PACKAGE / "_sync" / "client.py"), "-"]
        done = subprocess.run(command, input=source, capture_output=True, text=True, check=True)  # noqa: S603 - ruff itself
        source = done.stdout
    return source


def read(folder: Path) -> dict[str, str]:
    """Return the texts of a folder's modules by name, except that of `__init__.py`."""
    return {
        path.name: path.read_text(encoding="utf-8")
        for path in sorted(folder.glob("*.py"))
        if path.name != "__init__.py"
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a file differs from its source")
    checking = parser.parse_args().check
    fresh, present = generate(read(PACKAGE / "_async")), read(PACKAGE / "_sync")
    stale = sorted(name for name in fresh.keys() | present.keys() if fresh.get(name) != present.get(name))
    if checking and stale:
        sys.exit(f"_sync differs from what _async generates, run `make client`: {', '.join(stale)}")
    for name in stale:
        path = PACKAGE / "_sync" / name
        if name in fresh:
            path.write_text(fresh[name], encoding="utf-8")
        else:
            path.unlink()


if __name__ == "__main__":
    main()
