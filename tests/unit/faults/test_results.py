"""The page of the last run follows from its JSON, and a soak is judged by its memory and its problems."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[3]))

from faults.lab import Setup, absent
from faults.page import merged, written
from faults.rows import ROWS
from faults.soak import judged, svg

CANARY = {"calls": 90, "failed": 1, "p99_ms": 7.5, "baseline_p99_ms": 4.0}
RESULTS: dict[str, Any] = {
    "seed": 3, "full": True, "seconds": 60, "cores": 2, "machine": "x86_64", "python": "3.11", "rows": [
        {"row": 1, "fault": "a", "result": "holds", "injected": {"things": 4}, "seconds": 2.5,
         "measured": {"canary": CANARY, "growth_mb": 1.25, "statuses": {"OK": 90}}},
        {"row": 2, "fault": "b", "result": "absent", "injected": {}, "seconds": 0, "measured": {"reason": "no --x"}},
    ],
}  # fmt: skip


def test_page_ends_with_the_last_run() -> None:
    page = written("# Page\n\nbefore\n", RESULTS)
    assert page.startswith("# Page\n\nbefore\n\n## The last run\n")
    assert "1 of 2 rows hold, with full counts and seed 3, in 60 s on 2 cores" in page
    assert "| 1 | a | holds | things 4 | growth mb 1.25 | 1 of 90, 7.5 (4) | 2.5 |" in page
    assert page.endswith("| 2 | b | absent |  | because no --x | none | 0 |\n")
    assert written(page, RESULTS) == page


def test_rows_of_a_later_run_replace_those_of_an_earlier_one() -> None:
    later = {**RESULTS, "seconds": 9, "rows": [{**RESULTS["rows"][1], "result": "holds", "seconds": 9}]}
    both = merged([RESULTS, later])
    assert [(row["row"], row["result"]) for row in both["rows"]] == [(1, "holds"), (2, "holds")]
    assert both["seconds"] == 12, "those of the rows that are shown, rounded"
    with pytest.raises(ValueError, match="differ in full: False, True"):
        merged([RESULTS, {**later, "full": False}])


def test_every_row_of_the_table_has_its_number_once() -> None:
    assert [row.number for row in ROWS] == list(range(1, 44))


def test_row_is_absent_where_a_setting_is() -> None:
    assert absent(Setup(needs=("keepalive_s",))) == ""
    assert absent(Setup(needs=("keepalive_s", "none_such"))) == "the server has no --none-such"


def soaked(first: float | None, last: float, *problems: str) -> dict[str, Any]:
    return {"first_mb": first, "last_mb": last, "problems": list(problems)}


def test_soak_is_judged_by_its_growth_and_its_problems() -> None:
    assert judged(soaked(100.0, 131.0)) == []
    assert "grew" in judged(soaked(100.0, 133.0))[0]
    assert judged(soaked(100.0, 90.0, "answer: x")) == ["answer: x"]
    assert "too short" in judged(soaked(None, 90.0))[0]


def test_plot_has_a_line_for_each_process_and_their_sum() -> None:
    drawn = svg({"memory_mb": [[0.0, {"main": 10.0}], [5.0, {"main": 12.0, "engine tiny/1": 20.0}]]})
    assert drawn.count("<polyline") == 3
    assert "32" not in drawn.split("polyline")[0]
    assert ">all<" in drawn
