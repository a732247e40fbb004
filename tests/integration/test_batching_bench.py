"""A short run of `make batching`: no answer depends on its batch by default, and forced batches show that it could.

Forced batches are those of a server that joins rows without regard to the proof. Needs `bench` of this checkout; takes
seconds.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench.batching import Row, measured  # noqa: E402
from bench.batching_subjects import SUBJECTS  # noqa: E402

CALLS = 48
"""Sequences of each model, each sent by itself and again in calls of sixteen."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """The table."""
    return measured(SUBJECTS, CALLS, tmp_path_factory.mktemp("batching"))


def test_no_answer_is_wrong_by_default(rows: list[Row]) -> None:
    assert {row.model: (row.wrong, row.together_wrong) for row in rows if row.wrong or row.together_wrong} == {}


def test_forced_batches_are_wrong_for_each_model_that_mixes(rows: list[Row]) -> None:
    assert [row.model for row in rows if not row.batches and not row.forced_wrong] == []


def test_masked_models_still_share_runs(rows: list[Row]) -> None:
    controls = [row for row in rows if row.batches]
    assert controls
    assert all(row.mean_batch > 1 for row in controls), controls


def test_each_model_that_runs_alone_has_a_reason(rows: list[Row]) -> None:
    assert all(row.reason for row in rows if not row.batches)
