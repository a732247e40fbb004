"""The file of the audit log: whole lines, rotation, reopening, full disks, locks; and lines of other processes."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from attnserve_server.config import Settings
from attnserve_server.observability import audit_file
from attnserve_server.observability.audit import MAX_LINE, AuditLog, read_key, to_pipe
from attnserve_server.observability.audit_file import AuditFile, AuditUnusable
from attnserve_server.observability.metrics import Metrics
from attnserve_server.observability.spec import AUDIT_LINES

LINE = b"x" * 99 + b"\n"


@contextmanager
def full_at(size: int) -> Iterator[None]:
    """A limit of file size acts as a full disk does: both let a write succeed in part, and then fail."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_line_that_does_not_fit_on_the_disk_leaves_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []  # not to the tests' own output, which has the same limit
    log = SimpleNamespace(
        error=lambda event, **_: logged.append(event), warning=lambda event, **_: logged.append(event)
    )
    monkeypatch.setattr(audit_file, "_log", log)
    file = AuditFile(tmp_path / "log", 0, 1)
    assert file.write(LINE)
    with full_at(150):
        assert not file.write(LINE)
        assert not file.write(LINE)
        assert (tmp_path / "log").read_bytes() == LINE
    assert file.write(LINE)
    assert (tmp_path / "log").read_bytes() == LINE * 2
    assert logged == ["the audit log cannot be written", "the audit log is written again"], "once"
    file.close()


def test_files_rotate_by_size_and_the_oldest_is_removed(tmp_path: Path) -> None:
    file = AuditFile(tmp_path / "log", 250, 2)
    lines = [b"%d" % number * 99 + b"\n" for number in range(9)]
    assert all(file.write(line) for line in lines)
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert found == {
        "log": lines[8],
        "log.1": lines[6] + lines[7],
        "log.2": lines[4] + lines[5],
    }
    assert file.write(b"y" * 500)
    assert (tmp_path / "log").read_bytes() == b"y" * 500, "a line larger than a file has a separate one"
    file.close()


def test_a_file_that_cannot_be_rotated_is_written_further(tmp_path: Path) -> None:
    file = AuditFile(tmp_path / "log", 250, 1)
    (tmp_path / "log.1").mkdir()
    (tmp_path / "log.1" / "in the way").touch()
    assert all(file.write(LINE) for _ in range(5))
    assert (tmp_path / "log").read_bytes() == LINE * 5
    file.close()


def test_an_existing_file_is_continued_and_is_readable_by_its_user_alone(tmp_path: Path) -> None:
    for _ in range(2):
        file = AuditFile(tmp_path / "log", 0, 1)
        assert file.write(LINE)
        file.close()
    assert (tmp_path / "log").read_bytes() == LINE * 2
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_two_servers_cannot_write_one_file(tmp_path: Path) -> None:
    file = AuditFile(tmp_path / "log", 0, 1)
    with pytest.raises(AuditUnusable, match="another server writes it; give each server another file"):
        AuditFile(tmp_path / "log", 0, 1)
    file.close()
    AuditFile(tmp_path / "log", 0, 1).close()


def test_a_stale_file_is_opened_again_only_if_another_has_its_name(tmp_path: Path) -> None:
    file = AuditFile(tmp_path / "log", 0, 1)
    file.stale = True
    assert file.write(LINE), "the same file: its lock is the server's own"
    (tmp_path / "log").rename(tmp_path / "moved")
    assert file.write(LINE)
    file.stale = True
    assert file.write(b"")
    assert file.write(LINE)
    assert (tmp_path / "moved").read_bytes() == LINE * 2
    assert (tmp_path / "log").read_bytes() == LINE
    (tmp_path / "log").unlink()
    (tmp_path / "log").mkdir()
    file.stale = True
    assert file.write(LINE), "what was open stays in use"
    file.close()


def test_a_pipe_without_a_reader_and_a_short_key_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(AuditUnusable, match="fifo: cannot be written"):
        AuditFile(tmp_path / "fifo", 0, 1)
    (tmp_path / "key").write_bytes(b"k" * 31)
    with pytest.raises(AuditUnusable, match="31 bytes; at least 32 are needed"):
        read_key(tmp_path / "key")


@pytest.fixture
def log(tmp_path: Path) -> Iterator[tuple[AuditLog, Metrics, Path]]:
    (tmp_path / "key").write_bytes(b"k" * 32)
    metrics = Metrics()
    settings = Settings(audit_log=tmp_path / "log", audit_key_file=tmp_path / "key", max_request_bytes=1024)
    made = AuditLog(settings, metrics)
    yield made, metrics, tmp_path / "log"
    made.close(5)


def counted(metrics: Metrics) -> dict[str, float]:
    return {result: metrics.counter(AUDIT_LINES).labels(result).total for result in ("written", "dropped")}


def test_lines_of_other_processes_arrive_whole_and_parts_of_one_that_crashed_do_not(
    log: tuple[AuditLog, Metrics, Path],
) -> None:
    made, metrics, path = log
    whole = b'{"text":"\\"status\\":\\"OK\\"}","status":"OK"}\n'
    large = b'{"text":"' + b"x" * (MAX_LINE - 30) + b'","status":"OK"}\n'
    with made.pipe("front 0") as write:
        passed = os.dup(write)
    send = to_pipe(passed)
    assert send(whole)
    assert send(large)
    assert send(whole[:-3])
    os.close(passed)
    assert made.close(5)
    assert path.read_bytes() == whole + large
    assert counted(metrics) == {"written": 2, "dropped": 0}


def test_a_queue_that_is_full_drops_lines_and_counts_them(log: tuple[AuditLog, Metrics, Path]) -> None:
    made, metrics, path = log
    made.put(b"x" * (17 * 2**20))
    made.put(LINE)
    made.reopen()
    assert made.close(5)
    made.put(LINE)
    assert counted(metrics) == {"written": 1, "dropped": 2}
    assert path.read_bytes() == LINE
