"""The attack breaks the right clause of graphs whose answers depend on padding or neighbours, and none of safe graphs.

A clause states for the batch, or for one axis, that it cannot change an answer; the attack runs batches that try to.
`DEPENDENT` has, for each unsafe graph, the axes to be broken and options of the attack. `HARMLESS` has the safe graphs.
"""

from __future__ import annotations

from pathlib import Path

import batch_graphs as graphs
import numpy as np
import pytest
from attacked import SOME, attacked, broken
from attnserve_server.conversion.proof import judge
from attnserve_server.model.certificate import MaskNeed

pytestmark = pytest.mark.slow

DEPENDENT = {
    "no mask": (graphs.unmasked_attention(), {"t"}, {}),
    "no mask behind a norm": (graphs.sharp_attention(), {"t"}, {}),
    "padding id in the text": (graphs.unmasked_text(), {"t"}, {}),
    "softmax over all axes": (graphs.softmax_over_all_axes(), {"t"}, {}),
    "log-n scale": (graphs.log_length_scale(), {"t"}, {"masks": (SOME,)}),
    "scale that switches": (graphs.scale_switched_by_length(), {"t"}, {"masks": (SOME,), "thresholds": (40,)}),
    "branch": (graphs.branch_by_length(), {"t"}, {"thresholds": (64,)}),
    "last positions": (graphs.mean_of_last(), {"t"}, {"masks": (SOME,)}),
    "greatest length": (graphs.scale_by_greatest_length(), {"batch"}, {"masks": (SOME,)}),
    "capacity": (graphs.capacity(), {"batch"}, {"longest": 32, "thresholds": (40,)}),
    "small outputs": (graphs.small_mean(), {"t"}, {}),
    "quantized": (graphs.dynamically_quantized(), {"batch"}, {}),
    "quantized, fused": (graphs.dynamically_quantized(fused=True), {"batch"}, {}),
    "quantized text": (graphs.dynamically_quantized_text(), {"batch", "t"}, {}),
    "mask of -10": (graphs.masked_attention(-10), {"t"}, {"masks": (SOME,), "longest": 403}),
    "mask of -10000 below scores of millions": (graphs.sharp_masked_attention(-1e4), {"t"}, {"masks": (SOME,)}),
    "greatest position": (graphs.scale_by_greatest_position(), {"batch"}, {}),
    "token types of the batch": (graphs.scale_by_token_types_of_the_batch(), {"batch"}, {}),
    "mean over rows of fixed length": (graphs.mean_over_rows_of_fixed_length(), {"batch"}, {}),
    "number of rows": (graphs.scaled_by_rows(), {"batch"}, {}),
    "no mask over a memory": (graphs.cross_attention(masked=False), {"s"}, {"longest": 24}),
    "causal over a memory": (graphs.causal_cross_attention(), {"s"}, {"longest": 24}),
}


@pytest.mark.parametrize("case", DEPENDENT)
def test_attack_breaks_the_clause_whose_axis_changes_the_answer(case: str, tmp_path: Path) -> None:
    proto, axes, options = DEPENDENT[case]
    clauses = attacked(proto, tmp_path, **options)
    assert broken(clauses) == axes
    assert not any(clauses[axis].allows("tested") for axis in axes)


HARMLESS = {
    "mask of -inf": (graphs.masked_attention(), {"masks": (SOME,)}),
    "mask of the lowest value": (graphs.masked_attention(float(np.finfo(np.float32).min)), {"masks": (SOME,)}),
    "pointwise": (graphs.pointwise(), {}),
    "causal": (graphs.causal_attention(), {}),
    "less the masked mean": (graphs.centred(), {"masks": (SOME,)}),
    "sharp scores": (graphs.sharp_masked_attention(), {"masks": (SOME,)}),
    "masked mean": (graphs.masked_mean(), {"masks": (SOME,)}),
    "quantized by row": (graphs.quantized_by_row(), {}),
    "masked memory": (graphs.cross_attention(masked=True), {"masks": (SOME,), "longest": 20}),
    "mask derived from ids": (graphs.text_with_derived_mask(), {"masks": (MaskNeed(input="input_ids", need="some"),)}),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_attack_breaks_no_clause_of_a_safe_graph(case: str, tmp_path: Path) -> None:
    proto, options = HARMLESS[case]
    clauses = attacked(proto, tmp_path, **{"longest": 36, **options})
    assert broken(clauses) == set()
    assert all(clause.attack is not None and clause.attack.survived for clause in clauses.values())
    assert all(clause.allows("tested") for clause in clauses.values())


def test_padding_of_two_axes_at_once_is_not_attributed_to_neighbours(tmp_path: Path) -> None:
    clauses = attacked(graphs.scale_where_both_are_long(), tmp_path, longest=40)
    assert broken(clauses)
    assert broken(clauses) <= {"t", "s"}


def test_rounding_of_cancelling_values_would_break_the_batch_without_its_allowance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The positive control of `less the masked mean` above: without the allowance for rounding it is broken."""
    monkeypatch.setattr(judge, "is_rounding", lambda *_args, **_kwargs: False)
    assert broken(attacked(graphs.centred(), tmp_path, masks=(SOME,))) == {"batch"}
