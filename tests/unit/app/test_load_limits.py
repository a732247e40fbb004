"""Limits of memory: what counts, when it is looked at, and what follows from a bundle's size."""

from __future__ import annotations

import os

import pytest
from attnserve_server import load_limits
from attnserve_server.load_limits import MemoryLimit, all_bytes, derived_limit, own_bytes


def test_the_limit_of_memory_follows_the_files_and_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_limits, "memory_bytes", lambda: 2**40)
    assert derived_limit(1000) == 2**30 + 6 * 1000
    monkeypatch.setattr(load_limits, "memory_bytes", lambda: 5000)
    assert derived_limit(1000) == 5000


def test_own_memory_is_that_which_was_written() -> None:
    before = own_bytes(os.getpid())
    kept = b"x" * 2**26
    assert 0.9 * len(kept) < own_bytes(os.getpid()) - before < 1.2 * len(kept)
    assert own_bytes(0) == 0


def test_resident_memory_includes_pages_of_files() -> None:
    assert all_bytes(os.getpid()) > own_bytes(os.getpid()) > 0
    assert all_bytes(0) == 0


def test_memory_is_looked_at_no_more_often_than_stated() -> None:
    looks: list[int] = []

    def measure(pid: int) -> int:
        looks.append(pid)
        return 100 * len(looks)

    limit = MemoryLimit(7, 150, measure, every_s=1.0)
    assert [limit.look(now) for now in (5.0, 5.5, 6.0, 6.9, 7.0)] == [0, 0, 200, 0, 300]
    assert looks == [7, 7, 7]


def test_a_limit_of_zero_is_none() -> None:
    assert MemoryLimit(7, 0, lambda _: 2**60, every_s=0).look(1.0) == 0
