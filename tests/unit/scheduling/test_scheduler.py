"""The scheduler in virtual time: each request gets its own answer, or one error, exactly once.

The fixtures `virtually`, `bench`, `sequence` and `tags_of` are those of conftest.py: a scheduler on a fake executor, on
a loop that never waits. `storm` runs random callers from a seed, and planted bugs must make it fail.
"""

from __future__ import annotations

import asyncio
import gc
import random
import weakref
from dataclasses import replace

import numpy as np
import pytest
from attnserve_server.domain.errors import (
    AttnserveError,
    DeadlineExpired,
    InternalFault,
    NotServing,
    Overloaded,
)
from attnserve_server.domain.values import PreparedSequence, Priority
from attnserve_server.engine.cost import CostModel
from attnserve_server.model.manifest import AxisSpec
from attnserve_server.observability.metrics import Metrics
from attnserve_server.scheduling.policy import SchedulingSettings
from attnserve_server.scheduling.scheduler import Scheduler
from attnserve_server.scheduling.verifier import ShadowSettings


async def ticks(count: int = 20) -> None:
    """Let all ready tasks run; no time passes."""
    for _ in range(count):
        await asyncio.sleep(0)


async def end_of(task: asyncio.Task) -> BaseException | None:
    """Wait for a task, and return its exception."""
    await asyncio.wait({task})
    return asyncio.CancelledError() if task.cancelled() else task.exception()


def test_a_run_is_alone_while_requests_come_one_at_a_time(virtually, bench, sequence) -> None:
    async def story() -> None:
        async with bench:
            for tag in range(2):
                await bench.submit([sequence(tag)])
            assert bench.executor.alone == [True, True]
            await asyncio.gather(*(bench.submit([sequence(tag)]) for tag in range(9)))
            assert not any(bench.executor.alone[3:]), "others wait, run, or came just before"
            await bench.submit([sequence(0)])
            assert not bench.executor.alone[-1]
            for tag in range(200):
                await bench.submit([sequence(tag)])
            assert bench.executor.alone[-1]

    virtually(story())


def test_an_idle_instance_takes_a_sequence_at_once(virtually, bench, sequence, tags_of) -> None:
    async def story() -> None:
        async with bench:
            (result,) = await bench.submit([sequence(7)])
            assert tags_of([result]) == [7]
            assert result.queue_s == 0
            assert bench.clock.now() == pytest.approx(1001)

    virtually(story())


def test_a_request_counts_with_all_bytes_of_its_message(virtually, bench, sequence, tags_of) -> None:
    async def story() -> None:
        async with bench:
            first = asyncio.create_task(bench.submit([sequence(0)]))
            await ticks()
            padded = asyncio.create_task(bench.submit([sequence(1), sequence(2)], received_bytes=1064))
            plain = asyncio.create_task(bench.submit([sequence(3)], received_bytes=30))
            await ticks()
            # Three times 32 bytes of tensors and 8 of the answer, and 1,000 unused ones; 30 is less than the tensors.
            assert bench.metric("queue_bytes") == 1000 + 3 * (4 * 8 + 8)
            assert [tags_of(await task) for task in (first, padded, plain)] == [[0], [1, 2], [3]]
            assert bench.metric("queue_bytes") == 0

    virtually(story())


def test_requests_gather_while_the_instance_is_busy(virtually, bench, sequence, tags_of) -> None:
    async def story() -> None:
        async with bench:
            first = asyncio.create_task(bench.submit([sequence(0)]))
            await ticks()
            others = [asyncio.create_task(bench.submit([sequence(tag)])) for tag in (1, 2, 3)]
            await ticks()
            assert bench.metric("queue_depth") == 3
            assert bench.metric("queue_bytes") == 3 * (4 * 8 + 8)
            assert [tags_of(await task) for task in (first, *others)] == [[0], [1], [2], [3]]
            assert bench.executor.runs == [[0], [1, 2, 3]]
            assert bench.metric("queue_depth") == bench.metric("queue_bytes") == 0
            assert others[0].result()[0].queue_s == pytest.approx(1)

    virtually(story())


def test_every_instance_works(virtually, bench, sequence) -> None:
    bench.executor.instances = 3
    bench.settings = SchedulingSettings(max_batch_size=1)

    async def story() -> None:
        async with bench:
            await asyncio.gather(*(bench.submit([sequence(tag)]) for tag in range(3)))
            assert bench.clock.now() == pytest.approx(1001)

    virtually(story())


