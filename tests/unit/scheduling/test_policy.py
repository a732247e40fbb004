from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations
from math import prod

import pytest
from attnserve_server.domain.values import Priority
from attnserve_server.engine.cost import CostModel
from attnserve_server.scheduling.policy import (
    AGE_SHARE,
    PADDING_SHARE,
    SchedulingSettings,
    Waiting,
    _mates,
    plan,
    rank_s,
)
from hypothesis import given
from hypothesis import strategies as st

NOW = 100.0
CPU_COST = CostModel()
LAUNCHES = CostModel(run_s=5e-3, sequence_s=0.0, token_s=2e-6, pair_s=0.0)
"""A device that takes as long to launch a run as for 2,500 of its tokens."""


def line(*lengths: int, **common: object) -> list[Waiting]:
    """Sequences of these lengths along one axis, in order of arrival."""
    return [Waiting(rank_s=float(at), lengths=(length,), **common) for at, length in enumerate(lengths)]  # type: ignore[arg-type]


def alive(view: list[Waiting]) -> list[int]:
    """Those whose deadline has not passed."""
    return [at for at, one in enumerate(view) if one.deadline_s is None or one.deadline_s > NOW]


def score(view: list[Waiting], members: list[int] | tuple[int, ...], cost: CostModel) -> float:
    """Worth over seconds of a run whose first member is the oldest, from the definition."""
    padded = [max(column) for column in zip(*(view[at].lengths for at in members), strict=True)]
    oldest_s = NOW - view[members[0]].rank_s
    ages = [min(max((NOW - view[at].rank_s) / oldest_s, 0.0), 1.0) if oldest_s > 0 else 0.0 for at in members]
    launch_s = cost.run_s / (1 + len(_mates(view, members[0], alive(view), cost)))
    worth = sum(
        row_s + launch_s + AGE_SHARE * min(cost.run_s, row_s) * age
        for row_s, age in zip((cost.row_s(view[at].tokens) for at in members), ages, strict=True)
    )
    return worth / cost.seconds(len(members), sum(padded))


def bytes_of(view: list[Waiting], members: tuple[int, ...]) -> int:
    padded = [max(column) for column in zip(*(view[at].lengths for at in members), strict=True)]
    return sum(
        size * prod(padded[axis] for axis in axes) for at in members for axes, size in view[at].footprint.items()
    )


