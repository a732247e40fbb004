"""A command in a process of its own, so that a model which brings the runtime down still ends in one sentence."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable

CRASHED = 2
"""The exit code where the model brought the process down: it is refused as any other that does not run."""
_MEMORY_SHARE = 0.9
"""Of the machine's memory: what is left keeps the rest of it alive."""


def run_in_child(command: Callable[[], None]) -> int:
    """Run a command to its end, which may be any, and clean up behind it.

    The child may use most of the machine's memory and no more, so that a model that asks for absurdly much is refused
    it, rather than taking the machine down; its temporary files are removed, however it ends.

    Args:
        command: may end by returning, by `SystemExit` or by any exception, as the program itself would.

    Returns:
        The exit code, `CRASHED` where a signal ended the child.
    """
    if not hasattr(os, "fork"):
        command()
        return 0
    scratch = tempfile.mkdtemp(prefix="attnserve-")
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        child = os.fork()
        if child == 0:
            _bound_memory()
            os.environ["TMPDIR"] = tempfile.tempdir = scratch
            command()
            sys.exit(0)
        return _ended(child)
    finally:
        # In the child, too, where the command has ended with an exception: it has nothing more to write.
        shutil.rmtree(scratch, ignore_errors=True)


def _ended(child: int) -> int:
    """Wait for the child; interrupts reach it as well, and it ends by them in its own time."""
    while True:
        try:
            _, status = os.waitpid(child, 0)
        except KeyboardInterrupt:
            continue
        break
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return code
    if -code in {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}:
        return 128 - code
    why = "ran out of memory, or was killed" if -code == signal.SIGKILL else f"ended by {signal.Signals(-code).name}"
    sys.stderr.write(f"error: the model brought the runtime down: it {why}; no bundle was written\n")
    return CRASHED


def _bound_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # noqa: PLC0415 - there is none on some systems

        limit = int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * _MEMORY_SHARE)
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (limit if hard < 0 else min(limit, hard), hard))
