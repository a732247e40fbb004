"""The file of the audit log: whole lines, rotation by size, and what is wrong with a file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path

from attnserve_server.domain.errors import AttnserveError
from attnserve_server.observability.logs import logger

_log = logger(__name__)


class AuditUnusable(AttnserveError):
    """The file of the audit log, or of its key, cannot be used."""

    reason = "AUDIT_UNUSABLE"


class AuditFile:
    """A file that lines are appended to, whole or not at all. One thread only.

    It may also be a pipe or a device, such as `/dev/stdout`, which is not rotated.
    """

    def __init__(self, path: Path, rotate_bytes: int, keep: int) -> None:
        """Open the file.

        Args:
            path: of the file, which is created for this user alone if there is none.
            rotate_bytes: size that it does not exceed, but with a single line that does; 0: any.
            keep: renamed files that are kept.

        Raises:
            AuditUnusable: It cannot be written, or another server writes it.
        """
        self._path = path
        self._rotate_bytes = self._rotate_above = rotate_bytes
        self._keep = keep
        self._failing = False
        self.stale = False
        """Set by any thread: the next write opens the file again, if another one has its name."""
        try:
            self._descriptor = self._open()
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                why = "another server writes it; give each server another file"
            else:
                why = f"cannot be written: {error.strerror}; create its folder, and let the server's user write there"
            raise AuditUnusable(f"--audit-log {path}: {why}") from None

    def write(self, line: bytes) -> bool:
        """Append a line. Return False if it could not be written: then nothing of it is in the file."""
        if self.stale:
            self.stale = False
            self._reopen()
        if not line:
            return True
        rest = memoryview(line)
        try:
            if self._rotate_bytes:
                self._rotate_before(len(line))
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            self._take_back(len(line) - len(rest))
            if not self._failing:
                self._failing = True
                remedy = "free space, or mount a disk that can be written; lines are dropped until then"
                _log.error("the audit log cannot be written", file=str(self._path), why=error.strerror, remedy=remedy)
            return False
        if self._failing:
            self._failing = False
            _log.warning("the audit log is written again", file=str(self._path))
        return True

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY
        opened = os.open(self._path, flags, 0o600)
        try:
            os.set_blocking(opened, True)
            if stat.S_ISREG(os.fstat(opened).st_mode):
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}:  # a file system without locks
                os.close(opened)
                raise
        return opened

    def _use(self, opened: int) -> None:
        os.close(self._descriptor)
        self._descriptor = opened

    def _reopen(self) -> None:
        """Open the file of this name, unless it is the one in use."""
        own = os.fstat(self._descriptor)
        try:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(own, self._path.stat()):
                    return
            self._use(self._open())
        except OSError as error:
            effect = "the file that was open stays in use; let the server's user write there, and send SIGHUP again"
            _log.error("the audit log was not reopened", file=str(self._path), why=error.strerror, effect=effect)

    def _rotate_before(self, size: int) -> None:
        """Rename the file and begin another one, if it would grow too large by so many bytes."""
        facts = os.fstat(self._descriptor)
        if not facts.st_size or facts.st_size + size <= self._rotate_above or not stat.S_ISREG(facts.st_mode):
            return
        try:
            for number in range(self._keep - 1, -1, -1):
                with contextlib.suppress(FileNotFoundError):
                    self._numbered(number).replace(self._numbered(number + 1))
            self._use(self._open())
            self._rotate_above = self._rotate_bytes
        except OSError as error:
            self._rotate_above = facts.st_size + self._rotate_bytes  # then it is tried again
            remedy = "let the server's user rename files in its folder"
            _log.error("the audit log was not rotated", file=str(self._path), why=error.strerror, remedy=remedy)

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}") if number else self._path

    def _take_back(self, count: int) -> None:
        """Remove the bytes that were written of a line that failed."""
        with contextlib.suppress(OSError):
            facts = os.fstat(self._descriptor)
            if count and stat.S_ISREG(facts.st_mode):
                os.ftruncate(self._descriptor, facts.st_size - count)
