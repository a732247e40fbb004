"""What one model accepts, and what every way to its inputs shares: checks of values, and inputs that are filled in."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from attnserve_server.domain.errors import Violations
from attnserve_server.domain.values import Array, AxisUnits
from attnserve_server.model.certificate import MaskNeed
from attnserve_server.model.manifest import NUMPY_DTYPES, AxisSpec, InputRole, InputSpec, Manifest, OutputSpec
from attnserve_server.model.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class OutputSize:
    """How many bytes one sequence's output takes: `fixed_bytes` for each position of the product of its axes."""

    fixed_bytes: int
    axes: tuple[str, ...]

    @classmethod
    def of(cls, spec: OutputSpec, manifest: Manifest) -> OutputSize:
        """The size of one output. An axis that no input tells the length of counts with its greatest."""
        given = {extent for input_ in manifest.inputs for extent in input_.shape}
        told = given | {axis.symbol for axis in manifest.axes if axis.fixed}
        told |= {axis.symbol for axis in manifest.axes if axis.derived is not None and axis.derived.source in told}
        fixed = NUMPY_DTYPES[spec.dtype].itemsize
        axes: list[str] = []
        for extent in spec.shape:
            if isinstance(extent, str) and extent in told:
                axes.append(extent)
            else:
                fixed *= manifest.axis(extent).max_length if isinstance(extent, str) else extent
        return cls(fixed, tuple(axes))

    def bytes(self, lengths: Mapping[str, int]) -> int:
        """Bytes at these lengths, those of derived axes among them."""
        size = self.fixed_bytes
        for axis in self.axes:
            size *= lengths[axis]
        return size


@dataclass(frozen=True, slots=True)
class MaskCheck:
    """One need of the certificate, laid out for a look at every sequence.

    `filled`: what the server fills the input with, and `filled_meets`: whether that meets the need. Most masks are the
    server's own, so that one comparison of identities is all that they cost.
    """

    need: MaskNeed
    padding: float
    filled: Array | None
    filled_meets: bool

    @classmethod
    def of(cls, need: MaskNeed, spec: InputSpec, filled: Array | None) -> MaskCheck:
        """The check of one need."""
        return cls(need, spec.padding, filled, filled is not None and need.met_by(filled, spec.padding))

    def passes(self, tensor: Array) -> bool:
        """Whether one sequence's input meets the need."""
        if self.filled is not None and tensor.base is self.filled:
            return self.filled_meets
        return self.need.met_by(tensor, self.padding)


@dataclass(frozen=True, slots=True)
class Intake:
    """What one model accepts, laid out once for checking every request against."""

    manifest: Manifest
    tokenizer: TextTokenizer | None
    inputs: Mapping[str, InputSpec]
    max_lengths: Mapping[str, int]
    outputs: tuple[str, ...]
    limits: Mapping[str, int | None]
    """By input: the least number that is too large; None where any will do."""
    output_sizes: Mapping[str, OutputSize]
    constants: Mapping[str, Array]
    """By input that may be left out, where it has one axis of changing length: what it is then, at its longest."""
    derived: tuple[AxisSpec, ...]
    """The axes whose lengths follow from others'."""
    masks: tuple[MaskCheck, ...]
    """What sequences must meet to be padded; empty where none is padded."""
    places: bool
    """Whether any input looks up positions along an axis."""
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
        """The intake of one loaded model."""
        constants = {
            spec.name: _constant(spec, manifest.axis(spec.shape[0]).max_length)
            for spec in manifest.inputs
            if spec.fill is not None and len(spec.shape) == 1 and isinstance(spec.shape[0], str)
        }
        padded = any(axis.paddable for axis in manifest.axes)
        needs = manifest.certificate.masks if padded and manifest.certificate is not None else ()
        return cls(
            manifest=manifest,
            tokenizer=tokenizer,
            inputs={spec.name: spec for spec in manifest.inputs},
            max_lengths={axis.symbol: axis.max_length for axis in manifest.axes},
            outputs=tuple(spec.name for spec in manifest.outputs),
            limits={spec.name: _limit(spec, manifest) for spec in manifest.inputs},
            output_sizes={spec.name: OutputSize.of(spec, manifest) for spec in manifest.outputs},
            constants=constants,
            derived=tuple(axis for axis in manifest.axes if axis.derived is not None),
            masks=tuple(MaskCheck.of(need, manifest.input(need.input), constants.get(need.input)) for need in needs),
            places=any(each.along for spec in manifest.inputs for each in spec.index_ranges),
            max_batch_size=max_batch_size,
            max_text_bytes=max_text_bytes,
            max_response_bytes=max_response_bytes,
        )

    @property
    def max_tokens(self) -> dict[str, int]:
        """Most tokens that a text may have, by the axis that they run along."""
        text = self.manifest.text
        return {axis: min(most, self.max_lengths[axis]) for axis, most in text.axes.items()} if text else {}


@dataclass(frozen=True, slots=True)
class Inputs:
    """One sequence's model inputs, the lengths of its axes, and the units of those that were made from text."""

    tensors: dict[str, Array]
    lengths: dict[str, int]
    units: Mapping[str, AxisUnits] = field(default_factory=dict)


