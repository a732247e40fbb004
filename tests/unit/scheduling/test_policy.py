from __future__ import annotations

import random
from dataclasses import replace
from math import prod

import pytest
from attnserve_server.domain.values import Priority
from attnserve_server.scheduling.policy import DEFAULT_RUN_OVERHEAD_TOKENS, SchedulingSettings, Waiting, plan, rank_s
from hypothesis import given
from hypothesis import strategies as st

NOW = 100.0


def line(*lengths: int, **common: object) -> list[Waiting]:
    """Sequences of these lengths along one axis, in order of arrival."""
    return [Waiting(rank_s=float(at), lengths=(length,), **common) for at, length in enumerate(lengths)]  # type: ignore[arg-type]


def score(view: list[Waiting], members: list[int] | tuple[int, ...], overhead: float) -> float:
    """Useful tokens per unit of work, from the definition."""
    padded = [max(column) for column in zip(*(view[at].lengths for at in members), strict=True)]
    return sum(view[at].tokens for at in members) / (overhead + len(members) * sum(padded))


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
    look_ahead=st.integers(1, 12),
    run_overhead_tokens=st.none() | st.floats(0, 5000),
)


@given(views(), bounds)
def test_the_oldest_that_has_not_expired_is_always_in(view: list[Waiting], settings: SchedulingSettings) -> None:
    planned = plan(view, NOW, settings)
    alive = [at for at, one in enumerate(view) if one.deadline_s is None or one.deadline_s > NOW]
    assert set(planned.expired) == set(range(len(view))) - set(alive)
    if alive:
        assert planned.indices[0] == min(alive, key=lambda at: view[at].rank_s)
    else:
        assert planned.indices == ()
    assert not set(planned.indices) & set(planned.expired)
    assert len(set(planned.indices)) == len(planned.indices)


@given(views(), bounds)
def test_bounds_are_never_exceeded_but_by_the_oldest_alone(view: list[Waiting], settings: SchedulingSettings) -> None:
    members = plan(view, NOW, settings).indices
    if len(members) < 2:
        return
    assert len(members) <= settings.max_batch_size
    padded = [max(column) for column in zip(*(view[at].lengths for at in members), strict=True)]
    assert len(members) * sum(padded) <= settings.max_batch_tokens
    assert bytes_of(view, members) <= settings.max_batch_bytes
    assert len({view[at].rigid for at in members}) == 1


@given(views(), bounds)
def test_a_run_is_never_worse_than_the_oldest_alone(view: list[Waiting], settings: SchedulingSettings) -> None:
    members = plan(view, NOW, settings).indices
    overhead = DEFAULT_RUN_OVERHEAD_TOKENS if settings.run_overhead_tokens is None else settings.run_overhead_tokens
    if members:
        # the policy adds up in another order: rounding only
        assert score(view, members, overhead) >= score(view, members[:1], overhead) - 1e-9


@given(views(), bounds)
def test_only_the_oldest_within_the_look_ahead_join(view: list[Waiting], settings: SchedulingSettings) -> None:
    planned = plan(view, NOW, settings)
    alive = sorted(set(range(len(view))) - set(planned.expired), key=lambda at: view[at].rank_s)
    assert set(planned.indices) <= set(alive[: settings.look_ahead])


@given(views(), bounds, st.randoms(use_true_random=False))
def test_the_order_of_the_view_does_not_matter(
    view: list[Waiting], settings: SchedulingSettings, shuffle: random.Random
) -> None:
    order = list(range(len(view)))
    shuffle.shuffle(order)
    shuffled = plan([view[at] for at in order], NOW, settings)
    straight = plan(view, NOW, settings)
    assert [order[at] for at in shuffled.indices] == list(straight.indices)
    assert {order[at] for at in shuffled.expired} == set(straight.expired)


