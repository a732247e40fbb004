"""The checker of histories accepts what a right service does, and finds each kind of corruption.

Histories are made by a service in a few lines: versions that are loaded and unloaded, callers whose calls overlap, and
answers that follow from model, version and input. Each corruption changes one call of a right history.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[3]))

from faults.check import LATE_S, Checker, Rules, Service, Serving, check, percentile
from faults.history import Begin, End, Event, Journal, Recorder, events_of

RULES = Rules(others=frozenset({"OK", "CANCELLED", "RESOURCE_EXHAUSTED:OVERLOADED", "DEADLINE_EXCEEDED"}))
MODEL = "m"


def reference(model: str, version: str, key: str) -> dict[str, np.ndarray]:
    """The right answer: a row of numbers, and a map, of model, version and input."""
    chance = np.random.default_rng([int(version), *f"{model}{key}".encode()])
    return {"y": chance.standard_normal(4).astype(np.float32), "attention.s": chance.random((2, 2)).astype(np.float32)}


@dataclass
class History:
    """A right history: its events in order of time, what served, and what the server counted."""

    events: list[Event]
    service: Service
    counted: Counter[str] = field(default_factory=Counter)

    def problems(self) -> list[str]:
        checker = Checker(self.service, RULES)
        checker.take(*self.events)
        checker.finish()
        checker.reconcile(self.counted, sum(self.counted.values()))
        return [one.kind for one in checker.problems]


def right_history(chance: random.Random, callers: int, calls: int) -> History:
    """Calls of several callers over some seconds, while versions 1 to 4 replace each other."""
    # A load or unload takes from its first to its second time.
    times = sorted(chance.uniform(0, 10) for _ in range(6))
    servings = [Serving(MODEL, "1")]
    for version in (2, 3, 4):
        begun, ready = times[2 * (version - 2) : 2 * (version - 1)]
        servings.append(Serving(MODEL, str(version), since_s=begun, surely_s=ready))
        earlier = servings[-2]
        if chance.random() < 0.5:
            gone = ready + chance.uniform(0.1, 2.0)
            servings[-2] = replace(earlier, until_s=ready + 0.05, gone_s=gone)
    service = Service(reference, servings)
    events: list[Event] = []
    counted: Counter[str] = Counter()
    for caller in range(callers):
        now = chance.uniform(0, 1)
        for number in range(1, calls + 1):
            call = f"caller {caller}#{number}"
            rows = tuple(f"text {chance.randrange(20)}" for _ in range(chance.randint(1, 3)))
            took, limit = chance.uniform(0.0, 0.8), chance.choice([None, 1.0])
            version = chance.choice(["", "", "1"])
            begin = Begin(call, now, MODEL, version, rows, None if limit is None else now + limit)
            allowed = service.allowed(MODEL, version, now, now + took)
            kind = chance.choice(["OK"] * 6 + ["left", "refused"]) if allowed else "refused"
            end = End(call, now + took, "RESOURCE_EXHAUSTED", "OVERLOADED", "the queue is full")
            if kind == "OK":
                by = chance.choice(sorted(allowed))
                end = End(call, now + took, "OK", version=by, answers=tuple(reference(MODEL, by, row) for row in rows))
            elif kind == "left":
                end = End(call, now + took, "CANCELLED", left=True)
            counted["OK" if kind == "left" and chance.random() < 0.5 else end.code] += 1
            events += [begin, end]
            now += took + chance.uniform(0, 0.2)
    return History(sorted(events, key=lambda one: (one.at_s, isinstance(one, End))), service, counted)


@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 30))
@settings(max_examples=60)
def test_right_histories_have_no_problem(seed: int, callers: int, calls: int) -> None:
    assert right_history(random.Random(seed), callers, calls).problems() == []


def ok_at(history: History, chance: random.Random) -> int:
    places = [at for at, one in enumerate(history.events) if isinstance(one, End) and one.code == "OK"]
    return chance.choice(places)


def end_at(history: History, chance: random.Random) -> int:
    return chance.choice([at for at, one in enumerate(history.events) if isinstance(one, End)])


def lost_end(history: History, chance: random.Random) -> None:
    del history.events[end_at(history, chance)]


def doubled_end(history: History, chance: random.Random) -> None:
    at = end_at(history, chance)
    history.events.insert(chance.randint(at + 1, len(history.events)), history.events[at])


def doubled_begin(history: History, chance: random.Random) -> None:
    at = chance.choice([at for at, one in enumerate(history.events) if isinstance(one, Begin)])
    history.events.insert(chance.randint(at + 1, len(history.events)), history.events[at])


def end_without_begin(history: History, chance: random.Random) -> None:
    call = history.events[end_at(history, chance)].call
    at = next(at for at, one in enumerate(history.events) if one.call == call)
    del history.events[at]


def late_end(history: History, chance: random.Random) -> None:
    at = end_at(history, chance)
    call = history.events[at].call
    begin = next(at for at, one in enumerate(history.events) if one.call == call)
    old = history.events[begin]
    assert isinstance(old, Begin)
    history.events[begin] = replace(old, deadline_s=history.events[at].at_s - LATE_S - 0.001)


def early_end(history: History, chance: random.Random) -> None:
    at = end_at(history, chance)
    begin = next(one for one in history.events if one.call == history.events[at].call)
    history.events[at] = replace(history.events[at], at_s=begin.at_s - 0.001)


def changed_end(change: Callable[[End, random.Random], End]) -> Callable[[History, random.Random], None]:
    def corrupt(history: History, chance: random.Random) -> None:
        at = ok_at(history, chance)
        end = history.events[at]
        assert isinstance(end, End)
        history.events[at] = change(end, chance)

    return corrupt


def wrong_number(end: End, chance: random.Random) -> End:
    row = chance.randrange(len(end.answers))
    name = chance.choice(["y", "attention.s"])
    wrong = {key: value.copy() for key, value in end.answers[row].items()}
    wrong[name].flat[chance.randrange(4)] += 1e-2
    return replace(end, answers=(*end.answers[:row], wrong, *end.answers[row + 1 :]))


def another_input(end: End, chance: random.Random) -> End:
    answers = [reference(MODEL, end.version, f"other {chance.random()}"), *end.answers[1:]]
    return replace(end, answers=tuple(answers))


def not_a_number(end: End, chance: random.Random) -> End:
    return replace(end, answers=({**end.answers[0], "y": np.full(4, np.nan, np.float32)}, *end.answers[1:]))


def lacks_an_output(end: End, chance: random.Random) -> End:
    return replace(end, answers=({"y": end.answers[0]["y"]}, *end.answers[1:]))


def another_version(end: End, chance: random.Random) -> End:
    return replace(end, version="7")


def counter_off_by_one(history: History, chance: random.Random) -> None:
    by = chance.choice([-1, 1])
    history.counted["RESOURCE_EXHAUSTED"] += 1
    history.events += [Begin("x#1", 11, MODEL), End("x#1", 12, "RESOURCE_EXHAUSTED", "OVERLOADED")]
    left = sum(isinstance(one, End) and one.left for one in history.events)
    answered = sum(isinstance(one, End) and one.code == "OK" for one in history.events)
    history.counted["OK"] = answered + left + 1 if by > 0 else answered - 1


def refusal_not_counted(history: History, chance: random.Random) -> None:
    history.counted["RESOURCE_EXHAUSTED"] = 0
    history.events += [Begin("x#1", 11, MODEL), End("x#1", 12, "RESOURCE_EXHAUSTED", "OVERLOADED")]


CORRUPTIONS: dict[str, tuple[str, Callable[[History, random.Random], None]]] = {
    "an end is lost": ("lost call", lost_end),
    "an end comes twice": ("doubled end", doubled_end),
    "a begin comes twice": ("doubled begin", doubled_begin),
    "an end has no begin": ("end without begin", end_without_begin),
    "an end is late": ("late end", late_end),
    "an end is before its begin": ("early end", early_end),
    "a number is wrong": ("answer", changed_end(wrong_number)),
    "the answer is that of another input": ("answer", changed_end(another_input)),
    "the answer is NaN": ("answer", changed_end(not_a_number)),
    "an output is missing": ("answer", changed_end(lacks_an_output)),
    "a row is missing": ("rows", changed_end(lambda end, _: replace(end, answers=end.answers[:-1]))),
    "a row comes twice": ("rows", changed_end(lambda end, _: replace(end, answers=(*end.answers, end.answers[0])))),
    "the version never served": ("version", changed_end(another_version)),
    "the status is unknown": ("UNKNOWN", changed_end(lambda end, _: replace(end, code="UNKNOWN"))),
    "the status is not allowed": ("status", changed_end(lambda end, _: replace(end, code="DATA_LOSS"))),
    "the reason is not allowed": (
        "status", changed_end(lambda end, _: replace(end, code="RESOURCE_EXHAUSTED", reason="RESPONSE_TOO_LARGE")),
    ),
    "the counter of answers is off by one": ("counters", counter_off_by_one),
    "a refusal is not counted": ("counters", refusal_not_counted),
}  # fmt: skip


@pytest.mark.parametrize("name", CORRUPTIONS)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=8)
def test_corruption_is_found(name: str, seed: int) -> None:
    kind, corrupt = CORRUPTIONS[name]
    history = right_history(random.Random(seed), 3, 12)
    corrupt(history, random.Random(seed + 1))
    assert kind in history.problems()


@pytest.mark.parametrize(
    "message",
    [
        "Traceback (most recent call last): ...",
        '  File "queue", line 3',
        "cannot open /srv/models/tiny/1/model.onnx",
        "error in session.py",
        "failed at src/core/call.cc:12",
    ],
)
def test_path_or_traceback_in_a_message_is_found(message: str) -> None:
    rules = Rules(others=frozenset({"INTERNAL"}), private=("/srv/models",))
    service = Service(reference)
    usual = [Begin("a#1", 0), End("a#1", 1, "INTERNAL", "INTERNAL", "internal error; report the request id 1")]
    assert check(usual, service, rules) == []
    usual[1] = End("a#1", 1, "INTERNAL", "INTERNAL", message)
    assert [one.kind for one in check(usual, service, rules)] == ["leak"]


def test_version_that_is_replaced_may_answer_only_until_its_successor_surely_serves() -> None:
    old = Serving(MODEL, "1", until_s=6.0, gone_s=7.0)
    new = Serving(MODEL, "2", since_s=3.0, surely_s=4.0)
    service = Service(reference, [old, new])
    assert service.allowed(MODEL, "", 1.0, 2.0) == {"1"}
    assert service.allowed(MODEL, "", 1.0, 3.5) == {"1", "2"}
    assert service.allowed(MODEL, "", 3.9, 9.0) == {"1", "2"}
    assert service.allowed(MODEL, "", 4.1, 4.2) == {"2"}
    assert service.allowed(MODEL, "1", 4.1, 4.2) == {"1"}
    assert service.allowed(MODEL, "1", 7.5, 8.0) == set()
    assert service.allowed("other", "", 1.0, 2.0) == set()


def test_stale_answer_of_an_old_version_is_found() -> None:
    service = Service(reference, [Serving(MODEL, "1"), Serving(MODEL, "2", since_s=3.0, surely_s=4.0)])
    begin = Begin("a#1", 5.0, MODEL, "", ("x",))
    right, stale = (End("a#1", 6.0, "OK", version=one, answers=(reference(MODEL, one, "x"),)) for one in "21")
    mislabelled = replace(stale, version="2")
    found = [[one.kind for one in check([begin, end], service)] for end in (right, stale, mislabelled)]
    assert found == [[], ["version"], ["answer"]]


def test_lower_version_may_answer_only_while_the_highest_is_replaced() -> None:
    service = Service(reference, [Serving(MODEL, "1"), Serving(MODEL, "2"), Serving("other", "1")])
    service.pause(MODEL, 3.0)
    assert service.allowed(MODEL, "", 4.0, 5.0) == {"1", "2"}, "not confirmed yet"
    service.resume(MODEL, 6.0)
    service.pause(MODEL, 9.0)
    service.resume(MODEL, 9.5)
    assert service.allowed(MODEL, "", 1.0, 2.9) == {"2"}
    assert service.allowed(MODEL, "", 2.0, 3.1) == {"1", "2"}
    assert service.allowed(MODEL, "", 5.9, 8.0) == {"1", "2"}
    assert service.allowed(MODEL, "", 6.1, 8.0) == {"2"}
    assert service.allowed(MODEL, "", 8.0, 20.0) == {"1", "2"}
    assert service.allowed(MODEL, "", 9.6, 20.0) == {"2"}
    assert service.allowed(MODEL, "2", 4.0, 5.0) == {"2"}


@given(st.integers(0, 2**32))
@settings(max_examples=40)
def test_stale_answer_after_a_replacement_is_found(seed: int) -> None:
    chance = random.Random(seed)
    service = Service(reference, [Serving(MODEL, "1"), Serving(MODEL, "2")])
    times = sorted(chance.uniform(0, 10) for _ in range(6))
    for begun, ready in zip(times[::2], times[1::2], strict=True):
        service.pause(MODEL, begun)
        service.resume(MODEL, ready)

    def problems(begin_s: float, end_s: float) -> list[str]:
        answer = reference(MODEL, "1", "x")
        call = [Begin("a#1", begin_s, MODEL, "", ("x",)), End("a#1", end_s, "OK", version="1", answers=(answer,))]
        return [one.kind for one in check(call, service)]

    begin_s = chance.uniform(0, 11)
    end_s = begin_s + chance.uniform(0, 1)
    overlaps = any(begin_s <= ready and begun <= end_s for begun, ready in zip(times[::2], times[1::2], strict=True))
    assert problems(begin_s, end_s) == ([] if overlaps else ["version"])
    assert problems(times[-1] + 0.001, times[-1] + 1.0) == ["version"]


def test_history_survives_its_journey_through_a_file(tmp_path: Path) -> None:
    history = right_history(random.Random(3), 3, 20)
    with Journal(tmp_path / "history.jsonl") as journal:
        for event in history.events:
            journal(event)
    read = list(events_of(tmp_path / "history.jsonl"))
    assert [(one.call, one.at_s) for one in read] == [(one.call, one.at_s) for one in history.events]
    assert check(read, history.service, RULES) == []
    read[1:2] = []
    assert check(read, history.service, RULES) != []


def test_late_end_is_excused_by_the_timers_of_its_caller_alone() -> None:
    events: list[Event] = []
    for number, late_s in enumerate((0.2, 0.5, 3.0), start=1):
        events += [Begin(f"a#{number}", 0.0, deadline_s=1.0), End(f"a#{number}", 1.0 + late_s, "DEADLINE_EXCEEDED")]
    checker = Checker(Service(reference), RULES)
    checker.take(*events)
    assert [one.call for one in checker.finish()] == ["a#2", "a#3"]
    checker.excuse(lambda at: 0.3 if at > 0 else 9.0)
    assert [one.call for one in checker.finish()] == ["a#3"]
    assert checker.count["late end"] == 1


def test_recorder_names_calls_in_order_and_adds_their_deadline() -> None:
    events: list[Event] = []
    recorder = Recorder("one", events.append, clock=lambda: 5.0)
    call = recorder.begin(MODEL, "", ("x",), timeout_s=2.0)
    recorder.end(call, "OK", version="1")
    assert events == [Begin("one#1", 5.0, MODEL, "", ("x",), 7.0), End("one#1", 5.0, "OK", version="1")]


def test_percentile_is_an_observed_value() -> None:
    assert percentile(range(1, 101), 0.99) == 99
    assert percentile([3.0], 0.99) == 3.0
    assert np.isnan(percentile([], 0.99))
