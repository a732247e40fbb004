"""Find, by running a graph, which axis of the inputs each dimension of its outputs and weights follows.

A dimension is one of four: as long as an axis of the inputs (an axis symbol), fixed (a number), derived from one axis,
(T + offset) // stride, or none of these (None). Two runs on distinct primes and one on greater lengths distinguish the
first two; further runs fit the third.

Declared names of output dimensions are not used, because neither the runtime nor onnx's checker compares them:
findings/symbolic_dimensions_not_checked.sh.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.sites import FoundSite, Scores
from attnserve_server.conversion.probing.feeds import Lengths, Sampler, probe_lengths
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.conversion.rewrite.taps import WEIGHTS_PREFIX
from attnserve_server.domain.values import Array
from attnserve_server.model.manifest import DerivedLength

Dimension = tuple[str, int]
"""An array's name and one of its axes."""
Shapes = Mapping[str, tuple[int, ...]]
SymbolicShape = tuple[str | int | None, ...]
"""Axis symbols, fixed sizes, and None for a dimension that is neither."""

_LONGER = (37, 31, 43, 29, 47, 23, 41, 53, 59)
"""Lengths of the third run, by symbol: at least two strides of the greatest kind, and none the length of another."""
_MAX_STRIDE = 11
_MAX_SHIFT = 16
"""How far an offset may lie below 0, or above the stride."""
_LONGEST = 48
"""The greatest length that is tried: four strides of the greatest kind."""
_MAX_RUNS = 8
_GAPS = (2, 7, 13)


@dataclass(frozen=True, slots=True)
class ProbedAxes:
    """The axes of outputs and sites, as runs with distinct prime lengths show them; all without the batch axis.

    Attributes:
        outputs: the shape of each output whose first axis is the batch.
        sites: the query axis and the key axis of each tapped site's weights.
        unbatched_outputs: the outputs whose first axis is not the batch.
        unbatched_sites: the sites whose operator's first axis is not the batch.
        derived: the form of each symbol that is not an input's.
        causal_sites: windowed sites whose band has no key behind its query.
    """

    outputs: dict[str, SymbolicShape]
    sites: dict[str, tuple[str | int | None, str | int | None]]
    unbatched_outputs: tuple[str, ...]
    unbatched_sites: frozenset[str]
    derived: dict[str, DerivedLength]
    causal_sites: frozenset[str] = frozenset()


def probe_axes(
    runner: GraphRunner, sampler: Sampler, outputs: Sequence[str], sites: Mapping[str, FoundSite]
) -> ProbedAxes:
    """Match every dimension of the outputs and of each tapped site's weights with the axis symbols of the inputs.

    Args:
        runner: the graph, with taps.
        sampler: draws sequences for it.
        outputs: names of outputs.
        sites: all sites; those without a tap are left out.

    Raises:
        BuildRefused: the graph does not run on such lengths, mostly because axes with distinct symbols must be equal.
    """
    symbols = sampler.signature.symbols
    batches = (1, 1) if sampler.signature.fixed_batch else (2, 3)
    weights = {name: WEIGHTS_PREFIX + name for name, site in sites.items() if site.tappable}
    # A layout is known where the graph has the weights as a value; its output may then have any layout.
    own = {
        name: str(site.attention.output.value.name)
        for name, site in sites.items()
        if isinstance(site.attention, Scores)
    }
    runs: list[tuple[Lengths, dict[str, Array]]] = []
    for lengths, batch in zip(probe_lengths(symbols), batches, strict=True):
        feeds = sampler.rows(lengths, batch)
        try:
            runs.append((lengths, runner.run(feeds, [*outputs, *weights.values(), *own.values()])))
        except BuildRefused as fault:
            tried = ", ".join(f"{symbol}={length}" for symbol, length in lengths.items()) or "its fixed shapes"
            hint = "; axes that must be equal need the same symbol" if len(symbols) > 1 else ""
            raise BuildRefused(f"{fault} (tried on {tried}{hint})") from None
    (_, first), (_, second) = runs
    shapes = [(lengths, {name: array.shape for name, array in arrays.items()}) for lengths, arrays in runs]
    named_shapes, derived = symbolic_shapes(shapes, [*outputs, *weights.values()], runner, sampler)
    unbatched = [
        name for name in outputs if not first[name].ndim or (first[name].shape[0], second[name].shape[0]) != batches
    ]
    strange = [name for name, output in own.items() if (first[output].shape[0], second[output].shape[0]) != batches]
    site_axes = {name: named_shapes[output][1:3] for name, output in weights.items()}
    return ProbedAxes(
        outputs={name: named_shapes[name] for name in outputs if name not in unbatched},
        sites={name: (axes[0], axes[1]) for name, axes in site_axes.items()},
        unbatched_outputs=tuple(unbatched),
        unbatched_sites=frozenset(strange),
        derived=derived,
    )


