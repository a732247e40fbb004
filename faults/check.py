"""The check of a history against a model of the service: what each call may answer, and when it must have ended.

The service is modelled as simply as it can be: versions that serve from one time to another, and for each version and
input one right answer. A history is right if every call begins and ends once, in time, with a status that its
caller may get; if every answer is that of a version that may have served, row by row; and if the server counted what
its callers got. Histories are checked as they grow, so that a long run needs no memory for them.

Source: Kingsbury's Jepsen, whose checkers read a history of operations in the same way.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from attnserve_server.model.equality import Equality, greatest_difference

from faults.history import Answer, Begin, End, Event

LATE_S: Final = 0.25
"""A call may end this long after its deadline."""
LEAKS: Final = re.compile(r"Traceback \(most recent|File \"|\.py\b|\.cc:|\.so\b|site-packages|0x[0-9a-f]{8}")
"""Parts of paths, tracebacks and addresses, which no message may hold."""
MADE_BY_GRPC: Final = frozenset({"CANCELLED", "DEADLINE_EXCEEDED", "UNAVAILABLE"})
"""Statuses that a caller may get while the server counts another one: the two ended the call at the same time."""


@dataclass(frozen=True, slots=True)
class Serving:
    """The time of one version. It may serve from `since_s` to `gone_s`, and certainly does in the part between.

    Loads and unloads take time, so that each end has two times: before a load is requested the version cannot serve,
    and after the load is confirmed it must.

    While a server starts, or replaces a version's engine, the version may serve and need not. So a lower version
    answers until the highest is ready again. `pauses` are these times, from their begin to the confirmation.
    """

    model: str
    version: str
    since_s: float = -math.inf
    surely_s: float = -math.inf
    until_s: float = math.inf
    gone_s: float = math.inf
    pauses: tuple[tuple[float, float], ...] = ()

    def may(self, begin_s: float, end_s: float) -> bool:
        """Return whether it may serve in a part of this time."""
        return self.since_s <= end_s and begin_s <= self.gone_s

    def must(self, begin_s: float, end_s: float) -> bool:
        """Return whether it serves in all of this time."""
        paused = any(begin <= end_s and begin_s <= end for begin, end in self.pauses)
        return self.surely_s <= begin_s and end_s <= self.until_s and not paused


Reference = Callable[[str, str, str], Answer]
"""The right answer of a model's version to the input of a key."""


@dataclass
class Service:
    """What may serve when, and what it answers."""

    reference: Reference
    servings: list[Serving] = field(default_factory=list)
    equality: Equality = field(default_factory=lambda: Equality("fp32"))

    def allowed(self, model: str, version: str, begin_s: float, end_s: float) -> set[str]:
        """Return the versions that may answer a call. `version`: the requested one; empty: the highest that serves."""
        own = [one for one in self.servings if one.model == model]
        found = {one.version for one in own if one.may(begin_s, end_s)}
        if version:
            return found & {version}
        surely = [int(one.version) for one in own if one.must(begin_s, end_s)]
        return {one for one in found if int(one) >= max(surely, default=0)}

    def pause(self, model: str, now: float) -> None:
        """Record that no version of a model need serve from now on."""
        self._change(model, lambda one: replace(one, pauses=(*one.pauses, (now, math.inf))))

    def resume(self, model: str, now: float) -> None:
        """Record that its versions were confirmed to serve again."""

        def ended(one: Serving) -> Serving:
            return replace(one, pauses=tuple((begun, min(end, now)) for begun, end in one.pauses))

        self._change(model, ended)

    def _change(self, model: str, change: Callable[[Serving], Serving]) -> None:
        self.servings[:] = [change(one) if one.model == model else one for one in self.servings]

    def wrong(self, model: str, version: str, key: str, answer: Answer) -> str:
        """Return what is wrong with one sequence's answer; empty: nothing."""
        expected = self.reference(model, version, key)
        if answer.keys() != expected.keys():
            return f"it holds {sorted(answer)} and not {sorted(expected)}"
        given = {name: np.asarray(values, np.float32) for name, values in answer.items()}
        found = greatest_difference(given, expected, self.equality)
        return f"{found.name} differs by {found.error:.3g} times the tolerance" if found.error > 1 else ""


