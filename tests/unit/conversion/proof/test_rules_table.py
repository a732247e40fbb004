"""Every operator that the proof knows: its verdicts on tiny graphs, each borne out by runs in onnxruntime."""

from __future__ import annotations

import pytest
from proof_cases import Case
from proof_runs import faults_of
from proof_tables import TABLES


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{table}: {case.name}") for table, cases in TABLES.items() for case in cases]
)
def test_verdicts_are_right_and_runs_bear_them_out(case: Case) -> None:
    assert faults_of(case) == []
