"""Quotas of tokens and guesses of addresses: leaky buckets in memory that all processes of a server share.

One number for each bucket is enough (GCRA): the time at which all that was taken so far has been earned. So a limit
holds for the whole server, however its connections are spread over front processes.

Source: ITU-T I.371, annex A, the generic cell rate algorithm in its virtual scheduling form.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import struct
from collections.abc import Iterator
from typing import Final

PEERS: Final = 4096
"""Buckets of addresses. Two addresses may share one: then either can use up the guesses of the other. No token in use
is affected."""
GUESSES: Final = 10
"""Unknown tokens of one address that are examined at once."""
GUESS_EVERY_S: Final = 6.0
"""After these, one for each of these seconds."""
_KEY_BYTES: Final = 16
_CELL: Final = struct.Struct("=d")
_FIRST_TOKEN: Final = _KEY_BYTES + PEERS * _CELL.size


class Buckets:
    """The buckets of one server. Event loop only; processes exclude each other by a lock on the memory's file."""

    def __init__(self, tokens: int, descriptor: int | None = None) -> None:
        """Map the buckets.

        Args:
            tokens: the most tokens with a quota.
            descriptor: from `create`, of memory that processes share; None: this process is the whole server.
        """
        size = size_of(tokens)
        self._shared = descriptor is not None
        self._descriptor = -1 if descriptor is None else os.dup(descriptor)
        self._memory = mmap.mmap(self._descriptor, size) if self._shared else mmap.mmap(-1, size)
        if not self._shared:
            self._memory[:_KEY_BYTES] = os.urandom(_KEY_BYTES)
        self._key = self._memory[:_KEY_BYTES]

    @staticmethod
    def create(tokens: int) -> int:
        """Return the descriptor of shared buckets, all full. A child inherits it.

        Raises:
            OSError: the system has no such memory.
        """
        descriptor = os.memfd_create("attnserve", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, size_of(tokens))
        os.pwrite(descriptor, os.urandom(_KEY_BYTES), 0)
        return descriptor

    def take(self, slot: int, count: float, rate: float, burst: float, now: float) -> float:
        """Take `count` from a token's bucket, or return the seconds until that is possible; 0: it was taken.

        A request of more than `burst` needs a full bucket, and is earned afterwards, so that `rate` holds over time.

        Args:
            slot: of the token.
            count: sequences.
            rate: sequences a second.
            burst: the most sequences at once.
            now: monotonic seconds, of the same clock in all processes.
        """
        return self._take(_FIRST_TOKEN + slot * _CELL.size, count / rate, burst / rate, now)

    def reset(self, slot: int) -> None:
        """Fill the bucket of a slot, which another token has from now on."""
        with self._locked(_FIRST_TOKEN + slot * _CELL.size) as at:
            _CELL.pack_into(self._memory, at, 0.0)

    def guess(self, peer: str, now: float) -> float:
        """Take the right to have one token of this address examined, or return the seconds until then; 0: taken."""
        return self._take(self._place(peer), GUESS_EVERY_S, GUESSES * GUESS_EVERY_S, now)

    def right(self, peer: str) -> None:
        """Give the right back, because the token was valid."""
        with self._locked(self._place(peer)) as at:
            (earned,) = _CELL.unpack_from(self._memory, at)
            _CELL.pack_into(self._memory, at, earned - GUESS_EVERY_S)

    def _place(self, peer: str) -> int:
        digest = hashlib.blake2b(peer.encode(), digest_size=8, key=self._key).digest()
        return _KEY_BYTES + int.from_bytes(digest, "little") % PEERS * _CELL.size

    def _take(self, place: int, cost_s: float, burst_s: float, now: float) -> float:
        with self._locked(place) as at:
            (stored,) = _CELL.unpack_from(self._memory, at)
            earned = max(float(stored), now)
            wait_s = earned - now + min(cost_s, burst_s) - burst_s
            if wait_s > 1e-9:
                return wait_s
            _CELL.pack_into(self._memory, at, earned + cost_s)
            return 0.0

    @contextlib.contextmanager
    def _locked(self, at: int) -> Iterator[int]:
        if not self._shared:
            yield at
            return
        # Other processes hold the lock for the few instructions of this block.
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX, _CELL.size, at)
        try:
            yield at
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, _CELL.size, at)


class Slots:
    """Which token has which bucket: a token keeps its own over reloads of the file."""

    def __init__(self, buckets: Buckets, count: int) -> None:
        self._buckets = buckets
        self._free = list(range(count - 1, -1, -1))
        self._taken: dict[str, int] = {}

    def assign(self, names: set[str]) -> dict[str, int]:
        """Return the slots of these tokens, at most as many as there are; those of others become free."""
        for name in self._taken.keys() - names:
            self._free.append(self._taken.pop(name))
        for name in sorted(names - self._taken.keys()):
            slot = self._taken[name] = self._free.pop()
            self._buckets.reset(slot)
        return dict(self._taken)


def size_of(tokens: int) -> int:
    """Return the bytes of the buckets of so many tokens."""
    return _FIRST_TOKEN + tokens * _CELL.size