@given(st.lists(st.integers(4, 256), min_size=1, max_size=60), st.integers(1, 8), st.integers(0, 100))
def test_nothing_starves(lengths: list[int], max_batch_size: int, seed: int) -> None:
    settings = SchedulingSettings(max_batch_size=max_batch_size, look_ahead=16)
    chance = random.Random(seed)
    waiting = dict(enumerate(line(*lengths)))
    ahead = {at: at for at in waiting}
    runs, newest = 0, len(waiting)
    while any(at < len(lengths) for at in waiting):
        order = list(waiting)
        for at in plan([waiting[at] for at in order], NOW, settings).indices:
            number = order[at]
            assert runs <= ahead.get(number, runs), "overtaken more often than there were sequences before it"
            del waiting[number]
        runs += 1
        for _ in range(max_batch_size):  # as many come as can go, of the lengths that the policy likes
            waiting[newest] = Waiting(float(newest), (chance.choice([32, 32, 33]),))
            newest += 1


def test_nothing_waits_and_nothing_runs() -> None:
    assert plan([], NOW, SchedulingSettings()).indices == ()


def test_near_equal_lengths_go_together_on_a_cpu() -> None:
    assert set(plan(line(32, 250, 31, 8, 33, 120), NOW, SchedulingSettings()).indices) == {0, 2, 4}


def test_everything_goes_together_where_launches_dominate() -> None:
    settings = SchedulingSettings(run_overhead_tokens=5000)
    assert set(plan(line(32, 120, 31, 24, 33, 60), NOW, settings).indices) == set(range(6))
    assert len(plan(line(32, 120, 31, 24, 33, 60), NOW, SchedulingSettings()).indices) == 3


def test_without_overhead_only_equal_lengths_could_join_and_none_needs_to() -> None:
    assert plan(line(32, 32, 33), NOW, SchedulingSettings(run_overhead_tokens=0)).indices == (0,)


def test_among_equal_lengths_the_older_joins() -> None:
    settings = SchedulingSettings(max_batch_size=2)
    assert plan(line(32, 30, 30, 30), NOW, settings).indices == (0, 1)
    assert plan(line(32, 34, 34, 34), NOW, settings).indices == (0, 1)
    assert plan(line(32, 32, 32, 32), NOW, settings).indices == (0, 1)


def test_a_sequence_too_long_for_any_run_goes_alone() -> None:
    settings = SchedulingSettings(max_batch_tokens=64)
    assert plan(line(100, 100, 10), NOW, settings).indices == (0,)


def test_one_that_needs_too_many_bytes_is_passed_over_for_the_next() -> None:
    settings = SchedulingSettings(max_batch_bytes=100)
    view = line(10, 10, 10)
    view[1] = replace(view[1], footprint={(0, 0): 2})
    assert plan(view, NOW, settings).indices == (0, 2)


def test_attention_maps_count_at_their_padded_size() -> None:
    short_that_asks = replace(line(10)[0], footprint={(0, 0): 1})
    longer = replace(line(20)[0], rank_s=1.0)
    settings = SchedulingSettings(run_overhead_tokens=1000, max_batch_bytes=399)
    assert plan([short_that_asks, longer], NOW, settings).indices == (0,), "20 x 20 positions once padded"
    assert plan([short_that_asks, longer], NOW, replace(settings, max_batch_bytes=400)).indices == (0, 1)


def test_lengths_along_several_axes_are_weighed_together() -> None:
    view = [Waiting(float(at), lengths) for at, lengths in enumerate([(30, 10), (10, 30), (30, 11), (29, 10)])]
    assert set(plan(view, NOW, SchedulingSettings()).indices) == {0, 2, 3}


@pytest.mark.parametrize(("priority", "rank"), [(Priority.LOW, 11.0), (Priority.NORMAL, 10.0), (Priority.HIGH, 9.75)])
def test_priority_moves_the_arrival(priority: Priority, rank: float) -> None:
    assert rank_s(10.0, priority, SchedulingSettings()) == rank
