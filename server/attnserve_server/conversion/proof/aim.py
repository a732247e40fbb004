"""What an attack aims at: one model's lengths, thresholds, batch sizes and contents, and the form of a probe.

An attack runs a graph on batches that are likely to change an answer, and a probe is one such batch. Nothing is run
here. A symbol that `Aim.longest` lacks raises KeyError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from attnserve_server.conversion.probing.feeds import Lengths
from attnserve_server.conversion.proof.contents import ORDINARY, Draft

SHORT: Final = 16
"""Runs of sequences up to this length take negligible time."""
_SMALL: Final = (1, 2, 3, 4, 5, 7, 8, 9)
_LONG: Final = 512
_THRESHOLDS: Final = 24
"""The maximum number of thresholds that are straddled."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One batch.

    Args:
        rows: The sequences.
        padded: The lengths that they are padded to, by symbol.
        core: True if an attack without this probe is not complete.
    """

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
        longest: The greatest length of each symbol for which one row fits into the memory of a run.
        thresholds: Lengths, counts, strides and widths that the graph compares with.
        max_batch_size: The number of rows of the largest batch.
        contents: The kinds of content of sequences, ordinary values first.
        rows_that_fit: Returns how many rows of given lengths fit into the memory of a run.
    """

    longest: Lengths
    thresholds: Sequence[int]
    max_batch_size: int
    contents: Sequence[str]
    rows_that_fit: Callable[[Lengths], int]

    def lengths(self, symbol: str) -> list[int]:
        """Return the lengths to try along one axis, ascending."""
        longest = self.longest[symbol]
        steps = [*self.straddled, *(1 << power for power in range(3, longest.bit_length() + 1)), longest]
        around = {step + shift for step in steps for shift in (-1, 0, 1)}
        return sorted(length for length in {*_SMALL, *around} if 1 <= length <= longest)

    @property
    def straddled(self) -> list[int]:
        """The thresholds that are straddled, and twice the small ones, ascending."""
        kept = sorted({threshold for threshold in self.thresholds if threshold > 0})[:_THRESHOLDS]
        return sorted({*kept, *(2 * threshold for threshold in kept if threshold <= SHORT)})

    def long(self, symbol: str) -> int:
        """Return the padded length at which every content is tried: the maximum, while a run of it is short."""
        return min(self.longest[symbol], _LONG)

    def draft(self, own: Lengths, content: str = ORDINARY, number: int = 0) -> Draft:
        """Return a draft with lengths in the order of the symbols, so that equal lengths give equal drafts."""
        return Draft(tuple((symbol, own[symbol]) for symbol in self.longest), content, number)

    def clipped(self, lengths: Lengths) -> dict[str, int]:
        """Return the lengths, clipped to the maximum of each symbol and to at least 1."""
        return {symbol: max(min(length, self.longest[symbol]), 1) for symbol, length in lengths.items()}
