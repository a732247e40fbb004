"""How fast the instances are: a running estimate of seconds per useful token. Event loop only."""

from __future__ import annotations

from typing import Final

_MEMORY: Final = 0.95
"""How much of what was known before weighs after each run: the last twenty runs or so count."""
_SEED_TOKENS: Final = 64.0
"""What warm-up counts for: soon outweighed by real runs."""


class Speed:
    """Seconds per useful token of one instance, padding and overhead included, from recent runs."""

    def __init__(self, seconds_per_token: float | None = None) -> None:
        self._tokens = 0.0 if seconds_per_token is None else _SEED_TOKENS
        self._seconds = (seconds_per_token or 0.0) * self._tokens

    @property
    def seconds_per_token(self) -> float | None:
        """The estimate; None before anything is known."""
        return self._seconds / self._tokens if self._tokens else None

    def saw(self, seconds: float, tokens: int) -> None:
        """Takes in one run."""
        self._seconds = self._seconds * _MEMORY + seconds
        self._tokens = self._tokens * _MEMORY + tokens
