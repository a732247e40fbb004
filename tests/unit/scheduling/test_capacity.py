"""The simulation of a replica, against queueing theory and arithmetic where those have a formula."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from attnserve_server.engine.cost import CostModel
from attnserve_server.scheduling.capacity import Load, Replica, lengths, peak_rate, poisson, simulate
from attnserve_server.scheduling.policy import SchedulingSettings

ALONE = SchedulingSettings(max_batch_size=1)
COST = CostModel(run_s=2e-3, sequence_s=0.0, token_s=1e-4, pair_s=0.0)
ONE = Replica(cost=COST, instances=1, cores=8, call_s=0.0)
RUN_S = COST.seconds(1, 80)


def fixed(count: int, tokens: int = 80) -> np.ndarray:
    return np.full(count, tokens, np.int64)


@pytest.mark.parametrize("busy", [0.3, 0.6, 0.8])
def test_mean_wait_of_equal_runs_is_that_of_pollaczek_and_khinchine(busy: float) -> None:
    """M/D/1: W = rho s / 2 (1 - rho). The tolerance is that of 30,000 arrivals, whose waits are correlated."""
    load = poisson(fixed(30_000), 0.0, busy / RUN_S, np.random.default_rng(3))
    found = simulate(ONE, load, ALONE)
    assert found.wait_s.mean() == pytest.approx(busy * RUN_S / (2 * (1 - busy)), rel=0.1)
    assert found.busy == pytest.approx(busy, rel=0.03)
    assert found.rows == 1


def test_idle_replica_answers_in_the_time_of_a_run_and_a_call() -> None:
    load = poisson(fixed(50), 0.0, 0.01, np.random.default_rng(0))
    found = simulate(replace(ONE, call_s=1e-3), load, ALONE)
    assert found.latency_s == pytest.approx(RUN_S + 1e-3)
    assert found.wait_s.max() == 0


def test_peak_is_that_of_the_instances_as_far_as_there_are_cores() -> None:
    random = np.random.default_rng(0)
    for instances, cores, times in ((1, 2, 1), (2, 2, 2), (4, 2, 2)):
        replica = replace(ONE, instances=instances, cores=cores)
        assert peak_rate(replica, fixed(2000), 0.0, ALONE, random) == pytest.approx(times / RUN_S, rel=0.01)


def test_event_loop_takes_its_share_of_the_cores_and_bounds_the_peak() -> None:
    random = np.random.default_rng(0)
    free = peak_rate(replace(ONE, instances=2, cores=2), fixed(2000), 0.0, ALONE, random)
    taken = peak_rate(replace(ONE, instances=2, cores=2, call_s=1e-3), fixed(2000), 0.0, ALONE, random)
    assert 0.85 * free < taken < 0.97 * free
    slow = replace(ONE, instances=8, call_s=0.1)
    assert peak_rate(slow, fixed(200), 0.0, ALONE, random) <= 0.95 / 0.1


def test_overhead_is_shared_by_the_rows_of_a_batch() -> None:
    dear = replace(ONE, cost=replace(COST, run_s=0.1))
    random = np.random.default_rng(0)
    batched = peak_rate(dear, fixed(2000), 0.0, SchedulingSettings(max_batch_size=32), random)
    assert batched > 5 * peak_rate(dear, fixed(2000), 0.0, ALONE, random)


def test_lone_run_on_all_cores_is_faster_and_a_run_beside_others_is_not() -> None:
    wide = replace(ONE, wide=0.5)
    assert simulate(wide, Load(np.zeros(1), fixed(1), np.zeros(1, bool)), ALONE).latency_s[0] == RUN_S / 2
    both = simulate(replace(wide, instances=2), Load(np.zeros(2), fixed(2), np.zeros(2, bool)), ALONE)
    assert both.latency_s == pytest.approx(RUN_S)


def test_selection_adds_its_time_to_the_run() -> None:
    replica = replace(ONE, attention_s=1e-3, attention_pair_s=1e-6)
    found = simulate(replica, Load(np.array([0.0, 9.0]), fixed(2), np.array([False, True])), ALONE)
    assert found.latency_s == pytest.approx([RUN_S, RUN_S + 1e-3 + 6.4e-3])


def test_every_sequence_is_answered_after_it_arrived() -> None:
    tokens = lengths({0: 4, 0.5: 32, 1: 256}, 2000, np.random.default_rng(1))
    load = poisson(tokens, 0.2, 150, np.random.default_rng(2))
    found = simulate(replace(ONE, instances=2), load, SchedulingSettings(max_batch_size=8))
    assert (found.wait_s >= 0).all()
    assert (found.latency_s >= found.wait_s + COST.seconds(1, 4) - 1e-9).all()  # sums of other order


def test_drawn_lengths_have_the_quantiles_given() -> None:
    given = {0.0: 4, 0.5: 32, 0.9: 89, 0.99: 206, 1.0: 256}
    drawn = lengths(given, 200_000, np.random.default_rng(0))
    # a percent for the sample, and half a token for rounding
    for share, tokens in given.items():
        assert np.quantile(drawn, share) == pytest.approx(tokens, rel=0.02, abs=0.6)
