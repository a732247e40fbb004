"""How many rows, and how long sequences, a graph really takes: found by running what requests and warm-up will run.

What a file or a configuration declares may be more than the graph can run: a table of positions ends, a shape was
traced for a few rows. A bundle whose declared limits do not run fails to load, or fails on its first long request.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from attnserve_server.conversion.assemble import Assembled
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.inputs.roles import is_position
from attnserve_server.conversion.probing.feeds import Lengths, Sampler
from attnserve_server.domain.clock import ThreadCpuClock
from attnserve_server.domain.values import Array
from attnserve_server.engine import warmup
from attnserve_server.engine.collation import UnexpectedShape
from attnserve_server.engine.session import RunFailed, RuntimeSession
from attnserve_server.model.manifest import NUMPY_DTYPES, InputRole, InputSpec, Manifest

_SHORT: Final = 5
"""Length of the other axes while one is bisected, and the length from which a bisection starts: probes ran on it."""
_ROW_LENGTH: Final = 8
"""Length of the sequences of the largest batch."""
_ROWS_SEEN: Final = 3
"""Rows that the probes ran on, from which a bisection starts."""
_LONG: Final = 1024
"""The time of a longer run is predicted before it is tried."""
_TIMED_LENGTH: Final = 128
_MOST_SECONDS: Final = 5.0
"""How long the longest run may take, as predicted. Twice the linear share allows for attention's square."""
_MOST_SCORE_BYTES: Final = 64 * 2**20
"""What one site's scores of one long sequence may hold; a graph keeps a few arrays of this size at a time."""
_WARM_UP_S: Final = 0.5
"""How long the larger shapes of the warm-up may take; the server gives 1 s to three repeats, which is less each."""
_MOST_TAP_BYTES: Final = 256 * 2**20
"""Taps are asked for all rows as long as all their weights together hold at most this."""


@dataclass(frozen=True, slots=True)
class _Graph:
    """A tapped graph, and whether its padding id is known."""

    assembled: Assembled
    padding_known: bool

    def runs(self, lengths: Lengths, rows: int = 0) -> bool:
        """Whether the fullest sequences of these lengths run: `rows` of them in a batch, or each kind alone (0)."""
        sampler, outputs = self.assembled.sampler, [spec.name for spec in self.assembled.outputs]
        kinds = fullest(sampler, lengths, padding_known=self.padding_known)
        sequences = list(itertools.islice(itertools.cycle(kinds), rows or len(kinds)))
        together = rows or 1
        asked = self._tap_bytes(lengths) * together <= _MOST_TAP_BYTES
        fetches = [*outputs, *self.assembled.weights.values()]
        try:
            for first in range(0, len(sequences), together):
                feeds = sampler.batch(sequences[first : first + together], lengths)
                found = self.assembled.checker.run(feeds, fetches, tap=asked)
                if any(found[name].shape[0] != together for name in outputs):
                    return False
        except BuildRefused:
            return False
        return True

    def _tap_bytes(self, lengths: Lengths) -> int:
        """Of the weights of one sequence at every site, as float32."""
        derived = {symbol: form.of(lengths[form.source]) for symbol, form in self.assembled.derived_axes.items()}
        known = {**self.assembled.fixed_axes, **lengths, **derived}
        taps = [site for site in self.assembled.sites if site.available]
        columns = [known[site.columns] if isinstance(site.columns, str) else site.columns for site in taps]
        return sum(4 * site.heads * known[site.query_axis] * count for site, count in zip(taps, columns, strict=True))


