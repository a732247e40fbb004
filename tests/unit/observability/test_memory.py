"""The process's memory grows when it takes some, and is 0 where the system does not tell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from attnserve_server.observability.metrics import resident_bytes


def test_memory_that_was_taken_shows() -> None:
    before = resident_bytes()
    taken = np.ones(8 * 2**20, np.uint64)
    # 64 MiB were touched; the interpreter may have given some pages of its own back meanwhile.
    assert resident_bytes() - before > 48 * 2**20
    del taken


def test_a_system_that_does_not_tell_gives_nothing(tmp_path: Path) -> None:
    assert resident_bytes(tmp_path / "nowhere") == 0
