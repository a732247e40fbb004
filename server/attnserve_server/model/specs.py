"""Parts of a manifest that describe the graph: inputs, outputs, axes and text.

Each part checks its own fields. The manifest checks that the parts agree. An invalid one raises pydantic's
ValidationError.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any, Final, Self

import numpy as np
from pydantic import Field, model_validator

from attnserve_server.model.certificate import Batching, Certificate
from attnserve_server.model.formula import Formula, parsed
from attnserve_server.model.frozen import NUMPY_DTYPES, Dimension, Dtype, Frozen, Symbol

MAX_POSITIONS: Final = 2**22
"""Most positions of an axis: four minutes of audio at 16 kHz. Optional inputs are held filled to this length."""


class InputRole(StrEnum):
    """Meaning of an input, beyond its shape."""

    TOKEN_IDS = "token_ids"  # noqa: S105 - a role, not a secret
    """Ids into the vocabulary. The server checks them against its size; the tokenizer makes them from text."""
    ATTENTION_MASK = "attention_mask"
    """1 for data, 0 for padding; the other way round if the input is `inverted`."""
    TOKEN_TYPE_IDS = "token_type_ids"  # noqa: S105 - a role, not a secret
    """0 for the first text, 1 for the second."""
    POSITION_IDS = "position_ids"
    """Indices of positions, from 0. The server counts those that the mask does not hide, if a request sends none."""
    DATA = "data"
    """Any other meaning."""


class IndexRange(Frozen):
    """Valid numbers of an input that indexes a table of the graph: from `least` to `greatest`, both inclusive.

    An element is valid if it is in one of the ranges of its column. A column without ranges accepts any number.

    Args:
        least: the least number.
        greatest: the greatest number.
        column: index along the input's last axis; None: the range is for every element.
        along: symbol of an axis whose positions are indexed. `least` is then relative to minus its length and
            `greatest` to its length: 0 and -1 mean from the first position, counted from the end, to the last.
    """

    least: int
    greatest: int
    column: Annotated[int, Field(ge=0)] | None = None
    along: str = ""

    def at(self, lengths: Mapping[str, int]) -> tuple[int, int]:
        """Return the least and the greatest valid number, given the lengths of axes."""
        length = lengths[self.along] if self.along else 0
        return self.least - length, self.greatest + length

    @model_validator(mode="after")
    def _holds_a_number(self) -> Self:
        if self.least > self.greatest + (1 if self.along else 0):
            raise ValueError(f"a range from {self.least} to {self.greatest} is empty")
        return self


class InputSpec(Frozen):
    """One input.

    Args:
        name: name in the graph.
        dtype: element type.
        shape: without the batch axis.
        role: its meaning.
        padding: value of the positions after a sequence's end.
        fill: value that the server uses if a request leaves the input out; None: the input is required.
        vocabulary_size: number of valid token ids; 0: the manifest's `vocabulary_size`.
        index_ranges: valid numbers of an input that indexes tables of the graph; empty: any.
        additive_mask: whether it is only added to attention scores, so that minus infinity hides a key.
        needs_key: for an additive mask, whether the model returns NaN if a row of the mask is all minus infinity.
        counted: for an attention mask, whether the graph reads only the number of its ones. Ones must precede zeros
            then, because any other order hides the wrong positions.
        inverted: for an attention mask, whether 1 (True) hides a position, and 0 (False) means data.
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
    counted: bool = False
    inverted: bool = False

    @property
    def optional(self) -> bool:
        """Whether the server fills the input if a request leaves it out."""
        return self.fill is not None or self.role is InputRole.POSITION_IDS

    @property
    def data_value(self) -> int:
        """The value of an attention mask at positions that hold data."""
        return 0 if self.inverted else 1

    def ranges_at(self, column: int) -> tuple[IndexRange, ...]:
        """Return the ranges of one column along the last axis; empty: any number is valid there."""
        return tuple(each for each in self.index_ranges if each.column in {None, column})

    @property
    def columns(self) -> int:
        """Number of columns with their own ranges: all along the last axis, or 1 if one range is for every element."""
        apart = any(each.column is not None for each in self.index_ranges)
        return int(self.shape[-1]) if apart else 1

    @property
    def resting(self) -> tuple[int, ...]:
        """The valid number nearest to 0, for each of the `columns`."""
        return tuple(_nearest_to_zero(self.ranges_at(column)) for column in range(self.columns))

    @model_validator(mode="after")
    def _columns_exist(self) -> Self:
        named = max((each.column for each in self.index_ranges if each.column is not None), default=-1)
        last = self.shape[-1] if self.shape else 0
        if named >= 0 and not (isinstance(last, int) and named < last):
            raise ValueError(f"{self.name}: column {named} of index_ranges is not within the last axis")
        return self

    @model_validator(mode="after")
    def _values_fit_the_dtype(self) -> Self:
        for field, value in (("padding", self.padding), ("fill", self.fill)):
            if value is not None and not _fits(value, NUMPY_DTYPES[self.dtype]):
                raise ValueError(f"{self.name}: {field} {value:g} is not a {self.dtype}")
        return self


