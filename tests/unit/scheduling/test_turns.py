"""Callers take turns by what they have had; with one caller the order is that of arrival."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from attnserve_server.domain.errors import Overloaded
from attnserve_server.engine.cost import CostModel
from attnserve_server.scheduling.admission import Demand, Load, Pricing, refusal
from attnserve_server.scheduling.policy import Candidate, SchedulingSettings, plan
from attnserve_server.scheduling.queue import Entry, Queue, Request
from hypothesis import given
from hypothesis import strategies as st

COST = CostModel(run_s=1e-3, sequence_s=0.0, token_s=1e-3, pair_s=0.0)
ALONE = SchedulingSettings(max_batch_size=1)


def entry(number: int, caller: str, tokens: int = 10, at_s: float | None = None) -> Entry:
    arrived_s = float(number) if at_s is None else at_s
    sequence = SimpleNamespace(tokens=tokens)
    return Entry(Request(caller=caller), 0, number, sequence, Candidate(arrived_s, (tokens,)), 8)  # type: ignore[arg-type]


def run_all(queue: Queue, settings: SchedulingSettings = ALONE, most: int = 10_000) -> list[list[Entry]]:
    """Run until the queue is empty, or `most` runs."""
    runs = []
    while len(queue) and len(runs) < most:
        front = queue.candidates(128)
        planned = plan([one.candidate for one in front], 1e6, settings, COST, first=0)
        chosen = [front[at] for at in planned.indices]
        queue.take(chosen, COST)
        runs.append(chosen)
    return runs


def test_a_new_caller_runs_next_however_many_sequences_of_another_wait() -> None:
    queue = Queue()
    for number in range(400):
        queue.push(entry(number, "greedy"))
    run_all(queue, most=50)
    queue.push(entry(1000, "canary"))
    (first,), (second,) = run_all(queue, most=2)
    assert "canary" in {first.request.caller, second.request.caller}
    assert queue.waiting("canary") == Demand(0, 0, 0)
    assert queue.waiting("greedy").sequences == 349


@pytest.mark.parametrize("settings", [ALONE, SchedulingSettings()], ids=["alone", "batches"])
def test_callers_that_always_wait_get_equal_time_for_all_lengths(settings: SchedulingSettings) -> None:
    queue = Queue()
    for number in range(2000):
        queue.push(entry(number, "short", 5))
        queue.push(entry(number, "long", 20))
    taken, longest_s = {"short": 0.0, "long": 0.0}, 0.0
    for _ in range(25):
        (run,) = run_all(queue, settings, most=1)
        costs = [COST.run_s / len(run) + COST.row_s(one.candidate.tokens) for one in run]
        longest_s = max(longest_s, sum(costs))
        for one, cost_s in zip(run, costs, strict=True):
            taken[one.request.caller] += cost_s
    assert queue.callers == 2, "both wait throughout"
    assert abs(taken["short"] - taken["long"]) <= longest_s


def test_a_caller_saves_nothing_up_while_it_sends_nothing() -> None:
    queue = Queue()
    for number in range(300):
        queue.push(entry(number, "steady"))
        queue.push(entry(number, "other"))
    run_all(queue, most=200)
    for number in range(100):
        queue.push(entry(2000 + number, "back"))
    callers = [run[0].request.caller for run in run_all(queue, most=60)]
    assert callers.count("back") <= 22, "a third"


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 30)), min_size=1, max_size=40))
def test_with_one_caller_the_order_is_that_of_arrival(arrivals: list[tuple[float, int]]) -> None:
    queue = Queue()
    entries = [entry(number, "only", tokens, at_s) for number, (at_s, tokens) in enumerate(arrivals)]
    for one in entries:
        queue.push(one)
    ran = [run[0] for run in run_all(queue)]
    assert ran == sorted(entries, key=lambda one: one.arrival_key)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=120))
def test_every_sequence_runs_once_and_counts_agree(steps: list[tuple[str, bool]]) -> None:
    queue, pushed, ran = Queue(), 0, 0
    for number, (caller, runs) in enumerate(steps):
        queue.push(entry(number, caller))
        pushed += 1
        if runs:
            ran += sum(map(len, run_all(queue, most=1)))
        assert sum(queue.waiting(one).sequences for one in "abcd") == len(queue) == pushed - ran
        assert queue.callers == sum(queue.waiting(one).sequences > 0 for one in "abcd")
    assert sum(map(len, run_all(queue))) == pushed - ran
    assert queue.callers == 0


# Admission


def load(own: int, others: int, callers: int) -> Load:
    waiting = Demand(own + others, 10 * (own + others), own + others)
    return Load(waiting, 20, 1, 1e-2, Demand(own, 10 * own, own), callers)


def test_the_predicted_wait_of_a_caller_is_that_of_its_turn() -> None:
    demand, settings = Demand(1, 10, 1), SchedulingSettings()
    assert refusal(demand, load(0, 400, 1), 1.0, settings) is None
    refused = refusal(demand, load(400, 0, 1), 1.0, settings)
    assert refused is not None
    assert refused.cause == "predicted_wait"
    assert refusal(demand, load(0, 400, 30), 1.0, settings) is not None, "thirty others have their turns before"


def test_a_small_caller_finds_room_in_a_queue_that_another_has_filled() -> None:
    demand, settings = Demand(1, 10, 1), SchedulingSettings(max_queue_size=400)
    assert refusal(demand, load(0, 400, 1), None, settings) is None
    assert refusal(demand, load(400, 0, 1), None, settings) is not None
    assert refusal(demand, load(0, 450, 1), None, settings) is not None, "an eighth above the bound is the limit"


@pytest.mark.parametrize("predicted", [True, False], ids=["cost model", "control"])
def test_hopeless_requests_are_refused_before_the_first_run_has_ended(
    virtually, bench, sequence, monkeypatch: pytest.MonkeyPatch, predicted: bool
) -> None:
    if not predicted:
        monkeypatch.setattr(Pricing, "seconds_per_token", lambda self, *_: self.speed.seconds_per_token)
    bench.executor.cost = CostModel(run_s=1.0, sequence_s=0.0, token_s=1e-6, pair_s=0.0)  # each run takes a second
    bench.settings = SchedulingSettings(max_batch_size=4)

    refused: list[str] = []

    async def story() -> int:
        admitted = 0
        async with bench as scheduler:
            for tag in range(400):
                request = Request(str(tag), bench.clock.now() + 3.0)
                try:
                    scheduler.check_room(request.deadline_s)
                    scheduler.submit(request, [sequence(tag)]).add_done_callback(lambda done: done.exception())
                except Overloaded as error:
                    refused.append(str(error))
                    continue
                admitted += 1
                await asyncio.sleep(0)
        return admitted

    admitted = virtually(story())
    assert (4 <= admitted <= 16) if predicted else admitted == 400, (admitted, refused[:3])
