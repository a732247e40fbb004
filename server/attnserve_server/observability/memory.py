"""How much memory this process has, as the system tells it."""

from __future__ import annotations

import os
from pathlib import Path

_STATM = Path("/proc/self/statm")


def resident_bytes(statm: Path = _STATM) -> int:
    """The process's resident memory in bytes; 0 where the system does not tell."""
    try:
        pages = int(statm.read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
