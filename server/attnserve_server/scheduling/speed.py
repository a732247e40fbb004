"""How fast the instances are: running estimates, per useful token and per second foreseen. Event loop only."""

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
        self._took_s = self._foreseen_s = 0.0

    @property
    def seconds_per_token(self) -> float | None:
        """The estimate; None before anything is known."""
        return self._seconds / self._tokens if self._tokens else None

    @property
    def pace(self) -> float:
        """Seconds that runs take for each second that they were foreseen to; 0 before anything is known.

        The cost model tells an instance's own time. How long a run takes depends on who else uses the cores, too.
        """
        return self._took_s / self._foreseen_s if self._foreseen_s else 0.0

    def saw(self, seconds: float, tokens: int, foreseen_s: float = 0.0) -> None:
        """Takes in one run; `foreseen_s` by the cost model, 0 where there is none."""
        self._seconds = self._seconds * _MEMORY + seconds
        self._tokens = self._tokens * _MEMORY + tokens
        if foreseen_s:
            self._took_s = self._took_s * _MEMORY + seconds
            self._foreseen_s = self._foreseen_s * _MEMORY + foreseen_s
