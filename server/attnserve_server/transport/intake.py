"""What one model accepts, and what every way to its inputs shares: checks of values, and inputs that are filled in."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from attnserve_server.domain.values import Array, AxisUnits
from attnserve_server.model.manifest import NUMPY_DTYPES, InputRole, InputSpec, Manifest
from attnserve_server.model.tokenizer import TextTokenizer
from attnserve_server.transport.violations import Violations


@dataclass(frozen=True, slots=True)
class Intake:
    """What one model accepts, laid out once for checking every request against."""

    manifest: Manifest
    tokenizer: TextTokenizer | None
    inputs: Mapping[str, InputSpec]
    max_lengths: Mapping[str, int]
    outputs: tuple[str, ...]
    output_shapes: Mapping[str, tuple[tuple[int | str, ...], int]]
    """By output: its extents and the bytes of one element."""
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
        return cls(
            manifest=manifest,
            tokenizer=tokenizer,
            inputs={spec.name: spec for spec in manifest.inputs},
            max_lengths={axis.symbol: axis.max_length for axis in manifest.axes},
            outputs=tuple(spec.name for spec in manifest.outputs),
            output_shapes={spec.name: (spec.shape, NUMPY_DTYPES[spec.dtype].itemsize) for spec in manifest.outputs},
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
    if array.dtype.kind == "f":
        finite = np.isfinite(array)
        if not finite.all():
            at = int(np.argmin(finite))
            violations.add(path, f"element {at} is {array.flat[at]}; floats must be finite")
        return
    if array.dtype.kind == "b":
        return
    limit = {
        InputRole.TOKEN_IDS: intake.manifest.vocabulary_of(spec) or np.iinfo(array.dtype).max,
        InputRole.ATTENTION_MASK: 2,
        InputRole.TOKEN_TYPE_IDS: 2,
    }.get(spec.role)
    if limit is not None and (array.min() < 0 or array.max() >= limit):
        at = int(np.argmax((array < 0) | (array >= limit)))
        violations.add(path, f"element {at} is {array.flat[at]}; input {spec.name!r} runs from 0 to {limit - 1}")


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
        unknown = [extent for extent in spec.shape if isinstance(extent, str) and extent not in lengths]
        if spec.fill is None:
            violations.add(path, f"input {name!r} cannot be made from text: send tensors")
        elif unknown:
            violations.add(path, f"input {name!r} is missing, and nothing else tells the length of axis {unknown[0]!r}")
        else:
            shape = [lengths[extent] if isinstance(extent, str) else extent for extent in spec.shape]
            tensors[name] = np.full(shape, spec.fill, NUMPY_DTYPES[spec.dtype])
    return len(violations) == before
