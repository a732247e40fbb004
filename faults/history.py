"""The record of calls: one event when a call begins and one when it ends, in memory or as lines of JSON in a file.

Times are seconds on the system's monotonic clock, which all processes of one machine share.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

Answer = Mapping[str, Any]
"""The values of one sequence by name, as `model.equality` names them: arrays, or lists after a journey as JSON."""


@dataclass(frozen=True, slots=True)
class Begin:
    """A call was sent.

    Args:
        call: its name, unique in a history: the caller's name, `#` and a number.
        at_s: when.
        model: the requested model; empty where the call is no inference, or names none that exists.
        version: the requested version; empty: the highest.
        inputs: the key of each sequence's input, by which its reference is found; empty: no answer is expected.
        deadline_s: when the caller stops waiting; None: never.
    """

    call: str
    at_s: float
    model: str = ""
    version: str = ""
    inputs: tuple[str, ...] = ()
    deadline_s: float | None = None

    @property
    def caller(self) -> str:
        """The caller's name."""
        return self.call.rpartition("#")[0]


@dataclass(frozen=True, slots=True)
class End:
    """A call ended.

    Args:
        call: its name.
        at_s: when.
        code: the gRPC status.
        reason: of the error's ErrorInfo; empty where gRPC itself made the error.
        message: the error's text.
        version: of the answer's receipt.
        answers: one for each sequence.
        left: whether the caller ended the call.
    """

    call: str
    at_s: float
    code: str
    reason: str = ""
    message: str = ""
    version: str = ""
    answers: tuple[Answer, ...] = ()
    left: bool = False


Event = Begin | End
Sink = Callable[[Event], None]


@dataclass
class Recorder:
    """Names the calls of one caller, and passes their events on."""

    caller: str
    sink: Sink
    clock: Callable[[], float] = time.monotonic
    _count: int = field(default=0, init=False)

    def begin(
        self, model: str = "", version: str = "", inputs: tuple[str, ...] = (), timeout_s: float | None = None
    ) -> str:
        """Record that a call begins. Return its name."""
        self._count += 1
        call, now = f"{self.caller}#{self._count}", self.clock()
        self.sink(Begin(call, now, model, version, inputs, None if timeout_s is None else now + timeout_s))
        return call

    def end(self, call: str, code: str, **facts: Any) -> End:
        """Record that a call ended. `facts` are fields of `End`."""
        ended = End(call, self.clock(), code, **facts)
        self.sink(ended)
        return ended


@dataclass
class Last:
    """Keeps the last events, to write them out after a failure."""

    events: deque[Event] = field(default_factory=lambda: deque(maxlen=200_000))

    def __call__(self, event: Event) -> None:
        """Keep an event."""
        self.events.append(event)


class Journal:
    """Writes events to a file, one line of JSON each."""

    def __init__(self, path: Path) -> None:
        """Begin a file; one that exists is replaced."""
        self.path = path
        self._file: IO[str] = path.open("w", encoding="utf-8")

    def __call__(self, event: Event) -> None:
        """Write one event."""
        self._file.write(line_of(event) + "\n")

    def flush(self) -> None:
        """Make all events so far readable."""
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def line_of(event: Event) -> str:
    """Return an event as one line of JSON, without what is empty."""
    facts = {name: value for name, value in asdict(event).items() if value not in ("", (), None, False)}
    return json.dumps({"event": type(event).__name__.lower(), **facts}, default=_plain)


def _plain(value: Any) -> Any:
    return value.tolist()  # an array


def events_of(path: Path, start: int = 0) -> Iterator[Event]:
    """Yield the events of a file, from a place in bytes. A last line that is not complete is left out."""
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            if line.endswith(b"\n"):
                yield event_of(json.loads(line))


def event_of(facts: dict[str, Any]) -> Event:
    """Return the event that a line of JSON holds. Raises KeyError or TypeError if it holds none."""
    kind = {"begin": Begin, "end": End}[facts.pop("event")]
    for name in ("inputs", "answers"):
        if name in facts:
            facts[name] = tuple(facts[name])
    return kind(**facts)