def test_a_request_of_many_sequences_is_answered_in_its_order(virtually, bench, sequence, tags_of) -> None:
    bench.settings = SchedulingSettings(max_batch_size=4)
    lengths = [9, 3, 50, 3, 9, 50, 1, 2, 3, 9]

    async def story() -> None:
        async with bench:
            results = await bench.submit([sequence(tag, length) for tag, length in enumerate(lengths)])
            assert tags_of(results) == list(range(10))

    virtually(story())


def test_the_first_error_fails_a_request_and_withdraws_the_rest(virtually, bench, sequence, tags_of) -> None:
    bench.settings = SchedulingSettings(max_batch_size=2)
    bench.executor.poisoned.add(1)

    async def story() -> None:
        async with bench:
            many = asyncio.create_task(bench.submit([sequence(tag) for tag in range(6)]))
            other = asyncio.create_task(bench.submit([sequence(9)]))
            assert isinstance(await end_of(many), InternalFault)
            assert tags_of(await other) == [9]
            assert bench.executor.runs == [[0, 1], [9]], "sequences of a failed request in the queue do not run"
            assert bench.metric("dropped_total", reason="failed") == 5

    virtually(story())


def test_a_failing_sequence_leaves_its_batch_neighbours_unaffected(virtually, bench, sequence, tags_of) -> None:
    bench.executor.poisoned.add(2)

    async def story() -> None:
        async with bench:
            tasks = [asyncio.create_task(bench.submit([sequence(tag)])) for tag in range(4)]
            assert isinstance(await end_of(tasks[2]), InternalFault)
            assert [tags_of(await tasks[tag]) for tag in (0, 1, 3)] == [[0], [1], [3]]
            assert bench.executor.runs == [[0, 1, 2, 3]]

    virtually(story())


def test_a_request_cancelled_in_the_queue_never_runs(virtually, bench, sequence, tags_of) -> None:
    async def story() -> None:
        async with bench:
            first = asyncio.create_task(bench.submit([sequence(0)]))
            await ticks()
            cancelled = asyncio.create_task(bench.submit([sequence(1), sequence(2)]))
            stayer = asyncio.create_task(bench.submit([sequence(3)]))
            await ticks()
            cancelled.cancel()
            assert isinstance(await end_of(cancelled), asyncio.CancelledError)
            assert tags_of(await first) + tags_of(await stayer) == [0, 3]
            assert bench.executor.runs == [[0], [3]]
            assert bench.metric("dropped_total", reason="cancelled") == 2

    virtually(story())


def test_a_request_cancelled_before_submit_starts_leaves_no_state(virtually, bench, sequence) -> None:
    async def story() -> None:
        async with bench:
            cancelled = asyncio.create_task(bench.submit([sequence(1)]))
            cancelled.cancel()
            await end_of(cancelled)
            await ticks()
            assert bench.executor.runs == []

    virtually(story())


@pytest.mark.parametrize("deadline", [None, 1000.5])
def test_a_request_cancelled_in_the_turn_of_planning_never_runs(virtually, bench, sequence, deadline) -> None:
    async def story() -> None:
        async with bench as scheduler:
            first = asyncio.create_task(bench.submit([sequence(0)]))
            await ticks()
            cancelled = asyncio.create_task(bench.submit([sequence(1)], deadline=deadline))
            await ticks()
            cancelled.cancel()  # its future is done, and its task has not run yet
            bench.clock.time_s += 0.7
            assert scheduler._next_entries() == []
            assert isinstance(await end_of(cancelled), asyncio.CancelledError)
            await first
            assert bench.executor.runs == [[0]]
            assert bench.metric("dropped_total", reason="cancelled") == 1

    virtually(story())


def test_cancelling_during_a_run_leaves_batch_neighbours_unaffected(virtually, bench, sequence, tags_of) -> None:
    async def story() -> None:
        async with bench:
            cancelled = asyncio.create_task(bench.submit([sequence(1)]))
            stayer = asyncio.create_task(bench.submit([sequence(2)]))
            await asyncio.sleep(0.5)
            cancelled.cancel()
            assert tags_of(await stayer) == [2]
            assert bench.executor.runs == [[1, 2]]
            assert bench.executor.terminated == []

    virtually(story())


