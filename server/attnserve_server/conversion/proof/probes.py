"""The batches that an attack tries, in order: the most likely to find a difference in the least time come first.

Kinds of probes for an axis that could be padded; each row is compared with its own answer alone:

- Every kind of content (`contents`) at short lengths, padded a little, and padded to the greatest length: saturated and
  flat scores over as many padded keys as possible.
- Lengths from 1 to the maximum, padded across powers of two and each threshold, stride and width that the proof found:
  one less, equal, one more, as own length and as padded length, and twice it.
- The other axes shorter, longer and equally long, since a causal frontier shows padded keys only to queries that
  outnumber the keys.

Kinds for the batch, all at equal lengths, where every content is allowed:

- Every kind of content as the only neighbour of ordinary values, on either side, and all kinds together: neighbours a
  thousand times larger and smaller, empty masks, padding ids.
- Batches up to the greatest, with lengths that carry rows, and rows times length, across each threshold.

Kinds for both: rows of unequal lengths together, up to the greatest batch, padded along every axis at once.
All of them are repeated for several seeds, with mixtures of contents. Nothing here runs the graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Final

from attnserve_server.conversion.probing.feeds import Lengths
from attnserve_server.conversion.proof.aim import SHORT, Aim, Probe
from attnserve_server.conversion.proof.contents import MIXTURE, ORDINARY, Draft

SEEDS: Final = 3
MAX_PROVED_PROBES: Final = 20
_ROWS: Final = 8
"""Rows of one padded run: enough to share its cost, and few enough that the row that differs is found quickly."""
_LONG_ROWS: Final = 4
_MANY_TOKENS: Final = 1024
"""Positions of the largest batches that are tried for their number of rows."""
_PROVED_TOKENS: Final = 128
"""Positions of a batch that checks a proof. The check must be short."""
_MIDDLING: Final = 160
"""Joint batches up to this length are core, and so are sweeps where the proof found no threshold to straddle."""


def padding_probes(aim: Aim, symbol: str) -> Iterator[Probe]:
    """Yield probes that pad one axis, for an axis that is not proved."""
    for seed in range(SEEDS):
        yield from _padded_contents(aim, symbol, seed)
        if not seed:
            yield from _crossings(aim, symbol)
        yield from _sweep(aim, symbol, seed)


def batch_probes(aim: Aim) -> Iterator[Probe]:
    """Yield probes of rows of equal lengths, for a batch that is not proved."""
    for seed in range(SEEDS):
        yield from _pairs(aim, seed)
        yield from _crowds(aim, seed)
        yield from _sizes(aim, seed)
        yield from _equal_sweep(aim, seed)


def joint_probes(aim: Aim, symbols: Sequence[str], *, proved: bool = False) -> Iterator[Probe]:
    """Yield probes of rows of unequal lengths in one batch, padded along each symbol; short ones where proved."""
    contents = itertools.cycle(aim.contents)
    for seed in range(SEEDS):
        for core, size, longest in _joint_shapes(aim, symbols):
            if proved and size * longest > _PROVED_TOKENS:
                continue
            rows: list[Draft] = []
            for row in range(size):
                own = {
                    one: _spread(row + turn, longest) if one in symbols else 4 for turn, one in enumerate(aim.longest)
                }
                content = ORDINARY if row % 2 == 0 else next(contents)
                rows.append(aim.draft(aim.clipped(own), content, 100 * seed + row))
            padded = {one: max(row.own[one] for row in rows) for one in aim.longest}
            yield from _chunked(aim, rows, padded, core=core and not seed, chunk=size)


def proved_padding_probes(aim: Aim, symbol: str) -> Iterator[Probe]:
    """Yield at most `MAX_PROVED_PROBES` short probes, and a long one, as a check of a proof."""
    own = [_set(aim, symbol, length) for length in (1, 2, 3, 6)]
    shorts = [aim.draft(lengths, content, row) for lengths in own[2:] for row, content in enumerate(aim.contents)]
    long = {**own[2], symbol: aim.long(symbol)}
    yield from _chunked(aim, [aim.draft(own[2])], long, core=True)
    yield from _chunked(aim, shorts, {**own[0], symbol: min(SHORT, aim.longest[symbol])}, core=True, chunk=SHORT)
    straddling = [length for step in aim.straddled for length in (step, step + 1) if length <= 4 * SHORT]
    for length in (2, 4, 7, *straddling, 33):
        rows = [aim.draft(lengths, ORDINARY, row) for row, lengths in enumerate(own) if lengths[symbol] < length]
        yield from _chunked(aim, rows, {**own[0], symbol: min(length, aim.longest[symbol])})


def proved_batch_probes(aim: Aim) -> Iterator[Probe]:
    """Yield at most `MAX_PROVED_PROBES` short probes of equal lengths, as a check of a proof."""
    for length, chunk in ((3, SHORT), (1, 4), (5, 2)):
        own = aim.clipped(dict.fromkeys(aim.longest, length))
        rows = [aim.draft(own, content, row) for row, content in enumerate(aim.contents)]
        yield from _chunked(aim, rows, own, core=length == 3, chunk=chunk)
    yield from itertools.islice(_sizes(aim, 0, most_tokens=_PROVED_TOKENS), 6)


def _padded_contents(aim: Aim, symbol: str, seed: int) -> Iterator[Probe]:
    """Yield each content in sequences of 1, 3 and 6, padded a little and as far as a short run allows."""
    short, long = min(SHORT, aim.longest[symbol]), aim.long(symbol)
    every = list(_other_lengths(aim, symbol))
    for others in every if not seed else every[seed % len(every) :][:1]:
        for length in (3, 1, 6):
            own, core = {**others, symbol: length}, not seed and length == 3
            rows = [aim.draft(own, content, 10 * seed + number) for number in (0, 1) for content in aim.contents]
            if length < short:
                yield from _chunked(aim, rows, {**own, symbol: short}, core=core)
            if max(length, short) < long:
                # The share of hidden keys grows with their number, and the content matters most, so a few rows are
                # enough.
                yield from _chunked(aim, rows[:_LONG_ROWS], {**own, symbol: long}, core=core)
                rest = rows[_LONG_ROWS : len(aim.contents)]
                yield from _chunked(aim, rest, {**own, symbol: long})


def _crossings(aim: Aim, symbol: str) -> Iterator[Probe]:
    """Yield own lengths at each threshold, padded across it and to the maximum."""
    for others in itertools.islice(_other_lengths(aim, symbol), 2):
        for step in aim.straddled:
            owns = [length for length in (step - 1, step, step + 1) if 1 <= length < aim.longest[symbol]]
            for padded in dict.fromkeys((step, step + 1, step + 2, aim.longest[symbol])):
                if padded > aim.longest[symbol]:
                    continue
                shorter = [length for length in (3, *owns) if length < padded]
                rows = [aim.draft({**others, symbol: length}) for length in dict.fromkeys(shorter)]
                yield from _chunked(aim, rows, {**others, symbol: padded}, core=True)


def _sweep(aim: Aim, symbol: str, seed: int) -> Iterator[Probe]:
    """Yield every length to try as the padded one, with shorter ones of rotating contents."""
    contents = itertools.cycle([ORDINARY, *aim.contents[1:]])
    others = itertools.cycle(_other_lengths(aim, symbol))
    lengths = aim.lengths(symbol)
    for at, padded in enumerate(lengths):
        shorter = lengths[:at]
        chosen = [*shorter[:1], *shorter[len(shorter) // 2 :][:1], *shorter[-2:]]
        rest = next(others)
        rows = [
            aim.draft({**rest, symbol: length}, next(contents) if row % 2 else ORDINARY, 10 * seed + row)
            for row, length in enumerate(dict.fromkeys(chosen))
        ]
        yield from _chunked(
            aim, rows, {**rest, symbol: padded}, core=not (seed or aim.straddled) and padded <= _MIDDLING
        )


def _pairs(aim: Aim, seed: int) -> Iterator[Probe]:
    """Yield ordinary values beside one neighbour of each content, which comes first or last."""
    own = aim.clipped(dict.fromkeys(aim.longest, (4, 2, 7)[seed % 3]))
    for number, content in enumerate(aim.contents, start=1):
        ordinary, other = aim.draft(own, ORDINARY, 10 * seed), aim.draft(own, content, 10 * seed + number)
        flat = aim.draft(own, _first_flat(aim), 10 * seed)
        for rows in ((ordinary, other), (other, flat)):
            yield from _chunked(aim, rows, own, core=not seed, chunk=2)


def _crowds(aim: Aim, seed: int) -> Iterator[Probe]:
    """Yield batches of all contents together, at several lengths."""
    for length in (3, 1, SHORT, 2):
        own = aim.clipped(dict.fromkeys(aim.longest, length))
        rows = [aim.draft(own, content, 10 * seed + row) for row, content in enumerate(aim.contents)]
        yield from _chunked(aim, rows, own, core=not seed and length == 3, chunk=aim.max_batch_size)


def _sizes(aim: Aim, seed: int, most_tokens: int = _MANY_TOKENS) -> Iterator[Probe]:
    """Yield numbers of rows up to the greatest; rows, and positions of all rows, across each threshold."""
    most, longest = aim.max_batch_size, min(aim.longest.values(), default=1)
    shapes = [(most, 1), (most, SHORT), (min(most, 3), SHORT), (most, most_tokens // most)]
    for step in aim.straddled:
        rows = min(most, 8)
        shapes += [(rows, step // rows + 1), (2, step // 2 + 1), (2, step + 1)]
        shapes += [(step + shift, 4) for shift in (-1, 0, 1) if 2 <= step + shift <= most]
    shapes += [(size, 5) for size in (2, 4, 7, 8, 16, most - 1) if 2 <= size <= most]
    for rows, length in dict.fromkeys((rows, min(max(length, 1), longest)) for rows, length in shapes):
        if rows * length > most_tokens:
            continue
        own = aim.clipped(dict.fromkeys(aim.longest, length))
        drafts = [aim.draft(own, ORDINARY, 10 * seed + row % 4) for row in range(rows)]
        yield from _chunked(aim, drafts, own, core=not seed, chunk=rows)


def _equal_sweep(aim: Aim, seed: int) -> Iterator[Probe]:
    """Yield every length to try, in batches of three with rotating contents."""
    contents = itertools.cycle([MIXTURE, *aim.contents] if MIXTURE in aim.contents else aim.contents)
    for lengths in _together_lengths(aim):
        rows = [aim.draft(lengths, ORDINARY if row != 1 else next(contents), 10 * seed + row) for row in range(3)]
        yield from _chunked(aim, rows, lengths, chunk=3)


def _joint_shapes(aim: Aim, symbols: Sequence[str]) -> list[tuple[bool, int, int]]:
    """Return batches of unequal lengths as (is it core, number of rows, greatest length)."""
    longest = max((aim.long(symbol) for symbol in symbols), default=1)
    most = aim.max_batch_size
    shapes = [
        (True, min(most, size), length) for size, length in ((4, 7), (3, 12), (8, 33), (2, min(longest, _MIDDLING)))
    ]
    shapes += [(False, min(most, 6), step + 1) for step in aim.straddled]
    shapes += [(False, most, length) for length in (9, 40) if most * length <= _MANY_TOKENS]
    return [shape for shape in dict.fromkeys(shapes) if shape[1] > 1]


def _other_lengths(aim: Aim, symbol: str) -> Iterator[dict[str, int]]:
    """Yield lengths of the other axes: middling, longer and shorter than short sequences.

    Without other axes, one empty.
    """
    others = [one for one in aim.longest if one != symbol]
    for length in (4, 11, 1) if others else (1,):
        yield aim.clipped(dict.fromkeys(others, length))


def _together_lengths(aim: Aim) -> Iterator[dict[str, int]]:
    if not aim.longest:
        yield {}
        return
    each = {symbol: aim.lengths(symbol) for symbol in aim.longest}
    for at in range(max(map(len, each.values()))):
        yield {symbol: lengths[min(at, len(lengths) - 1)] for symbol, lengths in each.items()}


def _spread(row: int, longest: int) -> int:
    """Return the own length of a row of a joint batch: short, the greatest, and between."""
    return (3, longest, 1, max(longest // 2, 1), 2, max(longest - 1, 1), max(longest // 3, 1))[row % 7]


def _first_flat(aim: Aim) -> str:
    return next((content for content in aim.contents if content.rpartition(" ")[2] == "ones"), ORDINARY)


def _set(aim: Aim, symbol: str, length: int) -> dict[str, int]:
    return aim.clipped({**dict.fromkeys(aim.longest, 4), symbol: length})


def _chunked(
    aim: Aim, rows: Sequence[Draft], padded: Lengths, *, core: bool = False, chunk: int = _ROWS
) -> Iterator[Probe]:
    """Yield the rows, each once, in runs that fit into memory. Nothing where no row fits."""
    size = min(chunk, aim.max_batch_size, aim.rows_that_fit(padded))
    for start in range(0, len(rows), max(size, 1)) if size else ():
        yield Probe(tuple(rows[start : start + size]), tuple(padded.items()), core)
