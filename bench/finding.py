"""One result of a benchmark: a figure, its limit and whether it holds.

A finding without values raises ValueError when it is read.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Finding:
    """A figure and its limit. The median of the rounds is compared with the limit.

    Attributes:
        what: Its name, in words.
        values: One for each round.
        limit: The limit of the median.
        most: True if the limit is an upper one, False if it is a lower one.
        detail: Other measurements.
    """

    what: str
    values: Sequence[float]
    limit: float
    most: bool = True
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.values)

    @property
    def holds(self) -> bool:
        """True if the median is within the limit."""
        return self.median <= self.limit if self.most else self.median >= self.limit

    def facts(self) -> dict[str, Any]:
        """Return the finding for JSON."""
        return {
            "what": self.what,
            "median": self.median,
            "least": min(self.values),
            "greatest": max(self.values),
            "rounds": len(self.values),
            "limit": self.limit,
            "limit_is": "most" if self.most else "least",
            "holds": self.holds,
            **self.detail,
        }