def test_a_run_without_pending_requests_is_terminated(virtually, bench, sequence, tags_of) -> None:
    async def story() -> None:
        async with bench as scheduler:
            cancelled = [asyncio.create_task(bench.submit([sequence(tag)])) for tag in (1, 2)]
            await asyncio.sleep(0.5)
            cancelled[0].cancel()
            await ticks()
            assert not next(iter(scheduler._requests)).entries[0].run.handle.terminated
            cancelled[1].cancel()
            await ticks()
            assert tags_of(await bench.submit([sequence(3)])) == [3]
            assert bench.executor.terminated == [[1, 2]]
            assert bench.metric("dropped_total", reason="terminated") == 2
            assert bench.clock.now() < 1001.6, "the instance was free at once"

    virtually(story())


def test_cancelling_after_the_answer_has_no_effect(virtually, bench, sequence, tags_of) -> None:
    async def story() -> None:
        async with bench as scheduler:
            cancelled = asyncio.create_task(bench.submit([sequence(1)]))
            stayer = asyncio.create_task(bench.submit([sequence(2)]))
            real = scheduler._resolve

            def resolve_and_leave(entry, outcome, started) -> None:
                real(entry, outcome, started)
                if entry.number == 0:
                    cancelled.cancel()

            scheduler._resolve = resolve_and_leave
            assert tags_of(await stayer) == [2]
            assert isinstance(await end_of(cancelled), asyncio.CancelledError)

    virtually(story())


def test_a_request_past_its_deadline_is_not_admitted(virtually, bench, sequence) -> None:
    async def story() -> None:
        async with bench:
            with pytest.raises(DeadlineExpired):
                await bench.submit([sequence(1)], deadline=1000.0)
            assert bench.executor.runs == []

    virtually(story())


def test_a_request_that_expires_in_the_queue_never_runs(virtually, bench, sequence) -> None:
    async def story() -> None:
        async with bench:
            first = asyncio.create_task(bench.submit([sequence(0)]))
            await ticks()
            with pytest.raises(DeadlineExpired) as caught:
                await bench.submit([sequence(1)], deadline=1000.5)
            assert bench.clock.now() == pytest.approx(1000.5)
            assert caught.value.waited_s == pytest.approx(0.5)
            await first
            assert bench.executor.runs == [[0]]
            assert bench.metric("dropped_total", reason="expired") == 1

    virtually(story())


def test_a_deadline_during_a_run_fails_the_request_at_once(virtually, bench, sequence, tags_of) -> None:
    async def story() -> None:
        async with bench:
            patient = asyncio.create_task(bench.submit([sequence(0)]))
            hasty = asyncio.create_task(bench.submit([sequence(1)], deadline=1000.3))
            assert isinstance(await end_of(hasty), DeadlineExpired)
            assert bench.clock.now() == pytest.approx(1000.3)
            assert tags_of(await patient) == [0]
            assert bench.clock.now() == pytest.approx(1001)
            with pytest.raises(DeadlineExpired):
                await bench.submit([sequence(2)], deadline=1001.5)
            await asyncio.sleep(0.1)
            assert bench.executor.terminated == [[2]], "all requests of that run have ended"

    virtually(story())


def test_a_request_that_expires_while_the_loop_is_blocked_never_runs(virtually, bench, sequence) -> None:
    async def story() -> None:
        async with bench as scheduler:
            late = asyncio.create_task(bench.submit([sequence(1)], deadline=1000.5))
            in_time = asyncio.create_task(bench.submit([sequence(2)], deadline=1009))
            for _ in range(2):  # both submitted; the instance has not woken yet
                await asyncio.sleep(0)
                if len(scheduler._queue) == 2:
                    bench.clock.time_s += 1  # the loop was blocked for a second
                    break
            assert isinstance(await end_of(late), DeadlineExpired)
            await in_time
            assert bench.executor.runs == [[2]]

    virtually(story())


