"""What an attack aims at: one model's lengths, thresholds, batch sizes and contents, and the form of a probe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from attnserve_server.conversion.probing.feeds import Lengths
from attnserve_server.conversion.proof.contents import ORDINARY, Draft

SHORT: Final = 16
"""Sequences up to this length cost next to nothing."""
_SMALL: Final = (1, 2, 3, 4, 5, 7, 8, 9)
_LONG: Final = 512
_THRESHOLDS: Final = 24
"""How many thresholds are straddled."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One batch: sequences, and the lengths that they are padded to. `core`: an attack without it is not complete."""

    rows: tuple[Draft, ...]
    padded: tuple[tuple[str, int], ...]
    core: bool = False

    @property
    def to(self) -> dict[str, int]:
        """The padded lengths by symbol."""
        return dict(self.padded)


@dataclass(frozen=True, slots=True)
class Aim:
    """What the probes of one model are made of.

    Args:
        longest: the greatest length of each symbol that a run of one row has the memory for.
        thresholds: lengths, counts, strides and widths that the graph compares with.
        max_batch_size: rows of the largest batch.
        contents: what sequences may contain, ordinary values first.
        rows_that_fit: how many rows of given lengths one run has the memory for.
    """

    longest: Lengths
    thresholds: Sequence[int]
    max_batch_size: int
    contents: Sequence[str]
    rows_that_fit: Callable[[Lengths], int]

    def lengths(self, symbol: str) -> list[int]:
        """The lengths along one axis that are worth trying, ascending."""
        longest = self.longest[symbol]
        steps = [*self.straddled, *(1 << power for power in range(3, longest.bit_length() + 1)), longest]
        around = {step + shift for step in steps for shift in (-1, 0, 1)}
        return sorted(length for length in {*_SMALL, *around} if 1 <= length <= longest)

    @property
    def straddled(self) -> list[int]:
        """The thresholds that are straddled, and the doubles of the small ones, ascending."""
        kept = sorted({threshold for threshold in self.thresholds if threshold > 0})[:_THRESHOLDS]
        return sorted({*kept, *(2 * threshold for threshold in kept if threshold <= SHORT)})

    def long(self, symbol: str) -> int:
        """The padded length at which every content is tried: the maximum, as far as a run of it is short."""
        return min(self.longest[symbol], _LONG)

    def draft(self, own: Lengths, content: str = ORDINARY, number: int = 0) -> Draft:
        """A draft whose lengths stand in the order of the symbols, so that equal ones are equal drafts."""
        return Draft(tuple((symbol, own[symbol]) for symbol in self.longest), content, number)

    def clipped(self, lengths: Lengths) -> dict[str, int]:
        """Lengths, none of them beyond the greatest."""
        return {symbol: max(min(length, self.longest[symbol]), 1) for symbol, length in lengths.items()}