class OutputSpec(Frozen):
    """One output. `shape` is without the batch axis. `on_request`: it is returned only to requests that name it."""

    name: str
    dtype: Dtype
    shape: tuple[Dimension, ...]
    on_request: bool = False


class DerivedLength(Frozen):
    """Length of a derived axis: (length of `source` + `offset`) // `stride`, which can round up or down.

    Pooling by 4 with a padded last window: stride 4, offset 3. A convolution of width K, stride S and padding P on both
    sides: stride S, offset 2 P - K + S. A token before all others: stride 1, offset 1. With `plus`, the length of
    another axis is added: new positions after those of a past.
    """

    source: Symbol
    stride: Annotated[int, Field(ge=1)]
    offset: int = 0
    plus: str = ""

    def of(self, length: int) -> int:
        """Return the derived length in positions, at least 0; `length` includes that of `plus`."""
        return max((length + self.offset) // self.stride, 0)

    def at(self, lengths: Mapping[Any, int]) -> int | None:
        """Return the derived length from those of given axes; None if an axis that it needs is not among them."""
        if self.source not in lengths or (self.plus and self.plus not in lengths):
            return None
        return self.of(lengths[self.source] + (lengths[self.plus] if self.plus else 0))

    def length_at(self, lengths: Mapping[Any, int]) -> int:
        """Return the derived length from those of the axes that it needs."""
        return self.of(sum(lengths[symbol] for symbol in self.symbols))

    @property
    def symbols(self) -> tuple[str, ...]:
        """The axes that it needs."""
        return (self.source, self.plus) if self.plus else (self.source,)


Following = DerivedLength | Formula
"""How the length of an axis follows from those of others. Both have `length_at` and `symbols`."""


class AxisSpec(Frozen):
    """One axis other than the batch axis.

    Args:
        symbol: its name in shapes and sites.
        max_length: maximum number of positions.
        paddable: whether sequences may be padded along it, under the policy that the manifest is for.
        fixed: whether the graph always has `max_length` positions (of patches, of latent queries, of an input whose
            length was fixed at export). Only sites name such an axis; inputs and outputs do not.
        grid: rows and columns of the patches of a fixed axis, row by row; None: it has no patches.
        leading: positions before the patches, such as that of a class token.
        derived: relation to another axis that its length follows, such as pooled keys. Inputs do not name such an
            axis, and its positions do not count as tokens; those of its source do.
        formula: sum or product of other axes, such as `past + seq`, that its length equals in every sequence; empty:
            none. Inputs may name such an axis. Its positions do not count as tokens.
        bound: where `max_length` comes from, for people; empty: not stated.
    """

    symbol: Symbol
    max_length: Annotated[int, Field(ge=1)]
    paddable: bool
    fixed: bool = False
    grid: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    leading: Annotated[int, Field(ge=0)] = 0
    derived: DerivedLength | None = None
    formula: str = ""
    bound: str = ""

    @property
    def follows(self) -> Following | None:
        """How its length follows from those of other axes; None: it is free or fixed."""
        return parsed(self.formula) if self.formula else self.derived

    @property
    def padded_with(self) -> tuple[str, ...]:
        """The axes that must all be padded so that it is: itself, or those that it follows."""
        if self.formula:
            return parsed(self.formula).symbols
        return (self.derived.source if self.derived else self.symbol,)

    @property
    def free(self) -> bool:
        """Whether sequences choose its length."""
        return not self.fixed and self.derived is None and not self.formula

    @model_validator(mode="after")
    def _values_of_all_positions_fit(self) -> Self:
        if (self.free or self.grid is not None) and self.max_length > MAX_POSITIONS:
            raise ValueError(f"axis {self.symbol}: max_length {self.max_length} exceeds {MAX_POSITIONS}")
        return self

    @model_validator(mode="after")
    def _formula_grows(self) -> Self:
        if not self.formula:
            return self
        if not parsed(self.formula).grows:
            raise ValueError(f"axis {self.symbol}: formula {self.formula} may have sums and products alone")
        if self.fixed or self.derived is not None:
            raise ValueError(f"axis {self.symbol}: an axis with a formula cannot be fixed or derived")
        return self

    @model_validator(mode="after")
    def _fixed_is_never_padded(self) -> Self:
        if self.fixed and self.paddable:
            raise ValueError(f"axis {self.symbol}: a fixed axis has one length, so it cannot be paddable")
        if self.fixed and self.derived is not None:
            raise ValueError(f"axis {self.symbol}: a fixed axis has one length, so it cannot be derived")
        return self

    @model_validator(mode="after")
    def _grid_is_the_whole_axis(self) -> Self:
        if self.grid is None:
            if self.leading:
                raise ValueError(f"axis {self.symbol}: leading is {self.leading}, but there is no grid")
            return self
        rows, columns = self.grid
        if not self.fixed:
            raise ValueError(f"axis {self.symbol}: a grid needs a fixed axis")
        if self.leading + rows * columns != self.max_length:
            counted = f"{self.leading} leading positions and {rows} x {columns} patches"
            raise ValueError(f"axis {self.symbol}: {counted} do not make max_length {self.max_length}")
        return self


def axes_under(axes: Sequence[AxisSpec], certificate: Certificate | None, batching: Batching) -> tuple[AxisSpec, ...]:
    """Return the axes with `paddable` set for a policy, by the certificate. Derived axes follow their sources.

    Args:
        axes: of a manifest.
        certificate: of the manifest; None: no axis is padded.
        batching: the policy.
    """
    clauses = () if certificate is None else certificate.clauses
    padded = {clause.axis for clause in clauses if clause.allows(batching)}
    padded -= {axis.symbol for axis in axes if axis.fixed}
    return tuple(axis.model_copy(update={"paddable": padded.issuperset(axis.padded_with)}) for axis in axes)


class TextSpec(Frozen):
    """How text becomes inputs.

    Args:
        axis: symbol of the axis of the first text's tokens.
        max_tokens: maximum number of tokens along it.
        pair_axis: axis of a second text's tokens, such as a decoder's; empty: they follow the first text's.
        pair_max_tokens: maximum number of tokens along `pair_axis`.
        pair_start: id of the token before a second text with its own axis; None: no such token.
        as_written: the axes along which the tokenizer pads and truncates as its file declares, because no mask hides
            padding there; along the others it does neither. None: not stated; see `Manifest.text_as_written`.
        mask_token: the token that a text spells for a masked position; empty: text never becomes a special token.
        prompts: texts that a request can put before the first text, by name.
        default_prompt: name of the prompt of a request that names none; empty: no prompt.
        type_ids: whether the token types of a pair of texts differ; False: all are 0.
    """

    axis: Symbol
    max_tokens: Annotated[int, Field(ge=1)]
    pair_axis: str = ""
    pair_max_tokens: Annotated[int, Field(ge=0)] = 0
    pair_start: Annotated[int, Field(ge=0)] | None = None
    as_written: tuple[Symbol, ...] | None = None
    mask_token: str = ""
    prompts: dict[str, str] = Field(default_factory=dict)
    default_prompt: str = ""
    type_ids: bool = True

    @model_validator(mode="after")
    def _pair_is_whole(self) -> Self:
        if self.pair_axis == self.axis:
            raise ValueError(
                f"text: pair_axis is {self.axis}, the first text's axis; leave it empty for a pair on one axis"
            )
        if bool(self.pair_axis) != bool(self.pair_max_tokens):
            raise ValueError("text: pair_axis and pair_max_tokens must be given together")
        if self.pair_start is not None and not self.pair_axis:
            raise ValueError("text: pair_start needs a pair_axis")
        if self.default_prompt and self.default_prompt not in self.prompts:
            raise ValueError(f"text: default_prompt {self.default_prompt!r} is none of the prompts")
        return self

    @property
    def axes(self) -> dict[str, int]:
        """Maximum number of tokens by axis: the first text's, then the second's."""
        pair = {self.pair_axis: self.pair_max_tokens} if self.pair_axis else {}
        return {self.axis: self.max_tokens, **pair}


def _nearest_to_zero(ranges: tuple[IndexRange, ...]) -> int:
    # For positions along an axis, the first position, which always exists.
    nearest = (each.least if each.along else min(max(0, each.least), each.greatest) for each in ranges)
    return min(nearest, key=abs, default=0)


def _fits(value: float, dtype: np.dtype[np.generic]) -> bool:
    """Whether a dtype can hold the value: within its range for a float, exactly for an integer."""
    if np.issubdtype(dtype, np.floating):
        return math.isinf(value) or abs(value) <= float(np.finfo(dtype.name).max)
    if dtype == np.bool_:
        return value in {0, 1}
    range_ = np.iinfo(dtype.name)
    return float(value).is_integer() and range_.min <= value <= range_.max
