"""A pulse outlives its process, and a watcher finds runs and loops that hang, and no others."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
from attnserve_server.domain.values import PreparedSequence
from attnserve_server.engine.cost import CostModel
from attnserve_server.engine.providers import CPU, CUDA
from attnserve_server.engine.pulse import MOST_REQUESTS, Overdue, Pulse
from attnserve_server.engine.watched import FACTOR, FIRST_RUN_S, RunLimits
from attnserve_server.isolation.arena import Arena

STEP_S = 0.25


def requests(pulse: Pulse) -> list[list[tuple[int, int]]]:
    return [pulse.requests(run) for run in pulse.running()]


def test_the_requests_of_a_killed_process_are_known() -> None:
    memory = Arena.create_descriptor(Pulse.SIZE)
    program = (
        "import os, sys; from attnserve_server.engine.pulse import Pulse; pulse = Pulse(int(sys.argv[1]));"
        "pulse.begin(0, [(1, 5)], 2.0); pulse.end(0); pulse.begin(3, [(1, 7), (1, 7), (2, 9)], 4.0);"
        "pulse.beat(6.5); pulse.alone = True; os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(memory)], pass_fds=[memory], timeout=30, check=False)
    pulse = Pulse(memory)
    os.close(memory)
    assert done.returncode == -9
    assert requests(pulse) == [[(1, 7), (2, 9)]]
    assert (pulse.running()[0].limit_s, pulse.beat_s, pulse.alone, pulse.completed) == (4.0, 6.5, True, 1)
    pulse.close()


def test_more_requests_than_a_place_holds_are_cut() -> None:
    pulse = Pulse()
    pulse.begin(0, [(0, number) for number in range(MOST_REQUESTS + 5)], 1.0)
    pulse.begin(1, [(9, 9)], 1.0)
    assert [len(one) for one in requests(pulse)] == [MOST_REQUESTS, 1]


def looks(overdue: Overdue, pulse: Pulse, seconds: float, start: float, *, beats: bool = True) -> str:
    """Look four times a second, and return what the last look found."""
    why = ""
    for step in range(int(seconds / STEP_S)):
        now = start + step * STEP_S
        if beats:
            pulse.beat(now)
        why = overdue.look(now)
    return why


def test_a_run_over_its_limit_counts_as_hung_and_the_next_one_begins_at_zero() -> None:
    pulse = Pulse()
    overdue = Overdue(pulse, 5.0)
    pulse.begin(0, [(1, 1)], 2.0)
    assert looks(overdue, pulse, 2.0, 100) == ""
    assert looks(overdue, pulse, 0.75, 102) == "a run takes longer than 2 s"
    pulse.end(0)
    pulse.begin(0, [(1, 1)], 2.0)
    assert looks(overdue, pulse, 2.0, 103) == ""


def test_a_loop_without_heartbeats_counts_as_hung() -> None:
    pulse = Pulse()
    overdue = Overdue(pulse, 2.0)
    assert looks(overdue, pulse, 10, 100) == ""
    assert looks(overdue, pulse, 1.75, 110, beats=False) == ""
    assert looks(overdue, pulse, 1, 112, beats=False) == "its loop has stood still for 2 s"


def test_time_in_which_the_watcher_was_stopped_does_not_count() -> None:
    pulse = Pulse()
    overdue = Overdue(pulse, 5.0)
    pulse.begin(0, [(1, 1)], 5.0)
    pulse.beat(100.0)
    overdue.look(100.0)
    assert overdue.look(4000.0) == ""


def sequence(length: int) -> PreparedSequence:
    return PreparedSequence({"x": np.zeros(length, np.int64)}, {"seq": length}, ("y",))


def test_a_run_may_take_twenty_times_its_predicted_time_and_the_first_of_a_shape_two_minutes() -> None:
    limits, cost = RunLimits(10.0, CPU), CostModel(run_s=1.0, sequence_s=0.0, token_s=0.1, pair_s=0.0)
    batch = [sequence(10), sequence(20)]
    assert limits.limit_s(batch, cost) == FIRST_RUN_S
    limits.ran(batch)
    assert limits.limit_s(batch, cost) == FACTOR * (1.0 + 2 * 20 * 0.1)
    assert limits.limit_s([sequence(20), sequence(11)], cost) == FACTOR * 5.0, "the same shape"
    assert limits.limit_s(batch[:1], cost) == FIRST_RUN_S
    assert limits.limit_s(batch, None) == 10.0


def test_suspects_get_no_longer_limit_where_nothing_is_compiled() -> None:
    assert RunLimits(10.0, CPU).limit_s([sequence(3)], None, alone=True) == 10.0
    assert RunLimits(10.0, CUDA).limit_s([sequence(3)], None, alone=True) == FIRST_RUN_S
