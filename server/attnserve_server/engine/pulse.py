"""The pulse of a process, in shared memory: its loop's heartbeat, and which requests its instances run now.

The supervisor makes the memory, so that it outlives the process: after a crash it names the requests that were in a
run. The process writes, and the supervisor reads at any time; a value that is read while it is written is right at the
next look.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable
from typing import Final, NamedTuple

Origin = tuple[int, int]
"""A request: the number of its front, and its own number there."""

MOST_INSTANCES: Final = 512
"""Instances beyond share places."""
MOST_REQUESTS: Final = 4096
"""Requests of one run, each with one sequence or more."""
_HEAD: Final = struct.Struct("=dqqq")  # heartbeat, whether suspects run alone, completed runs, places in use
_RUN: Final = struct.Struct("=qdq")  # serial number, or 0; limit in seconds; requests
_REQUEST: Final = struct.Struct("=qq")
_HEAD_BYTES: Final = 64
_PLACE_BYTES: Final = 64 + MOST_REQUESTS * _REQUEST.size


class RunInProgress(NamedTuple):
    """A run. `serial`: differs from that of any other run at this place. `limit_s`: after that it counts as hung."""

    place: int
    serial: int
    limit_s: float


class Pulse:
    """One process's pulse. Its pages exist once they are written."""

    SIZE: Final = -(-(_HEAD_BYTES + MOST_INSTANCES * _PLACE_BYTES) // mmap.PAGESIZE) * mmap.PAGESIZE

    def __init__(self, descriptor: int = -1) -> None:
        """Map the memory of a descriptor of `SIZE` bytes; -1: memory of this process alone."""
        self._memory = mmap.mmap(descriptor, self.SIZE)
        self._serial = 0

    def close(self) -> None:
        """Unmap the memory."""
        self._memory.close()

    def beat(self, now: float) -> None:
        """Set the heartbeat, in monotonic seconds."""
        struct.pack_into("=d", self._memory, 0, now)

    @property
    def beat_s(self) -> float:
        """The last heartbeat; 0 before the first one."""
        return self._head()[0]

    @property
    def alone(self) -> bool:
        """Whether suspects of an earlier crash run alone now, one request at a time."""
        return bool(self._head()[1])

    @alone.setter
    def alone(self, alone: bool) -> None:
        struct.pack_into("=q", self._memory, 8, alone)

    @property
    def completed(self) -> int:
        """Runs that have ended."""
        return self._head()[2]

    def begin(self, instance: int, requests: Iterable[Origin], limit_s: float) -> None:
        """State that an instance begins a run of these requests."""
        place = instance % MOST_INSTANCES
        at = self._at(place)
        ids = list(dict.fromkeys(requests))[:MOST_REQUESTS]
        for number, (front, request) in enumerate(ids):
            _REQUEST.pack_into(self._memory, at + 64 + number * _REQUEST.size, front, request)
        self._serial += 1
        _RUN.pack_into(self._memory, at, self._serial, limit_s, len(ids))
        if place >= self._head()[3]:
            struct.pack_into("=q", self._memory, 24, place + 1)

    def end(self, instance: int) -> None:
        """State that an instance's run has ended."""
        struct.pack_into("=q", self._memory, self._at(instance % MOST_INSTANCES), 0)
        struct.pack_into("=q", self._memory, 16, self.completed + 1)

    def running(self) -> list[RunInProgress]:
        """Return the runs that are in progress."""
        found = []
        for place in range(self._head()[3]):
            serial, limit_s, _ = _RUN.unpack_from(self._memory, self._at(place))
            if serial:
                found.append(RunInProgress(place, serial, limit_s))
        return found

    def requests(self, run: RunInProgress) -> list[Origin]:
        """Return the requests of a run in progress; none for a repeat of the shadow check."""
        at = self._at(run.place)
        _, _, count = _RUN.unpack_from(self._memory, at)
        return [_REQUEST.unpack_from(self._memory, at + 64 + number * _REQUEST.size) for number in range(count)]

    def _head(self) -> tuple[float, int, int, int]:
        return _HEAD.unpack_from(self._memory)

    @staticmethod
    def _at(place: int) -> int:
        return _HEAD_BYTES + place * _PLACE_BYTES


class Overdue:
    """Whether a process hangs, from looks at its pulse.

    It adds up the time between looks, with a bound for each, so that no process counts as hung because the watcher was
    stopped, with the whole machine for example.
    """

    MOST_STEP_S: Final = 1.0
    """The most that one look adds."""

    def __init__(self, pulse: Pulse, beat_limit_s: float) -> None:
        """Begin. `beat_limit_s`: seconds after which a loop without a heartbeat counts as hung."""
        self._pulse = pulse
        self._beat_limit_s = beat_limit_s
        self._looked_s: float | None = None
        self._beat = 0.0
        self._silent_s = 0.0
        self._runs: dict[tuple[int, int], float] = {}

    def look(self, now: float) -> str:
        """Return why the process counts as hung; empty if it does not."""
        step = 0.0 if self._looked_s is None else min(now - self._looked_s, self.MOST_STEP_S)
        self._looked_s = now
        beat = self._pulse.beat_s
        self._silent_s = self._silent_s + step if beat == self._beat else 0.0
        self._beat = beat
        runs = {}
        why = ""
        for run in self._pulse.running():
            key = run.place, run.serial
            took_s = runs[key] = self._runs.get(key, -step) + step
            if took_s > run.limit_s:
                why = f"a run takes longer than {run.limit_s:.3g} s"
        self._runs = runs
        if self._silent_s > self._beat_limit_s:
            return f"its loop has stood still for {self._beat_limit_s:.3g} s"
        return why
