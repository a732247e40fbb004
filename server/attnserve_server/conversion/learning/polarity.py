"""Learns by running a graph which value of a mask hides a position: names do not state it, and exporters differ.

    attention_mask          1 or True is data: Hugging Face
    src_key_padding_mask    True is padding: torch.nn.TransformerEncoder, torch.nn.MultiheadAttention

A value hides positions if a sequence whose last position has it is answered like the sequence without that position,
and the other value is not. Where both are, as in a causal model, a value hides positions if the content of the first
position does not change the answers at the others, and the other value lets it. Where a file rounds, the one value must
change the answers several times as much as the other. A mask for which neither decides, or that no run takes, stays as
it was declared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import onnx_ir as ir

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.tolerances import Tolerances, max_abs
from attnserve_server.conversion.graphs.reading import precision_of, save
from attnserve_server.conversion.inputs.roles import is_position
from attnserve_server.conversion.inputs.signature import Signature
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.domain.values import Array
from attnserve_server.model.manifest import NUMPY_DTYPES, Dimension, InputRole, InputSpec

_LENGTH: Final = 7
"""The length along the mask's axis. Every other dynamic axis has another one."""
_OTHER_LENGTH: Final = 9
_VALUES: Final = (0, 1)
_RATIO, _EFFECT = 5.0, 0.25
"""Where a file rounds, one value must change the answers this many times as much as the other, and by this much.

A dynamic quantizer has one scale for all positions, so that a hidden one still changes the rounding of the others: by
0.08 of the greatest answer in small models. A visible one changes them by 0.9 and more.
"""


def with_polarity(proto: onnx.ModelProto, signature: Signature, work: Path) -> Signature:
    """Set role, padding and fill of the masks of a graph by what their values do.

    Args:
        proto: the graph.
        signature: of the graph; roles are those that names and tables state.
        work: a folder for a file.

    Returns:
        The signature. A mask of one axis has the role of an attention mask, and is `inverted` if 1 hides a position.
        Any other mask is padded with the value that hides a position.

    Raises:
        BuildRefused: the runtime cannot load the graph.
    """
    masks = [spec for spec in signature.inputs if _may_be_a_mask(spec, signature)]
    if not masks:
        return signature
    path = work / "polarity.onnx"
    save(ir.from_proto(proto), path)
    runner, precision = GraphRunner(path), precision_of(proto)
    known = signature
    for spec in masks:
        others = frozenset(each.name for each in masks)
        exact = Tolerances.of(precision).neighbours if precision == "fp32" else None
        trial = _Trial(runner, Sampler(known), spec, others, exact)
        hiding = trial.hiding()
        if hiding is not None:
            known = _with(known, spec, hiding)
    return known


def _may_be_a_mask(spec: InputSpec, signature: Signature) -> bool:
    """Whether an input may hold marks for the positions of its last axis, which another input has too.

    Along an axis of fixed length, which is never padded, only masks that the server fills count.
    """
    if NUMPY_DTYPES[spec.dtype].kind not in "iub" or not spec.shape:
        return False
    marks = spec.role is InputRole.ATTENTION_MASK or (
        spec.role is InputRole.DATA
        and isinstance(spec.shape[-1], str)
        and not spec.index_ranges
        and not is_position(spec.name)
    )
    return marks and any(_has_content(each, spec.shape[-1]) for each in signature.inputs)


def _has_content(spec: InputSpec, axis: Dimension) -> bool:
    """Whether an input holds ids or numbers for each position along an axis."""
    floats = NUMPY_DTYPES[spec.dtype].kind == "f" and not spec.additive_mask
    return axis in spec.shape and (spec.role is InputRole.TOKEN_IDS or floats)


def _with(signature: Signature, mask: InputSpec, hiding: int) -> Signature:
    taken = any(
        spec.role is InputRole.ATTENTION_MASK and spec.shape == mask.shape and spec.name != mask.name
        for spec in signature.inputs
    )
    update: dict[str, object] = {"padding": float(hiding)}
    if len(mask.shape) == 1 and not taken:
        update |= {"role": InputRole.ATTENTION_MASK, "fill": float(1 - hiding), "inverted": bool(hiding)}
    inputs = tuple(
        InputSpec.model_validate({**spec.model_dump(), **update}) if spec.name == mask.name else spec
        for spec in signature.inputs
    )
    return replace(signature, inputs=inputs)


