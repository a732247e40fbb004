"""Memory that grew is given back once the process rests, and not while it works."""

from __future__ import annotations

import ctypes

from attnserve_server.domain.machine import anonymous_bytes, return_freed_memory
from attnserve_server.engine.resting import GROWTH_BYTES, Trimmer

MIB = 2**20


class Process:
    """A process whose memory, clock and processor time the test sets."""

    def __init__(self) -> None:
        self.bytes, self.now_s, self.used_s, self.trims = 100 * MIB, 0.0, 0.0, 0
        self.in_use = 100 * MIB
        self.trimmer = Trimmer(self, lambda: self.bytes, lambda: self.used_s, self.give_back)

    def now(self) -> float:
        return self.now_s

    def give_back(self) -> None:
        self.bytes, self.trims = self.in_use, self.trims + 1

    async def look(self, used_s: float = 0.0) -> bool:
        self.now_s += 1.0
        self.used_s += used_s
        return await self.trimmer.look()


async def test_growth_is_given_back_at_rest() -> None:
    process = Process()
    process.bytes += GROWTH_BYTES
    assert await process.look(used_s=0.1)
    assert (process.bytes, process.trims) == (100 * MIB, 1)


async def test_nothing_is_given_back_while_the_process_works() -> None:
    process = Process()
    process.bytes += 40 * MIB
    assert [await process.look(used_s=0.5) for _ in range(5)] == [False] * 5
    assert await process.look()


async def test_small_growth_stays() -> None:
    process = Process()
    process.bytes += GROWTH_BYTES - 1
    assert not await process.look()


async def test_growth_that_is_in_use_is_tried_once() -> None:
    process = Process()
    process.bytes = process.in_use = 120 * MIB
    assert [await process.look() for _ in range(3)] == [True, False, False]
    process.bytes = 110 * MIB
    assert not await process.look()
    process.bytes = 110 * MIB + GROWTH_BYTES
    assert await process.look()


def test_freed_memory_below_a_block_in_use_is_returned() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes, libc.memset.argtypes = (
        ctypes.c_void_p, [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t],
    )  # fmt: skip
    return_freed_memory()
    before, size = anonymous_bytes(), 64 * 1024
    blocks = [libc.malloc(size) for _ in range(500)]
    for block in blocks:
        libc.memset(block, 1, size)
    last = libc.malloc(size)
    for block in blocks:
        libc.free(block)
    kept = anonymous_bytes() - before
    return_freed_memory()
    returned = before + kept - anonymous_bytes()
    libc.free(last)
    assert kept > 25 * MIB, "the control: the allocator keeps what was freed"
    assert returned > 25 * MIB
