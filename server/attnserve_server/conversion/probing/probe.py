"""Learns by running what a graph does not say: the axes of outputs and sites, and how long they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.sites import FoundSite, Scores
from attnserve_server.conversion.probing.extents import Extents, extents_of
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.conversion.rewrite.taps import WEIGHTS_PREFIX
from attnserve_server.domain.values import Array
from attnserve_server.model.manifest import DerivedLength, OutputSpec

_PRIMES = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


@dataclass(frozen=True, slots=True)
class Axes:
    """What a few runs with distinct prime lengths say about shapes; all without the batch axis.

    `derived` has the form of every symbol that is none of the inputs'.
    """

    outputs: dict[str, Extents]
    sites: dict[str, tuple[str | int | None, str | int | None]]
    unbatched_outputs: tuple[str, ...]
    unbatched_sites: frozenset[str]
    derived: dict[str, DerivedLength]
    causal_sites: frozenset[str] = frozenset()
    """Windowed sites whose band has no key behind its query."""


def probe_axes(runner: GraphRunner, sampler: Sampler, outputs: Sequence[str], sites: Mapping[str, FoundSite]) -> Axes:
    """Match every extent of every output and of every tapped site with the axis symbols of the inputs.

    Runs in which each symbol has a prime of its own: an extent that follows a symbol in all is that symbol, one that
    stays is fixed, and any other is fitted to a form derived from one symbol, or, where it follows several, has none.
    The third run is longer by far: an extent that a stride keeps at 1 for a while is not fixed.

    Raises:
        BuildRefused: the graph does not run on such lengths, mostly because axes with distinct symbols must be equal.
    """
    symbols = sampler.signature.symbols
    batches = (1, 1) if sampler.signature.fixed_batch else (2, 3)
    weights = {name: WEIGHTS_PREFIX + name for name, site in sites.items() if site.tappable}
    # Where the graph has the weights itself, their layout is known already, and that of its output may be any.
    own = {
        name: str(site.attention.output.value.name)
        for name, site in sites.items()
        if isinstance(site.attention, Scores)
    }
    runs: list[tuple[Mapping[str, int], dict[str, Array]]] = []
    for lengths, batch in zip(probe_lengths(symbols), batches, strict=True):
        feeds = sampler.batch([sampler.sequence(lengths, row) for row in range(batch)], lengths)
        try:
            runs.append((lengths, runner.run(feeds, [*outputs, *weights.values(), *own.values()])))
        except BuildRefused as fault:
            tried = ", ".join(f"{symbol}={length}" for symbol, length in lengths.items()) or "its fixed shapes"
            hint = "; axes that must be equal need the same symbol" if len(symbols) > 1 else ""
            raise BuildRefused(f"{fault} (tried on {tried}{hint})") from None
    (_, first), (_, second) = runs
    seen = [(lengths, {name: array.shape for name, array in arrays.items()}) for lengths, arrays in runs]
    extents, derived = extents_of(seen, [*outputs, *weights.values()], runner, sampler)
    unbatched = [
        name for name in outputs if not first[name].ndim or (first[name].shape[0], second[name].shape[0]) != batches
    ]
    strange = [name for name, output in own.items() if (first[output].shape[0], second[output].shape[0]) != batches]
    site_axes = {name: extents[output][1:3] for name, output in weights.items()}
    return Axes(
        outputs={name: extents[name] for name in outputs if name not in unbatched},
        sites={name: (axes[0], axes[1]) for name, axes in site_axes.items()},
        unbatched_outputs=tuple(unbatched),
        unbatched_sites=frozenset(strange),
        derived=derived,
    )


def probe_lengths(symbols: Sequence[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Two sets of lengths, in each of which every symbol has a prime of its own. Raises BuildRefused for too many."""
    if len(symbols) >= len(_PRIMES):
        raise BuildRefused(f"{len(symbols)} dynamic axes exceed the {len(_PRIMES) - 1} that can be told apart")
    first, second = ({symbol: _PRIMES[at + shift] for at, symbol in enumerate(symbols)} for shift in (0, 1))
    return first, second


def croppers(
    outputs: Sequence[OutputSpec],
    sites: Mapping[str, tuple[str, str]],
    given: Mapping[str, int],
    derived: Mapping[str, DerivedLength] = MappingProxyType({}),
) -> dict[str, Callable[[Array], Array]]:
    """For every output and every site's weights: what cuts one row of them (no batch axis) to a sequence's lengths.

    Args:
        outputs: by whose shapes outputs are cut.
        sites: query and key axis of each site.
        given: the sequence's lengths, by the symbols of the inputs.
        derived: the forms of the other symbols.
    """
    lengths = {**given, **{symbol: form.of(given[form.source]) for symbol, form in derived.items()}}

    def cutter(shape: Sequence[str | int]) -> Callable[[Array], Array]:
        cuts = tuple(slice(lengths[extent] if isinstance(extent, str) else extent) for extent in shape)
        return lambda array: array[cuts]

    crops = {spec.name: cutter(spec.shape) for spec in outputs}
    for name, (query_axis, key_axis) in sites.items():
        # An axis without a length is fixed, and whole as it is.
        cuts = (slice(None), slice(lengths.get(query_axis)), slice(lengths.get(key_axis)))
        crops[WEIGHTS_PREFIX + name] = lambda array, cuts=cuts: array[cuts]  # type: ignore[misc]
    return crops


def max_abs(one: Array, other: Array) -> float:
    """The greatest absolute difference of two arrays of one shape.

    Equal infinities differ by 0. Infinity where an infinity or a NaN stands in one of the two alone.
    """
    if one.shape != other.shape:
        return float("inf")
    wide, beside = one.astype(np.float64), other.astype(np.float64)
    same = (wide == beside) | (np.isnan(wide) & np.isnan(beside))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(wide - beside))
    return float(np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max(initial=0.0))