def true_limits(
    assembled: Assembled, wanted: Mapping[str, int], max_batch_size: int, steps: Steps, *, padding_known: bool = False
) -> tuple[dict[str, int], int]:
    """The greatest lengths, up to those wanted, and the greatest batch that the tapped graph runs on.

    Only the extremes are run: the longest sequences, and the largest batch. A limit that fails is bisected.

    Args:
        assembled: the tapped graph.
        wanted: the greatest length by axis symbol, as asked for or as the source declares it.
        max_batch_size: the greatest batch that is asked for; with 1 no batch is run.
        steps: receives a warning for each limit that is lowered, or that could not be tried.
        padding_known: whether the signature's padding is known to be the padding id that the graph was made for.
    """
    graph = _Graph(assembled, padding_known)
    tried = _affordable(graph, wanted, steps)
    lengths = _lengths(graph, tried)
    for symbol, length in lengths.items():
        if length < tried[symbol]:
            steps.warn(f"the graph takes at most {length} positions along {symbol!r}, not {wanted[symbol]}")
    found = {symbol: length if length < tried[symbol] else wanted[symbol] for symbol, length in lengths.items()}
    short = {symbol: min(_ROW_LENGTH, length) for symbol, length in found.items()}
    rows = max_batch_size
    if max_batch_size > 1 and not graph.runs(short, max_batch_size):
        rows = _greatest(lambda rows: graph.runs(short, rows), min(_ROWS_SEEN, max_batch_size), max_batch_size)
        steps.warn(f"the graph takes at most {_rows(rows)}, not {max_batch_size}")
    return found, rows


def as_the_server_warms_up(manifest: Manifest, model_path: Path, steps: Steps) -> tuple[Manifest, RuntimeSession]:
    """The manifest, with the greatest batch on which the server's own warm-up runs succeed, and the opened graph.

    Every shape of the warm-up is run once, within its own bounds of time. Where one fails, rows and lengths limit each
    other: the batch is then lowered until it runs at the greatest lengths.

    Raises:
        BuildRefused: not even one sequence runs, or a run's tensors have other shapes than the manifest declares.
    """
    session = RuntimeSession.load(
        model_path, provider="CPUExecutionProvider", left_out=manifest.left_out, intra_op_threads=1
    )
    try:
        return _warmed_up(manifest, session, steps), session
    except UnexpectedShape as fault:
        raise BuildRefused(
            f"{fault}: it does not follow the inputs' lengths as it did in shorter runs; a lower --max-length may help"
        ) from None


def _warmed_up(manifest: Manifest, session: RuntimeSession, steps: Steps) -> Manifest:
    try:
        warmup.touch(session, manifest)
        warmup.measure(session, manifest, ThreadCpuClock(), repeats=1, more_s=_WARM_UP_S)
    except RunFailed:
        return _that_loads(manifest, session, steps)
    return manifest


def _that_loads(manifest: Manifest, session: RuntimeSession, steps: Steps) -> Manifest:
    longest = max((axis.max_length for axis in manifest.axes), default=1)

    def loads(rows: int) -> bool:
        try:
            warmup.run(session, manifest, [warmup.synthetic(manifest, longest)] * rows)
            warmup.touch(session, manifest.model_copy(update={"max_batch_size": rows}))
        except RunFailed:
            return False
        return True

    if not loads(1):
        lengths = ", ".join(f"{axis.symbol}={axis.max_length}" for axis in manifest.axes) or "its fixed shapes"
        raise BuildRefused(f"the model does not run on one sequence of its greatest lengths ({lengths})")
    rows = _greatest(loads, 1, manifest.max_batch_size)
    steps.warn(f"the graph takes at most {_rows(rows)} of its greatest lengths, not {manifest.max_batch_size}")
    return manifest.model_copy(update={"max_batch_size": rows})


def _rows(count: int) -> str:
    return f"{count} row{'s' * (count != 1)} in a batch"


