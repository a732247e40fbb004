"""Logs: one JSON line for each event, on standard error: of the server, of libraries, and of native code.

`configure` writes lines in place, for commands. `serving` is for servers: a thread writes the lines, so that a log that
is not read delays no answer, and text that native code writes to standard error becomes JSON lines too.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final, TextIO
from weakref import WeakKeyDictionary

import structlog

from attnserve_server.observability.log_queue import MAX_BYTES, LogQueue, line_pipe

_LEVELS: Final = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_NATIVE_LEVELS: Final = {
    "I": logging.INFO,
    "V": logging.DEBUG,
    "W": logging.WARNING,
    "E": logging.ERROR,
    "F": logging.CRITICAL,
}
_NATIVE: Final = re.compile(
    r"(?:\x1b\[[\d;]*m)*(?:"
    r"(?P<absl>[IWEF])\d{4} \S+ +\d+ (?P<file>[\w.-]+:\d+)\] "  # absl's log_format.cc: gRPC core
    r"|[\d-]+ [\d:.]+ \[(?P<ort>[VIWEF]):onnxruntime:[^]]*? (?P<place>[\w.-]+:\d+) \S+\] "  # its ostream_sink.cc
    r")(?P<text>.*?)(?:\x1b\[m)?"
)
"""A line of gRPC's core or of onnxruntime: level, source file and text."""
END_S: Final = 2.0
"""Seconds that the last lines may take at the end of a server."""
REFUSALS_PER_S: Final = 10
"""Refusals of one reason that are logged in a second: they show what callers do wrong, and cost little."""

Logger = structlog.stdlib.BoundLogger

_log = structlog.stdlib.get_logger(__name__)
_queue: LogQueue | None = None
"""The queue of this process while it serves."""
_readers: list[threading.Thread] = []
"""Threads that read what this process and its children write."""


class _QueueHandler(logging.Handler):
    """Puts each line into a queue."""

    def __init__(self, queue: LogQueue) -> None:
        super().__init__()
        self._queue = queue

    def emit(self, record: logging.LogRecord) -> None:
        """Render a record here, where its values are as they were, and add it to the queue."""
        try:
            self._queue.put(self.format(record).encode() + b"\n")
        except Exception:  # noqa: BLE001 - as the library's own handlers do
            self.handleError(record)


def configure(
    level: str = "info", stream: TextIO | None = None, *, handler: logging.Handler | None = None, process: str = ""
) -> None:
    """Write the logs of the server and of all libraries to one stream, as JSON lines.

    JSON escapes line ends and control characters, so that text from a caller cannot forge or colour a line.

    Args:
        level: `debug`, `info`, `warning` or `error`.
        stream: where to write; None: standard error.
        handler: takes the lines in place of a stream.
        process: name of this process, which becomes the field `process` of its lines; empty: no such field.

    Raises:
        KeyError: `level` is none of these.
    """

    def named(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        if process:
            event.setdefault("process", process)
        return event

    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    handler = handler or logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name, structlog.stdlib.ExtraAdder()],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                named,
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(_LEVELS[level])
    # Below warning, these libraries log connections and requests, which metrics count.
    for library in ("uvicorn", "grpc", "asyncio"):
        logging.getLogger(library).setLevel(max(_LEVELS[level], logging.WARNING))
        logging.getLogger(library).handlers[:] = []
        logging.getLogger(library).propagate = True
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )


def logger(name: str) -> Logger:
    """Return the logger of a module."""
    made: Logger = structlog.stdlib.get_logger(name)
    return made


@contextlib.contextmanager
def serving(level: str, process: str = "", descriptor: int | None = None) -> Iterator[None]:
    """Write the logs of a server by a thread until the block ends. No call waits for the reader of the log.

    At the end, lines that are left have `END_S` to be written. A line that finds the queue full is dropped and counted
    (`dropped_lines`); once the log is read again, one line states how many. Python's stacks at a fatal signal go to
    standard error at once, past the queue, because the threads of a process that crashes do not run on.

    Args:
        level: as `configure`.
        process: as `configure`.
        descriptor: where the lines go, for a process whose parent reads its standard error too, by `pipes_of`. None:
            standard error, and what native code writes there goes through the queue, as one JSON line for each line.
    """
    global _queue  # noqa: PLW0603 - a process has one log
    out, crash = descriptor, 2
    if out is None:
        out = _standard_error()
        crash = _unblocked(out)
    handlers, hook, had_faults = logging.getLogger().handlers[:], threading.excepthook, faulthandler.is_enabled()
    queue = _queue = LogQueue(out, _report_dropped)
    configure(level, handler=_QueueHandler(queue), process=process)
    logging.captureWarnings(True)
    threading.excepthook = _log_thread
    faulthandler.enable(crash)
    if descriptor is None:
        write, reader = line_pipe(_log_native, "standard error")
        _readers.append(reader)
        os.dup2(write, 2)
        os.close(write)
    try:
        yield
    finally:
        # Where the log is not read, standard error stays the pipe, because the last words of a command would wait.
        if queue.flush(END_S) and descriptor is None:
            os.dup2(out, 2)
        while _readers:
            _readers.pop().join(END_S if queue.flush(0) else 0)
        queue.close(END_S if queue.flush(0) else 0)
        faulthandler.disable()
        if had_faults:
            faulthandler.enable(2)
        threading.excepthook = hook
        logging.captureWarnings(False)
        logging.getLogger().handlers[:] = handlers
        _queue = None


