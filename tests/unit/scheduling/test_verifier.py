"""The shadow check in virtual time: served work goes first, samples are bounded, differences are counted.

The shadow check repeats a share of the batched sequences alone and compares the answers. The fixtures are those of
conftest.py; tags in `mixed` of the fake executor differ when repeated, and tags in `poisoned` fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import logging
import random
import weakref

import pytest
from attnserve_server.domain.errors import InternalFault, NotServing
from attnserve_server.scheduling.policy import SchedulingSettings
from attnserve_server.scheduling.verifier import ShadowSettings

EVERY = ShadowSettings(share=1.0)
LOGGER = "attnserve_server.scheduling.verifier"


async def ticks(count: int = 20) -> None:
    """Let all ready tasks run; no time passes."""
    for _ in range(count):
        await asyncio.sleep(0)


async def settled(bench, drawn: int) -> None:
    """Wait, in virtual time, until so many drawn sequences have an outcome, and then for any further ones."""
    async with asyncio.timeout(1000):
        while sum(bench.checks().values()) < drawn:  # noqa: ASYNC110 - metrics have no event
            await asyncio.sleep(0.1)
    await asyncio.sleep(10)
    assert (bench.verifier._samples, bench.verifier._bytes) == (0, 0), "the samples are released"


def test_batched_sequences_are_repeated_alone_after_their_answers(virtually, bench, sequence, tags_of) -> None:
    bench.shadow = EVERY

    async def story() -> None:
        async with bench:
            assert tags_of(await bench.submit([sequence(1), sequence(2)])) == [1, 2]
            answered = bench.clock.now()
            assert bench.executor.repeats == []
            await settled(bench, 2)
            assert [tag for tag, _, _ in bench.executor.repeats] == [1, 2]
            assert all(start >= answered + EVERY.rest_s for _, _, start in bench.executor.repeats)
            assert bench.checks() == {"equal": 2}
            assert bench.metric("batch_mismatch_total") == 0

    virtually(story())


def test_a_sequence_that_ran_alone_is_not_repeated(virtually, bench, sequence) -> None:
    bench.shadow = EVERY

    async def story() -> None:
        async with bench:
            for tag in range(5):
                await bench.submit([sequence(tag)])
                await asyncio.sleep(5)
            assert bench.executor.runs == [[0], [1], [2], [3], [4]]
            assert [keep for _, keep in bench.executor.handed] == [False] * 5
            assert bench.executor.repeats == []
            assert bench.checks() == {}

    virtually(story())


@pytest.mark.parametrize("poisoned", [set(), {1}])
def test_a_sequence_of_a_split_batch_is_not_repeated(virtually, bench, sequence, poisoned: set[int]) -> None:
    bench.shadow = EVERY
    bench.executor.splits = True
    bench.executor.poisoned = poisoned

    async def story() -> None:
        async with bench:
            with pytest.raises(InternalFault) if poisoned else contextlib.nullcontext():
                await bench.submit([sequence(1)] * 2)
            await asyncio.sleep(5)
            assert (bench.executor.repeats, bench.checks()) == ([], {})
            assert bench.verifier._samples == 0

    virtually(story())


def test_a_sample_waits_until_all_of_its_request_is_answered(virtually, bench, sequence, tags_of) -> None:
    bench.shadow = EVERY
    bench.settings = SchedulingSettings(max_batch_size=2)
    bench.executor.instances = 3
    bench.executor.seconds = lambda sequences: 8.0 if len(sequences) == 1 else 1.0

    async def story() -> None:
        async with bench:
            await bench.submit([sequence(1), sequence(2), sequence(3)])
            assert bench.executor.runs == [[1, 2], [3]]
            assert bench.clock.now() == pytest.approx(1008)
            assert bench.executor.repeats == [], "two instances were idle for seven seconds"
            await settled(bench, 2)
            assert [tag for tag, _, _ in bench.executor.repeats] == [1, 2]

    virtually(story())


def test_the_drawn_share_is_the_configured_one(virtually, bench, sequence) -> None:
    bench.shadow = ShadowSettings(share=0.1)
    bench.draw = random.Random(3).random
    same = random.Random(3)
    expected = sum(same.random() < 0.1 for _ in range(1600))

    async def story() -> None:
        async with bench:
            for _ in range(100):
                await bench.submit([sequence(tag) for tag in range(16)])
                await asyncio.sleep(20)
            await settled(bench, expected)
            assert sum(bench.checks().values()) == expected
            assert expected == pytest.approx(160, abs=36), "three standard deviations of a binomial"

    virtually(story())


@pytest.mark.parametrize("new_requests", [1, 3])
def test_on_one_instance_a_new_request_stops_the_repeat(virtually, bench, sequence, new_requests: int) -> None:
    bench.shadow = EVERY

    async def story() -> None:
        async with bench:
            await bench.submit([sequence(1), sequence(2)])
            await asyncio.sleep(0.5)
            assert len(bench.executor.busy) == len(bench.executor.repeats) == 1
            results = await asyncio.gather(*(bench.submit([sequence(9)]) for _ in range(new_requests)))
            # The fake executor checks its handle every 10 ms.
            assert max(result.queue_s for (result,) in results) <= 0.0101
            assert bench.executor.stopped == [1]
            await settled(bench, 2 if new_requests == 1 else 5)
            assert bench.checks()["dropped"] == 1

    virtually(story())


def test_a_new_request_takes_the_free_instance_and_the_repeat_continues(virtually, bench, sequence) -> None:
    bench.shadow = EVERY
    bench.executor.instances = 2

    async def story() -> None:
        async with bench:
            await bench.submit([sequence(1), sequence(2)])
            await asyncio.sleep(0.5)
            (result,) = await bench.submit([sequence(9)])
            assert result.queue_s == 0
            await settled(bench, 2)
            assert bench.executor.stopped == []
            assert bench.checks() == {"equal": 2}

    virtually(story())


def test_the_repeat_stops_if_new_requests_need_its_instance(virtually, bench, sequence) -> None:
    bench.shadow = EVERY
    bench.executor.instances = 2
    bench.settings = SchedulingSettings(max_batch_size=2)

    async def story() -> None:
        async with bench:
            await bench.submit([sequence(1), sequence(2)])
            await asyncio.sleep(0.5)
            results = await asyncio.gather(*(bench.submit([sequence(9)]) for _ in range(4)))
            assert bench.executor.runs == [[1, 2], [9, 9], [9, 9]]
            assert max(result.queue_s for (result,) in results) <= 0.0101
            assert bench.executor.stopped == [1]

    virtually(story())


def test_no_repeat_starts_while_only_one_instance_is_free(virtually, bench, sequence) -> None:
    bench.shadow = EVERY
    bench.executor.instances = 2
    bench.executor.seconds = lambda sequences: 8.0 if len(sequences) == 1 else 1.0

    async def story() -> None:
        async with bench:
            long = asyncio.create_task(bench.submit([sequence(9)]))
            await ticks()
            await bench.submit([sequence(1), sequence(2)])
            await asyncio.sleep(6)
            assert bench.executor.repeats == [], "the other instance is busy"
            await long
            await settled(bench, 2)
            assert min(start for _, _, start in bench.executor.repeats) >= 1008

    virtually(story())


def test_one_repeat_at_a_time(virtually, bench, sequence) -> None:
    bench.shadow = EVERY
    bench.executor.instances = 4

    async def story() -> None:
        async with bench:
            await bench.submit([sequence(tag) for tag in range(4)])
            await settled(bench, 4)
            starts = [start for _, _, start in bench.executor.repeats]
            assert all(later - earlier >= 1 for earlier, later in itertools.pairwise(starts))

    virtually(story())


def test_sequences_beyond_the_bounds_are_dropped_and_counted(virtually, bench, sequence) -> None:
    bench.shadow = ShadowSettings(share=1.0, max_samples=3)

    async def story() -> None:
        async with bench:
            await bench.submit([sequence(tag) for tag in range(16)])
            assert bench.verifier._samples == 3
            await settled(bench, 16)
            assert bench.checks() == {"equal": 3, "dropped": 13}

    virtually(story())


def test_sequences_too_large_for_the_bound_are_dropped_before_they_are_copied(virtually, bench, sequence) -> None:
    # Eight bytes of ids per position, and 32 of the output.
    bench.shadow = ShadowSettings(share=1.0, max_bytes=8 * 10 + 32)

    async def story() -> None:
        async with bench:
            await bench.submit([sequence(1, 11), sequence(2, 10)])
            assert [keep for _, keep in bench.executor.handed] == [False, True]
            await settled(bench, 2)
            assert bench.checks() == {"equal": 1, "dropped": 1}

    virtually(story())


def test_a_loaded_server_drops_samples_and_repeats_none(virtually, bench, sequence) -> None:
    bench.shadow = EVERY

    async def caller(scheduler, tag: int) -> None:
        for _ in range(20):
            await bench.submit([sequence(tag)])

    async def story() -> None:
        async with bench as scheduler:
            callers = [asyncio.create_task(caller(scheduler, tag)) for tag in range(8)]
            await asyncio.wait(callers, return_when=asyncio.FIRST_COMPLETED)
            assert bench.executor.repeats == []
            assert bench.verifier._samples == EVERY.max_samples
            assert bench.checks()["dropped"] > 100
            await asyncio.gather(*callers)
            ended = bench.clock.now()
            await asyncio.sleep(20)
            assert bench.checks()["equal"] == EVERY.max_samples, "repeated once the queue is empty"
            assert min(start for _, _, start in bench.executor.repeats) > ended

    virtually(story())


def test_a_terminated_run_releases_the_room_of_its_samples(virtually, bench, sequence) -> None:
    bench.shadow = EVERY

    async def story() -> None:
        async with bench:
            cancelled = asyncio.create_task(bench.submit([sequence(1), sequence(2)]))
            await asyncio.sleep(0.5)
            assert bench.verifier._samples == 2
            cancelled.cancel()
            await asyncio.sleep(5)
            assert bench.executor.terminated == [[1, 2]]
            assert (bench.verifier._samples, bench.executor.repeats, bench.checks()) == (0, [], {})

    virtually(story())


def test_a_failed_repeat_is_counted_and_has_no_other_effect(virtually, bench, sequence, tags_of) -> None:
    bench.shadow = EVERY

    async def story() -> None:
        async with bench as scheduler:
            await bench.submit([sequence(1), sequence(2)])
            bench.executor.poisoned.add(1)
            await settled(bench, 2)
            assert bench.checks() == {"equal": 1, "failed": 1}
            assert tags_of(await bench.submit([sequence(3)])) == [3]
            assert scheduler.healthy

    virtually(story())


def test_a_difference_is_counted_and_logged_without_content(virtually, bench, sequence, caplog) -> None:
    bench.shadow = EVERY
    bench.executor.mixed.add(2)

    async def story() -> None:
        async with bench:
            await bench.submit([sequence(tag) for tag in (1, 2, 3)], request_id="mine")
            await settled(bench, 3)
            assert bench.checks() == {"equal": 2, "different": 1}
            assert bench.metric("batch_mismatch_total") == 1
            assert bench.metric("batching_isolated") == 0
            assert bench.isolated == []
            await bench.submit([sequence(4), sequence(5)])
            assert bench.executor.runs == [[1, 2, 3], [4, 5]], "differences are only counted: batches stay as before"

    virtually(story())
    [line] = [record for record in caplog.records if record.name == LOGGER]
    assert line.levelno == logging.WARNING
    logged = {name: line.__dict__[name] for name in ("model", "version", "request_id", "tensor", "error_over_allowed")}
    assert logged == {
        "model": "tiny", "version": "1", "request_id": "mine", "tensor": "tag", "error_over_allowed": 40.0,
    }  # fmt: skip
    assert (line.__dict__["batch_size"], line.__dict__["tokens"], line.__dict__["unlogged"]) == (3, 4, 0)


def test_warnings_are_few_and_the_next_one_counts_the_others(virtually, bench, sequence, caplog) -> None:
    bench.shadow = ShadowSettings(share=1.0, warn_every_s=10.0)
    bench.executor.mixed.update(range(4))

    async def story() -> None:
        async with bench:
            for _ in range(2):
                await bench.submit([sequence(tag) for tag in range(4)])
                await asyncio.sleep(20)
            assert bench.metric("batch_mismatch_total") == 8

    virtually(story())
    lines = [record for record in caplog.records if record.name == LOGGER]
    assert [line.__dict__["unlogged"] for line in lines] == [0, 3]


def test_isolate_runs_each_sequence_alone_after_the_first_difference(virtually, bench, sequence, caplog) -> None:
    bench.shadow = ShadowSettings(share=1.0, action="isolate")
    bench.executor.mixed.update({1, 2})

    async def story() -> None:
        async with bench:
            assert bench.metric("batching_isolated") == 0
            await bench.submit([sequence(1), sequence(2)])
            await settled(bench, 2)
            assert bench.metric("batching_isolated") == 1
            await bench.submit([sequence(tag) for tag in (3, 4, 5)])
            assert bench.executor.runs == [[1, 2], [3], [4], [5]]
            assert len(bench.isolated) == 1
            await asyncio.sleep(10)
            assert bench.checks() == {"different": 2}, "a sequence that ran alone is not repeated"

    virtually(story())
    errors = [record for record in caplog.records if record.name == LOGGER and record.levelno == logging.ERROR]
    assert [(line.__dict__["model"], line.__dict__["version"]) for line in errors] == [("tiny", "1")]


def test_a_repeated_sample_is_freed(virtually, bench, sequence) -> None:
    bench.shadow = EVERY

    async def story() -> None:
        async with bench:
            sent = [sequence(1), sequence(2)]
            received = weakref.ref(sent[0].tensors["input_ids"])
            results = await bench.submit(sent)
            sample = weakref.ref(bench.verifier._waiting[0].served["tag"])
            answer = weakref.ref(results[0].outputs["tag"])
            del results, sent
            await ticks(1)
            assert sample() is not None
            assert answer() is None, "a sample keeps its values, and not the answer"
            assert received() is None, "it has copies of its inputs: received ones keep their message in memory"
            await settled(bench, 2)
            assert sample() is None

    gc.disable()  # reference counts must suffice
    try:
        virtually(story())
    finally:
        gc.enable()


def test_draining_drops_waiting_samples_and_stops_the_repeat(virtually, bench, sequence) -> None:
    bench.shadow = EVERY

    async def story() -> None:
        async with bench as scheduler:
            await bench.submit([sequence(tag) for tag in range(3)])
            await asyncio.sleep(0.5)
            began = bench.clock.now()
            await scheduler.drain()
            assert bench.clock.now() - began < 0.02
            assert bench.executor.stopped == [0]
            assert bench.checks() == {"dropped": 3}
            assert bench.verifier._samples == 0
            with pytest.raises(NotServing):
                await bench.submit([sequence(9)])

    virtually(story())


def test_a_run_in_progress_at_a_drain_is_answered_and_not_repeated(virtually, bench, sequence, tags_of) -> None:
    bench.shadow = EVERY

    async def story() -> None:
        async with bench as scheduler:
            late = asyncio.create_task(bench.submit([sequence(1), sequence(2)]))
            await asyncio.sleep(0.5)
            await scheduler.drain()
            assert tags_of(await late) == [1, 2]
            assert (bench.executor.repeats, bench.checks()) == ([], {"dropped": 2})
            assert bench.verifier._samples == 0

    virtually(story())


def test_without_a_verifier_sequences_reach_the_executor_unchanged(virtually, bench, sequence) -> None:
    sent = [sequence(tag) for tag in range(4)]

    async def story() -> None:
        async with bench:
            results = await bench.submit(sent)
            assert bench.executor.handed == [(id(one), False) for one in sent]
            assert [result.values for result in results] == [None] * 4
            await asyncio.sleep(10)
            assert (bench.executor.repeats, bench.checks()) == ([], {})

    virtually(story())


def test_sequences_not_drawn_reach_the_executor_unchanged(virtually, bench, sequence) -> None:
    bench.shadow = ShadowSettings(share=0.5)
    draws = iter([0.4, 0.5, 0.6, 0.9])
    bench.draw = lambda: next(draws)
    sent = [sequence(tag) for tag in range(4)]

    async def story() -> None:
        async with bench:
            results = await bench.submit(sent)
            assert bench.executor.handed[1:] == [(id(one), False) for one in sent[1:]]
            assert bench.executor.handed[0] != (id(sent[0]), False)
            assert [result.values for result in results] == [None] * 4, (
                "values are kept for the check, and not returned"
            )

    virtually(story())
