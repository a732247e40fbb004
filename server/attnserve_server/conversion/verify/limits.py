"""Finds the greatest lengths and the greatest batch that a graph runs, by running what requests and warm-up run.

A file or a configuration may declare more than the graph can run: a table of positions ends, or a shape was traced for
a few rows. A bundle whose declared limits do not run fails to load, or fails on its first long request. A bundle is the
folder of one converted model.
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
"""The length of the other axes while one is bisected, and the lower end of a bisection: probes ran on it."""
_ROW_LENGTH: Final = 8
"""The length of the sequences of the largest batch."""
_PROBED_ROWS: Final = 3
"""The rows that probes ran on: the lower end of a bisection of rows."""
_LONG: Final = 1024
"""The time of a run above this length is predicted before it is tried."""
_TIMED_LENGTH: Final = 128
_MOST_SECONDS: Final = 5.0
"""The longest predicted run. The prediction doubles the linear share, as an allowance for quadratic attention."""
_MOST_SCORE_BYTES: Final = 64 * 2**20
"""The most bytes of one site's scores for one sequence; a graph keeps a few arrays of this size at a time."""
_WARM_UP_S: Final = 0.5
"""The limit of the larger shapes of the warm-up; the server allows 1 s for three repeats, which is less for each."""
_MOST_TAP_BYTES: Final = 256 * 2**20
"""Taps select all rows while their weights together hold at most this."""


@dataclass(frozen=True, slots=True)
class _Graph:
    """A tapped graph, and whether the padding id in its signature is known to be the model's."""

    assembled: Assembled
    padding_known: bool

    def runs(self, lengths: Lengths, rows: int = 0) -> bool:
        """Whether the fullest sequences of these lengths run: `rows` of them in a batch, or each kind alone (0).

        A batch whose outputs have another number of rows does not count as a run.
        """
        sampler, outputs = self.assembled.sampler, [spec.name for spec in self.assembled.outputs]
        kinds = fullest(sampler, lengths, padding_known=self.padding_known)
        sequences = list(itertools.islice(itertools.cycle(kinds), rows or len(kinds)))
        together = rows or 1
        select = self._tap_bytes(lengths) * together <= _MOST_TAP_BYTES
        fetches = [*outputs, *self.assembled.weights.values()]
        try:
            for first in range(0, len(sequences), together):
                feeds = sampler.batch(sequences[first : first + together], lengths)
                found = self.assembled.checker.run(feeds, fetches, tap=select)
                if any(found[name].shape[0] != together for name in outputs):
                    return False
        except BuildRefused:
            return False
        return True

    def _tap_bytes(self, lengths: Lengths) -> int:
        """Return the bytes of one sequence's weights at every site, as float32."""
        derived = {symbol: form.length_at(lengths) for symbol, form in self.assembled.derived_axes.items()}
        known = {**self.assembled.fixed_axes, **lengths, **derived}
        taps = [site for site in self.assembled.sites if site.available]
        columns = [known[site.columns] if isinstance(site.columns, str) else site.columns for site in taps]
        return sum(4 * site.heads * known[site.query_axis] * count for site, count in zip(taps, columns, strict=True))


def true_limits(
    assembled: Assembled,
    requested: Mapping[str, int],
    max_batch_size: int,
    steps: Steps,
    *,
    padding_known: bool = False,
) -> tuple[dict[str, int], int]:
    """Return the greatest lengths and the greatest batch that the tapped graph runs, up to those requested.

    Only the longest sequences and the largest batch are run. A limit that fails is bisected.

    Args:
        assembled: the tapped graph.
        requested: the requested or declared greatest length, by axis symbol.
        max_batch_size: the requested greatest batch; with 1 no batch is run.
        steps: receives a warning for each limit that is lowered, or that is too long to try.
        padding_known: whether the signature's padding is known to be the padding id that the model was trained with.
    """
    graph = _Graph(assembled, padding_known)
    tried = _affordable(graph, requested, steps)
    lengths = _lengths(graph, tried)
    for symbol, length in lengths.items():
        if length < tried[symbol]:
            steps.warn(f"the graph takes at most {length} positions along {symbol!r}, not {requested[symbol]}")
    found = {symbol: length if length < tried[symbol] else requested[symbol] for symbol, length in lengths.items()}
    short = {symbol: min(_ROW_LENGTH, length) for symbol, length in found.items()}
    rows = max_batch_size
    if max_batch_size > 1 and not graph.runs(short, max_batch_size):
        rows = _greatest(lambda rows: graph.runs(short, rows), min(_PROBED_ROWS, max_batch_size), max_batch_size)
        steps.warn(f"the graph takes at most {_rows(rows)}, not {max_batch_size}")
    return found, rows


