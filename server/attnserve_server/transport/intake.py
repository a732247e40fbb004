"""What one model accepts, laid out for checking requests against, and the checks of values. Reads no message.

The checks return a description of what is invalid, or an empty string; `inputs` adds the field and reports it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnserve_server.domain.values import Array
from attnserve_server.engine.labels import axis_of
from attnserve_server.model.certificate import MaskNeed
from attnserve_server.model.formula import Formula, parsed
from attnserve_server.model.manifest import NUMPY_DTYPES, AxisSpec, InputRole, InputSpec, Manifest, OutputSpec
from attnserve_server.model.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class OutputSize:
    """How many bytes one sequence's output takes: `fixed_bytes` for each position of the product of its axes."""

    fixed_bytes: int
    axes: tuple[str, ...]

    @classmethod
    def of(cls, spec: OutputSpec, manifest: Manifest) -> OutputSize:
        """Lay out one output. An axis whose length no input determines counts with its greatest length."""
        given = {extent for input_ in manifest.inputs for extent in input_.shape}
        known = given | {axis.symbol for axis in manifest.axes if axis.fixed}
        known |= {axis.symbol for axis in manifest.axes if axis.follows and known.issuperset(axis.follows.symbols)}
        fixed = NUMPY_DTYPES[spec.dtype].itemsize
        axes: list[str] = []
        for extent in spec.shape:
            if isinstance(extent, str) and extent in known:
                axes.append(extent)
            else:
                fixed *= manifest.axis(extent).max_length if isinstance(extent, str) else extent
        return cls(fixed, tuple(axes))

    def bytes(self, lengths: Mapping[str, int]) -> int:
        """Return the bytes at these lengths, which include those of derived axes."""
        size = self.fixed_bytes
        for axis in self.axes:
            size *= lengths[axis]
        return size


@dataclass(frozen=True, slots=True)
class MaskCheck:
    """One need of the certificate, laid out for checking every sequence.

    `filled`: the array that the server fills the input with, and `filled_meets`: whether it meets the need. Most masks
    are filled in, so that one comparison of identities replaces the check of values.
    """

    need: MaskNeed
    padding: float
    filled: Array | None
    filled_meets: bool

    @classmethod
    def of(cls, need: MaskNeed, spec: InputSpec, filled: Array | None) -> MaskCheck:
        """Lay out one need."""
        return cls(need, spec.padding, filled, filled is not None and need.met_by(filled, spec.padding))

    def passes(self, tensor: Array) -> bool:
        """Return whether one sequence's input meets the need."""
        if self.filled is not None and tensor.base is self.filled:
            return self.filled_meets
        return self.need.met_by(tensor, self.padding)


@dataclass(frozen=True, slots=True)
class CountedPositions:
    """An input of positions along one axis, and the mask that decides which positions count.

    `keys`: the axis of the mask: the same one or, after a past, that of past and new positions. `whole`: positions from
    0 to the greatest length, read-only, for sequences whose mask hides none. `mask`: the name of the mask; empty: none.
    `filled`: the array that the server fills the mask with, if it is all ones.
    """

    spec: InputSpec
    axis: str
    keys: str
    whole: Array
    mask: str = ""
    filled: Array | None = None

    @classmethod
    def of(cls, spec: InputSpec, manifest: Manifest, constants: Mapping[str, Array]) -> CountedPositions:
        """Lay out one input of role `position_ids`, whose shape is one axis."""
        axis = str(spec.shape[0])
        longer = (
            one.symbol for one in manifest.axes if one.derived and one.derived.plus and one.derived.source == axis
        )
        keys = next(longer, axis)
        whole = np.arange(manifest.axis(keys).max_length, dtype=NUMPY_DTYPES[spec.dtype])
        whole.flags.writeable = False
        mask = manifest.input_of_role(InputRole.ATTENTION_MASK, keys)
        if mask is None:
            return cls(spec, axis, keys, whole)
        return cls(spec, axis, keys, whole, mask.name, constants.get(mask.name) if mask.fill == 1 else None)

    def positions(self, tensors: Mapping[str, Array], length: int, total: int) -> Array:
        """Return the positions of one sequence, (T,): each position that its mask keeps counts one; hidden ones have 0.

        Source: transformers' `generate`, which counts the mask's ones in the same way.

        Args:
            tensors: the sequence's inputs by name, with its mask.
            length: T, the new positions.
            total: P + T, those of a past included; T without one.
        """
        mask = tensors.get(self.mask)
        if mask is None or (self.filled is not None and mask.base is self.filled) or mask.all():
            return self.whole[total - length : total]
        kept = mask != 0
        return np.where(kept, np.cumsum(kept) - 1, 0).astype(self.whole.dtype)[total - length :]


