"""Fixed shapes of runs: which shape holds a run, how the run is filled up, and which shapes are prepared.

A shape is (rows, tokens). `shape_for` returns None where no shape holds a run. Replaying CUDA graphs needs a GPU:
tests/gpu.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from attnserve_server.engine.cost import CostModel
from attnserve_server.engine.shapes import ShapePlan, buckets, filled_up, shape_for
from attnserve_server.engine.warmup import are_dear, bucket_plan, plan_of
from attnserve_server.model.manifest import Manifest
from hypothesis import given
from hypothesis import strategies as st

SHAPES = ((1, 32), (8, 32), (4, 128))


@pytest.mark.parametrize(
    ("rows", "tokens", "shape"),
    [(1, 32, (1, 32)), (1, 33, (4, 128)), (2, 8, (8, 32)), (8, 32, (8, 32)), (9, 8, None), (5, 33, None)],
)
def test_run_takes_the_smallest_shape_that_holds_it(rows: int, tokens: int, shape: tuple[int, int] | None) -> None:
    assert shape_for(rows, tokens, SHAPES) == shape


def test_tokens_are_padded_and_rows_repeat_the_first() -> None:
    full = filled_up(np.array([[5, 6], [7, 0]], np.int64), (4, 3), padding=9)
    assert full.tolist() == [[5, 6, 9], [7, 0, 9], [5, 6, 9], [5, 6, 9]]
    assert full.dtype == np.int64


def test_plan_pads_a_run_to_its_shape_and_leaves_the_inputs_of_taps() -> None:
    plan = ShapePlan(SHAPES, {"ids": 7})
    feeds = {"ids": np.array([[1, 2]]), "items": np.array([0])}
    full = plan.padded(feeds)
    assert (full["ids"].shape, full["ids"][0, 2], full["items"].tolist()) == ((1, 32), 7, [0])
    large = {"ids": np.ones((9, 200)), "items": np.array([0])}
    assert plan.padded(large) is large


@given(
    run_s=st.floats(0, 0.1),
    token_s=st.floats(1e-6, 1e-2),
    pair_s=st.floats(0, 1e-5),
    max_rows=st.integers(1, 80),
    max_tokens=st.integers(1, 700),
    count=st.integers(1, 100),
)
def test_buckets_are_bounded_and_padding_a_length_costs_a_quarter_at_most(
    run_s: float, token_s: float, pair_s: float, max_rows: int, max_tokens: int, count: int
) -> None:
    cost = CostModel(run_s, 0.0, token_s, pair_s)
    every = buckets(cost, max_rows, max_tokens, 10_000)
    few = buckets(cost, max_rows, max_tokens, count)
    assert few == every[:count]
    assert len(set(every)) == len(every)
    assert all(1 <= rows <= max_rows and 1 <= tokens <= max_tokens for rows, tokens in every)
    times = [cost.seconds(*shape) for shape in every]
    assert times == sorted(times)
    lengths = sorted({tokens for _, tokens in every})
    assert lengths[-1] == max_tokens
    for shorter, longer in pairwise(lengths):
        # One step of eight tokens may cost more, which no choice of lengths avoids.
        assert longer - shorter <= 8 or cost.seconds(1, longer) <= 1.25 * cost.seconds(1, shorter)


def test_buckets_end_with_the_seconds_that_they_may_take() -> None:
    cost = CostModel(run_s=0.0, sequence_s=0.0, token_s=1e-3, pair_s=0.0)
    assert buckets(cost, 4, 64, 100, budget_s=0.05) == ((1, 8), (1, 16), (2, 8))


def test_lengths_are_coarser_where_the_overhead_of_a_run_dominates() -> None:
    dear, cheap = CostModel(run_s=0.05, token_s=1e-4), CostModel(run_s=0.0, token_s=1e-4)
    assert len(buckets(dear, 1, 512, 100)) < len(buckets(cheap, 1, 512, 100))


def test_axis_that_may_not_be_padded_gets_no_plan(manifest: Manifest) -> None:
    assert bucket_plan(manifest.under("off"), CostModel(), None) is None
    plan = bucket_plan(manifest, CostModel(), 5)
    assert plan is not None
    assert len(plan.shapes) == 5
    assert plan.padding == {"input_ids": 1, "attention_mask": 0}


def test_shapes_have_no_more_rows_than_a_run_may_have(manifest: Manifest) -> None:
    alone = manifest.model_copy(update={"max_batch_size": 1})
    plan = plan_of(alone, [(1, 8), (2, 8)])
    assert plan is not None
    assert plan.shapes == ((1, 8),)
    assert plan_of(alone, [(2, 8)]) is None


def test_new_shapes_are_dear_from_twice_the_time_of_later_runs() -> None:
    assert are_dear(2.0)
    assert not are_dear(1.9)
