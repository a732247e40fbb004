"""Learns by running what extents of arrays follow: an axis symbol, nothing at all, or a form derived from a symbol."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.model.manifest import DerivedLength

Key = tuple[str, int]
"""An array's name and one of its axes."""
Lengths = Mapping[str, int]
Shapes = Mapping[str, tuple[int, ...]]
Extents = tuple[str | int | None, ...]
"""Axis symbols, fixed extents, and None for what is neither."""

_LONGER = (37, 31, 43, 29, 47, 23, 41, 53, 59)
"""Lengths of the third run, by symbol: at least two strides of the greatest kind, and none the length of another."""
_MAX_STRIDE = 11
_MAX_SHIFT = 16
"""How far an offset may go below 0, or beyond the stride."""
_LONGEST = 48
"""Lengths are tried up to this: four strides of the greatest kind."""
_MAX_RUNS = 8
_GAPS = (2, 7, 13)


def extents_of(
    runs: Sequence[tuple[Lengths, Shapes]],
    names: Sequence[str],
    runner: GraphRunner,
    sampler: Sampler,
) -> tuple[dict[str, Extents], dict[str, DerivedLength]]:
    """For every array, without its first axis, what its extents follow; and the form of each derived symbol.

    One more run than those given is longer by far: an extent that a stride keeps at 1 for a while is not fixed.

    Args:
        runs: lengths, and the shapes of the arrays then.
        names: of the arrays.
        runner: gives them.
        sampler: makes sequences for it.
    """
    symbols = sampler.signature.symbols

    def shapes(lengths: Lengths) -> Shapes:
        feeds = sampler.batch([sampler.sequence(lengths)], lengths)
        return {name: array.shape for name, array in runner.run(feeds, list(names)).items()}

    if symbols:
        with contextlib.suppress(BuildRefused):  # the graph takes no such lengths: nor will any sequence have them
            longer = {symbol: _LONGER[at] for at, symbol in enumerate(symbols)}
            runs = [*runs, (longer, shapes(longer))]
    lengths = [run[0] for run in runs]
    told: dict[Key, str | int | None] = {}
    unknown: dict[Key, list[int]] = {}
    for name in names:
        each = [run[1][name] for run in runs]
        for place in range(1, len(each[0])):
            values = [shape[place] for shape in each]
            told[name, place] = _symbol(values, lengths)
            if told[name, place] is None:
                unknown[name, place] = values

    def at(tried: Lengths) -> dict[Key, int]:
        found = shapes(tried)
        return {(name, place): found[name][place] for name, place in unknown}

    forms = fit(unknown, lengths, at) if unknown else {}
    by_form = named(list(forms.values()), symbols)
    told |= {key: by_form[form] for key, form in forms.items()}
    extents = {name: tuple(told[name, place] for place in range(1, len(runs[0][1][name]))) for name in names}
    return extents, {symbol: form for form, symbol in by_form.items()}


def _symbol(extents: Sequence[int], lengths: Sequence[Mapping[str, int]]) -> str | int | None:
    """The symbol that an extent follows in all runs, the extent where it never changes, else None."""
    for symbol in lengths[0]:
        if all(extent == each[symbol] for extent, each in zip(extents, lengths, strict=True)):
            return symbol
    return extents[0] if len(set(extents)) == 1 else None


def fit(
    unknown: Mapping[Key, Sequence[int]],
    seen: Sequence[Lengths],
    run: Callable[[Lengths], Mapping[Key, int]],
) -> dict[Key, DerivedLength]:
    """Which form (T + offset) // stride each extent has, of those that have one.

    Every further run takes the lengths on which the forms that are still possible differ most.

    Args:
        unknown: the extents in the runs so far.
        seen: the lengths of those runs.
        run: gives the extents at other lengths; raises BuildRefused where the graph does not run on them.

    Returns:
        The forms of the extents that have just one that fits all runs; of several that no run tells apart, the one
        of the least stride, then of the least offset.
    """
    possible = {
        key: [
            form
            for form in _forms(list(seen[0]))
            if all(form.of(lengths[form.source]) == extent for lengths, extent in zip(seen, extents, strict=True))
        ]
        for key, extents in unknown.items()
    }
    tried = list(seen)
    longest = _LONGEST
    for _ in range(_MAX_RUNS):
        possible = {key: forms for key, forms in possible.items() if forms}
        lengths = _telling(possible, list(seen[0]), tried, longest) if possible else None
        if lengths is None:
            break
        tried.append(lengths)
        try:
            extents = run(lengths)
        except BuildRefused:
            longest = min(lengths.values()) - 1
            continue
        possible = {
            key: [form for form in forms if form.of(lengths[form.source]) == extents[key]]
            for key, forms in possible.items()
        }
    return {key: forms[0] for key, forms in possible.items() if forms}


def named(forms: Sequence[DerivedLength], taken: Sequence[str]) -> dict[DerivedLength, str]:
    """A symbol for each form: `seq_by_4`, or `seq_plus_1` where the stride is 1."""
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


def _telling(
    possible: Mapping[Key, Sequence[DerivedLength]], symbols: Sequence[str], tried: Sequence[Lengths], longest: int
) -> Lengths | None:
    """The lengths on which the possible forms differ most; None where they differ on none."""
    best: Lengths | None = None
    most = 0
    span = longest - 1
    for start, gap in itertools.product(range(max(span, 0)), _GAPS[: len(symbols)]):
        # Gaps that differ tell apart what follows one symbol and what follows another at a distance.
        lengths = {symbol: 2 + (start + gap * place) % span for place, symbol in enumerate(symbols)}
        if lengths in tried:
            continue
        told = sum(len({form.of(lengths[form.source]) for form in forms}) - 1 for forms in possible.values())
        if told > most:
            best, most = lengths, told
    return best
