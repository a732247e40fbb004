"""What a run costs: the cost model, and the estimate of it that warm-up begins and real runs correct.

A run of B sequences, padded to T positions each (summed over the axes), takes

    run_s + B (sequence_s + token_s T + pair_s T^2)

seconds: launching it, then each row's own part, its positions, and its pairs of positions, which attention computes. No
part is negative. What is measured here is one instance's own time; how instances share a machine is seen by scheduling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Final

import numpy as np
import numpy.typing as npt

_LEAST_TOKEN_S: Final = 1e-9
"""Nothing costs nothing: a token of a nanosecond stands for times below the clock's grain."""
_LEAST_RUN_TOKENS: Final = 4.0
"""Below what any runtime was seen to need: a noisy measurement must not talk us out of batching."""
_MEMORY: Final = 0.998
"""How much of what was seen before weighs after each run: the last 500 runs or so count."""
_REFIT_RUNS: Final = 64
"""Runs between two fits: a fit takes up to about as long as answering a request."""


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds of one run on one instance, as the module says. The default: MiniLM in float32 on one core."""

    run_s: float = 2.2e-3
    sequence_s: float = 2.6e-5
    token_s: float = 2.3e-4
    pair_s: float = 1.9e-7

    def row_s(self, tokens: float) -> float:
        """What one row of so many positions adds to a run."""
        return self.sequence_s + tokens * (self.token_s + tokens * self.pair_s)

    def rows_s(self, tokens: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """`row_s` of many."""
        return self.sequence_s + tokens * (self.token_s + tokens * self.pair_s)

    def row_tokens(self, seconds: float) -> float:
        """How many positions a row has that takes so long: what `row_s` undoes; 0 where none is that quick."""
        left = seconds - self.sequence_s
        if left <= 0:
            return 0.0
        # The root of the quadratic in the form that loses no digits where pairs hardly count.
        return 2 * left / (self.token_s + math.sqrt(self.token_s**2 + 4 * self.pair_s * left))

    def seconds(self, size: int, tokens: float) -> float:
        """A run of `size` rows, padded to `tokens` positions each."""
        return self.run_s + size * self.row_s(tokens)

    def with_overhead(self, tokens: float | None) -> CostModel:
        """With a run's overhead as so many positions; None: as measured, and never less than any runtime needs."""
        if tokens is None:
            return replace(self, run_s=max(self.run_s, _LEAST_RUN_TOKENS * self.token_s))
        return replace(self, run_s=tokens * self.token_s)


@dataclass(frozen=True, slots=True)
class TimedRun:
    """One run that was timed: its rows, their padded positions, and the seconds that it took its instance."""

    size: int
    tokens: int
    seconds: float


class CostEstimate:
    """The cost model that errs least, in relation to each time, over warm-up's runs and recent real ones.

    Warm-up's runs count for ever, each as one: whatever shapes the traffic has, all four parts stay determined. Event
    loop only, once the instances serve.
    """

    def __init__(self, seen: tuple[TimedRun, ...] = ()) -> None:
        # Normal equations of the fit: of warm-up's runs, which stay, and of real ones, which fade.
        self._begun = _Equations.of(seen, memory=1.0)
        self._recent = _Equations.of((), memory=_MEMORY)
        self._unfitted: list[TimedRun] = []
        self._model = self._fit()

    @property
    def model(self) -> CostModel:
        """The cost model, as of the last fit."""
        return self._model

    def saw(self, run: TimedRun) -> None:
        """Takes in a real run."""
        self._unfitted.append(run)
        if len(self._unfitted) >= _REFIT_RUNS:
            self._recent = self._recent.faded(_MEMORY ** len(self._unfitted)) + _Equations.of(self._unfitted, _MEMORY)
            self._unfitted.clear()
            self._model = self._fit()

    def _fit(self) -> CostModel:
        all_seen = self._begun + self._recent
        parts = _non_negative(all_seen.matrix, all_seen.vector)
        run_s, sequence_s, token_s, pair_s = (float(part) for part in parts)
        return CostModel(run_s, sequence_s, max(token_s, _LEAST_TOKEN_S), pair_s)


def fit(seen: tuple[TimedRun, ...]) -> CostModel:
    """The cost model of a few timed runs."""
    return CostEstimate(seen).model


@dataclass(frozen=True, slots=True)
class _Equations:
    """The sums that a least-squares fit of relative errors needs."""

    matrix: npt.NDArray[np.float64]
    vector: npt.NDArray[np.float64]

    @classmethod
    def of(cls, runs: Sequence[TimedRun], memory: float) -> _Equations:
        """Of runs in the order in which they were seen; each weighs `memory` times what the next one does."""
        size, tokens, seconds = np.array([(run.size, run.tokens, run.seconds) for run in runs]).reshape(-1, 3).T
        terms = np.stack((np.ones_like(size), size, size * tokens, size * tokens**2)) / np.maximum(
            seconds, _LEAST_TOKEN_S
        )
        weights = memory ** np.arange(len(runs))[::-1]
        return cls((terms * weights) @ terms.T, terms @ weights)

    def faded(self, share: float) -> _Equations:
        return _Equations(self.matrix * share, self.vector * share)

    def __add__(self, other: _Equations) -> _Equations:
        return _Equations(self.matrix + other.matrix, self.vector + other.vector)


def _non_negative(matrix: npt.NDArray[np.float64], vector: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The non-negative x of least x'Mx - 2v'x: of the ways to leave some of four unknowns at zero, the best."""
    # Scaled to a unit diagonal first: a square of positions is a million times what the constant is.
    scale = np.sqrt(np.diag(matrix))
    scale[scale == 0] = 1.0
    unit, wanted = matrix / np.outer(scale, scale), vector / scale
    found, *_ = np.linalg.lstsq(unit, wanted, rcond=1e-9)
    if (found >= 0).all():  # what is best of all is best of those
        whole: npt.NDArray[np.float64] = found / scale
        return whole
    best, least = np.zeros(4), 0.0
    for count in (1, 2, 3):
        for chosen in combinations(range(4), count):
            part = np.ix_(chosen, chosen)
            found, *_ = np.linalg.lstsq(unit[part], wanted[list(chosen)], rcond=1e-9)
            error = float(found @ unit[part] @ found - 2 * wanted[list(chosen)] @ found)
            if (found >= 0).all() and error < least - 1e-9:
                best, least = np.zeros(4), error
                best[list(chosen)] = found
    return best / scale
