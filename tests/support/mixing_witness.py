"""Run generated graphs to find out whether padding, or other rows, change an answer: the check of the grammar's truths.

A graph that onnxruntime cannot load raises its error. A run that it refuses for a sequence alone is left out; one that
it refuses only for the padded sequence or the batch counts as an infinite difference.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from attnserve_server.model.equality import Equality
from attnserve_server.model.manifest import BATCH, NUMPY_DTYPES, InputRole, InputSpec
from mixing_graphs import MixingGraph
from mixing_values import Need

Array = np.ndarray[Any, np.dtype[Any]]
Row = dict[str, Array]
EQUALITY = Equality("fp32")
CLEAR = 3.0
"""A difference of at least this many times the allowed one is more than rounding."""


@dataclass(frozen=True, slots=True)
class Regime:
    """How rows are drawn. `scale`: of features; `masks`: full, with holes, from the left, empty, or of odd numbers."""

    scale: float = 1.0
    masks: str = "full"
    pads: bool = False
    """Whether ids may be the padding id."""


USUAL = (Regime(), Regime(0.1), Regime(10.0))
EXTREME = (Regime(1e3), Regime(1e6), Regime(1e8), Regime(3e10))
HOLES = (Regime(masks="holes", pads=True), Regime(masks="left", pads=True))
ANY = (Regime(masks="empty", pads=True),)
ODD = (Regime(masks="odd"),)


def satisfying(needs: frozenset[Need] | Sequence[Need]) -> tuple[Regime, ...]:
    """Return the usual regimes under which a graph's needs hold."""
    regimes = list(USUAL)
    if all(need.need != "all" for need in needs):
        regimes += HOLES
    if not needs:
        regimes += ANY
    if not any(need.ones for need in needs):
        regimes += ODD
    return tuple(regimes)


