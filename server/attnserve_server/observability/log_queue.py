"""Bounded queues of lines, the threads that write them, and pipes whose text becomes lines.

A full pipe blocks its writer, and a blocked event loop answers no request. Here only the queue's own thread writes: a
log that is not read costs lines, which are counted, and never an answer. The standard library's QueueHandler and
QueueListener bound the number of lines but not their bytes, print a traceback for each line that does not fit, and wait
without a bound at the end.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import threading
from collections import deque
from collections.abc import Callable, Sized
from typing import Final, Generic, TypeVar

Line = TypeVar("Line", bound=Sized)

MAX_LINES: Final = 1024
MAX_BYTES: Final = 2**20
"""Bounds of the lines that wait. A traceback is a few KiB, so that the lines of a failure fit many times."""
MAX_FOREIGN_LINE: Final = 16 * 1024
"""Bytes of a line that native code writes; a longer one is split."""
_PIPE_BYTES: Final = 2**20
"""Size of a pipe: Linux allows each user that much. It holds what libraries write while the reading thread waits."""
_CHUNK: Final = 65_536


class LineQueue(Generic[Line]):
    """Lines that wait to be written, and the thread that writes them, as a subclass states in `_write`.

    `put` may be called by any thread, and never waits for a write. A line is dropped, and counted, if the queue is full
    or its write fails. The length of a line is the number of bytes that it keeps in memory; one of length 0 is always
    taken, and not counted: it only has the thread call `_write`.
    """

    def __init__(self, name: str, on_dropped: Callable[[int], None] | None, max_lines: int, max_bytes: int) -> None:
        """Start the thread, which uses what a subclass sets before.

        Args:
            name: of the thread.
            on_dropped: called by the thread with the number of dropped lines that were not reported before, once a
                write succeeds and the queue is at most half full.
            max_lines: lines that wait.
            max_bytes: bytes of the lines that wait.
        """
        self._on_dropped = on_dropped
        self._max_lines, self._max_bytes = max_lines, max_bytes
        self._lines: deque[Line] = deque()
        self._bytes = 0
        self._dropped = self._reported = self._written = 0
        self._writing = self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._write_all, name=name, daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Lines dropped so far."""
        return self._dropped

    @property
    def written(self) -> int:
        """Lines written so far."""
        return self._written

    def put(self, line: Line) -> None:
        """Add a line; drop it if the queue is full or closed."""
        with self._changed:
            fits = len(self._lines) < self._max_lines and self._bytes + len(line) <= self._max_bytes
            if self._closed or not (fits or not len(line)):
                self._dropped += 1
                return
            self._lines.append(line)
            self._bytes += len(line)
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until all lines are written, at most `timeout_s`. Return whether they are."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._lines and not self._writing, timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s` for the lines that are left, and take no more. Return whether they are written.

        A thread that waits for a pipe which is not read ends with the process.
        """
        written = self.flush(timeout_s)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        return written

    def _write_all(self) -> None:
        while (line := self._next()) is not None:
            written = self._write(line)
            with self._changed:
                self._written += written and len(line) > 0
                self._dropped += not written
                unreported = self._dropped - self._reported
                is_low = len(self._lines) <= self._max_lines // 2 and self._bytes <= self._max_bytes // 2
                report = self._on_dropped if written and unreported and is_low else None
                if report is not None:
                    self._reported = self._dropped
            if report is not None:
                report(unreported)
            with self._changed:
                self._writing = False
                self._changed.notify_all()

    def _next(self) -> Line | None:
        """Wait for a line and take it; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._closed)
            if not self._lines:
                return None
            line = self._lines.popleft()
            self._bytes -= len(line)
            self._writing = True
            return line

    def _write(self, line: Line) -> bool:
        """Write one line. Return False if it could not be written, or in part only. The queue's thread only."""
        raise NotImplementedError


class LogQueue(LineQueue[bytes]):
    """Lines, each with its line end, that wait for a descriptor. A closed pipe, or a full disk, drops them."""

    def __init__(
        self,
        descriptor: int,
        on_dropped: Callable[[int], None] | None = None,
        *,
        max_lines: int = MAX_LINES,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """Start the thread.

        Args:
            descriptor: where the lines go. It may be shared with other processes, so its flags are left as they are.
            on_dropped: as `LineQueue`.
            max_lines: as `LineQueue`.
            max_bytes: as `LineQueue`.
        """
        self._descriptor = descriptor
        self._torn = False
        super().__init__("log-writer", on_dropped, max_lines, max_bytes)

    def _write(self, line: bytes) -> bool:
        """Write one line. Return False if it could not be written, or in part only."""
        before = int(self._torn)
        rest = memoryview(b"\n" * before + line)
        whole = len(rest)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # another process has set the shared descriptor to this
                select.select([], [self._descriptor], [])
            except OSError:
                # The next line that can be written begins with a line end, so that it does not continue this one.
                if len(rest) < whole:
                    self._torn = whole - len(rest) > before
                return False
        self._torn = False
        return True


def line_pipe(
    take: Callable[[bytes], None], name: str, *, max_line: int = MAX_FOREIGN_LINE, blocking: bool = False
) -> tuple[int, threading.Thread]:
    """Return the write end of a new pipe, and the thread that gives each of its lines to `take`.

    The thread ends when all write ends are closed, those of other processes included. It outlives another process that
    crashes, so that its last lines arrive.

    Args:
        take: gets a line without its line end; empty lines are left out.
        name: of the thread.
        max_line: bytes of a line; a longer one is split.
        blocking: whether a writer waits while the pipe is full. Otherwise its text is lost then: native code that waits
            could hold the interpreter's lock, which the reading thread needs.
    """
    read, write = os.pipe()
    with contextlib.suppress(OSError, AttributeError):  # a smaller pipe serves too
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    os.set_blocking(write, blocking)
    thread = threading.Thread(target=_read_all, args=(read, take, max_line), name=name, daemon=True)
    thread.start()
    return write, thread


def _read_all(descriptor: int, take: Callable[[bytes], None], max_line: int) -> None:
    rest = b""
    while chunk := os.read(descriptor, _CHUNK):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            _give(line, take, max_line)
        if len(rest) > max_line:
            _give(rest[:max_line], take, max_line)
            rest = rest[max_line:]
    _give(rest, take, max_line)
    os.close(descriptor)


def _give(line: bytes, take: Callable[[bytes], None], max_line: int) -> None:
    for start in range(0, len(line), max_line):
        take(line[start : start + max_line])