def flush(timeout_s: float) -> bool:
    """Wait at most `timeout_s` for the lines of `serving` to be written. Return whether they are. Any thread."""
    return _queue is None or _queue.flush(timeout_s)


def dropped_lines() -> int:
    """Return the number of lines that this process has dropped; 0 if it writes its logs in place."""
    return 0 if _queue is None else _queue.dropped


@contextlib.contextmanager
def pipes_of(process: str, name: Callable[[], str] | None = None) -> Iterator[tuple[int, int]]:
    """Yield the descriptors that a child process writes to: its log, and its standard error. Close them at the end.

    Lines of the log go on as they are. Lines of standard error become JSON lines with the name of the process, those of
    a crash included. Outside `serving`, both are this process's standard error.

    Args:
        process: name of the child.
        name: returns its name at any time, for one that changes it; None: it does not.
    """
    queue = _queue
    named = name or (lambda: process)
    _readers[:] = [one for one in _readers if one.is_alive()]
    if queue is None:
        yield 2, 2
        return

    def forward(line: bytes) -> None:
        if line.endswith(b"}"):
            queue.put(line + b"\n")
        else:  # its end is missing, because the process crashed
            _log_native(line, named())

    log, log_reader = line_pipe(forward, f"log of {process}", max_line=MAX_BYTES, blocking=True)
    native, native_reader = line_pipe(lambda line: _log_native(line, named()), f"standard error of {process}")
    _readers[:] = [*(reader for reader in _readers if reader.is_alive()), log_reader, native_reader]
    try:
        yield log, native
    finally:
        os.close(log)
        os.close(native)


class Sampler:
    """Passes some lines of each kind in each period, and logs how many others there were. Event loop only."""

    def __init__(self, most: int = REFUSALS_PER_S, period_s: float = 1.0, level: int = logging.INFO) -> None:
        """Begin.

        Args:
            most: lines of a kind in a period.
            period_s: seconds of a period, which the first line of a kind begins.
            level: of the line that states how many others there were.
        """
        self._most, self._period_s, self._level = most, period_s, level
        # A loop that ends takes its timers along.
        self._periods: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, int]] = WeakKeyDictionary()

    def passes(self, kind: str) -> bool:
        """Return whether to log one more line of a kind. Kinds are from a closed set."""
        loop = asyncio.get_running_loop()
        counts = self._periods.setdefault(loop, {})
        count = counts.get(kind, 0)
        if not count:
            loop.call_later(self._period_s, self._end, counts, kind)
        counts[kind] = count + 1
        return count < self._most

    def _end(self, counts: dict[str, int], kind: str) -> None:
        suppressed = counts.pop(kind) - self._most
        if suppressed > 0:
            named = {"reason": kind, "suppressed": suppressed, "logged": self._most}
            _log.log(self._level, "refusals were not logged", **named)


def _standard_error() -> int:
    """Return another descriptor of standard error; one that takes everything where the process was started without."""
    try:
        return os.dup(2)
    except OSError:
        return os.dup(os.open(os.devnull, os.O_WRONLY))


def _unblocked(descriptor: int) -> int:
    """Return another descriptor of the same file or pipe that does not block; if there is none, the descriptor."""
    try:
        return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)
    except OSError:  # a socket, another user's pipe, or no such file system
        return descriptor


def _report_dropped(count: int) -> None:
    _log.warning("log lines were dropped", dropped=count, remedy="read the log faster, or raise --log-level")


def last_words(event: str, **fields: object) -> None:
    """Log a warning of a process that ends: in place, as JSON, if its log has ended already."""
    if logging.getLogger().handlers:
        _log.warning(event, **fields)
        return
    words: dict[str, Any] = {**fields, "event": event, "level": "warning"}
    line = json.dumps(structlog.processors.TimeStamper(fmt="iso", utc=True)(None, "warning", words))
    with contextlib.suppress(OSError):
        os.write(2, line.encode() + b"\n")


def _log_thread(failed: threading.ExceptHookArgs) -> None:
    error = failed.exc_value
    if error is not None:
        _log.error("a thread failed", thread=getattr(failed.thread, "name", ""), exc_info=error)


def _log_native(line: bytes, process: str = "") -> None:
    """Log a line that native code, or Python itself, wrote to standard error."""
    text = line.decode("utf-8", "backslashreplace").rstrip("\r")
    if not text.strip():
        return
    found = _NATIVE.fullmatch(text)
    fields: dict[str, str] = {"logger": "stderr"} | ({"process": process} if process else {})
    level = logging.ERROR  # unknown, and the stack of a crash must pass every level
    if found is not None:
        level = _NATIVE_LEVELS[found["absl"] or found["ort"]]
        fields["source"] = found["file"] or found["place"]
        text = found["text"]
    _log.log(level, text, **fields)
