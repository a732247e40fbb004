"""The queue of log lines: bounds, counts, order, failed writes, and pipes whose text becomes lines.

Real pipes and files; nothing waits without a bound.
"""

from __future__ import annotations

import contextlib
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from attnserve_server.observability.log_queue import MAX_FOREIGN_LINE, LogQueue, line_pipe

LINE = b"x" * 99 + b"\n"


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    yield read, write
    os.close(write)
    os.close(read)


def all_of(read: int, until: bytes) -> bytes:
    """What comes from a pipe, to the line `until`."""
    found = b""
    while not found.endswith(until):
        chunk = os.read(read, 65536)
        assert chunk, "the pipe ended"
        found += chunk
    return found


def fill(write: int) -> None:
    """Write to a pipe until it takes nothing more."""
    os.set_blocking(write, False)
    for size in (4096, 1):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(write, b"\n" * size)
    os.set_blocking(write, True)


def test_lines_arrive_in_order(pipe: tuple[int, int]) -> None:
    queue = LogQueue(pipe[1])
    for number in range(100):
        queue.put(b"%d\n" % number)
    assert queue.close(5)
    assert os.read(pipe[0], 65536).split() == [b"%d" % number for number in range(100)]
    assert queue.dropped == 0


@pytest.mark.parametrize(
    ("bounds", "most"), [({"max_lines": 50}, 50), ({"max_bytes": 5000}, 50)], ids=["lines", "bytes"]
)
def test_a_pipe_that_is_not_read_costs_lines_and_no_time(
    pipe: tuple[int, int], bounds: dict[str, int], most: int
) -> None:
    fill(pipe[1])
    reports: list[int] = []
    queue = LogQueue(pipe[1], reports.append, **bounds)
    for _ in range(200):
        queue.put(LINE)
    assert not queue.flush(0.05), "the pipe is full"
    waiting, dropped = len(queue._lines), queue.dropped
    assert waiting in (most - 1, most)
    assert queue._bytes == waiting * len(LINE)
    assert dropped == 199 - waiting, "the thread has one line, which waits for the pipe"
    reader = threading.Thread(target=all_of, args=(pipe[0], b"end\n"))
    reader.start()
    assert queue.flush(5), "the pipe moves again"
    assert sum(reports) == dropped, "each dropped line is reported once"
    queue.put(b"end\n")
    reader.join(5)
    assert queue.close(5)
    assert (queue.dropped, reader.is_alive()) == (dropped, False)


def test_a_write_in_place_would_wait_for_the_reader(pipe: tuple[int, int]) -> None:
    """The control: the same lines, written by the caller, fill the pipe and stop it."""
    writer = threading.Thread(target=lambda: [os.write(pipe[1], LINE) for _ in range(2000)], daemon=True)
    writer.start()
    writer.join(0.5)
    assert writer.is_alive()
    left = 2000 * len(LINE)
    while left:
        left -= len(os.read(pipe[0], 65536))
    writer.join(5)
    assert not writer.is_alive()


def test_closing_is_bounded_where_the_pipe_is_not_read(pipe: tuple[int, int]) -> None:
    queue = LogQueue(pipe[1])
    for _ in range(900):
        queue.put(LINE)
    assert not queue.close(0.05)
    queue.put(LINE)
    assert queue.dropped == 1, "a closed queue takes no line"
    all_of(pipe[0], LINE * 900)


def test_a_shared_descriptor_that_does_not_block_is_waited_for(pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[1], False)
    queue = LogQueue(pipe[1])
    for _ in range(900):
        queue.put(LINE)
    assert not queue.flush(0.05)
    assert all_of(pipe[0], LINE * 900) == LINE * 900
    assert queue.close(5)
    assert queue.dropped == 0


def test_a_closed_pipe_costs_lines_only() -> None:
    read, write = os.pipe()
    os.close(read)
    queue = LogQueue(write)
    queue.put(LINE)
    queue.put(LINE)
    assert queue.close(5)
    assert queue.dropped == 2
    os.close(write)


def test_a_full_disk_costs_lines_and_tears_at_most_one(tmp_path: Path) -> None:
    """A limit of file size acts as a full disk does: both let a write succeed in part, and then fail."""
    path = tmp_path / "log"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    reports: list[int] = []
    queue = LogQueue(descriptor, reports.append)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (250, hard))
        for _ in range(5):
            queue.put(LINE)
        assert queue.flush(5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    queue.put(b"after\n")
    assert queue.close(5)
    os.close(descriptor)
    assert queue.dropped == 3
    assert reports == [3]
    assert path.read_bytes() == LINE + LINE + b"x" * 50 + b"\nafter\n"


def test_a_line_of_a_pipe_is_given_whole_or_in_pieces() -> None:
    taken: list[bytes] = []
    write, reader = line_pipe(taken.append, "test")
    long = b"y" * (MAX_FOREIGN_LINE + 5)
    for part in (b"one\ntw", b"o\n\n", long, b"\nno end"):
        os.write(write, part)
    os.close(write)
    reader.join(5)
    assert taken == [b"one", b"two", long[:MAX_FOREIGN_LINE], long[MAX_FOREIGN_LINE:], b"no end"]


def test_a_writer_to_a_full_pipe_does_not_wait() -> None:
    held = threading.Event()
    write, reader = line_pipe(lambda _: held.wait(5) and None, "test")
    with contextlib.suppress(BlockingIOError):
        for _ in range(2**20 // 10):
            os.write(write, LINE)
        pytest.fail("ten times the pipe's size was written")
    held.set()
    os.close(write)
    reader.join(5)
    assert not reader.is_alive()