@st.composite
def views(draw: st.DrawFn) -> list[Waiting]:
    axes = draw(st.integers(1, 3))
    keys = st.lists(st.integers(0, axes - 1), max_size=2).map(lambda key: tuple(sorted(key)))
    count = draw(st.integers(0, 12))
    ranks = draw(st.lists(st.floats(0, 200, allow_nan=False), min_size=count, max_size=count, unique=True))
    return [
        Waiting(
            rank_s=rank,
            lengths=tuple(draw(st.lists(st.integers(1, 60), min_size=axes, max_size=axes))),
            deadline_s=draw(st.none() | st.floats(90, 110)),
            rigid=draw(st.sampled_from([(), (), (1,), (2,)])),
            footprint=draw(st.dictionaries(keys, st.integers(0, 50), max_size=3)),
        )
        for rank in ranks
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


@given(views(), bounds, costs)
def test_the_oldest_that_has_not_expired_is_always_in(
    view: list[Waiting], settings: SchedulingSettings, cost: CostModel
) -> None:
    planned = plan(view, NOW, settings, cost)
    assert set(planned.expired) == set(range(len(view))) - set(alive(view))
    if alive(view):
        assert planned.indices[0] == min(alive(view), key=lambda at: view[at].rank_s)
    else:
        assert planned.indices == ()
    assert not set(planned.indices) & set(planned.expired)
    assert len(set(planned.indices)) == len(planned.indices)


@given(views(), bounds, costs, st.floats(0.01, 100))
def test_nothing_runs_that_would_end_after_its_caller_has_left(
    view: list[Waiting], settings: SchedulingSettings, cost: CostModel, pace: float
) -> None:
    planned = plan(view, NOW, settings, cost, pace)
    members = planned.indices
    hopeful = [
        at
        for at in alive(view)
        if view[at].deadline_s is None or view[at].deadline_s >= NOW + pace * cost.seconds(1, view[at].tokens)  # type: ignore[operator]
    ]
    if not hopeful:
        assert len(members) == min(1, len(alive(view))), "tried, for want of anything better to do"
        return
    assert set(planned.expired) == set(range(len(view))) - set(hopeful)
    assert members[0] == min(hopeful, key=lambda at: view[at].rank_s)
    padded = [max(column) for column in zip(*(view[at].lengths for at in members), strict=True)]
    ends = NOW + pace * cost.seconds(len(members), sum(padded))
    assert all(view[at].deadline_s is None or view[at].deadline_s >= ends - 1e-6 for at in members)  # type: ignore[operator]


def test_mate_that_has_no_time_for_company_is_left_for_a_run_of_its_own() -> None:
    # A run of one takes about 10 ms, one of two about 17.
    view = line(32, 32, 32, 32)
    view[2] = replace(view[2], deadline_s=NOW + 0.015)
    assert set(plan(view, NOW, SchedulingSettings(), CPU_COST, pace=1.0).indices) == {0, 1, 3}
    assert set(plan(view, NOW, SchedulingSettings(), CPU_COST, pace=0.1).indices) == {0, 1, 2, 3}


@given(views(), bounds, costs)
def test_bounds_are_never_exceeded_but_by_the_oldest_alone(
    view: list[Waiting], settings: SchedulingSettings, cost: CostModel
) -> None:
    members = plan(view, NOW, settings, cost).indices
    if len(members) < 2:
        return
    assert len(members) <= settings.max_batch_size
    padded = [max(column) for column in zip(*(view[at].lengths for at in members), strict=True)]
    assert len(members) * sum(padded) <= settings.max_batch_tokens
    assert bytes_of(view, members) <= settings.max_batch_bytes
    assert len({view[at].rigid for at in members}) == 1


@given(views(), bounds, costs)
def test_a_run_is_never_worse_than_the_oldest_alone(
    view: list[Waiting], settings: SchedulingSettings, cost: CostModel
) -> None:
    members = plan(view, NOW, settings, cost).indices
    if members:
        # the policy adds up in another order: rounding only
        assert score(view, members, cost) >= score(view, members[:1], cost) * (1 - 1e-9)


@given(views(), bounds, costs)
def test_nobody_is_padded_by_more_than_half_of_what_a_run_costs_before_its_first_token(
    view: list[Waiting], settings: SchedulingSettings, cost: CostModel
) -> None:
    members = plan(view, NOW, settings, cost).indices
    if len(members) > 1:
        padded = [max(column) for column in zip(*(view[at].lengths for at in members), strict=True)]
        for at in members:
            added_s = cost.row_s(sum(padded)) - cost.row_s(view[at].tokens)
            assert added_s <= PADDING_SHARE * cost.run_s * (1 + 1e-9) + 1e-15


@given(
    st.lists(st.tuples(st.integers(1, 60), st.floats(0, 100)), min_size=1, max_size=7, unique_by=lambda one: one[1]),
    st.integers(1, 5),
    costs,
)
def test_along_one_axis_no_other_run_with_the_oldest_is_worth_more(
    arrivals: list[tuple[int, float]], max_batch_size: int, cost: CostModel
) -> None:
    view = [Waiting(rank, (length,)) for length, rank in arrivals]
    members = plan(view, NOW, SchedulingSettings(max_batch_size=max_batch_size), cost).indices
    oldest = min(range(len(view)), key=lambda at: view[at].rank_s)
    others = [at for at in range(len(view)) if at != oldest]
    best = 0.0
    for count in range(max_batch_size):
        for mates in combinations(others, count):
            chosen = (oldest, *mates)
            longest_s = cost.row_s(max(view[at].tokens for at in chosen))
            if all(longest_s - cost.row_s(view[at].tokens) <= PADDING_SHARE * cost.run_s for at in chosen):
                best = max(best, score(view, chosen, cost))
    assert score(view, members, cost) == pytest.approx(best, rel=1e-9)  # rounding only


@given(views(), bounds, costs, st.randoms(use_true_random=False))
def test_the_order_of_the_view_does_not_matter(
    view: list[Waiting], settings: SchedulingSettings, cost: CostModel, shuffle: random.Random
) -> None:
    order = list(range(len(view)))
    shuffle.shuffle(order)
    shuffled = plan([view[at] for at in order], NOW, settings, cost)
    straight = plan(view, NOW, settings, cost)
    assert [order[at] for at in shuffled.indices] == list(straight.indices)
    assert {order[at] for at in shuffled.expired} == set(straight.expired)


@given(st.lists(st.integers(4, 256), min_size=1, max_size=60), st.integers(1, 8), st.integers(0, 100))
def test_nothing_starves(lengths: list[int], max_batch_size: int, seed: int) -> None:
    settings = SchedulingSettings(max_batch_size=max_batch_size)
    chance = random.Random(seed)
    waiting = dict(enumerate(line(*lengths)))
    ahead = {at: at for at in waiting}
    runs, newest = 0, len(waiting)
    while any(at < len(lengths) for at in waiting):
        order = list(waiting)
        for at in plan([waiting[at] for at in order], NOW, settings, CPU_COST).indices:
            number = order[at]
            assert runs <= ahead.get(number, runs), "overtaken more often than there were sequences before it"
            del waiting[number]
        runs += 1
        for _ in range(max_batch_size):  # as many come as can go, of the lengths that the policy likes
            waiting[newest] = Waiting(float(newest), (chance.choice([32, 32, 33]),))
            newest += 1


def test_nothing_waits_and_nothing_runs() -> None:
    assert plan([], NOW, SchedulingSettings(), CPU_COST).indices == ()


def test_near_equal_lengths_go_together_on_a_cpu() -> None:
    assert set(plan(line(32, 250, 31, 8, 33, 120), NOW, SchedulingSettings(), CPU_COST).indices) == {0, 2, 4}


def test_everything_goes_together_where_launches_dominate() -> None:
    view = line(32, 120, 31, 24, 33, 60)
    assert set(plan(view, NOW, SchedulingSettings(), LAUNCHES).indices) == set(range(6))
    assert len(plan(view, NOW, SchedulingSettings(), CPU_COST).indices) == 3


def test_few_that_wait_share_one_launch_where_it_is_dear() -> None:
    # Padding the short ones to 250 costs each less than its part in launching a second run.
    launches = replace(LAUNCHES, token_s=3e-7, run_s=1.2e-3)
    assert len(plan(line(250, *[8] * 15), NOW, SchedulingSettings(), launches).indices) == 16
    # Among many, those of its own length are company enough.
    crowd = line(250, *[250] * 60, *[8] * 60)
    assert {crowd[at].tokens for at in plan(crowd, NOW, SchedulingSettings(), launches).indices} == {250}


def test_without_overhead_none_needs_company() -> None:
    free = CostModel(run_s=0.0, sequence_s=0.0, token_s=1e-4, pair_s=0.0)
    assert plan(line(32, 33, 31), NOW, SchedulingSettings(), free).indices == (0,)


def test_a_short_one_is_not_padded_for_a_large_company_of_long_ones() -> None:
    assert plan(line(8, *[100] * 20), NOW, SchedulingSettings(), CPU_COST).indices == (0,)


def test_of_mates_as_near_those_that_have_waited_longer_join() -> None:
    view = [Waiting(rank, (32,)) for rank in (0.0, 99.0, 1.0, 98.0)]
    assert set(plan(view, NOW, SchedulingSettings(max_batch_size=2), CPU_COST).indices) == {0, 2}


def test_among_equal_lengths_the_older_joins() -> None:
    settings = SchedulingSettings(max_batch_size=2)
    assert plan(line(32, 30, 30, 30), NOW, settings, CPU_COST).indices == (0, 1)
    assert plan(line(32, 34, 34, 34), NOW, settings, CPU_COST).indices == (0, 1)
    assert plan(line(32, 32, 32, 32), NOW, settings, CPU_COST).indices == (0, 1)


def test_a_sequence_too_long_for_any_run_goes_alone() -> None:
    settings = SchedulingSettings(max_batch_tokens=64)
    assert plan(line(100, 100, 10), NOW, settings, CPU_COST).indices == (0,)


def test_one_that_needs_too_many_bytes_is_passed_over_for_the_next() -> None:
    settings = SchedulingSettings(max_batch_bytes=100)
    view = line(10, 10, 10)
    view[1] = replace(view[1], footprint={(0, 0): 2})
    assert plan(view, NOW, settings, CPU_COST).indices == (0, 2)


def test_attention_maps_count_at_their_padded_size() -> None:
    short_that_asks = replace(line(10)[0], footprint={(0, 0): 1})
    longer = replace(line(20)[0], rank_s=1.0)
    settings = SchedulingSettings(max_batch_bytes=399)
    assert plan([short_that_asks, longer], NOW, settings, LAUNCHES).indices == (0,), "20 x 20 positions once padded"
    assert plan([short_that_asks, longer], NOW, replace(settings, max_batch_bytes=400), LAUNCHES).indices == (0, 1)


def test_lengths_along_several_axes_are_weighed_together() -> None:
    view = [Waiting(float(at), lengths) for at, lengths in enumerate([(30, 10), (10, 30), (30, 11), (29, 10)])]
    assert set(plan(view, NOW, SchedulingSettings(), CPU_COST).indices) == {0, 2, 3}


@pytest.mark.parametrize(("priority", "rank"), [(Priority.LOW, 11.0), (Priority.NORMAL, 10.0), (Priority.HIGH, 9.75)])
def test_priority_moves_the_arrival(priority: Priority, rank: float) -> None:
    assert rank_s(10.0, priority, SchedulingSettings()) == rank
