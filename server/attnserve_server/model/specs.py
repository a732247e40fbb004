"""Inputs, outputs, axes and text as a manifest describes them. How they fit together is the manifest's to check."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from attnserve_server.model.bands import BandSpec
from attnserve_server.model.frozen import NUMPY_DTYPES, Dimension, Dtype, Frozen, Symbol


class InputRole(StrEnum):
    """What the server may know about an input beyond its shape."""

    TOKEN_IDS = "token_ids"  # noqa: S105 - a role, no secret
    """Ids into the vocabulary: checked against its size, and made by the tokenizer."""
    ATTENTION_MASK = "attention_mask"
    """1 where there is data, 0 where there is padding."""
    TOKEN_TYPE_IDS = "token_type_ids"  # noqa: S105 - a role, no secret
    """0 for the first text, 1 for the second."""
    DATA = "data"
    """Anything else."""


class IndexRange(Frozen):
    """Numbers that an input may hold which the graph looks a table up with: from `least` to `greatest`, both legal.

    `column`: the place along the input's last axis that this is of; None: of every element. An element is legal that is
    in one of the ranges of its place. A place without ranges may hold any number.

    `along`: the symbol of an axis whose positions are looked up; `least` then counts from minus its length and
    `greatest` from its length, so that 0 and -1 are from its first position, counted from the end, to its last.
    """

    least: int
    greatest: int
    column: Annotated[int, Field(ge=0)] | None = None
    along: str = ""

    def at(self, lengths: Mapping[str, int]) -> tuple[int, int]:
        """The least and the greatest legal number, given the lengths of axes."""
        length = lengths[self.along] if self.along else 0
        return self.least - length, self.greatest + length

    @model_validator(mode="after")
    def _holds_a_number(self) -> Self:
        if self.least > self.greatest + (1 if self.along else 0):
            raise ValueError(f"a range from {self.least} to {self.greatest} holds no number")
        return self


class InputSpec(Frozen):
    """One input. `shape` leaves out the batch axis; `padding` fills positions behind a sequence's end.

    `fill` is the value that the server uses where a caller leaves the input out; None: it must be sent.
    `vocabulary_size`: of an input of token ids, how many it knows; 0: as many as the manifest says of all of them.
    `index_ranges`: of any other input that tables are looked up with, the numbers that it may hold; empty: any.
    `additive_mask`: it is added to attention scores and does nothing else, so that minus infinity hides a key.
    `needs_key`: of such a mask, that the model answers NaN where a row of it is nothing but minus infinity.
    """

    name: str
    dtype: Dtype
    shape: tuple[Dimension, ...]
    role: InputRole = InputRole.DATA
    padding: float = 0
    fill: float | None = None
    vocabulary_size: Annotated[int, Field(ge=0)] = 0
    index_ranges: tuple[IndexRange, ...] = ()
    additive_mask: bool = False
    needs_key: bool = False

    def ranges_at(self, column: int) -> tuple[IndexRange, ...]:
        """The ranges of one place along the last axis; empty: any number is legal there."""
        return tuple(each for each in self.index_ranges if each.column in {None, column})

    @property
    def columns(self) -> int:
        """Places along the last axis that differ in their ranges: all of them, or 1 where one range serves for all."""
        apart = any(each.column is not None for each in self.index_ranges)
        return int(self.shape[-1]) if apart else 1

    @property
    def resting(self) -> tuple[int, ...]:
        """For each of the `columns` the legal number nearest to 0."""
        return tuple(_nearest_to_zero(self.ranges_at(column)) for column in range(self.columns))

    @model_validator(mode="after")
    def _columns_exist(self) -> Self:
        named = max((each.column for each in self.index_ranges if each.column is not None), default=-1)
        last = self.shape[-1] if self.shape else 0
        if named >= 0 and not (isinstance(last, int) and named < last):
            raise ValueError(f"{self.name}: column {named} of its ranges is not along its last axis")
        return self

    @model_validator(mode="after")
    def _values_fit_the_dtype(self) -> Self:
        for field, value in (("padding", self.padding), ("fill", self.fill)):
            if value is not None and not _fits(value, NUMPY_DTYPES[self.dtype]):
                raise ValueError(f"{self.name}: {field} {value:g} is no {self.dtype}")
        return self


class OutputSpec(Frozen):
    """One output. `shape` leaves out the batch axis."""

    name: str
    dtype: Dtype
    shape: tuple[Dimension, ...]


class DerivedLength(Frozen):
    """How long a derived axis is: (length of `source` + `offset`) // `stride`, which has rounding up and down in it.

    Pooling by 4, the last window filled up: stride 4, offset 3. A convolution of width K, stride S and padding P on
    either side: stride S, offset 2 P - K + S. A token put before all others: stride 1, offset 1.
    """

    source: Symbol
    stride: Annotated[int, Field(ge=1)]
    offset: int = 0

    def of(self, length: int) -> int:
        """The derived length, in positions; 0 where nothing is left."""
        return max((length + self.offset) // self.stride, 0)


class AxisSpec(Frozen):
    """A dynamic axis. `paddable`: sequences may be padded along it, under the policy that the manifest is for.

    `fixed`: not dynamic after all; the graph always has `max_length` positions here (of patches, of latent queries, of
    an input whose length was fixed at export), and the symbol is there for sites to name. Inputs and outputs do not.
    `grid`: rows and columns of the patches that a fixed axis runs over, row by row; `leading` positions, such as
    that of a class token, stand before them.
    `derived`: its length follows that of another axis, of keys that a model pools, say. Inputs do not name it, and its
    positions are not counted as tokens: those of its source are.
    """

    symbol: Symbol
    max_length: Annotated[int, Field(ge=1)]
    paddable: bool
    fixed: bool = False
    grid: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    leading: Annotated[int, Field(ge=0)] = 0
    derived: DerivedLength | None = None

    @model_validator(mode="after")
    def _fixed_is_never_padded(self) -> Self:
        if self.fixed and self.paddable:
            raise ValueError(f"axis {self.symbol}: a fixed axis has one length, so nothing along it is padded")
        if self.fixed and self.derived is not None:
            raise ValueError(f"axis {self.symbol}: a fixed axis has one length, so it follows no other")
        return self

    @model_validator(mode="after")
    def _grid_is_the_whole_axis(self) -> Self:
        if self.grid is None:
            if self.leading:
                raise ValueError(f"axis {self.symbol}: positions lead, but there is no grid behind them")
            return self
        rows, columns = self.grid
        if not self.fixed:
            raise ValueError(f"axis {self.symbol}: a grid needs a fixed axis")
        if self.leading + rows * columns != self.max_length:
            said = f"{self.leading} positions and {rows} x {columns} patches are not {self.max_length}"
            raise ValueError(f"axis {self.symbol}: {said}")
        return self


class TextSpec(Frozen):
    """How text becomes inputs: the tokenizer runs along `axis`.

    `pair_axis` empty: a second text stands behind the first on the same axis. Else it has that axis, and its token ids,
    to itself (of a decoder, say), behind the token `pair_start`, if there is one.

    `as_written`: the axes along which the tokenizer pads and cuts as its file says, since nothing would hide such
    padding; along the others it does neither. None: a bundle that does not say; see `Manifest.text_as_written`.
    """

    axis: Symbol
    max_tokens: Annotated[int, Field(ge=1)]
    pair_axis: str = ""
    pair_max_tokens: Annotated[int, Field(ge=0)] = 0
    pair_start: Annotated[int, Field(ge=0)] | None = None
    as_written: tuple[Symbol, ...] | None = None

    @model_validator(mode="after")
    def _pair_is_whole(self) -> Self:
        if self.pair_axis == self.axis:
            raise ValueError(f"text: both texts have the axis {self.axis}; a pair on one axis names no pair_axis")
        if bool(self.pair_axis) != bool(self.pair_max_tokens):
            raise ValueError("text: pair_axis and pair_max_tokens go together")
        if self.pair_start is not None and not self.pair_axis:
            raise ValueError("text: pair_start needs a pair_axis")
        return self

    @property
    def axes(self) -> dict[str, int]:
        """The axes that texts run along, with the most tokens on each: the first text's, then the second's."""
        pair = {self.pair_axis: self.pair_max_tokens} if self.pair_axis else {}
        return {self.axis: self.max_tokens, **pair}


def _nearest_to_zero(ranges: tuple[IndexRange, ...]) -> int:
    # Of positions along an axis the first one, which there always is.
    nearest = (each.least if each.along else min(max(0, each.least), each.greatest) for each in ranges)
    return min(nearest, key=abs, default=0)


def _fits(value: float, dtype: np.dtype[np.generic]) -> bool:
    """Whether a dtype holds the value: within its range if of fractions, exactly if of whole numbers."""
    if np.issubdtype(dtype, np.floating):
        return math.isinf(value) or abs(value) <= float(np.finfo(dtype.name).max)
    if dtype == np.bool_:
        return value in {0, 1}
    range_ = np.iinfo(dtype.name)
    return float(value).is_integer() and range_.min <= value <= range_.max


class SiteSpec(Frozen):
    """One place where attention is computed, and the graph's tap for it.

    The tap reads `items_input` (int64, (n,): rows of the batch) and writes `weights_output` (float32, (n, heads, query,
    key), or with a `band` and without `whole_rows` (n, heads, query, columns of the band)). Both are None where the
    site could not be tapped; `unavailable_reason` then says why.
    """

    name: str
    layer: Annotated[int, Field(ge=0)]
    kind: Literal["self", "causal", "cross"]
    form: Literal["dense", "windowed", "linear"]
    operator: str
    heads: Annotated[int, Field(ge=1)]
    kv_heads: Annotated[int, Field(ge=1)]
    head_dim: Annotated[int, Field(ge=0)]
    query_axis: str
    key_axis: str
    items_input: str | None = None
    weights_output: str | None = None
    unavailable_reason: str = ""
    band: BandSpec | None = None
    """Which keys a query of a windowed site sees; None: its weights are of all keys."""
    whole_rows: bool = False
    """Whether the tap writes (n, heads, query, key) all the same, of which the band's columns are taken afterwards."""

    @property
    def available(self) -> bool:
        """Whether its weights can be had."""
        return self.weights_output is not None

    @property
    def columns(self) -> str | int:
        """What the last axis of its weights has: the key axis, or so many columns of the band."""
        return self.key_axis if self.band is None or self.whole_rows else self.band.width

    @property
    def weight_axes(self) -> tuple[str, str]:
        """The axis symbols of the rows and of the columns of its weights; the columns of a band have none: empty."""
        return self.query_axis, self.columns if isinstance(self.columns, str) else ""

    @model_validator(mode="after")
    def _tap_is_whole(self) -> Self:
        if (self.items_input is None) != (self.weights_output is None):
            raise ValueError(f"site {self.name}: a tap has both an input and an output, or neither")
        if self.available == bool(self.unavailable_reason):
            raise ValueError(f"site {self.name}: either a tap or a reason why there is none")
        if self.heads % self.kv_heads:
            raise ValueError(f"site {self.name}: {self.kv_heads} key heads do not divide {self.heads} heads")
        if self.band is not None and self.form != "windowed":
            raise ValueError(f"site {self.name}: a band is of windowed sites, and this one is {self.form}")
        if self.whole_rows and self.band is None:
            raise ValueError(f"site {self.name}: rows are whole anyway where there is no band")
        return self