def check_values(array: Array, spec: InputSpec, intake: Intake, path: str, violations: Violations) -> None:
    """Note values that would poison a batch: ids outside the vocabulary, marks that are no 0 or 1, NaN and infinity."""
    if array.dtype.kind == "f" and not _check_floats(array, spec, path, violations):
        return
    if spec.index_ranges:
        if not any(each.along for each in spec.index_ranges):
            _check_ranges(array, spec, {}, path, violations)
        return
    if array.dtype.kind == "f":
        return
    limit = intake.limits[spec.name]
    if limit is None:
        return
    # A negative number of two's complement is a large one without sign: one look finds both faults.
    unsigned = array if array.dtype.kind == "u" else array.view(f"u{array.dtype.itemsize}")
    if unsigned.max() >= limit:
        at = int(np.argmax((array < 0) | (array >= limit)))
        violations.add(path, f"element {at} is {array.flat[at]}; input {spec.name!r} runs from 0 to {limit - 1}")


def _check_floats(array: Array, spec: InputSpec, path: str, violations: Violations) -> bool:
    """Whether all floats are finite, or, of a mask that is added to scores, minus infinity; notes the first other."""
    legal = np.isfinite(array)
    if legal.all():
        return True
    said = "floats must be finite"
    if spec.additive_mask:
        legal |= np.isneginf(array)
        said = f"input {spec.name!r} is added to scores: floats must be finite, or -inf"
    if not legal.all():
        at = int(np.argmin(legal))
        violations.add(path, f"element {at} is {array.flat[at]}; {said}")
        return False
    empty = np.isneginf(array).reshape(-1, array.shape[-1] if array.ndim else 1).all(axis=1)
    if spec.needs_key and empty.any():
        row = int(np.argmax(empty))
        violations.add(
            path, f"row {row} of input {spec.name!r} is -inf throughout: at least one key must not be hidden"
        )
        return False
    return True


def _check_ranges(array: Array, spec: InputSpec, lengths: Mapping[str, int], path: str, violations: Violations) -> None:
    """Note the first number that tables, or axes of these lengths, have no row for."""
    numbers = np.trunc(array) if array.dtype.kind == "f" else array
    illegal = np.zeros(numbers.shape, dtype=bool)
    for column in range(spec.columns):
        place = (...,) if spec.columns == 1 else (..., column)
        bounds = [each.at(lengths) for each in spec.ranges_at(column)]
        legal = [(numbers[place] >= least) & (numbers[place] <= greatest) for least, greatest in bounds]
        illegal[place] = ~np.logical_or.reduce(legal) if legal else False
    if illegal.any():
        at = int(np.argmax(illegal))
        column = at % spec.columns
        bounds = [each.at(lengths) for each in spec.ranges_at(column)]
        runs = " or ".join(f"from {least} to {greatest}" for least, greatest in bounds)
        where = f"column {column} of input" if spec.columns > 1 else "input"
        violations.add(path, f"element {at} is {array.flat[at]}; {where} {spec.name!r} runs {runs}")


def place_in_sequences(
    tensors: dict[str, Array], lengths: Mapping[str, int], intake: Intake, path: str, violations: Violations
) -> None:
    """Check inputs that look up positions along an axis, and count those from the end from the beginning.

    The end of a batch is not that of a sequence which is padded in it.
    """
    for name, spec in intake.inputs.items():
        along = next((each for each in spec.index_ranges if each.along in lengths), None)
        if along is None or name not in tensors:
            continue
        _check_ranges(tensors[name], spec, lengths, path, violations)
        behind = tensors[name] < along.least
        if behind.any():
            length = lengths[along.along]
            tensors[name] = np.where(behind, tensors[name] + length, tensors[name]).astype(tensors[name].dtype)


def _limit(spec: InputSpec, manifest: Manifest) -> int | None:
    """The least number that an input of whole numbers may not hold; None where any will do."""
    dtype: np.dtype[Any] = NUMPY_DTYPES[spec.dtype]
    if dtype.kind not in "iu":
        return None
    return {
        InputRole.TOKEN_IDS: manifest.vocabulary_of(spec) or int(np.iinfo(dtype).max),
        InputRole.ATTENTION_MASK: 2,
        InputRole.TOKEN_TYPE_IDS: 2,
    }.get(spec.role)


def _constant(spec: InputSpec, length: int) -> Array:
    """An input of one axis as it is filled in, read-only."""
    constant = np.full(length, spec.fill, NUMPY_DTYPES[spec.dtype])
    constant.flags.writeable = False
    return constant


def fill_in(
    tensors: dict[str, Array],
    lengths: Mapping[str, int],
    intake: Intake,
    path: str,
    violations: Violations,
    sent: Collection[str] = (),
) -> bool:
    """Fill inputs that were left out with the value that the manifest gives; whether nothing was wrong with that.

    Of `sent`, those that are not among the tensors were refused, and that has been noted.
    """
    before = len(violations)
    for name, spec in intake.inputs.items():
        if name in tensors or name in sent:
            continue
        constant = intake.constants.get(name)
        if constant is not None and spec.shape[0] in lengths:
            tensors[name] = constant[: lengths[str(spec.shape[0])]]
            continue
        unknown = [extent for extent in spec.shape if isinstance(extent, str) and extent not in lengths]
        if spec.fill is None:
            violations.add(path, f"input {name!r} cannot be made from text: send tensors")
        elif unknown:
            violations.add(path, f"input {name!r} is missing, and nothing else tells the length of axis {unknown[0]!r}")
        else:
            shape = [lengths[extent] if isinstance(extent, str) else extent for extent in spec.shape]
            tensors[name] = np.full(shape, spec.fill, NUMPY_DTYPES[spec.dtype])
    if intake.places and len(violations) == before:
        place_in_sequences(tensors, lengths, intake, path, violations)
    return len(violations) == before
