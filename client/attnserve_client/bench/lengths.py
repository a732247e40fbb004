"""Distributions of sequence lengths, written as one word on a command line."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

FORMS: Final = "N, uniform:LOW,HIGH or lognormal:MEDIAN,SIGMA,LOW,HIGH"


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of lengths in tokens, from `low` (at least 1) to `high`.

    `lognormal`, which fits sentences, is the exponential of a normal distribution with mean log(`median`) and standard
    deviation `sigma`, rounded and clipped.
    """

    kind: Literal["fixed", "uniform", "lognormal"]
    low: int
    high: int
    median: float = 0.0
    sigma: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Parse `128`, `uniform:4,256` or `lognormal:32,0.8,4,256`.

        Raises:
            ValueError: The text has another form, or its numbers are out of range.
            OverflowError: A length is infinite.
        """
        kind, colon, rest = text.partition(":")
        made = None
        with contextlib.suppress(ValueError):
            numbers = [float(each) for each in (rest if colon else kind).split(",")]
            if not colon and len(numbers) == 1:
                made = cls("fixed", int(numbers[0]), int(numbers[0]))
            elif kind == "uniform" and len(numbers) == 2:
                made = cls("uniform", int(numbers[0]), int(numbers[1]))
            elif kind == "lognormal" and len(numbers) == 4:
                made = cls("lognormal", int(numbers[2]), int(numbers[3]), numbers[0], numbers[1])
        if made is None:
            raise ValueError(f"lengths {text!r} are not of the form {FORMS}")
        if not 1 <= made.low <= made.high:
            raise ValueError(f"lengths from {made.low} to {made.high}: need 1 <= lowest <= highest")
        if made.kind == "lognormal" and not (made.median > 0 and made.sigma >= 0):
            raise ValueError(f"median {made.median:g} must be above 0, and sigma {made.sigma:g} at least 0")
        return made

    def draw(self, count: int, random: np.random.Generator) -> npt.NDArray[Any]:
        """Draw `count` lengths, int64 (count,)."""
        if self.kind == "lognormal":
            drawn = np.rint(random.lognormal(np.log(self.median), self.sigma, count))
            return np.clip(drawn, self.low, self.high).astype(np.int64)
        return random.integers(self.low, self.high + 1, count)

    def __str__(self) -> str:
        if self.kind == "fixed":
            return str(self.low)
        shape = f"{self.median:g},{self.sigma:g}," if self.kind == "lognormal" else ""
        return f"{self.kind}:{shape}{self.low},{self.high}"


DEFAULT: Final = Lengths("lognormal", 4, 256, 32, 0.8)
