"""Inputs made up for probes and checks: random sequences of given lengths, padded into one batch as the server does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from attnserve_server.conversion.inputs.roles import is_position
from attnserve_server.conversion.inputs.signature import Signature
from attnserve_server.domain.values import Array
from attnserve_server.model.manifest import NUMPY_DTYPES, InputRole, InputSpec

Lengths = Mapping[str, int]

_HIDDEN = 1 / 8
"""The share of keys that an added mask hides."""


@dataclass(frozen=True, slots=True)
class Sampler:
    """Draws sequences.

    Args:
        signature: of the graph.
        vocabulary_size: of the input of token ids; 0: not known, ids stay at 0 and 1.
        seed: of what is drawn.
        vocabulary_sizes: by the name of each input that holds ids, where that is known of more than one.
    """

    signature: Signature
    vocabulary_size: int = 0
    seed: int = 0
    vocabulary_sizes: Mapping[str, int] = field(default_factory=dict)

    def sequence(self, lengths: Lengths, number: int = 0) -> dict[str, Array]:
        """One sequence, without the batch axis; the same number and lengths give the same one."""
        rng = np.random.default_rng([self.seed, number, *lengths.values()])
        return {spec.name: self._draw(spec, lengths, rng) for spec in self.signature.inputs}

    def batch(self, sequences: Sequence[Mapping[str, Array]], padded: Lengths) -> dict[str, Array]:
        """Sequences as one batch, padded to `padded` at the end of each dynamic axis."""
        feeds: dict[str, Array] = {}
        for spec in self.signature.inputs:
            shape = tuple(_extent(extent, padded) for extent in spec.shape)
            array = np.full((len(sequences), *shape), spec.padding, NUMPY_DTYPES[spec.dtype])
            for row, sequence in enumerate(sequences):
                own = sequence[spec.name]
                place: tuple[int | slice, ...] = (row, *(slice(extent) for extent in own.shape))
                array[place] = own
            feeds[spec.name] = array
        return feeds

    def mixed(self, lengths: Sequence[int]) -> tuple[dict[str, Array], list[dict[str, int]]]:
        """A padded batch, one sequence for each length, and the lengths of each.

        On every further axis the lengths go round by one, so that a sequence's axes differ where the lengths do.
        """
        symbols, count = self.signature.symbols, len(lengths)
        each = [{symbol: lengths[(row + turn) % count] for turn, symbol in enumerate(symbols)} for row in range(count)]
        padded = dict.fromkeys(symbols, max(lengths))
        return self.batch([self.sequence(own, row) for row, own in enumerate(each)], padded), each

    def _draw(self, spec: InputSpec, lengths: Lengths, rng: np.random.Generator) -> Array:
        shape = tuple(_extent(extent, lengths) for extent in spec.shape)
        dtype = NUMPY_DTYPES[spec.dtype]
        known = spec.vocabulary_size or self.vocabulary_size
        size = self.vocabulary_sizes.get(spec.name, known if spec.role is InputRole.TOKEN_IDS else 0)
        if size or spec.role is InputRole.TOKEN_IDS:
            ids = rng.integers(0, max(size, 2), shape)
            # Padding's own id inside a sequence would be masked by models that derive their mask from the ids.
            return np.where(ids == spec.padding, (ids + 1) % max(size, 2), ids).astype(dtype)
        if spec.fill is not None:
            return np.full(shape, spec.fill, dtype)
        if is_position(spec.name):
            return np.broadcast_to(np.arange(shape[-1]), shape).astype(dtype)
        return _drawn(spec, shape, lengths, rng)


def _drawn(spec: InputSpec, shape: tuple[int, ...], lengths: Lengths, rng: np.random.Generator) -> Array:
    """Data that is neither ids nor positions: as the input's ranges, or its type, have it."""
    dtype = NUMPY_DTYPES[spec.dtype]
    if spec.index_ranges:
        return _of_ranges(spec, shape, lengths, rng)
    if spec.additive_mask:
        return _of_mask(spec, shape, rng)
    if np.issubdtype(dtype, np.floating):
        return rng.normal(size=shape).astype(dtype)
    return _marks(shape, rng).astype(dtype)


def _of_mask(spec: InputSpec, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """A mask that is added to scores: it moves most of them, and hides some keys, but never the first."""
    hidden = rng.random(shape) < _HIDDEN
    if shape:
        hidden[..., 0] = False
    return np.where(hidden, spec.padding, rng.normal(size=shape)).astype(NUMPY_DTYPES[spec.dtype])


def _of_ranges(spec: InputSpec, shape: tuple[int, ...], lengths: Lengths, rng: np.random.Generator) -> Array:
    """Legal numbers of an input that looks tables up, none of them negative where there are others."""
    drawn = np.empty(shape, NUMPY_DTYPES[spec.dtype])
    for column, resting in enumerate(spec.resting):
        bounds = [each.at(lengths) for each in spec.ranges_at(column)]
        chosen = next(((low, high) for low, high in bounds if low <= resting <= high), None)
        least, greatest = (0, 1) if chosen is None else (max(chosen[0], min(resting, 0)), chosen[1])
        least = resting if any(each.along for each in spec.index_ranges) else least
        place = (...,) if spec.columns == 1 else (..., column)
        drawn[place] = rng.integers(least, greatest, drawn[place].shape, endpoint=True)
    return drawn


def _marks(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Zeros and ones, both along the last axis: a mask of either sense then keeps something, and hides something.

    With everything hidden, padding that leaks into an answer would be hidden too.
    """
    marks = rng.integers(0, 2, shape)
    if shape:
        marks[..., -1] = 0
        marks[..., 0] = 1
    return marks


def _extent(extent: str | int, lengths: Lengths) -> int:
    return lengths[extent] if isinstance(extent, str) else extent