def reasons_of(
    reasons: Mapping[str, str], requested: Mapping[str, int], found: Mapping[str, int], steps: Steps
) -> dict[str, str]:
    """Return where the greatest length of each axis comes from, and report it.

    Args:
        reasons: where the requested lengths come from, by axis symbol; other axes are left out.
        requested: the requested lengths.
        found: those that `true_limits` found.
        steps: receives a line for each axis.
    """
    known = {
        symbol: "the graph runs no more" if found[symbol] < requested[symbol] else reason
        for symbol, reason in reasons.items()
    }
    for symbol, reason in known.items():
        steps.report(f"axis {symbol!r}: up to {found[symbol]} positions ({reason})")
    return known


def as_the_server_warms_up(manifest: Manifest, model_path: Path, steps: Steps) -> tuple[Manifest, RuntimeSession]:
    """Run the server's warm-up. Return the manifest, with a batch on which it succeeds, and the opened graph.

    Every shape of the warm-up is run once, within the warm-up's time limits. Where one fails, rows and lengths limit
    each other: the batch is then lowered until it runs at the greatest lengths.

    Raises:
        BuildRefused: one sequence alone does not run, or a run's tensors have other shapes than the manifest declares.
    """
    session = RuntimeSession.load(
        model_path, provider="CPUExecutionProvider", left_out=manifest.left_out, intra_op_threads=1
    )
    try:
        return _warmed_up(manifest, session, steps), session
    except UnexpectedShape as fault:
        raise BuildRefused(
            f"{fault}: it does not follow the inputs' lengths as in shorter runs; try a lower --max-length"
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


def _affordable(graph: _Graph, requested: Mapping[str, int], steps: Steps) -> dict[str, int]:
    """Return the lengths that are tried: those requested, or less where they take too much time or memory."""
    if max(requested.values(), default=0) <= _LONG:
        return dict(requested)
    begun = time.perf_counter()
    if not graph.runs(dict.fromkeys(requested, _TIMED_LENGTH), 1):
        return dict(requested)
    position_s = (time.perf_counter() - begun) / _TIMED_LENGTH
    heads = max((site.heads for site in graph.assembled.sites if site.form == "dense"), default=1)
    in_memory = math.isqrt(_MOST_SCORE_BYTES // (4 * heads))
    most = max(min(int(_MOST_SECONDS / (2 * position_s)), in_memory), _LONG)
    for symbol, length in requested.items():
        if length > most:
            steps.warn(
                f"lengths above {most} along {symbol!r} were not run, which would take too long or too much memory; "
                f"{length} is declared"
            )
    return {symbol: min(length, most) for symbol, length in requested.items()}


def _lengths(graph: _Graph, requested: Mapping[str, int]) -> dict[str, int]:
    """Return for each symbol the greatest length that runs, alone and together with those of the others."""
    if not requested or graph.runs(requested):
        return dict(requested)
    found: dict[str, int] = {}
    for symbol, most in requested.items():
        others = {other: min(_SHORT, length) for other, length in requested.items()}
        found[symbol] = _longest(graph, most, lambda length, s=symbol, o=others: {**o, s: length})  # type: ignore[misc]
    if len(found) > 1:
        # Where axes share a table, for example, each alone may be longer than all together.
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
    """Bisect: return the greatest number that runs, given that `low` runs and `high` does not."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if runs(middle) else (low, middle)
    return low


def fullest(sampler: Sampler, lengths: Lengths, *, padding_known: bool = False) -> list[dict[str, Array]]:
    """Return sequences, without the batch axis, in which the graph counts as many positions as in any request.

    Graphs may count the ones of a mask, or the ids that are not the padding's. Each sequence repeats one id, and the
    ids differ, so that one sequence holds no padding id, whichever id that is; where it is known, one sequence is
    enough. Masks are full. Other whole numbers may be masks of either sense: there is a sequence of ones and one of
    zeros.

    Args:
        sampler: draws what is neither ids nor masks.
        lengths: of the sequences.
        padding_known: as for `true_limits`.
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
    """Return the size of an input's vocabulary, at least 2; 0 for an input that holds no ids."""
    if np.issubdtype(NUMPY_DTYPES[spec.dtype], np.floating):
        return 0
    known = sampler.vocabulary_sizes.get(spec.name) or spec.vocabulary_size or sampler.vocabulary_size
    return max(known, 2) if spec.role is InputRole.TOKEN_IDS else sampler.vocabulary_sizes.get(spec.name, 0)


def _may_be_a_mask(sampler: Sampler, spec: InputSpec) -> bool:
    """Whether an input holds whole numbers of unknown meaning: neither its name nor a table gives it."""
    whole = not np.issubdtype(NUMPY_DTYPES[spec.dtype], np.floating)
    return whole and not _ids(sampler, spec) and spec.fill is None and not is_position(spec.name)
