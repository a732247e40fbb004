"""Progress of a conversion: a bar in a terminal, one plain line for each step elsewhere, nothing if silent.

`shown` returns what the progress of two steps writes. Nothing raises.
"""

from __future__ import annotations

import io

import pytest
from attnserve_server.conversion.base.steps import Steps
from rich.console import Console


def shown(*, terminal: bool) -> str:
    written = io.StringIO()
    steps = Steps(Console(file=written, force_terminal=terminal, width=100))
    with steps.shown(total=2):
        steps.begin("reading")
        steps.warn("half of it is missing")
        steps.begin("checking")
        steps.note("checking: 2 of 3")
    return written.getvalue()


def test_one_line_per_step_where_there_is_no_terminal() -> None:
    assert shown(terminal=False) == "reading\nwarning: half of it is missing\nchecking\n"


def test_bar_counts_steps_in_a_terminal() -> None:
    drawn = shown(terminal=True)
    assert "\x1b[" in drawn
    assert "checking: 2 of 3" in drawn
    assert "1/2" in drawn
    assert "warning: half of it is missing" in drawn


def test_silent_steps_write_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    steps = Steps.silent()
    with steps.shown(total=1):
        steps.begin("reading")
        steps.note("reading: 1 of 2")
        steps.warn("unread")
    assert capsys.readouterr() == ("", "")
