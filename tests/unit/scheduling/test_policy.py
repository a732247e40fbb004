"""The batching policy: which of the waiting sequences go into the next run.

`plan` is a function of candidates, time, settings and costs, all made by hand or drawn. Its properties hold for drawn
queues; the others are examples. Nothing runs or raises.
"""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations
from math import prod

import pytest
from attnserve_server.domain.values import PreparedSequence, Priority
from attnserve_server.engine.cost import CostModel
from attnserve_server.scheduling.policy import (
    AGE_SHARE,
    PADDING_SHARE,
    Candidate,
    Layout,
    SchedulingSettings,
    _alike,
    _choose,
    _neighbours,
    adjusted_arrival,
    plan,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from past_graphs import manifest

NOW = 100.0
CPU_COST = CostModel()
LAUNCHES = CostModel(run_s=5e-3, sequence_s=0.0, token_s=2e-6, pair_s=0.0)
"""A device on which a run's overhead costs as much as 2,500 tokens."""


def line(*lengths: int, **common: object) -> list[Candidate]:
    """Sequences of these lengths along one axis, in order of arrival."""
    return [Candidate(adjusted_arrival_s=float(at), lengths=(length,), **common) for at, length in enumerate(lengths)]  # type: ignore[arg-type]


def alive(candidates: list[Candidate]) -> list[int]:
    """Those whose deadline has not passed."""
    return [at for at, one in enumerate(candidates) if one.deadline_s is None or one.deadline_s > NOW]


def score(candidates: list[Candidate], members: list[int] | tuple[int, ...], cost: CostModel) -> float:
    """Value per second of a run whose first member is the oldest, from the definition."""
    padded = [max(column) for column in zip(*(candidates[at].lengths for at in members), strict=True)]
    oldest_s = NOW - candidates[members[0]].adjusted_arrival_s
    ages = [
        min(max((NOW - candidates[at].adjusted_arrival_s) / oldest_s, 0.0), 1.0) if oldest_s > 0 else 0.0
        for at in members
    ]
    launch_s = cost.run_s / (1 + len(_neighbours(candidates, members[0], alive(candidates), cost)))
    value = sum(
        row_s + launch_s + AGE_SHARE * min(cost.run_s, row_s) * age
        for row_s, age in zip((cost.row_s(candidates[at].tokens) for at in members), ages, strict=True)
    )
    return value / cost.seconds(len(members), sum(padded))


def bytes_of(candidates: list[Candidate], members: tuple[int, ...]) -> int:
    padded = [max(column) for column in zip(*(candidates[at].lengths for at in members), strict=True)]
    return sum(
        size * prod(padded[axis] for axis in axes) for at in members for axes, size in candidates[at].footprint.items()
    )


@st.composite
def candidate_lists(draw: st.DrawFn) -> list[Candidate]:
    axes = draw(st.integers(1, 3))
    keys = st.lists(st.integers(0, axes - 1), max_size=2).map(lambda key: tuple(sorted(key)))
    count = draw(st.integers(0, 12))
    arrivals = draw(st.lists(st.floats(0, 200, allow_nan=False), min_size=count, max_size=count, unique=True))
    return [
        Candidate(
            adjusted_arrival_s=arrived_s,
            lengths=tuple(draw(st.lists(st.integers(1, 60), min_size=axes, max_size=axes))),
            deadline_s=draw(st.none() | st.floats(90, 110)),
            rigid=draw(st.sampled_from([(), (), (1,), (2,)])),
            footprint=draw(st.dictionaries(keys, st.integers(0, 50), max_size=3)),
        )
        for arrived_s in arrivals
    ]


bounds = st.builds(
    SchedulingSettings,
    max_batch_size=st.integers(1, 8),
    max_batch_tokens=st.integers(1, 600),
    max_batch_bytes=st.integers(1, 30_000),
)
costs = st.builds(
    CostModel,
    run_s=st.floats(0, 0.1),
    sequence_s=st.floats(0, 1e-3),
    token_s=st.floats(1e-6, 1e-3),
    pair_s=st.floats(0, 1e-6),
)


@given(candidate_lists(), bounds, costs)
def test_the_oldest_unexpired_sequence_always_runs(
    candidates: list[Candidate], settings: SchedulingSettings, cost: CostModel
) -> None:
    planned = plan(candidates, NOW, settings, cost)
    assert set(planned.expired) == set(range(len(candidates))) - set(alive(candidates))
    if alive(candidates):
        assert planned.indices[0] == min(alive(candidates), key=lambda at: candidates[at].adjusted_arrival_s)
    else:
        assert planned.indices == ()
    assert not set(planned.indices) & set(planned.expired)
    assert len(set(planned.indices)) == len(planned.indices)


@given(candidate_lists(), bounds, costs, st.floats(0.01, 100))
def test_no_run_ends_past_a_deadline_of_its_sequences(
    candidates: list[Candidate], settings: SchedulingSettings, cost: CostModel, pace: float
) -> None:
    planned = plan(candidates, NOW, settings, cost, pace)
    members = planned.indices
    hopeful = [
        at
        for at in alive(candidates)
        if candidates[at].deadline_s is None
        or candidates[at].deadline_s >= NOW + pace * cost.seconds(1, candidates[at].tokens)  # type: ignore[operator]
    ]
    if not hopeful:
        assert len(members) == min(1, len(alive(candidates))), "one runs, because nothing else waits"
        return
    assert set(planned.expired) == set(range(len(candidates))) - set(hopeful)
    assert members[0] == min(hopeful, key=lambda at: candidates[at].adjusted_arrival_s)
    padded = [max(column) for column in zip(*(candidates[at].lengths for at in members), strict=True)]
    ends = NOW + pace * cost.seconds(len(members), sum(padded))
    assert all(candidates[at].deadline_s is None or candidates[at].deadline_s >= ends - 1e-6 for at in members)  # type: ignore[operator]


@given(
    st.lists(st.floats(0, 99), min_size=2, max_size=40, unique=True),
    st.integers(1, 60),
    st.integers(0, 5000),
    bounds,
    costs,
)
def test_sequences_of_one_shape_are_planned_as_the_general_rule_plans_them(
    arrivals: list[float], length: int, size: int, settings: SchedulingSettings, cost: CostModel
) -> None:
    line = [Candidate(at, (length,), footprint={(): size}) for at in sorted(arrivals)]
    assume(settings.max_batch_size > 1)
    general = _choose(line, NOW, settings, cost, 0.0)
    count = _alike(line, NOW, settings, cost)
    assert general == list(range(len(general))), "the order by value is that by age"

    def score(members: int) -> float:
        ages = [(NOW - one.adjusted_arrival_s) / (NOW - line[0].adjusted_arrival_s) for one in line[:members]]
        row_s = cost.row_s(length)
        value_s = sum(row_s + cost.run_s / len(line) + AGE_SHARE * min(cost.run_s, row_s) * age for age in ages)
        return value_s / cost.seconds(members, length)

    # Scores that differ by rounding alone may be chosen either way.
    assert count == len(general) or score(count) == pytest.approx(score(len(general)), rel=1e-9)


def test_a_sequence_near_its_deadline_joins_no_batch() -> None:
    # A run of one takes about 10 ms, one of two about 17.
    candidates = line(32, 32, 32, 32)
    candidates[2] = replace(candidates[2], deadline_s=NOW + 0.015)
    assert set(plan(candidates, NOW, SchedulingSettings(), CPU_COST, pace=1.0).indices) == {0, 1, 3}
    assert set(plan(candidates, NOW, SchedulingSettings(), CPU_COST, pace=0.1).indices) == {0, 1, 2, 3}


@given(candidate_lists(), bounds, costs)
def test_only_the_oldest_alone_may_exceed_the_bounds(
    candidates: list[Candidate], settings: SchedulingSettings, cost: CostModel
) -> None:
    members = plan(candidates, NOW, settings, cost).indices
    if len(members) < 2:
        return
    assert len(members) <= settings.max_batch_size
    padded = [max(column) for column in zip(*(candidates[at].lengths for at in members), strict=True)]
    assert len(members) * sum(padded) <= settings.max_batch_tokens
    assert bytes_of(candidates, members) <= settings.max_batch_bytes
    assert len({candidates[at].rigid for at in members}) == 1


@given(candidate_lists(), bounds, costs)
def test_a_run_has_at_least_the_value_per_second_of_the_oldest_alone(
    candidates: list[Candidate], settings: SchedulingSettings, cost: CostModel
) -> None:
    members = plan(candidates, NOW, settings, cost).indices
    if members:
        # the policy adds in another order: rounding only
        assert score(candidates, members, cost) >= score(candidates, members[:1], cost) * (1 - 1e-9)


@given(candidate_lists(), bounds, costs)
def test_padding_is_bounded_by_half_the_run_overhead(
    candidates: list[Candidate], settings: SchedulingSettings, cost: CostModel
) -> None:
    members = plan(candidates, NOW, settings, cost).indices
    if len(members) > 1:
        padded = [max(column) for column in zip(*(candidates[at].lengths for at in members), strict=True)]
        for at in members:
            added_s = cost.row_s(sum(padded)) - cost.row_s(candidates[at].tokens)
            assert added_s <= PADDING_SHARE * cost.run_s * (1 + 1e-9) + 1e-15


@given(
    st.lists(st.tuples(st.integers(1, 60), st.floats(0, 100)), min_size=1, max_size=7, unique_by=lambda one: one[1]),
    st.integers(1, 5),
    costs,
)
def test_the_run_along_one_axis_has_the_greatest_value_per_second(
    arrivals: list[tuple[int, float]], max_batch_size: int, cost: CostModel
) -> None:
    candidates = [Candidate(arrived_s, (length,)) for length, arrived_s in arrivals]
    members = plan(candidates, NOW, SchedulingSettings(max_batch_size=max_batch_size), cost).indices
    oldest = min(range(len(candidates)), key=lambda at: candidates[at].adjusted_arrival_s)
    others = [at for at in range(len(candidates)) if at != oldest]
    best = 0.0
    for count in range(max_batch_size):
        for neighbours in combinations(others, count):
            chosen = (oldest, *neighbours)
            longest_s = cost.row_s(max(candidates[at].tokens for at in chosen))
            if all(longest_s - cost.row_s(candidates[at].tokens) <= PADDING_SHARE * cost.run_s for at in chosen):
                best = max(best, score(candidates, chosen, cost))
    assert score(candidates, members, cost) == pytest.approx(best, rel=1e-9)  # rounding only


@given(candidate_lists(), bounds, costs, st.randoms(use_true_random=False))
def test_the_order_of_candidates_does_not_matter(
    candidates: list[Candidate], settings: SchedulingSettings, cost: CostModel, shuffle: random.Random
) -> None:
    order = list(range(len(candidates)))
    shuffle.shuffle(order)
    shuffled = plan([candidates[at] for at in order], NOW, settings, cost)
    straight = plan(candidates, NOW, settings, cost)
    assert [order[at] for at in shuffled.indices] == list(straight.indices)
    assert {order[at] for at in shuffled.expired} == set(straight.expired)


@given(st.lists(st.integers(4, 256), min_size=1, max_size=60), st.integers(1, 8), st.integers(0, 100))
def test_no_sequence_starves(lengths: list[int], max_batch_size: int, seed: int) -> None:
    settings = SchedulingSettings(max_batch_size=max_batch_size)
    chance = random.Random(seed)
    waiting = dict(enumerate(line(*lengths)))
    ahead = {at: at for at in waiting}
    runs, newest = 0, len(waiting)
    while any(at < len(lengths) for at in waiting):
        order = list(waiting)
        for at in plan([waiting[at] for at in order], NOW, settings, CPU_COST).indices:
            number = order[at]
            assert runs <= ahead.get(number, runs), "overtaken more often than sequences were before it"
            del waiting[number]
        runs += 1
        for _ in range(max_batch_size):  # as many arrive as can run, of lengths that fit together
            waiting[newest] = Candidate(float(newest), (chance.choice([32, 32, 33]),))
            newest += 1


def test_an_empty_queue_gives_an_empty_plan() -> None:
    assert plan([], NOW, SchedulingSettings(), CPU_COST).indices == ()


def test_near_equal_lengths_share_a_run_on_a_cpu() -> None:
    assert set(plan(line(32, 250, 31, 8, 33, 120), NOW, SchedulingSettings(), CPU_COST).indices) == {0, 2, 4}


def test_all_lengths_share_a_run_if_overhead_dominates() -> None:
    candidates = line(32, 120, 31, 24, 33, 60)
    assert set(plan(candidates, NOW, SchedulingSettings(), LAUNCHES).indices) == set(range(6))
    assert len(plan(candidates, NOW, SchedulingSettings(), CPU_COST).indices) == 3


def test_a_short_queue_shares_one_run_if_overhead_is_high() -> None:
    # Padding a short one to 250 costs less than its share of a second run's overhead.
    launches = replace(LAUNCHES, token_s=3e-7, run_s=1.2e-3)
    assert len(plan(line(250, *[8] * 15), NOW, SchedulingSettings(), launches).indices) == 16
    # Among many, those of equal length suffice.
    crowd = line(250, *[250] * 60, *[8] * 60)
    assert {crowd[at].tokens for at in plan(crowd, NOW, SchedulingSettings(), launches).indices} == {250}


def test_without_overhead_each_sequence_runs_alone() -> None:
    free = CostModel(run_s=0.0, sequence_s=0.0, token_s=1e-4, pair_s=0.0)
    assert plan(line(32, 33, 31), NOW, SchedulingSettings(), free).indices == (0,)


def test_a_short_sequence_is_not_padded_for_many_long_ones() -> None:
    assert plan(line(8, *[100] * 20), NOW, SchedulingSettings(), CPU_COST).indices == (0,)


def test_among_equal_neighbours_those_that_waited_longer_join() -> None:
    candidates = [Candidate(arrived_s, (32,)) for arrived_s in (0.0, 99.0, 1.0, 98.0)]
    assert set(plan(candidates, NOW, SchedulingSettings(max_batch_size=2), CPU_COST).indices) == {0, 2}


def test_among_equal_lengths_the_older_joins() -> None:
    settings = SchedulingSettings(max_batch_size=2)
    assert plan(line(32, 30, 30, 30), NOW, settings, CPU_COST).indices == (0, 1)
    assert plan(line(32, 34, 34, 34), NOW, settings, CPU_COST).indices == (0, 1)
    assert plan(line(32, 32, 32, 32), NOW, settings, CPU_COST).indices == (0, 1)


def test_a_sequence_beyond_the_token_bound_runs_alone() -> None:
    settings = SchedulingSettings(max_batch_tokens=64)
    assert plan(line(100, 100, 10), NOW, settings, CPU_COST).indices == (0,)


def test_a_neighbour_beyond_the_byte_bound_is_skipped() -> None:
    settings = SchedulingSettings(max_batch_bytes=100)
    candidates = line(10, 10, 10)
    candidates[1] = replace(candidates[1], footprint={(0, 0): 2})
    assert plan(candidates, NOW, settings, CPU_COST).indices == (0, 2)


def test_attention_maps_count_at_their_padded_size() -> None:
    short_with_map = replace(line(10)[0], footprint={(0, 0): 1})
    longer = replace(line(20)[0], adjusted_arrival_s=1.0)
    settings = SchedulingSettings(max_batch_bytes=399)
    assert plan([short_with_map, longer], NOW, settings, LAUNCHES).indices == (0,), "20 x 20 positions once padded"
    assert plan([short_with_map, longer], NOW, replace(settings, max_batch_bytes=400), LAUNCHES).indices == (0, 1)


def test_lengths_along_several_axes_are_weighed_together() -> None:
    candidates = [Candidate(float(at), lengths) for at, lengths in enumerate([(30, 10), (10, 30), (30, 11), (29, 10)])]
    assert set(plan(candidates, NOW, SchedulingSettings(), CPU_COST).indices) == {0, 2, 3}


@pytest.mark.parametrize(
    ("priority", "arrival"), [(Priority.LOW, 11.0), (Priority.NORMAL, 10.0), (Priority.HIGH, 9.75)]
)
def test_priority_moves_the_arrival(priority: Priority, arrival: float) -> None:
    assert adjusted_arrival(10.0, priority, SchedulingSettings()) == arrival


def test_sequences_share_a_run_only_with_those_of_the_same_past() -> None:
    both = manifest()
    assert both.continuing is not None
    prompts, continued = Layout(both), Layout(both.continuing)

    def sequence(new: int, past: int = 0, *, unpadded: bool = False) -> PreparedSequence:
        lengths = {"seq": new, "past": past} if past else {"seq": new}
        return PreparedSequence({}, lengths, ("logits",), unpadded=unpadded, past=past)

    one = continued.candidate(sequence(2, 3), 0.0)
    assert (one.lengths, one.tokens) == ((2, 3, 0), 5)
    same = continued.candidate(sequence(2, 3), 0.0)
    others = [
        continued.candidate(sequence(2, 4), 0.0),
        continued.candidate(sequence(3, 3), 0.0),
        prompts.candidate(sequence(2), 0.0),
        prompts.candidate(sequence(3, unpadded=True), 0.0),
    ]
    assert same.rigid == one.rigid
    assert all(other.rigid != one.rigid for other in others)
