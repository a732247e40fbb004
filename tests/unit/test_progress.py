"""Limits that follow progress: a command that works may take long, and one that stands still is ended."""

from __future__ import annotations

import sys

import pytest
from serving import run_while_it_works

BUSY = """
import time
until = time.monotonic() + 1.5
while time.monotonic() < until: pass
print("done")
raise SystemExit(3)
"""


def test_command_that_works_longer_than_the_patience_is_not_ended() -> None:
    assert run_while_it_works([sys.executable, "-c", BUSY], patience_s=0.7) == (3, "done\n")


def test_control_command_that_stands_still_is_ended() -> None:
    with pytest.raises(AssertionError, match=r"took no processor time for 0.7 s$"):
        run_while_it_works([sys.executable, "-c", "import time; time.sleep(60)"], patience_s=0.7)
