"""Weights over the patches of an image, arranged in the image's rows and columns."""

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
    """The grid in which the units of an axis cover an image, counted row by row.

    Attributes:
        rows: Patches from top to bottom.
        columns: Patches from left to right.
        leading: Units before the first patch, for example 1 for a class token.
    """

    rows: int
    columns: int
    leading: int = 0

    def place(self, token: Token) -> tuple[int, int] | None:
        """Return the row and column of a unit, from 0; None for a leading unit.

        The row of a unit behind the grid is `rows` or greater.
        """
        at = token.index - self.leading
        return divmod(at, self.columns) if at >= 0 else None

    def lay_out(self, weights: npt.NDArray[Any], tokens: Sequence[Token]) -> npt.NDArray[np.float32]:
        """Arrange the weights of units over the grid.

        Args:
            weights: Weights (S,).
            tokens: The S units, in the order of the weights.

        Returns:
            float32 (rows, columns); NaN for patches without a unit.

        Raises:
            ValueError: The numbers of weights and units differ.
            IndexError: A unit is behind the grid.
        """
        grid = np.full((self.rows, self.columns), np.nan, dtype=np.float32)
        for weight, token in zip(weights, tokens, strict=True):
            place = self.place(token)
            if place is not None:
                grid[place] = weight
        return grid


@dataclass(frozen=True, slots=True, eq=False)
class Panel:
    """The weights between one unit and the patches of an image.

    Attributes:
        token: The unit.
        weights: float32 (rows, columns); NaN for patches that are not in the map.
    """

    token: Token
    weights: npt.NDArray[np.float32]


def strongest(panels: Sequence[Panel], most: int) -> list[Panel]:
    """Return the `most` panels with the greatest maxima, in their original order. NaN does not count."""
    order = sorted(range(len(panels)), key=lambda at: -float(np.nanmax(panels[at].weights, initial=0.0)))
    return [panels[at] for at in sorted(order[:most])]