class Witness:
    """One loaded graph. Draws rows and compares an answer with another."""

    def __init__(self, graph: MixingGraph, seed: int = 0) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        self.graph = graph
        self.session = ort.InferenceSession(
            graph.proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.rng = np.random.default_rng([seed, graph.seed])
        fed = {spec.name for spec in graph.signature.inputs}
        # The taps' inputs list the rows whose weights are returned.
        self._items = [each.name for each in self.session.get_inputs() if each.name not in fed]

    def row(self, lengths: Mapping[str, int], regime: Regime, along: str = "") -> Row:
        """Return one sequence.

        `along` is the only symbol with masks of the regime; others are full. Empty: all have them.
        """
        full = Regime(regime.scale)
        return {
            spec.name: self._drawn(spec, lengths, full if along and along not in spec.shape else regime)
            for spec in self.graph.signature.inputs
        }

    def _drawn(self, spec: InputSpec, lengths: Mapping[str, int], regime: Regime) -> Array:
        shape = tuple(lengths[extent] if isinstance(extent, str) else extent for extent in spec.shape)
        dtype = NUMPY_DTYPES[spec.dtype]
        if spec.role is InputRole.TOKEN_IDS:
            ids = self.rng.integers(0, spec.vocabulary_size, shape)
            ids = np.where(ids == spec.padding, ids + 2, ids) % spec.vocabulary_size
            ids = np.where(ids == spec.padding, spec.padding + 2, ids)
            if regime.pads:
                ids = np.where(self._keep(shape, regime), ids, spec.padding)
            return ids.astype(dtype)
        if len(shape) == 1:
            keep = self._keep(shape, regime)
            if dtype == np.bool_:
                return keep ^ bool(spec.padding)
            numbers = int(self.rng.choice([2, 3, -3])) if regime.masks == "odd" else 1
            return (keep * numbers).astype(dtype)
        return (self.rng.normal(size=shape) * regime.scale).astype(dtype)

    def _keep(self, shape: tuple[int, ...], regime: Regime) -> Array:
        keep = np.ones(shape, bool)
        count = shape[0]
        if regime.masks == "empty":
            keep[:] = False
        elif regime.masks == "left":
            keep[: int(self.rng.integers(0, count))] = False
        elif regime.masks == "holes":
            keep = self.rng.random(shape) < 0.5
            keep[int(self.rng.integers(0, count))] = True
        return keep

    def batch(self, rows: Sequence[Row], padded: Mapping[str, int]) -> Row:
        """Return rows as one batch, padded behind their ends."""
        feeds: Row = {}
        for spec in self.graph.signature.inputs:
            shape = tuple(padded[extent] if isinstance(extent, str) else extent for extent in spec.shape)
            array = np.full((len(rows), *shape), spec.padding, NUMPY_DTYPES[spec.dtype])
            for number, row in enumerate(rows):
                own = row[spec.name]
                array[(number, *(slice(extent) for extent in own.shape))] = own
            feeds[spec.name] = array
        return feeds | {name: np.arange(len(rows)) for name in self._items}

    def run(self, feeds: Row) -> dict[str, Array] | None:
        """Return all outputs, or None where the runtime refuses the run."""
        try:
            outputs = self.session.run([spec.name for spec in self.graph.outputs], feeds)
        except Exception:  # noqa: BLE001 - the runtime raises undocumented types
            return None
        return dict(zip((spec.name for spec in self.graph.outputs), outputs, strict=True))

    def own(self, output: str, values: Array, lengths: Mapping[str, int]) -> Array:
        """Return a row of an output, cropped to a sequence's own lengths."""
        spec = next(spec for spec in self.graph.outputs if spec.name == output)
        known = {**lengths, **{name: form.of(lengths[form.source]) for name, form in self.graph.derived.items()}}
        return values[tuple(slice(known[extent] if isinstance(extent, str) else extent) for extent in spec.shape)]

    def errors(self, axis: str, regimes: Sequence[Regime], rounds: int = 1) -> Iterator[dict[str, float]]:
        """Yield, for each probe, the difference that an axis makes by output, as a multiple of the allowed one."""
        for _, regime, probe in itertools.product(range(rounds), regimes, range(6)):
            found = self._of_rows(regime, probe) if axis == BATCH else self._of_padding(axis, regime, probe)
            if found is not None:
                yield found

    def _compared(self, alone: Row, together: Row, lengths: Mapping[str, int], at: int) -> dict[str, float] | None:
        one, other = self.run(alone), self.run(together)
        if one is None:
            return None
        if other is None:
            return dict.fromkeys(one, np.inf)
        return {
            name: EQUALITY.error(name, self.own(name, other[name][at], lengths), self.own(name, one[name][0], lengths))
            for name in one
        }

    def _of_padding(self, axis: str, regime: Regime, probe: int) -> dict[str, float] | None:
        lengths = {symbol: int(self.rng.choice([1, 2, 3, 4, 7, 12])) for symbol in self.graph.signature.symbols}
        more = (1, 2, 5, 40, 100, 480)[probe]
        row = self.row(lengths, regime, axis)
        padded = {**lengths, axis: lengths[axis] + more}
        return self._compared(self.batch([row], lengths), self.batch([row], padded), lengths, 0)

    def _of_rows(self, regime: Regime, probe: int) -> dict[str, float] | None:
        """Compare a row with the run alone at the same padded length, so that the effect of padding cancels."""
        symbols = self.graph.signature.symbols
        lengths = {symbol: int(self.rng.choice([1, 2, 3, 6, 9])) for symbol in symbols}
        padded = lengths if probe % 2 else {symbol: length + 4 for symbol, length in lengths.items()}
        row = self.row(lengths, regime)
        count = (2, 2, 3, 5, 9, 24)[probe]
        at = int(self.rng.integers(0, count))
        other = Regime(regime.scale * float(self.rng.choice([1, 1000, 0.001])), str(self.rng.choice(["full", "holes"])))
        rows = [self.row(padded, other) for _ in range(count)]
        rows[at] = row
        return self._compared(self.batch([row], padded), self.batch(rows, padded), lengths, at)

    def worst(self, axis: str, regimes: Sequence[Regime], rounds: int = 1, enough: float = np.inf) -> dict[str, float]:
        """Return the greatest differences by output. Ends early once every output has `enough`."""
        worst = {spec.name: 0.0 for spec in self.graph.outputs}
        for found in self.errors(axis, regimes, rounds):
            worst = {name: max(value, found[name]) for name, value in worst.items()}
            if all(value >= enough for value in worst.values()):
                break
        return worst
