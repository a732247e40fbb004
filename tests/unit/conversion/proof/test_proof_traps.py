"""Small graphs whose truth is easy to get wrong: no clause is proved along an axis that the graph mixes.

A graph mixes along an axis if padding, or other rows of the batch, change an answer. Importing the modules
`mixing_traps_of_*` registers their graphs in `TRAPS`. Each trap is also run, to confirm that it mixes.
"""

from __future__ import annotations

import mixing_traps_of_attention
import mixing_traps_of_padding
import mixing_traps_of_rows
import pytest
from mixing_judge import judged
from mixing_traps import TRAPS, graph_of
from mixing_witness import CLEAR, EXTREME, HOLES, USUAL, Witness

assert mixing_traps_of_attention
assert mixing_traps_of_padding
assert mixing_traps_of_rows


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_is_not_proved_where_it_mixes(name: str) -> None:
    graph = graph_of(name)
    assert [each.fault for each in judged(graph) if each.fault] == []


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_mixes(name: str) -> None:
    graph = graph_of(name)
    for axis in TRAPS[name].mixes:
        worst = Witness(graph).worst(axis, USUAL + HOLES + EXTREME, 6, enough=CLEAR)
        assert worst["y"] > CLEAR, axis
