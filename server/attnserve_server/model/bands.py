"""Bands: which key each column of a windowed site's weights has. `attention.bands` computes the keys.

Each query of a windowed site has few keys, so its weights have W columns in place of one for each key. An invalid band
raises pydantic's ValidationError. A site is a place in a graph that computes attention; it is windowed if its weights
have a band.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from attnserve_server.model.frozen import Frozen

_Count = Annotated[int, Field(ge=0)]
_Size = Annotated[int, Field(ge=1)]


class SlidingBand(Frozen):
    """Keys around each query: column c has key q + (c - before) * dilation.

    The first `global_keys` columns have the first keys; no later column of a row has them again.

    Source: Beltagy et al. 2020, "Longformer: The Long-Document Transformer", section 3.1.
    """

    kind: Literal["sliding"] = "sliding"
    before: _Count
    after: _Count
    dilation: _Size = 1
    global_keys: _Count = 0

    @property
    def width(self) -> int:
        """W, the number of columns."""
        return self.global_keys + self.before + 1 + self.after


class BlockBand(Frozen):
    """Keys of whole blocks: queries of block b have the keys of the blocks b - before to b + after, in order.

    `global_keys` as in `SlidingBand`.

    Source: Child et al. 2019, "Generating Long Sequences with Sparse Transformers".
    """

    kind: Literal["blocks"] = "blocks"
    block: _Size
    before: _Count
    after: _Count
    global_keys: _Count = 0

    @property
    def width(self) -> int:
        """W, the number of columns."""
        return self.global_keys + (self.before + 1 + self.after) * self.block


class GridBand(Frozen):
    """Square windows over a grid of patches, numbered row by row. Both axes of the site are the grid.

    The windows are shifted by `shift` rows and columns, and wrap around the edges. Columns are the patches of the
    query's window, row by row.

    Source: Liu et al. 2021, "Swin Transformer: Hierarchical Vision
    Transformer using Shifted Windows", section 3.2.
    """

    kind: Literal["grid"] = "grid"
    rows: _Size
    columns: _Size
    window: _Size
    shift: _Count = 0

    @property
    def width(self) -> int:
        """W, the number of columns."""
        return self.window * self.window


class TableBand(Frozen):
    """Keys as a table, for fixed axes without a closed form: query q has the keys `windows[window_of[q]]`.

    -1 means no key.
    """

    kind: Literal["table"] = "table"
    windows: Annotated[tuple[tuple[Annotated[int, Field(ge=-1)], ...], ...], Field(min_length=1)]
    window_of: Annotated[tuple[_Count, ...], Field(min_length=1)]

    @property
    def width(self) -> int:
        """W, the number of columns."""
        return len(self.windows[0])

    @model_validator(mode="after")
    def _windows_are_whole(self) -> Self:
        if len({len(window) for window in self.windows}) > 1:
            raise ValueError("every window of a band's table has the same number of keys")
        if max(self.window_of) >= len(self.windows):
            raise ValueError(f"window {max(self.window_of)} of a band's table is not among its {len(self.windows)}")
        return self


BandSpec = Annotated[SlidingBand | BlockBand | GridBand | TableBand, Field(discriminator="kind")]
