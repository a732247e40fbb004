"""Inputs for probes and checks: random sequences of chosen lengths, padded into a batch as the server pads them.

`probe_lengths` chooses the lengths, `Sampler` draws and pads the sequences, and `croppers` cuts what a graph answers
back to each sequence's lengths. Lengths that lack an axis symbol of the inputs raise KeyError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.inputs.roles import is_position
from attnserve_server.conversion.inputs.signature import Signature
from attnserve_server.conversion.rewrite.taps import WEIGHTS_PREFIX
from attnserve_server.domain.values import Array
from attnserve_server.model.manifest import NUMPY_DTYPES, Following, InputRole, InputSpec, OutputSpec

Lengths = Mapping[str, int]
"""The length along each axis symbol."""

_PRIMES = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
_HIDDEN = 1 / 8
"""The share of keys that an added mask hides."""


def probe_lengths(symbols: Sequence[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Return two sets of lengths; the symbols have distinct primes in each, and each symbol another in the second.

    Raises:
        BuildRefused: there are too many symbols.
    """
    if len(symbols) >= len(_PRIMES):
        raise BuildRefused(
            f"the inputs have {len(symbols)} dynamic axes; at most {len(_PRIMES) - 1} are supported: "
            "fix the sizes of some"
        )
    first, second = ({symbol: _PRIMES[at + shift] for at, symbol in enumerate(symbols)} for shift in (0, 1))
    return first, second


@dataclass(frozen=True, slots=True)
class Sampler:
    """Draws sequences for a graph, and pads them into batches.

    Args:
        signature: the graph's inputs.
        vocabulary_size: of the input of token ids; 0: unknown, and ids are 0 and 1 only.
        seed: of the random numbers.
        vocabulary_sizes: by input name, where they are known for more inputs that hold ids.
    """

    signature: Signature
    vocabulary_size: int = 0
    seed: int = 0
    vocabulary_sizes: Mapping[str, int] = field(default_factory=dict)

    def sequence(self, lengths: Lengths, number: int = 0) -> dict[str, Array]:
        """Draw one sequence, without the batch axis. The same number and lengths give the same sequence."""
        rng = np.random.default_rng([self.seed, number, *lengths.values()])
        every = self.signature.lengths(lengths)
        return {spec.name: self._draw(spec, every, rng) for spec in self.signature.inputs}

    def batch(self, sequences: Sequence[Mapping[str, Array]], padded: Lengths) -> dict[str, Array]:
        """Return the sequences as one batch, padded to the lengths `padded` at the end of each dynamic axis.

        Raises:
            ValueError: a sequence is longer than `padded`.
        """
        feeds: dict[str, Array] = {}
        every = self.signature.lengths(padded)
        for spec in self.signature.inputs:
            shape = _shape(spec, every)
            array = np.full((len(sequences), *shape), spec.padding, NUMPY_DTYPES[spec.dtype])
            for row, sequence in enumerate(sequences):
                own = sequence[spec.name]
                place: tuple[int | slice, ...] = (row, *(slice(size) for size in own.shape))
                array[place] = own
            feeds[spec.name] = array
        return feeds

    def rows(self, lengths: Lengths, count: int, first: int = 0) -> dict[str, Array]:
        """Draw a batch without padding: the sequences number `first` to before `first + count`, of equal lengths."""
        return self.batch([self.sequence(lengths, row) for row in range(first, first + count)], lengths)

    def mixed(self, lengths: Sequence[int]) -> tuple[dict[str, Array], list[dict[str, int]]]:
        """Draw a padded batch, one sequence for each length. Return the batch and the lengths of each sequence.

        On every further axis the lengths rotate by one, so that a sequence's axes differ where the lengths do.
        """
        symbols, count = self.signature.symbols, len(lengths)
        each = [{symbol: lengths[(row + turn) % count] for turn, symbol in enumerate(symbols)} for row in range(count)]
        padded = dict.fromkeys(symbols, max(lengths))
        return self.batch([self.sequence(own, row) for row, own in enumerate(each)], padded), each

    def _draw(self, spec: InputSpec, lengths: Lengths, rng: np.random.Generator) -> Array:
        shape = _shape(spec, lengths)
        dtype = NUMPY_DTYPES[spec.dtype]
        known = spec.vocabulary_size or self.vocabulary_size
        size = self.vocabulary_sizes.get(spec.name, known if spec.role is InputRole.TOKEN_IDS else 0)
        if size or spec.role is InputRole.TOKEN_IDS:
            ids = rng.integers(0, max(size, 2), shape)
            # A model that derives its mask from the ids would mask the padding's id inside a sequence.
            return np.where(ids == spec.padding, (ids + 1) % max(size, 2), ids).astype(dtype)
        if spec.fill is not None:
            return np.full(shape, spec.fill, dtype)
        if is_position(spec.name):
            return np.broadcast_to(np.arange(shape[-1]), shape).astype(dtype)
        return _data(spec, shape, lengths, rng)