def test_requests_that_cannot_end_in_time_are_dropped_for_others(virtually, bench, sequence) -> None:
    # A row takes a second and the run itself two, as predicted.
    bench.executor.cost = CostModel(run_s=2.0, sequence_s=1.0, token_s=1e-9, pair_s=0.0)
    bench.executor.seconds = lambda sequences: 2.0 + len(sequences)

    async def story() -> None:
        async with bench:
            await bench.submit([sequence(0)])  # 3 s, which determine the pace
            running = asyncio.create_task(bench.submit([sequence(1)]))
            await ticks()
            hopeless = asyncio.create_task(bench.submit([sequence(2)], deadline=bench.clock.now() + 5))
            patient = asyncio.create_task(bench.submit([sequence(3)], deadline=bench.clock.now() + 20))
            error = await end_of(hopeless)
            assert isinstance(error, DeadlineExpired)
            assert error.waited_s == pytest.approx(3), "when the instance became free, 2 s before the deadline"
            assert "no run would end before the deadline" in str(error)
            await asyncio.gather(running, patient)
            assert bench.executor.runs == [[0], [1], [3]]
            # It runs if nothing else waits, because the prediction may have been too high.
            bench.executor.seconds = lambda sequences: 0.5
            await bench.submit([sequence(4)], deadline=bench.clock.now() + 1)

    virtually(story())


def test_deadlines_follow_the_injected_clock_when_the_loops_clock_is_ahead(virtually, bench, sequence) -> None:
    async def story() -> None:
        loop = asyncio.get_running_loop()
        ahead = 0.0
        real = loop.time
        loop.time = lambda: real() + ahead  # type: ignore[method-assign]
        async with bench:
            task = asyncio.create_task(bench.submit([sequence(1)], deadline=1000.5))
            await ticks()
            ahead = 10.0  # every timer set so far fires now
            await ticks()
            assert not task.done()
            assert isinstance(await end_of(task), DeadlineExpired)
            assert bench.clock.now() == pytest.approx(1000.5)

    virtually(story())


def test_a_full_queue_refuses_with_a_retry_delay(virtually, bench, sequence) -> None:
    bench.settings = SchedulingSettings(max_queue_size=2, max_batch_size=1)

    async def story() -> None:
        async with bench as scheduler:
            tasks = [asyncio.create_task(bench.submit([sequence(tag)])) for tag in range(1)]
            await ticks()
            tasks += [asyncio.create_task(bench.submit([sequence(tag)])) for tag in (1, 2)]
            await ticks()
            with pytest.raises(Overloaded) as caught:
                await bench.submit([sequence(3)])
            assert (caught.value.cause, caught.value.limit, caught.value.value) == ("queue_full", 2, 3)
            assert caught.value.retry_delay_s > 0
            assert bench.metric("refused_total", reason="queue_full") == 1
            with pytest.raises(Overloaded):
                scheduler.check_room(None)
            await asyncio.gather(*tasks)
            scheduler.check_room(None)
            await bench.submit([sequence(3)])

    virtually(story())


def test_a_predicted_wait_beyond_the_deadline_is_refused_at_once(virtually, bench, sequence) -> None:
    bench.executor.cost = CostModel(
        run_s=0.0, sequence_s=0.0, token_s=0.25, pair_s=0.0
    )  # four tokens a second, as the fake executor takes
    bench.settings = SchedulingSettings(max_batch_size=1, wait_headroom=1.0)

    async def story() -> None:
        async with bench:
            tasks = [asyncio.create_task(bench.submit([sequence(tag)])) for tag in range(3)]
            await ticks()
            with pytest.raises(Overloaded) as caught:
                await bench.submit([sequence(3)], deadline=1001.5)
            assert caught.value.cause == "predicted_wait"
            assert bench.clock.now() == 1000.0
            # half of the running batch, two waiting and its own run are 3.5 s, and its deadline allows 1.5 s
            assert caught.value.retry_delay_s == pytest.approx(2.0)
            await asyncio.sleep(caught.value.retry_delay_s)
            await bench.submit([sequence(3)], deadline=bench.clock.now() + 3)
            await asyncio.gather(*tasks)

    virtually(story())


def test_priorities_change_the_order(virtually, bench, sequence) -> None:
    bench.settings = SchedulingSettings(max_batch_size=1)

    async def story() -> None:
        async with bench:
            order = [Priority.NORMAL, Priority.LOW, Priority.NORMAL, Priority.HIGH]
            await asyncio.gather(
                *(bench.submit([sequence(tag)], priority=priority) for tag, priority in enumerate(order))
            )
            assert bench.executor.runs == [[3], [0], [2], [1]]

    virtually(story())