@dataclass(frozen=True, slots=True)
class _Trial:
    """Runs of a graph that compare the two values of one mask.

    Attributes:
        runner: runs the graph.
        sampler: draws sequences.
        mask: the mask.
        masks: the names of all masks.
        tolerance: the greatest relative difference of equal answers; None: the file rounds, and none is known.
    """

    runner: GraphRunner
    sampler: Sampler
    mask: InputSpec
    masks: frozenset[str]
    tolerance: float | None

    @property
    def axis(self) -> Dimension:
        """The axis whose positions the mask marks: its symbol, or its fixed length."""
        return self.mask.shape[-1]

    def hiding(self) -> int | None:
        """Return the value that hides a position; None where no run decides it."""
        for others in _VALUES:
            try:
                fixed = isinstance(self.axis, int)
                cuts = [np.inf if fixed else self._cut(value, others) for value in _VALUES]
                found = self._decided(cuts)
                # Marks that only set features to zero leave the keys visible; they are no mask.
                harmless = max(cuts) <= (_EFFECT if self.tolerance is None else self.tolerance)
                if found is None and (harmless or self.mask.role is InputRole.ATTENTION_MASK):
                    found = self._decided([self._silent(value, others) for value in _VALUES])
            except BuildRefused:
                continue
            if found is not None:
                return found
        return None

    def _decided(self, changes: list[float]) -> int | None:
        """Return the value that changes answers less, if it is clear that it hides a position and the other does not.

        Args:
            changes: for each value, the greatest relative difference of two answers that are equal if it hides.
        """
        least, greatest = sorted(changes)
        if self.tolerance is None:
            clear = greatest >= max(_EFFECT, _RATIO * least)
        else:
            clear = least <= self.tolerance < greatest
        return changes.index(least) if clear else None

    def _cut(self, value: int, others: int) -> float:
        """Return how far the answers to a sequence whose last position has this value are from those without it."""
        whole, shorter = self._answers(value, others, -1), self._answers(value, others, None)
        return max(_relative(_cropped(whole[name], shorter[name]), shorter[name]) for name in shorter)

    def _silent(self, value: int, others: int) -> float:
        """Return how far the first position's content changes other answers, where the mask there has this value."""
        one, other = self._answers(value, others, 0), self._answers(value, others, 0, changed=True)
        if isinstance(self.axis, int):
            shapes = {name: tuple(size - (size == self.axis) for size in array.shape) for name, array in one.items()}
        else:
            shapes = {name: array.shape for name, array in self._answers(value, others, None).items()}
        return max(_relative(_behind(one[name], shape), _behind(other[name], shape)) for name, shape in shapes.items())

    def _answers(self, value: int, others: int, at: int | None, *, changed: bool = False) -> dict[str, Array]:
        """Return the outputs for a sequence whose position `at` is marked with a value, and all others with 1 - value.

        Args:
            value: of the mask.
            others: what the other masks hold.
            at: the marked position; None: none is marked, and the last position is cut off.
            changed: whether the position has other content.
        """
        signature = self.sampler.signature
        lengths = {symbol: _OTHER_LENGTH + place for place, symbol in enumerate(signature.symbols)}
        lengths[str(self.axis)] = _LENGTH
        sequence, other = (self.sampler.sequence(lengths, number) for number in (0, 1))
        for spec in signature.inputs:
            along = [axis for axis, extent in enumerate(spec.shape) if extent == self.axis]
            array = sequence[spec.name]
            if spec.name == self.mask.name:
                array = np.full_like(array, 1 - value)
                if at is not None:
                    array[..., at] = value
            elif spec.name in self.masks:
                array = np.full_like(array, others)
            elif changed and at is not None and _has_content(spec, self.axis):
                place = tuple(at if axis in along else slice(None) for axis in range(array.ndim))
                array[place] = other[spec.name][place] + (0 if spec.role is InputRole.TOKEN_IDS else 1)
            if at is None:
                array = array[tuple(slice(-1) if axis in along else slice(None) for axis in range(array.ndim))]
            sequence[spec.name] = array
        feeds: Mapping[str, Array] = {name: array[None] for name, array in sequence.items()}
        return self.runner.run(feeds, self.runner.output_names, tap=False)


def _relative(found: Array | None, expected: Array | None) -> float:
    """Return the greatest difference over the greatest value; infinity where shapes differ or an answer has a NaN.

    Different integers differ by infinity.
    """
    if found is None or expected is None:
        return np.inf
    if expected.dtype.kind != "f":
        return 0.0 if np.array_equal(found, expected) else np.inf
    if np.isnan(found).any() or np.isnan(expected).any():
        return np.inf
    scale = float(np.abs(np.nan_to_num(expected, posinf=0.0, neginf=0.0)).max(initial=0.0))
    return max_abs(found, expected) / max(scale, 1e-6)


def _cropped(whole: Array, shorter: Array) -> Array | None:
    """Return the part of a longer sequence's answer that the shorter one has; None where ranks differ."""
    if whole.ndim != shorter.ndim:
        return None
    return whole[tuple(slice(size) for size in shorter.shape)]


def _behind(whole: Array, shorter: tuple[int, ...]) -> Array | None:
    """Return an answer without its first position along the axes that follow the sequence, by a shorter one's shape."""
    if whole.ndim != len(shorter):
        return None
    sizes = zip(whole.shape, shorter, strict=True)
    return whole[tuple(slice(1 if longer != size else 0, None) for longer, size in sizes)]