def _data(spec: InputSpec, shape: tuple[int, ...], lengths: Lengths, rng: np.random.Generator) -> Array:
    """Draw data that is neither ids nor positions, by the input's index ranges or its type."""
    dtype = NUMPY_DTYPES[spec.dtype]
    if spec.index_ranges:
        return _indices(spec, shape, lengths, rng)
    if spec.additive_mask:
        return _additive_mask(spec, shape, rng)
    if np.issubdtype(dtype, np.floating):
        return rng.normal(size=shape).astype(dtype)
    return _marks(shape, rng).astype(dtype)


def _additive_mask(spec: InputSpec, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Draw a mask that is added to scores: it moves most of them, and hides some keys, but never the first."""
    hidden = rng.random(shape) < _HIDDEN
    if shape:
        hidden[..., 0] = False
    return np.where(hidden, spec.padding, rng.normal(size=shape)).astype(NUMPY_DTYPES[spec.dtype])


def _indices(spec: InputSpec, shape: tuple[int, ...], lengths: Lengths, rng: np.random.Generator) -> Array:
    """Draw valid indices of an input that looks tables up; none is negative where others are valid."""
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
    """Draw zeros and ones, both along the last axis: a mask of either sense then keeps and hides something.

    If a mask hid every key, padding that leaks into an answer would be hidden too.
    """
    marks = rng.integers(0, 2, shape)
    if shape:
        marks[..., -1] = 0
        marks[..., 0] = 1
    return marks


def _shape(spec: InputSpec, lengths: Lengths) -> tuple[int, ...]:
    """Return the shape of one sequence of an input, without the batch axis."""
    return tuple(lengths[size] if isinstance(size, str) else size for size in spec.shape)


def croppers(
    outputs: Sequence[OutputSpec],
    sites: Mapping[str, tuple[str, str]],
    given: Lengths,
    derived: Mapping[str, Following] = MappingProxyType({}),
) -> dict[str, Callable[[Array], Array]]:
    """Return, for each output and each site's weights, a function that crops one row (no batch axis) to a sequence.

    Args:
        outputs: cropped along the axes of their shapes.
        sites: the query axis and the key axis of each site.
        given: the sequence's lengths, by the symbols of the inputs.
        derived: the forms of the other symbols.
    """
    lengths = {**given, **{symbol: form.length_at(given) for symbol, form in derived.items()}}

    def cropper(shape: Sequence[str | int]) -> Callable[[Array], Array]:
        cuts = tuple(slice(lengths[size] if isinstance(size, str) else size) for size in shape)
        return lambda array: array[cuts]

    crops = {spec.name: cropper(spec.shape) for spec in outputs}
    for name, (query_axis, key_axis) in sites.items():
        # An axis without a length is fixed, and is not cropped.
        cuts = (slice(None), slice(lengths.get(query_axis)), slice(lengths.get(key_axis)))
        crops[WEIGHTS_PREFIX + name] = lambda array, cuts=cuts: array[cuts]  # type: ignore[misc]
    return crops