@dataclass(frozen=True, slots=True)
class Intake:
    """What one model accepts, laid out once for all requests."""

    manifest: Manifest
    tokenizer: TextTokenizer | None
    inputs: Mapping[str, InputSpec]
    axes: Mapping[str, AxisSpec]
    max_lengths: Mapping[str, int]
    fixed_lengths: Mapping[str, int]
    """Lengths of the axes that are the same for every sequence."""
    max_tokens: Mapping[str, int]
    """Most tokens that a text may have, by the axis that they run along; empty without text."""
    outputs: tuple[str, ...]
    """Those that a request gets if it names none."""
    limits: Mapping[str, int | None]
    """By input: the least integer that is too large; None where any will do."""
    output_sizes: Mapping[str, OutputSize]
    constants: Mapping[str, Array]
    """By optional input with one axis of variable length: its fill value at the greatest length, read-only."""
    derived: tuple[AxisSpec, ...]
    """The axes whose lengths follow from others'."""
    counted: tuple[CountedPositions, ...]
    """Inputs of positions, which the server counts where a request sends none."""
    formulas: Mapping[str, Formula]
    """The axes of inputs among them, which each sequence must satisfy."""
    masks: tuple[MaskCheck, ...]
    """What sequences must meet to be padded; empty where none is padded."""
    head_outputs: tuple[str, ...]
    """The outputs that labels are computed from; empty without a head."""
    labelled_axis: str
    """Symbol of the axis of tokens that a head labels; empty without a head, and for one that labels sequences."""
    longest_token: int
    """Bytes of the longest token, if labels are tokens of the vocabulary; else 0."""
    indexes_positions: bool
    """Whether any input holds indices of positions along an axis."""
    continuing: Intake | None
    """What the continuing graph accepts; None if sequences have no past."""
    max_batch_size: int
    max_text_bytes: int
    max_response_bytes: int

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        tokenizer: TextTokenizer | None,
        *,
        max_batch_size: int,
        max_text_bytes: int,
        max_response_bytes: int,
    ) -> Intake:
        """Lay out one loaded model."""
        constants = {
            spec.name: _constant(spec, manifest.axis(spec.shape[0]).max_length)
            for spec in manifest.inputs
            if spec.fill is not None and len(spec.shape) == 1 and isinstance(spec.shape[0], str)
        }
        padded = any(axis.paddable for axis in manifest.axes)
        needs = manifest.certificate.masks if padded and manifest.certificate is not None else ()
        max_lengths = {axis.symbol: axis.max_length for axis in manifest.axes}
        head = manifest.head
        named_by_tokens = tokenizer is not None and head is not None and not head.labels
        max_tokens = manifest.text.axes if manifest.text is not None else {}
        continuing = manifest.continuing
        limits = {"max_text_bytes": max_text_bytes, "max_response_bytes": max_response_bytes}
        return cls(
            manifest=manifest,
            tokenizer=tokenizer,
            inputs={spec.name: spec for spec in manifest.inputs},
            axes={axis.symbol: axis for axis in manifest.axes},
            max_lengths=max_lengths,
            fixed_lengths=manifest.fixed_lengths,
            max_tokens={axis: min(most, max_lengths[axis]) for axis, most in max_tokens.items()},
            outputs=tuple(spec.name for spec in manifest.outputs if not spec.on_request),
            limits={spec.name: _limit(spec, manifest) for spec in manifest.inputs},
            output_sizes={spec.name: OutputSize.of(spec, manifest) for spec in manifest.outputs},
            constants=constants,
            counted=tuple(
                CountedPositions.of(spec, manifest, constants)
                for spec in manifest.inputs
                if spec.role is InputRole.POSITION_IDS
            ),
            derived=tuple(axis for axis in manifest.axes if axis.follows is not None),
            formulas={axis.symbol: parsed(axis.formula) for axis in manifest.axes if axis.formula},
            masks=tuple(MaskCheck.of(need, manifest.input(need.input), constants.get(need.input)) for need in needs),
            head_outputs=() if head is None else head.outputs,
            labelled_axis="" if head is None else axis_of(head, manifest),
            longest_token=tokenizer.longest_token_bytes if tokenizer is not None and named_by_tokens else 0,
            indexes_positions=any(each.along for spec in manifest.inputs for each in spec.index_ranges),
            continuing=None
            if continuing is None
            else cls.of(continuing, tokenizer, max_batch_size=max_batch_size, **limits),
            max_batch_size=max_batch_size,
            **limits,
        )


def _limit(spec: InputSpec, manifest: Manifest) -> int | None:
    """Return the least integer that an input may not hold; None where any will do."""
    dtype: np.dtype[Any] = NUMPY_DTYPES[spec.dtype]
    if dtype.kind not in "iu":
        return None
    return {
        InputRole.TOKEN_IDS: manifest.vocabulary_of(spec) or int(np.iinfo(dtype).max),
        InputRole.ATTENTION_MASK: 2,
        InputRole.TOKEN_TYPE_IDS: 2,
    }.get(spec.role)


def _constant(spec: InputSpec, length: int) -> Array:
    """Return an input of one axis filled with its fill value, read-only."""
    constant = np.full(length, spec.fill, NUMPY_DTYPES[spec.dtype])
    constant.flags.writeable = False
    return constant


