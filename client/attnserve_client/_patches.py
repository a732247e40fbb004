"""Weights over the patches of an image, laid out as the image is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from attnserve_client._tokens import Token


@dataclass(frozen=True, slots=True)
class PatchGrid:
    """How the units of an axis cover an image.

    Attributes:
        rows: Patches from top to bottom.
        columns: Patches from left to right; they are counted row by row.
        leading: Units before the first patch, for example one for a class token.
    """

    rows: int
    columns: int
    leading: int = 0

    def place(self, token: Token) -> tuple[int, int] | None:
        """Row and column of a unit, from 0; None for one that leads the patches."""
        at = token.index - self.leading
        return divmod(at, self.columns) if at >= 0 else None

    def lay_out(self, weights: npt.NDArray[Any], tokens: Sequence[Token]) -> npt.NDArray[np.float32]:
        """Weights (S,) of these units, float32 (rows, columns); NaN where a patch is not among them."""
        laid = np.full((self.rows, self.columns), np.nan, dtype=np.float32)
        for weight, token in zip(weights, tokens, strict=True):
            place = self.place(token)
            if place is not None:
                laid[place] = weight
        return laid


@dataclass(frozen=True, slots=True, eq=False)
class Panel:
    """What one unit looks at, or is looked at by, over the patches: weights float32 (rows, columns)."""

    token: Token
    weights: npt.NDArray[np.float32]


def strongest(panels: Sequence[Panel], most: int) -> list[Panel]:
    """Of many panels those with the greatest weights, in their own order."""
    order = sorted(range(len(panels)), key=lambda at: -float(np.nanmax(panels[at].weights, initial=0.0)))
    return [panels[at] for at in sorted(order[:most])]
