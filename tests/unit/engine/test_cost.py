"""The cost model: fitted to times, never negative, and corrected by real runs.

It predicts the seconds of a run of some sequences, each padded to some tokens. `timed` makes exact times of a known
model; nothing runs.
"""

from __future__ import annotations

from itertools import product

import pytest
from attnserve_server.engine.cost import CostEstimate, CostModel, TimedRun, fit
from hypothesis import given
from hypothesis import strategies as st

GRID = tuple(product((1, 4, 16), (8, 32, 128)))
parts = st.floats(0, 1e-2)


def timed(cost: CostModel, grid: tuple[tuple[int, int], ...] = GRID) -> tuple[TimedRun, ...]:
    return tuple(TimedRun(size, tokens, cost.seconds(size, tokens)) for size, tokens in grid)


def test_fit_to_exact_times_returns_their_cost_model() -> None:
    cost = CostModel(run_s=2e-3, sequence_s=1e-5, token_s=2e-4, pair_s=1e-7)
    found = fit(timed(cost))
    # an exact fit: rounding of sums that differ by a factor of a million
    for name in ("run_s", "sequence_s", "token_s", "pair_s"):
        assert getattr(found, name) == pytest.approx(getattr(cost, name), rel=1e-4)


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 512), st.floats(0, 10)), max_size=8))
def test_no_coefficient_is_negative_and_token_time_is_positive(seen: list[tuple[int, int, float]]) -> None:
    found = fit(tuple(TimedRun(*run) for run in seen))
    assert min(found.run_s, found.sequence_s, found.pair_s) >= 0
    assert found.token_s > 0


def test_coefficient_that_would_be_negative_is_zero_and_the_others_are_fitted_without_it() -> None:
    # less than proportional to tokens: only a constant explains it, and the rest follows the times
    found = fit(tuple(TimedRun(1, tokens, 0.01 + 1e-4 * tokens - 1e-8 * tokens**2) for tokens in (8, 32, 128, 512)))
    assert found.pair_s == 0
    assert found.seconds(1, 128) == pytest.approx(0.0226, rel=0.05)  # the share of the missing square


def test_real_runs_correct_the_costs_of_warm_up() -> None:
    slow = CostModel(run_s=4e-3, sequence_s=0.0, token_s=4e-4, pair_s=0.0)
    estimate = CostEstimate(timed(CostModel(run_s=2e-3, sequence_s=0.0, token_s=2e-4, pair_s=0.0)))
    before = estimate.model.seconds(4, 32)
    for _ in range(40):
        for run in timed(slow):
            estimate.add(run)
    assert before == pytest.approx(slow.seconds(4, 32) / 2, rel=1e-3)
    # nine warm-up runs against 360 real ones, some of which have faded: with relative errors, c in
    # 9 (1 - 2c)^2 + 257 (1 - c)^2 is least at 0.94
    assert estimate.model.seconds(4, 32) == pytest.approx(0.94 * slow.seconds(4, 32), rel=0.02)


def test_later_runs_have_more_weight_than_earlier_ones() -> None:
    quick, slow = TimedRun(4, 32, 0.01), TimedRun(4, 32, 0.02)

    def predicted(runs: list[TimedRun]) -> float:
        estimate = CostEstimate()
        for run in runs:
            estimate.add(run)
        return estimate.model.seconds(4, 32)

    # once within one refit, and once across two; a memory of 0.998 per run makes 1.017 and 1.034
    for count in (32, 64):
        assert predicted([quick] * count + [slow] * count) > 1.01 * predicted([slow] * count + [quick] * count)


def test_traffic_of_one_shape_keeps_the_other_coefficients_of_warm_up() -> None:
    cost = CostModel(run_s=2e-3, sequence_s=0.0, token_s=2e-4, pair_s=1e-7)
    estimate = CostEstimate(timed(cost))
    for _ in range(5000):
        estimate.add(TimedRun(4, 32, cost.seconds(4, 32)))
    assert estimate.model.seconds(16, 128) == pytest.approx(cost.seconds(16, 128), rel=0.01)  # rounding of many sums


@given(parts, parts, st.floats(1e-6, 1e-2), st.floats(0, 1e-5), st.integers(1, 8192))
def test_row_tokens_is_the_inverse_of_row_s(
    run_s: float, sequence_s: float, token_s: float, pair_s: float, tokens: int
) -> None:
    cost = CostModel(run_s, sequence_s, token_s, pair_s)
    # a difference of nearly equal square roots if pair_s is nearly 0
    assert cost.row_tokens(cost.row_s(tokens)) == pytest.approx(tokens, rel=1e-3)
    assert cost.row_tokens(-1.0) == 0


def test_overhead_is_set_in_tokens_and_has_a_minimum_when_measured() -> None:
    cost = CostModel(run_s=0.0, sequence_s=0.0, token_s=1e-3, pair_s=0.0)
    assert cost.with_overhead(20.0).run_s == pytest.approx(0.02)
    assert cost.with_overhead(0.0).run_s == 0
    assert cost.with_overhead(None).run_s == pytest.approx(0.004)