def test_low_priority_is_overtaken_only_within_its_delay(virtually, bench, sequence) -> None:
    bench.settings = SchedulingSettings(max_batch_size=1, low_delay_s=0.95)
    bench.executor.seconds = lambda sequences: 0.3

    async def story() -> None:
        async with bench:
            tasks = []
            for tag in range(20):  # one arrives every 0.1 s, and one ends every 0.3 s: the queue grows
                priority = Priority.LOW if tag == 1 else Priority.NORMAL
                tasks.append(asyncio.create_task(bench.submit([sequence(tag)], priority=priority)))
                await asyncio.sleep(0.1)
            await asyncio.gather(*tasks)
            assert [tag for (tag,) in bench.executor.runs].index(1) == 10

    virtually(story())


def test_drain_refuses_new_requests_and_finishes_pending_ones(virtually, bench, sequence, tags_of) -> None:
    bench.settings = SchedulingSettings(max_batch_size=1)

    async def story() -> None:
        async with bench as scheduler:
            tasks = [asyncio.create_task(bench.submit([sequence(tag)])) for tag in range(3)]
            await ticks()
            draining = asyncio.create_task(scheduler.drain())
            await ticks()
            with pytest.raises(NotServing, match="draining"):
                await bench.submit([sequence(9)])
            await draining
            assert [tags_of(task.result()) for task in tasks] == [[0], [1], [2]]
            assert not scheduler.healthy
            assert bench.faults == []

    virtually(story())


def test_an_idle_scheduler_drains_at_once(virtually, bench) -> None:
    bench.executor.instances = 2

    async def story() -> None:
        async with bench as scheduler:
            await ticks()
            await scheduler.drain()
            assert bench.clock.now() == 1000.0

    virtually(story())


def test_close_fails_pending_requests_and_terminates_runs(virtually, bench, sequence) -> None:
    bench.settings = SchedulingSettings(max_batch_size=1)
    bench.executor.seconds = lambda sequences: 1e9

    async def story() -> None:
        async with bench as scheduler:
            tasks = [asyncio.create_task(bench.submit([sequence(tag)])) for tag in range(3)]
            await asyncio.sleep(1)
            await scheduler.aclose()
            assert [type(await end_of(task)) for task in tasks] == [NotServing] * 3
            assert bench.executor.terminated == [[0]]

    virtually(story())


def test_a_scheduler_that_was_not_started_does_not_serve(virtually, bench, sequence) -> None:
    async def story() -> None:
        async with bench as scheduler:
            await scheduler.drain()
            scheduler._task, scheduler._draining = None, False
            with pytest.raises(NotServing, match="loading"):
                await bench.submit([sequence(1)])
            await scheduler.drain()

    virtually(story())


