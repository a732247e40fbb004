"""Learns by running what a graph does not say: axes of outputs and sites, how long, whether padding is harmless."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from attnserve_server.build.errors import BuildRefused
from attnserve_server.build.inputs.feeds import Sampler
from attnserve_server.build.learning.extents import Extents, extents_of
from attnserve_server.build.runtime import Runner
from attnserve_server.build.sites import FoundSite
from attnserve_server.build.taps import WEIGHTS_PREFIX
from attnserve_server.domain.values import Array
from attnserve_server.model.manifest import DerivedLength, OutputSpec

_PRIMES = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
_PADDING = 3
"""How far a probe pads: enough that a leak of padding into a softmax or a mean is far above any tolerance."""

_IN_PROPORTION = 0.5
"""The share of a weight that padding may change where only its order of magnitude is looked at."""


@dataclass(frozen=True, slots=True)
class Axes:
    """What a few runs with distinct prime lengths say about shapes; all without the batch axis.

    `derived` has the form of every symbol that is none of the inputs'.
    """

    outputs: dict[str, Extents]
    sites: dict[str, tuple[str | int | None, str | int | None]]
    unbatched_outputs: tuple[str, ...]
    unbatched_sites: frozenset[str]
    causal_sites: frozenset[str]
    derived: dict[str, DerivedLength]


def probe_axes(runner: Runner, sampler: Sampler, outputs: Sequence[str], sites: Mapping[str, FoundSite]) -> Axes:
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
    own = {name: _own_output(site) for name, site in sites.items() if site.scores is not None}
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
        causal_sites=frozenset(name for name, output in weights.items() if _is_causal((first[output], second[output]))),
        derived=derived,
    )


def probe_lengths(symbols: Sequence[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Two sets of lengths, in each of which every symbol has a prime of its own. Raises BuildRefused for too many."""
    if len(symbols) >= len(_PRIMES):
        raise BuildRefused(f"{len(symbols)} dynamic axes exceed the {len(_PRIMES) - 1} that can be told apart")
    first, second = ({symbol: _PRIMES[at + shift] for at, symbol in enumerate(symbols)} for shift in (0, 1))
    return first, second


def _own_output(site: FoundSite) -> str:
    """The name of the operator's own output; a finder that taps a site also says where its output is."""
    assert site.output is not None
    assert site.output.value.name is not None
    return site.output.value.name


def _is_causal(runs: Sequence[Array]) -> bool:
    """Whether no query looks past itself, on square maps, though keys behind the first one are looked at."""
    square = all(weights.shape[2] == weights.shape[3] for weights in runs)
    return (
        square
        and not any(np.triu(weights, 1).any() for weights in runs)
        and any(weights[..., 1:].any() for weights in runs)
    )


def padding_error(
    runner: Runner,
    sampler: Sampler,
    symbol: str,
    outputs: Sequence[OutputSpec],
    sites: Mapping[str, tuple[str, str]],
    derived: Mapping[str, DerivedLength],
) -> float:
    """How much padding along one axis changes a sequence's own outputs and weights: the greatest difference.

    In parts of each array's greatest value, where that is beyond 1, as rounding is.

    Args:
        runner: the tapped graph.
        sampler: makes the sequence.
        symbol: the axis that is padded; the others are as long as the sequence.
        outputs: what is compared, cropped to the sequence's own lengths.
        sites: query and key axis of each site whose weights are compared.
        derived: the forms of symbols that are none of the inputs'.

    Returns:
        Infinity where the graph does not run on the padded sequence.
    """
    symbols = sampler.signature.symbols
    # Both orders: under a causal frontier, padded keys are seen only by queries that outnumber the keys.
    orders = (symbols, symbols[::-1]) if len(symbols) > 1 else (symbols,)
    assigned = ({name: _PRIMES[position] for position, name in enumerate(order)} for order in orders)
    return max(_padding_error(runner, sampler, symbol, outputs, sites, derived, lengths) for lengths in assigned)


def _padding_error(
    runner: Runner,
    sampler: Sampler,
    symbol: str,
    outputs: Sequence[OutputSpec],
    sites: Mapping[str, tuple[str, str]],
    derived: Mapping[str, DerivedLength],
    lengths: Mapping[str, int],
) -> float:
    sequence = sampler.sequence(lengths)
    fetches = [*(spec.name for spec in outputs), *(WEIGHTS_PREFIX + name for name in sites)]
    alone = runner.run(sampler.batch([sequence], lengths), fetches)
    try:
        feeds = sampler.batch([sequence], {**lengths, symbol: lengths[symbol] + _PADDING})
        padded = runner.run(feeds, fetches)
    except BuildRefused:
        return float("inf")
    crops = croppers(outputs, sites, lengths, derived)
    for name, (_, key_axis) in sites.items():
        form = derived.get(key_axis)
        before, after = (run[WEIGHTS_PREFIX + name][0] for run in (alone, padded))
        if form is not None and form.source == symbol and _displaced(before, after, form):
            return float("inf")
    return max(_scaled(crops[name](padded[name][0]), crops[name](alone[name][0])) for name in fetches)


def _displaced(alone: Array, padded: Array, form: DerivedLength) -> bool:
    """Whether keys beyond the source's positions move when it is padded, or whether that cannot be told.

    A zero or a bias that is concatenated behind the keys stands behind the padding too, where no crop finds it. In its
    place stands the weight of a padded key, which is seen in proportion: a weight may be too small for a difference to
    tell. Keys that are put before the others stay where they are.

    Args:
        alone: weights (H, L, S) without padding.
        padded: weights (H, L or more, S or more).
        form: of the key axis.
    """
    if form.stride != 1 or form.offset <= 0:
        return False
    queries, keys = alone.shape[1:]
    last, there = (each[:, :queries, keys - form.offset : keys].astype(np.float64) for each in (alone, padded))
    return not last.any() or bool((np.abs(there - last) > _IN_PROPORTION * last).any())


def batch_error(
    runner: Runner, sampler: Sampler, outputs: Sequence[OutputSpec], sites: Mapping[str, tuple[str, str]]
) -> float:
    """How much a batch mate changes a sequence's own outputs and weights: the greatest difference.

    Measured as padding's is, on sequences of one length.
    """
    lengths = {symbol: _PRIMES[position] for position, symbol in enumerate(sampler.signature.symbols)}
    sequences = [sampler.sequence(lengths, row) for row in range(3)]
    fetches = [*(spec.name for spec in outputs), *(WEIGHTS_PREFIX + name for name in sites)]
    together = runner.run(sampler.batch(sequences, lengths), fetches)
    worst = 0.0
    for row, sequence in enumerate(sequences):
        alone = runner.run(sampler.batch([sequence], lengths), fetches)
        worst = max(worst, *(_scaled(together[name][row], alone[name][0]) for name in fetches))
    return worst


def _scaled(one: Array, reference: Array) -> float:
    wide = np.abs(np.nan_to_num(reference.astype(np.float64), posinf=0.0, neginf=0.0))
    return max_abs(one, reference) / max(1.0, float(wide.max(initial=0.0)))


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
