"""Make the sequences of an attack, which runs a graph on them to break the clauses of its certificate.

They hold ordinary values, extremes, padding ids inside texts, and masks of all shapes. Nothing here runs the graph.
A content that is unknown, or matches the kind of no input, leaves ordinary values. Errors of the sampler pass through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from attnserve_server.conversion.inputs.roles import is_position
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.domain.values import Array
from attnserve_server.model.certificate import MaskNeed
from attnserve_server.model.manifest import NUMPY_DTYPES, InputRole, InputSpec

ORDINARY = "ordinary values"
MIXTURE = "a mixture"

Change = Callable[[Array, "Setting", np.random.Generator], Array]


class Kind(StrEnum):
    """The meaning of an input, as far as it decides which values may break a clause."""

    IDS = "ids"
    MASK = "mask"
    TYPES = "token types"
    POSITIONS = "positions"
    FLOATS = "floats"
    MARKS = "marks"
    """Integers or booleans of unknown meaning."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Facts about the input that a change applies to."""

    spec: InputSpec
    vocabulary_size: int
    extreme_ids: tuple[int, ...]
    longest: int
    """The greatest length of the input's last axis."""

    @property
    def allowed(self) -> float:
        """The value of a mask at positions that it does not hide."""
        return 1.0 if self.spec.fill is None else self.spec.fill

    @property
    def other_ids(self) -> list[int]:
        """Some ids other than the padding's; at least one."""
        size = max(self.vocabulary_size, 2)
        return [token for token in (0, 1, size // 2, size - 1) if token != self.spec.padding]


@dataclass(frozen=True, slots=True)
class Content:
    """One kind of content: its name, the kind of input that it changes, and the change."""

    words: str
    kind: Kind
    change: Change


@dataclass(frozen=True, slots=True)
class Draft:
    """A reproducible sequence: the same draft gives the same arrays.

    Attributes:
        lengths: The length of each axis symbol of the inputs.
        content: A name from `Author.contents`.
        number: Distinguishes drafts of equal lengths and content, which differ in their random values.
    """

    lengths: tuple[tuple[str, int], ...]
    content: str = ORDINARY
    number: int = 0

    @property
    def own(self) -> dict[str, int]:
        """Lengths by the symbols of the inputs."""
        return dict(self.lengths)


@dataclass(frozen=True, slots=True)
class Author:
    """Makes sequences from drafts.

    Args:
        sampler: Makes sequences of ordinary values.
        masks: The needs that a sequence must meet before the server pads it.
        max_lengths: The greatest length of each symbol.
        extreme_ids: For each input of ids: the ids with the greatest and the smallest embeddings.
    """

    sampler: Sampler
    masks: Sequence[MaskNeed] = ()
    max_lengths: Mapping[str, int] = field(default_factory=dict)
    extreme_ids: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def contents(self) -> tuple[str, ...]:
        """The kinds of content that change an input of this model, ordinary values first."""
        kinds = {self._kind(spec) for spec in self.sampler.signature.inputs}
        changed = [content.words for content in CONTENTS if content.kind in kinds]
        return (ORDINARY, *changed, *((MIXTURE,) if len(kinds) > 1 else ()))

    def sequence(self, draft: Draft) -> dict[str, Array]:
        """Return the arrays of one sequence, without the batch axis."""
        base = self.sampler.sequence(draft.own, draft.number)
        if draft.content == ORDINARY:
            return base
        rng = np.random.default_rng([self.sampler.seed, draft.number, *draft.own.values()])
        for spec in self.sampler.signature.inputs:
            content = self._chosen(spec, draft.content, rng)
            if content is not None and base[spec.name].size:
                changed = content.change(base[spec.name], self._setting(spec), rng)
                base[spec.name] = np.asarray(changed, NUMPY_DTYPES[spec.dtype])
        return base

    def may_pad(self, sequence: Mapping[str, Array]) -> bool:
        """Return whether the server would pad this sequence: its masks meet the proof's needs."""
        paddings = {spec.name: spec.padding for spec in self.sampler.signature.inputs}
        return all(need.met_by(sequence[need.input], paddings[need.input]) for need in self.masks)

    def _chosen(self, spec: InputSpec, words: str, rng: np.random.Generator) -> Content | None:
        kind = self._kind(spec)
        if words != MIXTURE:
            return next((each for each in CONTENTS if each.words == words and each.kind is kind), None)
        suitable = [each for each in CONTENTS if each.kind is kind]
        at = int(rng.integers(-1, len(suitable)))
        return suitable[at] if at >= 0 else None

    def _kind(self, spec: InputSpec) -> Kind:
        floats = np.issubdtype(NUMPY_DTYPES[spec.dtype], np.floating)
        masks = {need.input for need in self.masks}
        if spec.role is InputRole.TOKEN_IDS or self._vocabulary(spec):
            return Kind.IDS
        if spec.role is InputRole.ATTENTION_MASK or (floats and spec.name in masks):
            return Kind.MASK
        if spec.role is InputRole.TOKEN_TYPE_IDS:
            return Kind.TYPES
        if is_position(spec.name):
            return Kind.POSITIONS
        return Kind.FLOATS if floats else Kind.MARKS

    def _vocabulary(self, spec: InputSpec) -> int:
        known = spec.vocabulary_size or (self.sampler.vocabulary_size if spec.role is InputRole.TOKEN_IDS else 0)
        return self.sampler.vocabulary_sizes.get(spec.name, known)

    def _setting(self, spec: InputSpec) -> Setting:
        last = spec.shape[-1] if spec.shape else 1
        longest = self.max_lengths.get(last, 1) if isinstance(last, str) else last
        extremes = tuple(self.extreme_ids.get(spec.name, ()))
        return Setting(spec, self._vocabulary(spec), extremes, longest)


def _scaled(factor: float) -> Change:
    def change(array: Array, _setting: Setting, _rng: np.random.Generator) -> Array:
        return np.clip(array * factor, -_most(array), _most(array))

    return change


def _filled(value: float) -> Change:
    return lambda array, _setting, _rng: np.full_like(array, value)


def _most(array: Array) -> float:
    return float(np.finfo(array.dtype.name).max)


def _spike(array: Array, _setting: Setting, rng: np.random.Generator) -> Array:
    flat = array.flatten()
    flat[rng.integers(flat.size)] = 1000
    return flat.reshape(array.shape)


def _repeated(array: Array, _setting: Setting, _rng: np.random.Generator) -> Array:
    return np.broadcast_to(array[:1], array.shape) if array.ndim else array


def _chosen_ids(choose: Callable[[Setting], Sequence[int]]) -> Change:
    def change(array: Array, setting: Setting, rng: np.random.Generator) -> Array:
        choices = choose(setting)
        return rng.choice(np.array(choices), array.shape) if choices else array

    return change


def _one_id(array: Array, setting: Setting, rng: np.random.Generator) -> Array:
    choices = [*setting.other_ids, *setting.extreme_ids, int(array.flat[0])]
    return np.full_like(array, choices[int(rng.integers(len(choices)))])


def _padding_inside(array: Array, setting: Setting, rng: np.random.Generator) -> Array:
    """Return ids with the padding id at about half of the places, the first included. One place keeps its id."""
    hidden = rng.random(array.shape) < 0.5
    hidden.flat[0] = True
    hidden.flat[int(rng.integers(1, array.size)) if array.size > 1 else 0] = False
    return np.where(hidden, setting.spec.padding, array)


def _padding_behind(array: Array, setting: Setting, _rng: np.random.Generator) -> Array:
    return np.where(np.arange(array.shape[-1]) < 1, array, setting.spec.padding) if array.ndim else array


def _padding_only(array: Array, setting: Setting, _rng: np.random.Generator) -> Array:
    return np.full_like(array, setting.spec.padding)


def _mask(allow: Callable[[int, np.random.Generator], Array]) -> Change:
    """Return a change to a mask that allows the places chosen along its last axis."""

    def change(array: Array, setting: Setting, rng: np.random.Generator) -> Array:
        allowed = allow(array.shape[-1] if array.ndim else 1, rng)
        along = allowed if array.ndim else allowed[0]
        return np.broadcast_to(np.where(along, setting.allowed, setting.spec.padding), array.shape)

    return change


def _holes(length: int, rng: np.random.Generator) -> Array:
    allowed = rng.random(length) < 0.5
    allowed[int(rng.integers(length))] = True
    return allowed


def _positions_to_the_end(array: Array, setting: Setting, _rng: np.random.Generator) -> Array:
    return array + max(setting.longest - array.shape[-1], 0) if array.ndim else array


CONTENTS: tuple[Content, ...] = (
    Content("values near zero, 0.001 of ordinary ones", Kind.FLOATS, _scaled(1e-3)),
    Content("values 1000 times ordinary ones", Kind.FLOATS, _scaled(1e3)),
    Content("one value of 1000 among ordinary ones", Kind.FLOATS, _spike),
    Content("nothing but ones", Kind.FLOATS, _filled(1.0)),
    Content("nothing but zeros", Kind.FLOATS, _filled(0.0)),
    Content("the same values at every position", Kind.FLOATS, _repeated),
    Content("values 0.1 of ordinary ones", Kind.FLOATS, _scaled(0.1)),
    Content("values 20 times ordinary ones", Kind.FLOATS, _scaled(20.0)),
    Content("nothing but minus three", Kind.FLOATS, _filled(-3.0)),
    Content("padding ids inside the text", Kind.IDS, _padding_inside),
    Content("one id, repeated", Kind.IDS, _one_id),
    Content("ids with the greatest and the least embeddings", Kind.IDS, _chosen_ids(lambda each: each.extreme_ids)),
    Content("padding ids behind the first id", Kind.IDS, _padding_behind),
    Content("padding ids only", Kind.IDS, _padding_only),
    Content("the first and the last ids of the vocabulary", Kind.IDS, _chosen_ids(lambda each: each.other_ids)),
    Content("a mask with holes", Kind.MASK, _mask(_holes)),
    Content("a left-padded mask", Kind.MASK, _mask(lambda n, _: np.arange(n) >= n // 2)),
    Content("a right-padded mask", Kind.MASK, _mask(lambda n, _: np.arange(n) < (n + 1) // 2)),
    Content("an empty mask", Kind.MASK, _mask(lambda n, _: np.zeros(n, bool))),
    Content("a mask of the last position alone", Kind.MASK, _mask(lambda n, _: np.arange(n) == n - 1)),
    Content("token types of both kinds", Kind.TYPES, lambda array, _, rng: rng.integers(0, 2, array.shape)),
    Content("token types of the second kind", Kind.TYPES, _filled(1)),
    Content("positions in reverse", Kind.POSITIONS, lambda array, _setting, _rng: array[..., ::-1]),
    Content("positions up to the last", Kind.POSITIONS, _positions_to_the_end),
    Content("position 0 everywhere", Kind.POSITIONS, _filled(0)),
    Content("marks of ones", Kind.MARKS, _filled(1)),
    Content("marks of zeros", Kind.MARKS, _filled(0)),
    Content("marks at random", Kind.MARKS, lambda array, _, rng: rng.integers(0, 2, array.shape)),
)
"""In the order in which they are tried: the contents that break most models of their kind come first."""