@dataclass(frozen=True, slots=True)
class Problem:
    """One violation: its kind, the call, and what happened."""

    kind: str
    call: str
    what: str

    def __str__(self) -> str:
        """One line."""
        return f"{self.kind}: {self.call}: {self.what}" if self.call else f"{self.kind}: {self.what}"


@dataclass
class Rules:
    """What callers may get.

    Args:
        allowed: the statuses of each caller, `CODE` or `CODE:REASON`; of other callers, `others`.
        private: texts that no message may hold, such as the path of the repository.
        late_s: seconds after its deadline until which a call may end.
    """

    allowed: Mapping[str, frozenset[str]] = field(default_factory=dict)
    others: frozenset[str] = frozenset({"OK"})
    private: tuple[str, ...] = ()
    late_s: float = LATE_S

    def permits(self, caller: str, end: End) -> bool:
        """Return whether this caller may get this status."""
        allowed = self.allowed.get(caller, self.others)
        return end.code in allowed or f"{end.code}:{end.reason}" in allowed


class Checker:
    """Takes the events of a history in any order of callers, and collects what is wrong."""

    MOST = 50
    """Problems that are kept; `count` counts all."""

    def __init__(self, service: Service, rules: Rules | None = None) -> None:
        """Begin an empty history."""
        self.service = service
        self.rules = rules or Rules()
        self.problems: list[Problem] = []
        self.count: Counter[str] = Counter()
        """Problems by kind."""
        self.codes: dict[str, Counter[str]] = {}
        """Statuses by caller."""
        self.reasons: Counter[str] = Counter()
        """Errors that the server made, by code."""
        self.latencies_s: dict[str, list[float]] = {}
        """Seconds of the calls with an OK answer, by caller; one that is never emptied grows."""
        self.late: dict[str, tuple[float, float]] = {}
        """Of the calls that ended too late: when, and how many seconds after their deadlines."""
        self.left = 0
        """Calls that ended on the caller's side, or may have."""
        self._open: dict[str, Begin] = {}
        self._ended: dict[str, int] = {}
        self._gaps: dict[str, set[int]] = {}

    def take(self, *events: Event) -> None:
        """Check the next events. A call's end follows its begin."""
        for event in events:
            if isinstance(event, Begin):
                self._begin(event)
            else:
                self._end(event)

    @property
    def pending(self) -> int:
        """Calls without an end."""
        return len(self._open)

    def finish(self) -> list[Problem]:
        """Return all problems. Calls without an end are lost."""
        for call in list(self._open):
            self._add("lost call", call, "it did not end")
        self._open.clear()
        return self.problems

    def excuse(self, late_s: Callable[[float], float]) -> None:
        """Drop problems of calls that ended at most this later than allowed: their caller's own timers were so late.

        Args:
            late_s: returns how late timers were, in seconds, about the time of an end.
        """
        excused = {call for call, (at, late) in self.late.items() if late <= self.rules.late_s + late_s(at)}
        self.problems = [one for one in self.problems if one.kind != "late end" or one.call not in excused]
        self.count["late end"] -= len(excused)
        self.late = {call: found for call, found in self.late.items() if call not in excused}

    def reconcile(self, server: Mapping[str, float], started: float, *, attempts: int = 0) -> None:
        """Compare the statuses of a server with those of its callers, once no call is open.

        Args:
            server: calls that the server ended, by code, since the history began.
            started: calls that it started.
            attempts: the most attempts that the callers made beyond one a call, such as retries.
        """
        answered = sum(codes["OK"] for codes in self.codes.values())
        handled = sum(server.values())
        if started != handled:
            self._add("counters", "", f"the server started {started:g} calls and ended {handled:g}")
        counted = server.get("OK", 0.0)
        most = answered + self.left + attempts
        if not answered <= counted <= most:
            self._add("counters", "", f"callers got {answered} answers (at most {most}), the server sent {counted:g}")
        for code, count in self.reasons.items():
            if count > server.get(code, 0.0):
                self._add("counters", "", f"callers got {count} of {code}, the server sent {server.get(code, 0.0):g}")

    def _begin(self, begin: Begin) -> None:
        if begin.call in self._open or self._has_ended(begin.call):
            self._add("doubled begin", begin.call, "a call of this name began before")
            return
        self._open[begin.call] = begin

    def _end(self, end: End) -> None:
        begin = self._open.pop(end.call, None)
        if begin is None:
            kind = "doubled end" if self._has_ended(end.call) else "end without begin"
            self._add(kind, end.call, f"it ended with {end.code}")
            return
        self._remember(end.call)
        self.codes.setdefault(begin.caller, Counter())[end.code] += 1
        self._in_time(begin, end)
        self._status(begin, end)
        if end.code == "OK":
            self.latencies_s.setdefault(begin.caller, []).append(end.at_s - begin.at_s)
            self._answer(begin, end)

    def _in_time(self, begin: Begin, end: End) -> None:
        if end.at_s < begin.at_s:
            self._add("early end", end.call, f"it ended {begin.at_s - end.at_s:.3f} s before it began")
        if begin.deadline_s is not None and end.at_s > begin.deadline_s + self.rules.late_s:
            self.late[end.call] = end.at_s, end.at_s - begin.deadline_s
            self._add("late end", end.call, f"it ended {end.at_s - begin.deadline_s:.3f} s after its deadline")

    def _status(self, begin: Begin, end: End) -> None:
        if end.left or (end.code in MADE_BY_GRPC and not end.reason):
            self.left += 1
        elif end.reason:
            self.reasons[end.code] += 1
        if end.code == "UNKNOWN":
            self._add("UNKNOWN", end.call, end.message)
        elif not (end.left or self.rules.permits(begin.caller, end)):
            self._add("status", end.call, f"{end.code} {end.reason}: {end.message}")
        if LEAKS.search(end.message) or any(one and one in end.message for one in self.rules.private):
            self._add("leak", end.call, f"the message holds a path or a traceback: {end.message}")

    def _answer(self, begin: Begin, end: End) -> None:
        if not begin.inputs:
            return
        allowed = self.service.allowed(begin.model, begin.version, begin.at_s, end.at_s)
        if end.version not in allowed:
            what = f"version {end.version!r} answered, of {sorted(allowed)} that may have served"
            self._add("version", end.call, what)
            return
        if len(end.answers) != len(begin.inputs):
            self._add("rows", end.call, f"{len(end.answers)} answers to {len(begin.inputs)} sequences")
            return
        for row, (key, answer) in enumerate(zip(begin.inputs, end.answers, strict=True)):
            if what := self.service.wrong(begin.model, end.version, key, answer):
                self._add("answer", end.call, f"row {row}, {key!r}: {what}")

    def _add(self, kind: str, call: str, what: str) -> None:
        self.count[kind] += 1
        if len(self.problems) < self.MOST:
            self.problems.append(Problem(kind, call, what))

    # Names of ended calls are kept as one number for each caller, and those that ended before an earlier call.

    def _has_ended(self, call: str) -> bool:
        caller, _, number = call.rpartition("#")
        return int(number) <= self._ended.get(caller, 0) or int(number) in self._gaps.get(caller, ())

    def _remember(self, call: str) -> None:
        caller, _, number = call.rpartition("#")
        ahead = self._gaps.setdefault(caller, set())
        ahead.add(int(number))
        upto = self._ended.get(caller, 0)
        while upto + 1 in ahead:
            upto += 1
            ahead.remove(upto)
        self._ended[caller] = upto


def check(events: Iterable[Event], service: Service, rules: Rules | None = None) -> list[Problem]:
    """Return the problems of a whole history, counters excepted."""
    checker = Checker(service, rules)
    checker.take(*events)
    return checker.finish()


def percentile(values: Iterable[float], share: float) -> float:
    """Return the observed value below which this share of the values lies; NaN without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan
