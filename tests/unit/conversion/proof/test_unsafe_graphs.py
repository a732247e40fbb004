"""Graphs whose answers depend on padding in ways that are easily missed: none is proved, and runs show it.

Each case is a tiny graph with its expected verdicts, from `proof_tables`. The proof must not state that padding cannot
change the answer.
"""

from __future__ import annotations

import pytest
from proof_cases import PROVED, REFUTED, Case
from proof_runs import Runs
from proof_tables import unsafe_numbers, unsafe_places

UNSAFE = [*unsafe_numbers.UNSAFE, *unsafe_places.UNSAFE]


@pytest.mark.parametrize("case", UNSAFE, ids=lambda case: case.name)
def test_a_run_shows_that_the_graph_is_unsafe(case: Case) -> None:
    runs = Runs(case, case.proof())
    assert runs.worst("seq") > 1
    if case.batch is REFUTED:
        assert runs.worst("batch") > 1


@pytest.mark.parametrize("case", UNSAFE, ids=lambda case: case.name)
def test_a_graph_shown_to_be_unsafe_is_not_proved(case: Case) -> None:
    verdicts = {clause.axis: clause.verdict for clause in case.proof().clauses}
    assert verdicts["seq"] is not PROVED
    if case.batch is REFUTED:
        assert verdicts["batch"] is not PROVED