@pytest.mark.parametrize("how", ["policy", "executor", "answer", "cancelled"])
def test_a_loop_that_dies_fails_pending_requests_and_reports_a_fault(
    virtually, bench, sequence, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    bench.executor.instances = 2
    bench.settings = SchedulingSettings(max_batch_size=1)

    async def story() -> None:
        async with bench as scheduler:
            assert scheduler.healthy
            running = asyncio.create_task(bench.submit([sequence(1)]))
            await ticks()
            if how == "policy":
                monkeypatch.setattr(
                    "attnserve_server.scheduling.scheduler.plan", lambda *_: (_ for _ in ()).throw(KeyError("bug"))
                )
            elif how == "executor":
                bench.executor.breaks = True
            elif how == "answer":
                monkeypatch.setattr(scheduler, "_resolve", lambda *_: (_ for _ in ()).throw(KeyError("bug")))
            else:
                scheduler._task.cancel()
            queued = [asyncio.create_task(bench.submit([sequence(tag)])) for tag in (2, 3)]
            assert [type(await end_of(task)) for task in (running, *queued)] == [InternalFault] * 3
            assert not scheduler.healthy
            assert bench.faults == ["fault"]
            with pytest.raises(NotServing, match="failed"):
                await bench.submit([sequence(4)])
            assert bench.metric("queue_depth") == 0

    virtually(story())


def test_a_high_measured_overhead_makes_large_batches(virtually, bench, sequence) -> None:
    bench.executor.cost = CostModel(
        run_s=1.0, sequence_s=0.0, token_s=0.001, pair_s=0.0
    )  # as much as a thousand tokens

    async def story() -> None:
        async with bench:
            await bench.submit([sequence(tag, length) for tag, length in enumerate([4, 40, 80, 120])])
            assert [set(run) for run in bench.executor.runs] == [{0, 1, 2, 3}]

    virtually(story())


def test_sequences_of_other_lengths_on_a_rigid_axis_run_apart(virtually, bench, sequence, monkeypatch) -> None:
    module = __import__(type(bench).__module__, fromlist=["MANIFEST"])
    rigid = module.MANIFEST.model_copy(update={"axes": (AxisSpec(symbol="seq", max_length=9, paddable=False),)})
    monkeypatch.setattr(module, "MANIFEST", rigid)

    async def story() -> None:
        async with bench:
            await bench.submit([sequence(0, 4), sequence(1, 5), sequence(2, 4), sequence(3, 5)])
            assert bench.executor.runs == [[0, 2], [1, 3]]

    virtually(story())


@pytest.mark.parametrize(
    ("unpadded", "runs"),
    [((), [{0, 1, 2, 3, 4}]), ((1, 2, 3), [{0, 4}, {1, 3}, {2}])],
    ids=["all may be padded", "three may not"],
)
def test_unpadded_sequences_share_runs_only_with_their_own_lengths(
    virtually, bench, sequence, unpadded: tuple[int, ...], runs: list[set[int]]
) -> None:
    bench.executor.cost = CostModel(
        run_s=1.0, sequence_s=0.0, token_s=0.001, pair_s=0.0
    )  # as much as a thousand tokens
    lengths = [4, 5, 4, 5, 6]

    async def story() -> None:
        async with bench:
            sequences = [replace(sequence(tag, length), unpadded=tag in unpadded) for tag, length in enumerate(lengths)]
            await bench.submit(sequences)
            assert [set(run) for run in bench.executor.runs] == runs

    virtually(story())


def test_an_unpadded_sequence_shares_runs_only_with_equal_lengths_on_both_axes(virtually, bench, monkeypatch) -> None:
    bench.executor.cost = CostModel(run_s=1.0, sequence_s=0.0, token_s=0.001, pair_s=0.0)
    module = __import__(type(bench).__module__, fromlist=["MANIFEST"])
    axes = (*module.MANIFEST.axes, AxisSpec(symbol="patch", max_length=9, paddable=False))
    monkeypatch.setattr(module, "MANIFEST", module.MANIFEST.model_copy(update={"axes": axes}))

    def sequence(tag: int, seq: int, patch: int, *, unpadded: bool = False) -> PreparedSequence:
        tensors = {"input_ids": np.full(seq, tag, np.int64)}
        return PreparedSequence(tensors, {"seq": seq, "patch": patch}, ("embedding",), unpadded=unpadded)

    async def story() -> None:
        async with bench:
            padded = [sequence(0, 4, 2), sequence(1, 6, 2), sequence(2, 4, 3)]
            whole = [
                sequence(3, 4, 2, unpadded=True),
                sequence(4, 4, 2, unpadded=True),
                sequence(5, 6, 2, unpadded=True),
            ]
            await bench.submit([*padded, *whole])
            assert sorted(map(sorted, bench.executor.runs)) == [[0, 1], [2], [3, 4], [5]]

    virtually(story())


def test_a_measured_overhead_of_zero_does_not_prevent_batching(virtually, bench, sequence) -> None:
    bench.executor.cost = CostModel(run_s=0.0, sequence_s=0.0, token_s=0.001, pair_s=0.0)

    async def story() -> None:
        async with bench:
            await bench.submit([sequence(0), sequence(1)])
            assert bench.executor.runs == [[0, 1]]

    virtually(story())


@pytest.mark.parametrize("end", ["answered", "failed", "expired", "cancelled"])
def test_an_ended_request_is_freed(virtually, bench, sequence, end: str) -> None:
    bench.executor.poisoned = {1} if end == "failed" else set()

    async def story() -> None:
        async with bench:
            kept = []
            sequences = [sequence(1), sequence(2)]
            kept = [weakref.ref(one.tensors["input_ids"]) for one in sequences]
            deadline = bench.clock.now() + 0.5 if end == "expired" else None
            task = asyncio.create_task(bench.submit(sequences, deadline=deadline))
            del sequences
            await asyncio.sleep(0.2)
            if end == "cancelled":
                task.cancel()
            await end_of(task)
            assert (task.cancelled() or task.exception() is not None) is (end != "answered")
            del task
            await asyncio.sleep(2)
            await bench.submit([sequence(3)])  # the instance's loop drops the run before
            assert [ref() for ref in kept] == [None, None]

    gc.disable()  # reference counts must suffice: tensors may be large, and collections rare
    try:
        virtually(story())
    finally:
        gc.enable()


def storm(virtually, bench, sequence, tags_of, seed: int) -> None:
    """Sixty callers at random, of whom some leave and some have deadlines; asserts that each is answered rightly.

    With an odd seed, half of what is batched is repeated alone wherever an instance is idle.
    """
    bench.shadow = ShadowSettings(share=0.5) if seed % 2 else None
    chance = random.Random(seed)
    bench.executor.instances = chance.choice([1, 2, 3])
    bench.executor.seconds = lambda sequences: 0.02 + 0.01 * len(sequences)
    bench.executor.poisoned = {tag for tag in range(300) if chance.random() < 0.02}
    bench.settings = SchedulingSettings(max_batch_size=chance.choice([1, 4, 16]), max_queue_size=40)
    ends: dict[int, object] = {}

    async def caller(scheduler, first: int, many: int) -> None:
        await asyncio.sleep(chance.random() * 2)
        wanted = list(range(first, first + many))
        deadline = bench.clock.now() + chance.random() * 0.3 if chance.random() < 0.3 else None
        submitted = asyncio.create_task(
            bench.submit(
                [sequence(tag, chance.randint(1, 60)) for tag in wanted],
                deadline=deadline,
                priority=chance.choice(list(Priority)),
            )
        )
        ended_s: list[float] = []
        submitted.add_done_callback(lambda _: ended_s.append(bench.clock.now()))
        if chance.random() < 0.3:
            await asyncio.sleep(chance.random() * 0.1)
            submitted.cancel()
        error = await end_of(submitted)
        assert first not in ends
        ends[first] = error or tags_of(submitted.result()) == wanted
        if deadline is not None:
            assert ended_s[0] <= deadline + 1e-3  # a loop timer's grain

    async def story() -> None:
        async with bench as scheduler:
            sizes = [chance.choice([1, 1, 1, 2, 5]) for _ in range(60)]
            await asyncio.gather(*(caller(scheduler, sum(sizes[:at]), size) for at, size in enumerate(sizes)))
            await scheduler.drain()
            assert len(ends) == 60
            for end in ends.values():
                assert end is True or isinstance(end, AttnserveError | asyncio.CancelledError), end
            ran = [tag for run in bench.executor.runs for tag in run]
            assert len(ran) == len(set(ran)), "no sequence runs twice"
            assert not scheduler._running_tokens
            assert len(scheduler._queue) == 0
            assert bench.metric("queue_depth") == bench.metric("queue_bytes") == 0
            if bench.verifier is not None:
                assert (bench.verifier._samples, bench.verifier._bytes) == (0, 0)

    virtually(story())


@pytest.mark.parametrize("seed", range(60))
def test_each_request_gets_its_own_answer_once(virtually, bench, sequence, tags_of, seed: int) -> None:
    storm(virtually, bench, sequence, tags_of, seed)


def swapped(self: Scheduler, entry, outcome, started) -> None:
    """A bug: a result is stored for another sequence."""
    twin = min((one for run in self._last for one in run), key=lambda one: one is entry)
    REAL_RESOLVE(self, twin, outcome, started)


def lost(self: Scheduler, entry, outcome, started) -> None:
    """A bug: one result in ten is lost."""
    if entry.number % 10:
        REAL_RESOLVE(self, entry, outcome, started)


def late(self: Scheduler, request) -> None:
    """A bug: deadlines have no effect while a sequence runs."""
    if any(entry.waiting for entry in request.entries):
        REAL_EXPIRE(self, request)


REAL_RESOLVE = Scheduler._resolve
REAL_EXPIRE = Scheduler._expire


@pytest.mark.parametrize(("method", "bug"), [("_resolve", swapped), ("_resolve", lost), ("_expire", late)])
def test_the_random_scheduler_test_detects_bugs(
    virtually, bench, sequence, tags_of, monkeypatch, method: str, bug
) -> None:
    real_run = Scheduler._run

    async def remember(self: Scheduler, entries, instance) -> None:
        self._last = [entries]
        await real_run(self, entries, instance)

    monkeypatch.setattr(Scheduler, "_run", remember)
    monkeypatch.setattr(Scheduler, method, bug)

    def storms() -> None:
        for seed in range(10):
            executor = replace(bench.executor, runs=[], busy=set())
            storm(virtually, replace(bench, metrics=Metrics(), executor=executor), sequence, tags_of, seed)

    with pytest.raises(AssertionError):
        storms()
