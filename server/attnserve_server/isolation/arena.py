"""Shared memory in fixed slots: one process allocates and writes, the other maps the same memory and reads.

Linux only: the memory is a file without a name (`memfd_create`), whose descriptor a child process inherits. Nothing is
left behind, however the processes end.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from typing import Final, NamedTuple

SLOT_BYTES: Final = 16 * 1024
"""Bytes of one slot. Smaller data travels inside its message, where it costs less than a slot."""
KEPT_BYTES: Final = 4 * 2**20
"""Bytes whose pages stay with an arena that is empty; those above go back to the system."""


class Arena:
    """Shared memory. One process, the owner, calls `allocate` and `free`; both call `view`."""

    def __init__(self, descriptor: int, size: int) -> None:
        """Map the memory of a descriptor from `create_descriptor`.

        Args:
            descriptor: of the memory; it may be closed afterwards.
            size: its bytes, a multiple of `SLOT_BYTES`.
        """
        self._memory = mmap.mmap(descriptor, size)
        self._whole = memoryview(self._memory)
        self._slots = bytearray(size // SLOT_BYTES)  # 1: taken
        self._end = 0  # of the slots whose pages may exist
        self.free_slots = len(self._slots)
        self.size = size

    @staticmethod
    def create_descriptor(size: int) -> int:
        """Return the descriptor of new memory of `size` bytes, zeroed and without pages until it is written.

        Raises:
            OSError: the system has no such memory, or not as much.
        """
        descriptor = os.memfd_create("attnserve", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, size)
        return descriptor

    def allocate(self, size: int) -> int | None:
        """Return the offset of `size` free bytes, 1 or more; None if no run of free slots is long enough."""
        count = -(-size // SLOT_BYTES)
        wanted = bytes(count)
        at = self._slots.find(wanted)  # the lowest, so that pages are used again
        if at < 0:
            return None
        self._slots[at : at + count] = b"\x01" * count
        self._end = max(self._end, at + count)
        self.free_slots -= count
        return at * SLOT_BYTES

    def free(self, offset: int, size: int) -> None:
        """Free what `allocate` returned for this size. Raises ValueError if it is not taken."""
        at, count = offset // SLOT_BYTES, -(-size // SLOT_BYTES)
        if self._slots[at : at + count] != b"\x01" * count:
            raise ValueError(f"{count} slots at {at} are not all taken")
        self._slots[at : at + count] = bytes(count)
        self.free_slots += count
        if self.free_slots == len(self._slots) and self._end * SLOT_BYTES > KEPT_BYTES:
            self._memory.madvise(mmap.MADV_REMOVE, KEPT_BYTES, self._end * SLOT_BYTES - KEPT_BYTES)
            self._end = KEPT_BYTES // SLOT_BYTES

    def view(self, offset: int, size: int) -> memoryview:
        """Return the memory at an offset. Raises ValueError if it is not within the arena."""
        if offset < 0 or offset + size > len(self._whole):
            raise ValueError(f"{size} bytes at {offset} are not within {len(self._whole)}")
        return self._whole[offset : offset + size]

    def close(self) -> None:
        """Unmap the memory, as soon as no array reads it."""
        with contextlib.suppress(BufferError):  # an array still reads it: it is unmapped with that
            self._whole.release()
            self._memory.close()


class LoadFacts(NamedTuple):
    """The load of an engine, as `scheduling.admission.Load` needs it. `seconds_per_token` is NaN while unknown."""

    sequences: int
    tokens: int
    bytes: int
    running_tokens: int
    instances: int
    seconds_per_token: float
    callers: int = 0


_FACTS: Final = struct.Struct("=qqqqqdq")


class LoadBoard:
    """The load of an engine in shared memory: the engine writes it, fronts read it, and no message is needed.

    A front may read it while it is written; an estimate that is off for one request does no harm.
    """

    SIZE: Final = mmap.PAGESIZE

    def __init__(self, descriptor: int) -> None:
        """Map the memory of a descriptor of `SIZE` bytes."""
        self._memory = mmap.mmap(descriptor, self.SIZE)

    def write(self, facts: LoadFacts) -> None:
        """Publish the load."""
        _FACTS.pack_into(self._memory, 0, *facts)

    def read(self) -> LoadFacts:
        """Return the load as it was last published; zeros before."""
        return LoadFacts(*_FACTS.unpack_from(self._memory))

    def close(self) -> None:
        """Unmap the memory."""
        self._memory.close()
