"""Limits of memory for processes that load and run models: of the trial of a bundle, and of an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from attnserve_server.domain.machine import memory_bytes, resident_bytes

LEAST_BYTES: Final = 2**30
"""Memory of a trial beside that for the files: the interpreter with the runtime takes 80 MB, runs take the rest."""
PER_FILE_BYTE: Final = 6
"""Copies of weights while they load: the file, the tensors, those in another precision, those packed for kernels."""


class MemoryLimit:
    """Whether the memory of a process has passed a limit, from looks at it."""

    def __init__(self, pid: int, limit_bytes: int, measure: Callable[[int], int], every_s: float) -> None:
        """Begin.

        Args:
            pid: of the process.
            limit_bytes: of its memory; 0: none.
            measure: returns its bytes by its id: `own_bytes` or `all_bytes`.
            every_s: seconds between two looks.
        """
        self.every_s = every_s
        self.limit_bytes = limit_bytes
        self._pid = pid
        self._measure = measure
        self._looked_s: float | None = None

    def look(self, now: float) -> int:
        """Return the bytes that pass the limit; 0 if they do not, or if the last look was too short a time ago."""
        if not self.limit_bytes or (self._looked_s is not None and now - self._looked_s < self.every_s):
            return 0
        self._looked_s = now
        found = self._measure(self._pid)
        return found if found > self.limit_bytes else 0


def derived_limit(files_bytes: int) -> int:
    """Return the memory that the trial of a bundle may take, in bytes, by the size of its files and the machine's."""
    return min(LEAST_BYTES + PER_FILE_BYTE * files_bytes, memory_bytes())


def own_bytes(pid: int) -> int:
    """Return what a process has written to memory, without pages of files, which the system can take back; else 0.

    Source: proc_pid_status(5), RssAnon and RssShmem.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def all_bytes(pid: int) -> int:
    """Return the resident memory of a process, pages of files and shared memory included; 0 if it has ended."""
    return resident_bytes(Path(f"/proc/{pid}/statm"))
