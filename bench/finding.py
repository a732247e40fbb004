"""One line of a benchmark's verdict: what was measured, against which limit."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Finding:
    """A figure and its limit. `values` are those of the rounds; the median counts.

    Attributes:
        what: in words.
        values: one for each round.
        limit: what the median may be.
        most: whether the limit is the greatest allowed or the least.
        detail: what else was seen.
    """

    what: str
    values: Sequence[float]
    limit: float
    most: bool = True
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.values)

    @property
    def holds(self) -> bool:
        """Whether the median keeps the limit."""
        return self.median <= self.limit if self.most else self.median >= self.limit

    def facts(self) -> dict[str, Any]:
        """For JSON."""
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