def symbolic_shapes(
    runs: Sequence[tuple[Lengths, Shapes]],
    names: Sequence[str],
    runner: GraphRunner,
    sampler: Sampler,
) -> tuple[dict[str, SymbolicShape], dict[str, DerivedLength]]:
    """Return the symbolic shape of each array, without its first axis, and the form of each derived symbol.

    One run is added to those given, on greater lengths: a stride keeps a dimension at 1 for a while, which then looks
    fixed.

    Args:
        runs: lengths, and the shapes of the arrays then.
        names: of the arrays.
        runner: a graph that returns them.
        sampler: draws sequences for it.
    """
    symbols = sampler.signature.symbols

    def shapes(lengths: Lengths) -> Shapes:
        return {name: array.shape for name, array in runner.run(sampler.rows(lengths, 1), list(names)).items()}

    if symbols:
        with contextlib.suppress(BuildRefused):  # a graph that takes no such lengths serves none either
            longer = {symbol: _LONGER[at] for at, symbol in enumerate(symbols)}
            runs = [*runs, (longer, shapes(longer))]
    lengths = [run[0] for run in runs]
    full = [sampler.signature.lengths(each) for each in lengths]
    known: dict[Dimension, str | int | None] = {}
    unknown: dict[Dimension, list[int]] = {}
    for name in names:
        each = [run[1][name] for run in runs]
        for place in range(1, len(each[0])):
            sizes = [shape[place] for shape in each]
            known[name, place] = _symbol(sizes, full)
            if known[name, place] is None:
                unknown[name, place] = sizes

    def sizes_at(tried: Lengths) -> dict[Dimension, int]:
        found = shapes(tried)
        return {(name, place): found[name][place] for name, place in unknown}

    forms = fit(unknown, lengths, sizes_at) if unknown else {}
    by_form = named(list(forms.values()), list(full[0]))
    known |= {key: by_form[form] for key, form in forms.items()}
    result = {name: tuple(known[name, place] for place in range(1, len(runs[0][1][name]))) for name in names}
    return result, {symbol: form for form, symbol in by_form.items()}


def _symbol(sizes: Sequence[int], lengths: Sequence[Lengths]) -> str | int | None:
    """Return the symbol whose length equals the size in all runs, the size where it never changes, else None."""
    for symbol in lengths[0]:
        if all(size == each[symbol] for size, each in zip(sizes, lengths, strict=True)):
            return symbol
    return sizes[0] if len(set(sizes)) == 1 else None


def fit(
    unknown: Mapping[Dimension, Sequence[int]],
    done: Sequence[Lengths],
    run: Callable[[Lengths], Mapping[Dimension, int]],
) -> dict[Dimension, DerivedLength]:
    """Fit a form (T + offset) // stride to each dimension that has one.

    Every further run takes the lengths on which the forms that are still possible differ most.

    Args:
        unknown: sizes in the runs so far.
        done: the lengths of those runs.
        run: returns the sizes at other lengths; raises BuildRefused where the graph does not run on them.

    Returns:
        The form of each dimension for which one fits all runs; of several that no run distinguishes, the one of the
        least stride, then of the least offset.
    """
    possible = {
        key: [
            form
            for form in _forms(list(done[0]))
            if all(form.of(lengths[form.source]) == size for lengths, size in zip(done, sizes, strict=True))
        ]
        for key, sizes in unknown.items()
    }
    tried = list(done)
    longest = _LONGEST
    for _ in range(_MAX_RUNS):
        possible = {key: forms for key, forms in possible.items() if forms}
        lengths = _most_distinct(possible, list(done[0]), tried, longest) if possible else None
        if lengths is None:
            break
        tried.append(lengths)
        try:
            sizes = run(lengths)
        except BuildRefused:
            longest = min(lengths.values()) - 1
            continue
        possible = {
            key: [form for form in forms if form.of(lengths[form.source]) == sizes[key]]
            for key, forms in possible.items()
        }
    return {key: forms[0] for key, forms in possible.items() if forms}


def named(forms: Sequence[DerivedLength], taken: Sequence[str]) -> dict[DerivedLength, str]:
    """Return a symbol for each form: `seq_by_4`, or `seq_plus_1` where the stride is 1."""
    symbols: dict[DerivedLength, str] = {}
    for form in dict.fromkeys(forms):
        sign = "plus" if form.offset > 0 else "minus"
        part = f"by_{form.stride}" if form.stride > 1 else f"{sign}_{abs(form.offset)}"
        symbol = f"{form.source}_{part}"
        while symbol in taken or symbol in symbols.values():
            symbol += "_"
        symbols[form] = symbol
    return symbols


def _forms(sources: Sequence[str]) -> list[DerivedLength]:
    return [
        DerivedLength(source=source, stride=stride, offset=offset)
        for source in sources
        for stride in range(1, _MAX_STRIDE + 1)
        for offset in sorted(range(-_MAX_SHIFT, stride + _MAX_SHIFT), key=abs)
        if (stride, offset) != (1, 0)
    ]


def _most_distinct(
    possible: Mapping[Dimension, Sequence[DerivedLength]],
    symbols: Sequence[str],
    tried: Sequence[Lengths],
    longest: int,
) -> Lengths | None:
    """Return the lengths on which the possible forms differ most; None where they differ on none."""
    best: Lengths | None = None
    most = 0
    span = longest - 1
    for start, gap in itertools.product(range(max(span, 0)), _GAPS[: len(symbols)]):
        # Unequal gaps distinguish a form of one symbol from a form of another at a fixed distance.
        lengths = {symbol: 2 + (start + gap * place) % span for place, symbol in enumerate(symbols)}
        if lengths in tried:
            continue
        distinct = sum(len({form.of(lengths[form.source]) for form in forms}) - 1 for forms in possible.values())
        if distinct > most:
            best, most = lengths, distinct
    return best
