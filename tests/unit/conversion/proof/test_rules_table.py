"""Every operator with a rule: its verdicts on tiny graphs, each confirmed by runs in onnxruntime.

A verdict states whether padding or batch neighbours can change the graph's answer. `TABLES` has the cases by subject.
`faults_of` returns a sentence for each verdict that is wrong, or that runs contradict.
"""

from __future__ import annotations

import pytest
from proof_cases import Case
from proof_runs import faults_of
from proof_tables import TABLES


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{table}: {case.name}") for table, cases in TABLES.items() for case in cases]
)
def test_verdicts_are_right_and_confirmed_by_runs(case: Case) -> None:
    assert faults_of(case) == []
