"""The audit log of a server: the queue before its file, and the pipes of other processes to it.

Only one thread of one process writes the file. No request waits for it: a line that finds the queue full, or cannot be
written, is dropped and counted. What a line holds is in `transport.audited`.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from attnserve_server.config import Settings
from attnserve_server.config_bounds import MIB
from attnserve_server.domain.values import Array
from attnserve_server.observability.audit_file import AuditFile, AuditUnusable
from attnserve_server.observability.log_queue import LineQueue, line_pipe
from attnserve_server.observability.logs import logger
from attnserve_server.observability.metrics import Metrics
from attnserve_server.observability.spec import AUDIT_LINES

_log = logger(__name__)

LEAST_KEY: Final = 32
"""Bytes of a key, as many as HMAC-SHA256 returns. Source: RFC 2104, section 3."""
MAX_LINE: Final = MIB
"""Bytes of a line, its line end included."""
_MAX_LINES: Final = 8192
_MAX_BYTES: Final = 16 * MIB
"""Bounds of the queue, beside one request of the maximum size."""
_WHOLE: Final = re.compile(rb'.*"status":"[A-Z_]+"\}', re.DOTALL)
"""A line that a front wrote to its end: no text can hold this, because JSON escapes its quotes."""


@dataclass(slots=True)
class Note:
    """What the audit log keeps of a request until it ends.

    Args:
        caller: name of the caller's token; empty: it has none.
        texts: text and its pair of each sequence; None for one of tensors.
        tensors: tensors that identify each sequence, by input.
        tokens: positions of each sequence.
    """

    caller: str
    texts: tuple[tuple[str, str] | None, ...] = ()
    tensors: tuple[dict[str, Array], ...] = ()
    tokens: tuple[int, ...] = ()


class Record(Protocol):
    """A line that the queue's thread renders, so that no call waits for its HMACs."""

    def __len__(self) -> int:
        """Return the bytes that it keeps in memory."""

    def render(self) -> bytes:
        """Return the line, with its line end, of at most `MAX_LINE`."""


def read_key(path: Path) -> bytes:
    """Return the content of a file, which is a key. Raises AuditUnusable if it cannot be read, or is too short."""
    remedy = f"`openssl rand -out {path} {LEAST_KEY}` makes one"
    try:
        key = path.read_bytes()
    except OSError as error:
        raise AuditUnusable(f"--audit-key-file {path}: cannot be read: {error.strerror}; {remedy}") from None
    if len(key) < LEAST_KEY:
        raise AuditUnusable(f"--audit-key-file {path}: {len(key)} bytes; at least {LEAST_KEY} are needed: {remedy}")
    return key


class _Queue(LineQueue["Record | bytes"]):
    """Lines of the audit log that wait."""

    def __init__(self, write: Callable[[bytes], bool], max_bytes: int) -> None:
        self._sink = write
        super().__init__("audit", None, _MAX_LINES, max_bytes)

    def _write(self, line: Record | bytes) -> bool:
        try:
            return self._sink(line if isinstance(line, bytes) else line.render())
        except Exception:  # noqa: BLE001 - the boundary of one line: later ones are written
            _log.error("an audit line was not written", exc_info=True)
            return False


class Audit:
    """What a process writes its audit lines with. Event loop only."""

    def __init__(self, settings: Settings, metrics: Metrics, key: bytes, write: Callable[[bytes], bool]) -> None:
        """Start the thread that writes.

        Args:
            settings: of the server.
            metrics: of this process, which count the lines that it drops.
            key: of the HMACs.
            write: writes a line and returns whether that succeeded; called by the thread.
        """
        self.key = key
        self.with_text = settings.audit_text
        self._queue = _Queue(write, queue_bytes(settings))
        self.put = self._queue.put
        metrics.counter(AUDIT_LINES).labels("dropped").function = lambda: self._queue.dropped

    def close(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s` for the lines that are left, and take no more. Return whether they are written.

        It blocks: call it in a thread.
        """
        written = self._queue.close(timeout_s)
        if not written:
            _log.warning("the last audit lines were not written in time", waited_s=timeout_s)
        return written


class AuditLog(Audit):
    """The audit log of a server: of this process, and of those that write to its pipes. Event loop only."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        """Read the key, and open the file.

        Raises:
            AuditUnusable: One of them cannot be used.
        """
        assert settings.audit_log is not None, "settings without an audit log have none"
        assert settings.audit_key_file is not None, "settings with an audit log have a key"
        key = read_key(settings.audit_key_file)
        self._file = AuditFile(settings.audit_log, settings.audit_rotate_bytes, settings.audit_keep)
        super().__init__(settings, metrics, key, self._file.write)
        metrics.counter(AUDIT_LINES).labels("written").function = lambda: self._queue.written
        self._readers: list[threading.Thread] = []
        self._is_closed = False

    def reopen(self) -> None:
        """Open the file again, if another one has its name: for SIGHUP."""
        self._file.stale = True
        self.put(b"")

    @contextlib.contextmanager
    def pipe(self, process: str) -> Iterator[int]:
        """Yield the descriptor that another process writes its lines to. It is closed at the end of the block.

        A full pipe blocks its writer: in that process, a thread.
        """

        def forward(line: bytes) -> None:
            if _WHOLE.fullmatch(line):  # else its process crashed within it
                self.put(line + b"\n")

        write, reader = line_pipe(forward, f"audit of {process}", max_line=MAX_LINE, blocking=True)
        self._readers = [*(one for one in self._readers if one.is_alive()), reader]
        try:
            yield write
        finally:
            os.close(write)

    def close(self, timeout_s: float) -> bool:
        """Wait as `Audit.close`, also for the lines of other processes, which have ended, and close the file."""
        for reader in self._readers:
            reader.join(timeout_s)
        written = super().close(timeout_s)
        if written and not self._is_closed:
            self._is_closed = True
            self._file.close()
        return written


def audit_of(settings: Settings, metrics: Metrics) -> AuditLog | None:
    """Return the audit log of a server; None without `--audit-log`. Raises AuditUnusable."""
    return None if settings.audit_log is None else AuditLog(settings, metrics)


def to_pipe(descriptor: int) -> Callable[[bytes], bool]:
    """Return a function that writes lines to the pipe of another process's `AuditLog`. It blocks while that is full."""

    def write(line: bytes) -> bool:
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except OSError:  # the other process has ended
            return False
        return True

    return write


def queue_bytes(settings: Settings) -> int:
    """Return the most bytes that lines which wait keep in memory, in each process that has an audit log."""
    return _MAX_BYTES + settings.max_request_bytes if settings.audit_log else 0