def invalid_value(array: Array, spec: InputSpec, limit: int | None) -> str:
    """Describe the first value that would spoil a batch: an id without a row, a mark that is no 0 or 1, NaN, infinity.

    Args:
        array: one sequence's input, of the dtype of `spec`.
        spec: the input.
        limit: the least integer that is too large; None: any will do.

    Returns:
        The description; empty if all values are valid, or can be checked only with `invalid_index`.
    """
    if array.dtype.kind == "f" and (invalid := _invalid_float(array, spec)):
        return invalid
    if spec.index_ranges:
        return "" if any(each.along for each in spec.index_ranges) else invalid_index(array, spec, {})
    if spec.counted and array.dtype.kind == "b":
        return _misplaced_one(array, spec)
    if array.dtype.kind == "f" or limit is None:
        return ""
    # As unsigned numbers, negative ones are large: one comparison finds both kinds.
    unsigned = array if array.dtype.kind == "u" else array.view(f"u{array.dtype.itemsize}")
    if unsigned.max() < limit:
        return _misplaced_one(array, spec) if spec.counted else ""
    at = int(np.argmax((array < 0) | (array >= limit)))
    return f"element {at} is {array.flat[at]}; values of input {spec.name!r} must be from 0 to {limit - 1}"


def _misplaced_one(mask: Array, spec: InputSpec) -> str:
    """Describe the first element of a counted mask that is not where its count puts it; empty if all are."""
    ones = np.count_nonzero(mask)
    at = 0 if not ones else int(np.argmin(mask)) if not mask[:ones].all() else -1
    if at < 0:
        return ""
    after = f"ones follow it, and the model counts the ones of input {spec.name!r}" if ones else "so are all"
    rule = "at least one 1 must come first, and no 1 may follow a 0"
    return f"element {at} is 0 and {after}: {rule}; leave the padding out, or put it behind the tokens"


def _invalid_float(array: Array, spec: InputSpec) -> str:
    """Describe the first float that is not finite, or, in a mask that is added to scores, neither finite nor -inf."""
    valid = np.isfinite(array)
    if valid.all():
        return ""
    rule = "floats must be finite"
    if spec.additive_mask:
        valid |= np.isneginf(array)
        rule = f"input {spec.name!r} is added to scores: floats must be finite, or -inf"
    if not valid.all():
        at = int(np.argmin(valid))
        return f"element {at} is {array.flat[at]}; {rule}"
    hidden = np.isneginf(array).reshape(-1, array.shape[-1] if array.ndim else 1).all(axis=1)
    if spec.needs_key and hidden.any():
        row = int(np.argmax(hidden))
        return f"row {row} of input {spec.name!r} is -inf throughout: at least one key must not be hidden"
    return ""


def invalid_index(array: Array, spec: InputSpec, lengths: Mapping[str, int]) -> str:
    """Describe the first index for which the tables, or the axes of these lengths, have no row; empty if none."""
    numbers = np.trunc(array) if array.dtype.kind == "f" else array
    invalid = np.zeros(numbers.shape, dtype=bool)
    for column in range(spec.columns):
        place = (...,) if spec.columns == 1 else (..., column)
        bounds = [each.at(lengths) for each in spec.ranges_at(column)]
        valid = [(numbers[place] >= least) & (numbers[place] <= greatest) for least, greatest in bounds]
        invalid[place] = ~np.logical_or.reduce(valid) if valid else False
    if not invalid.any():
        return ""
    at = int(np.argmax(invalid))
    column = at % spec.columns
    bounds = [each.at(lengths) for each in spec.ranges_at(column)]
    ranges = " or ".join(f"from {least} to {greatest}" for least, greatest in bounds)
    where = f"column {column} of input" if spec.columns > 1 else "input"
    return f"element {at} is {array.flat[at]}; values of {where} {spec.name!r} must be {ranges}"


def counted_from_the_start(array: Array, spec: InputSpec, lengths: Mapping[str, int]) -> Array:
    """Replace positions that count from the end of a sequence: padding moves the end, and not the start."""
    along = next((each for each in spec.index_ranges if each.along in lengths), None)
    if along is None or not (negative := array < along.least).any():
        return array
    return np.where(negative, array + lengths[along.along], array).astype(array.dtype)


def fits(length: int, extent: int | str, max_lengths: Mapping[str, int], lengths: dict[str, int]) -> bool:
    """Return whether one axis's length is valid; add the length of a new symbol to `lengths`."""
    if isinstance(extent, int):
        return 0 < length == extent
    return 0 < length <= max_lengths[extent] and lengths.setdefault(extent, length) == length


def invalid_length(length: int, extent: int | str, max_lengths: Mapping[str, int], lengths: dict[str, int]) -> str:
    """Describe what is wrong with one axis's length, or nothing; add the length of a new symbol to `lengths`."""
    if isinstance(extent, int):
        return "" if length == extent else f"length {length}, but the model takes {extent}"
    if length > max_lengths[extent]:
        return f"length {length} exceeds {max_lengths[extent]} of axis {extent!r}"
    known = lengths.setdefault(extent, length)
    return "" if known == length else f"length {length} of axis {extent!r} differs from {known} of an input before it"