def _affordable(graph: _Graph, wanted: Mapping[str, int], steps: Steps) -> dict[str, int]:
    """The lengths that are tried: those wanted, or what runs in reasonable time where they are very long."""
    if max(wanted.values(), default=0) <= _LONG:
        return dict(wanted)
    begun = time.perf_counter()
    if not graph.runs(dict.fromkeys(wanted, _TIMED_LENGTH), 1):
        return dict(wanted)
    position_s = (time.perf_counter() - begun) / _TIMED_LENGTH
    heads = max((site.heads for site in graph.assembled.sites if site.form == "dense"), default=1)
    in_memory = math.isqrt(_MOST_SCORE_BYTES // (4 * heads))
    most = max(min(int(_MOST_SECONDS / (2 * position_s)), in_memory), _LONG)
    for symbol, length in wanted.items():
        if length > most:
            steps.warn(
                f"lengths above {most} along {symbol!r} were not run, which would take too long or too much memory; "
                f"{length} is declared"
            )
    return {symbol: min(length, most) for symbol, length in wanted.items()}


def _lengths(graph: _Graph, wanted: Mapping[str, int]) -> dict[str, int]:
    """For each symbol the greatest length on which the graph runs, alone and together with the others'."""
    if not wanted or graph.runs(wanted):
        return dict(wanted)
    found: dict[str, int] = {}
    for symbol, most in wanted.items():
        others = {other: min(_SHORT, length) for other, length in wanted.items()}
        found[symbol] = _longest(graph, most, lambda length, s=symbol, o=others: {**o, s: length})  # type: ignore[misc]
    if len(found) > 1:
        # Axes that share a table, say: each alone may be longer than all together.
        together = _longest(
            graph, max(found.values()), lambda length: {s: min(length, most) for s, most in found.items()}
        )
        found = {symbol: min(length, together) for symbol, length in found.items()}
    return found


def _longest(graph: _Graph, most: int, lengths: Callable[[int], Lengths]) -> int:
    if graph.runs(lengths(most)):
        return most
    return _greatest(lambda length: graph.runs(lengths(length)), min(_SHORT, most), most)


def _greatest(runs: Callable[[int], bool], low: int, high: int) -> int:
    """The greatest number from `low`, which runs, to below `high`, which does not. By bisection."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if runs(middle) else (low, middle)
    return low


def fullest(sampler: Sampler, lengths: Lengths, *, padding_known: bool = False) -> list[dict[str, Array]]:
    """Sequences, without the batch axis, whose positions count as far as those of any request of these lengths.

    Graphs number positions by what they find in their inputs: by the ones of a mask, or by the ids that are not the
    padding's. Each sequence has one id throughout, another in each, so that in one of them no id is the padding's,
    whichever that is; where it is known, one sequence is enough. Masks are full. Other whole numbers, which may be
    masks of either sense, are all 1 or all 0.
    """
    specs = sampler.signature.inputs
    places = (0, 1) if not padding_known and any(_ids(sampler, spec) for spec in specs) else (0,)
    either = (1, 0) if any(_may_be_a_mask(sampler, spec) for spec in specs) else (1,)
    drawn = sampler.sequence(lengths)
    return [
        {spec.name: _filled(sampler, spec, drawn[spec.name], place, marks) for spec in specs}
        for place, marks in itertools.product(places, either)
    ]


def _filled(sampler: Sampler, spec: InputSpec, drawn: Array, place: int, marks: int) -> Array:
    size = _ids(sampler, spec)
    if size:
        spread = dict.fromkeys((size - 1, size // 2, size // 3, 0, 1))
        first, second = [*(each for each in spread if each != spec.padding), int(spec.padding)][:2]
        return np.full_like(drawn, (first, second)[place])
    return np.full_like(drawn, marks) if _may_be_a_mask(sampler, spec) else drawn


def _ids(sampler: Sampler, spec: InputSpec) -> int:
    """How many ids an input knows, at least 2; 0 for one that holds none."""
    if np.issubdtype(NUMPY_DTYPES[spec.dtype], np.floating):
        return 0
    known = sampler.vocabulary_sizes.get(spec.name) or spec.vocabulary_size or sampler.vocabulary_size
    return max(known, 2) if spec.role is InputRole.TOKEN_IDS else sampler.vocabulary_sizes.get(spec.name, 0)


def _may_be_a_mask(sampler: Sampler, spec: InputSpec) -> bool:
    """Whether an input holds whole numbers of which neither a name nor a table says what they are."""
    whole = not np.issubdtype(NUMPY_DTYPES[spec.dtype], np.floating)
    return whole and not _ids(sampler, spec) and spec.fill is None and not is_position(spec.name)
