"""Which request ended an engine, and how long the next start waits."""

from __future__ import annotations

import pytest
from attnserve_server.engine.pulse import Origin, Pulse
from attnserve_server.processes.ends import End, Suspects, pause_s

CRASH = End("crash", "engine crashed: signal 11")
KILLED = End("crash", "engine crashed: signal 9", is_from_outside=True)


def pulse_of(*runs: list[Origin], alone: bool = False) -> Pulse:
    """The pulse of an engine that ended in these runs."""
    pulse = Pulse()
    pulse.alone = alone
    for instance, run in enumerate(runs):
        pulse.begin(instance, run, 1.0)
    return pulse


def test_all_requests_of_all_runs_are_suspects() -> None:
    suspects = Suspects()
    assert suspects.after(pulse_of([(1, 1), (2, 1)], [(1, 2)]), CRASH) is None
    assert suspects.by_front([1, 2, 3]) == {1: [1, 2], 2: [1], 3: []}
    assert suspects.by_front([2]) == {2: [1]}


def test_a_suspect_that_ran_alone_is_the_culprit_and_the_others_stay_suspects() -> None:
    suspects = Suspects()
    suspects.after(pulse_of([(1, 1), (1, 2), (1, 3)]), CRASH)
    assert suspects.after(pulse_of([(1, 2)], alone=True), CRASH) == (1, 2)
    assert suspects.by_front([1]) == {1: [1, 3]}


def test_a_lone_request_is_no_culprit_the_first_time() -> None:
    assert Suspects().after(pulse_of([(1, 1)]), CRASH) is None


def test_a_kill_from_outside_convicts_the_second_time_only() -> None:
    suspects = Suspects()
    suspects.after(pulse_of([(1, 1), (1, 2)]), KILLED)
    assert suspects.after(pulse_of([(1, 1)], alone=True), KILLED) is None
    assert suspects.by_front([1]) == {1: [1, 2]}
    assert suspects.after(pulse_of([(1, 1)], alone=True), KILLED) == (1, 1)


@pytest.mark.parametrize("runs", [[], [[(1, 1)], [(1, 2)]], [[(1, 1)], []]], ids=["no run", "two", "beside a repeat"])
def test_an_end_that_names_no_single_request_convicts_none(runs: list[list[Origin]]) -> None:
    suspects = Suspects()
    suspects.after(pulse_of([(1, 1), (1, 2)]), CRASH)
    assert suspects.after(pulse_of(*runs, alone=True), CRASH) is None
    assert suspects.by_front([1]) == {1: [1, 2]}


def test_an_end_outside_of_runs_leaves_no_suspects() -> None:
    suspects = Suspects()
    suspects.after(pulse_of([(1, 1)]), CRASH)
    suspects.after(pulse_of(), CRASH)
    assert suspects.by_front([1]) == {1: []}


def test_pauses_grow_while_engines_end_without_a_run() -> None:
    assert [pause_s(failures) for failures in range(9)] == [0, 0, 1, 2, 4, 8, 16, 30, 30]


def test_ends_are_named_by_signal_or_exit_code() -> None:
    assert End.of(-11, "engine") == CRASH
    assert End.of(-9, "engine") == KILLED
    assert End.of(70, "front").why == "front crashed: exit code 70"
