"""What a run costs: its time, by a cost model that is fitted to timed runs, and the bytes of its tensors.

A run of B sequences, each padded to T positions (summed over the axes), takes

    run_s + B (sequence_s + token_s T + pair_s T^2)

seconds: the launch, then for each row a constant, its positions, and its pairs of positions, which attention computes.
No coefficient is negative. The model is of one instance; `scheduling.admission.Speed` measures how instances share a
machine. The inputs are timed runs and a checked manifest, with which nothing here fails.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import combinations
from math import ceil
from typing import Final

import numpy as np
import numpy.typing as npt

from attnserve_server.domain.values import PreparedSequence
from attnserve_server.model.formula import parsed
from attnserve_server.model.manifest import NUMPY_DTYPES, Dimension, InputSpec, Manifest, OutputSpec, SiteSpec

Terms = Mapping[tuple[int, ...], int]
"""Axis indices -> bytes for each element of the product of those axes' padded lengths; () is the constant term."""

_MIN_TOKEN_S: Final = 1e-9
"""Lower bound of `token_s`, one nanosecond: it replaces times below the resolution of the clock."""
_MIN_RUN_TOKENS: Final = 4.0
"""Lower bound of `run_s`, in tokens: less than any measured runtime. It keeps a noisy fit from disabling batching."""
_MEMORY: Final = 0.998
"""Weight of earlier runs after each run, so that about the last 500 runs count."""
_REFIT_RUNS: Final = 64
"""Runs between two fits. A fit takes up to about as long as answering one request."""
_SCRATCH_COPIES: Final = 2
"""Arrays of the size of the weights that a tap also holds: the scores before and after the mask."""
_MAX_KNOWN_LAYERS: Final = 1024
"""Selections of layers whose terms are kept. Callers choose layers, so the number must be bounded."""


@dataclass(frozen=True, slots=True)
class CostModel:
    """Coefficients of the cost model, in seconds. The defaults are of MiniLM in float32 on one core."""

    run_s: float = 2.2e-3
    sequence_s: float = 2.6e-5
    token_s: float = 2.3e-4
    pair_s: float = 1.9e-7

    def row_s(self, tokens: float) -> float:
        """Seconds that one row of `tokens` positions adds to a run."""
        return self.sequence_s + tokens * (self.token_s + tokens * self.pair_s)

    def rows_s(self, tokens: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """`row_s` of an array of any shape."""
        return self.sequence_s + tokens * (self.token_s + tokens * self.pair_s)

    def row_tokens(self, seconds: float) -> float:
        """The inverse of `row_s`: positions of a row that takes `seconds`; 0 if a row always takes longer."""
        left = seconds - self.sequence_s
        if left <= 0:
            return 0.0
        # This form of the quadratic's root loses no digits when `pair_s` is nearly 0.
        return 2 * left / (self.token_s + math.sqrt(self.token_s**2 + 4 * self.pair_s * left))

    def seconds(self, size: int, tokens: float) -> float:
        """Seconds of a run of `size` rows, each padded to `tokens` positions."""
        return self.run_s + size * self.row_s(tokens)

    def with_overhead(self, tokens: float | None) -> CostModel:
        """The model with the overhead of a run set to `tokens`; None keeps the measured one, at least 4 tokens."""
        if tokens is None:
            return replace(self, run_s=max(self.run_s, _MIN_RUN_TOKENS * self.token_s))
        return replace(self, run_s=tokens * self.token_s)


@dataclass(frozen=True, slots=True)
class TimedRun:
    """One timed run.

    Args:
        size: rows.
        tokens: padded positions of each row.
        seconds: time on its instance.
    """

    size: int
    tokens: int
    seconds: float


Timed = tuple[TimedRun, ...]


class CostEstimate:
    """Fits the cost model to warm-up runs and recent runs, by least squares of the relative errors.

    Warm-up runs never fade, so that traffic of a single shape still determines all four coefficients. Event loop
    only, once the instances serve.
    """

    def __init__(self, warm_up: tuple[TimedRun, ...] = ()) -> None:
        self._warm_up = _Equations.of(warm_up, memory=1.0)
        self._recent = _Equations.of((), memory=_MEMORY)
        self._unfitted: list[TimedRun] = []
        self._model = self._fit()

    @property
    def model(self) -> CostModel:
        """The cost model of the last fit."""
        return self._model

    def add(self, run: TimedRun) -> None:
        """Add a timed run. Every 64 runs, fit the model again."""
        self._unfitted.append(run)
        if len(self._unfitted) >= _REFIT_RUNS:
            self._recent = self._recent.faded(_MEMORY ** len(self._unfitted)) + _Equations.of(self._unfitted, _MEMORY)
            self._unfitted.clear()
            self._model = self._fit()

    def _fit(self) -> CostModel:
        equations = self._warm_up + self._recent
        coefficients = _non_negative(equations.matrix, equations.vector)
        run_s, sequence_s, token_s, pair_s = (float(coefficient) for coefficient in coefficients)
        return CostModel(run_s, sequence_s, max(token_s, _MIN_TOKEN_S), pair_s)


def fit(runs: tuple[TimedRun, ...]) -> CostModel:
    """Return the cost model of a few timed runs, all of the same weight."""
    return CostEstimate(runs).model


@dataclass(frozen=True, slots=True)
class _Equations:
    """The normal equations of a least-squares fit of relative errors: matrix (4, 4) and vector (4,)."""

    matrix: npt.NDArray[np.float64]
    vector: npt.NDArray[np.float64]

    @classmethod
    def of(cls, runs: Sequence[TimedRun], memory: float) -> _Equations:
        """Equations of runs from oldest to newest; each has `memory` times the weight of the next one."""
        size, tokens, seconds = np.array([(run.size, run.tokens, run.seconds) for run in runs]).reshape(-1, 3).T
        terms = np.stack((np.ones_like(size), size, size * tokens, size * tokens**2)) / np.maximum(
            seconds, _MIN_TOKEN_S
        )
        weights = memory ** np.arange(len(runs))[::-1]
        return cls((terms * weights) @ terms.T, terms @ weights)

    def faded(self, share: float) -> _Equations:
        return _Equations(self.matrix * share, self.vector * share)

    def __add__(self, other: _Equations) -> _Equations:
        return _Equations(self.matrix + other.matrix, self.vector + other.vector)


def _non_negative(matrix: npt.NDArray[np.float64], vector: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The non-negative x (4,) that minimises x'Mx - 2v'x, by trying each subset of non-zero coefficients."""
    # Scaled to a unit diagonal, because the term of squared positions is a million times the constant one.
    scale = np.sqrt(np.diag(matrix))
    scale[scale == 0] = 1.0
    unit, wanted = matrix / np.outer(scale, scale), vector / scale
    found, *_ = np.linalg.lstsq(unit, wanted, rcond=1e-9)
    if (found >= 0).all():  # the unconstrained minimum is feasible, so it is the constrained one
        whole: npt.NDArray[np.float64] = found / scale
        return whole
    best, least = np.zeros(4), 0.0
    for count in (1, 2, 3):
        for chosen in combinations(range(4), count):
            part = np.ix_(chosen, chosen)
            found, *_ = np.linalg.lstsq(unit[part], wanted[list(chosen)], rcond=1e-9)
            error = float(found @ unit[part] @ found - 2 * wanted[list(chosen)] @ found)
            if (found >= 0).all() and error < least - 1e-9:
                best, least = np.zeros(4), error
                best[list(chosen)] = found
    return best / scale


_Product = tuple[tuple[int, ...], Fraction]
"""Axes whose lengths are multiplied, by index, and a factor."""


class Footprint:
    """Counts the bytes of tensors that one sequence adds to a run, as terms in the run's padded lengths.

    It counts every output, requested or not, because the graph computes all of them. A site's weights count whole, also
    for a sequence that reads only their mean over heads: the runtime computes them, and returns them for all rows of
    the site if another sequence of the run reads them.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._index = {axis.symbol: at for at, axis in enumerate(manifest.axes)}
        self._longest = {axis.symbol: axis.max_length for axis in manifest.axes}
        self._derived = {axis.symbol: axis.derived for axis in manifest.axes if axis.derived is not None}
        self._formulas = {axis.symbol: parsed(axis.formula) for axis in manifest.axes if axis.formula}
        self._given = {symbol for spec in manifest.inputs for symbol in spec.shape if isinstance(symbol, str)}
        rows: Counter[tuple[int, ...]] = Counter()
        arrays: tuple[InputSpec | OutputSpec, ...] = (*manifest.inputs, *manifest.outputs)
        for spec in arrays:
            self._count(rows, spec.shape, NUMPY_DTYPES[spec.dtype].itemsize)
        self._rows: Terms = dict(rows)
        self._by_layers: dict[tuple[int, ...], Terms] = {}

    def of(self, sequence: PreparedSequence) -> Terms:
        """Return the terms of one sequence, with the weights of the sites that it selects."""
        if sequence.attention is None:
            return self._rows
        layers = sequence.attention.layers
        known = self._by_layers.get(layers)
        if known is None:
            known = self._with_layers(layers)
            if len(self._by_layers) < _MAX_KNOWN_LAYERS:
                self._by_layers[layers] = known
        return known

    def largest(self) -> Terms:
        """Return the terms of a sequence that selects every site."""
        return self._with_layers([site.layer for site in self._manifest.sites if site.available])

    def _with_layers(self, layers: Iterable[int]) -> Terms:
        terms = Counter(self._rows)
        for layer in layers:
            site = self._manifest.sites[layer]
            self._count(terms, _weights_shape(site), 4)
            if site.mean_output is not None:
                self._count(terms, _weights_shape(site)[1:], 4)
        scratch: Counter[tuple[int, ...]] = Counter()
        for site in (self._manifest.sites[layer] for layer in layers):
            one: Counter[tuple[int, ...]] = Counter()
            self._count(one, _weights_shape(site), 4 * _SCRATCH_COPIES)
            scratch |= one
        return dict(terms + scratch)

    def _count(self, terms: Counter[tuple[int, ...]], shape: tuple[Dimension, ...], item_bytes: int) -> None:
        """Add an array to `terms`. An axis that is in no input's shape is counted at its maximum length.

        A derived axis is at most T / stride + offset / stride long, so it makes two products out of each. One that
        follows a past is (T + P) / stride long, which makes one product more.
        """
        products: list[tuple[tuple[int, ...], Fraction]] = [((), Fraction(item_bytes))]
        for dimension in shape:
            formula = self._formulas.get(dimension) if isinstance(dimension, str) else None
            if formula is not None:
                parts = formula.fold(self._leaf, _multiplied)
                products = [((*axes, *more), size * count) for axes, size in products for more, count in parts]
                continue
            derived = self._derived.get(dimension) if isinstance(dimension, str) else None
            if derived is not None and derived.source in self._given:
                share = Fraction(1, derived.stride)
                summed = [self._index[symbol] for symbol in (derived.source, derived.plus) if symbol]
                more = max(derived.offset, 0) * share
                products = [
                    *(((*axes, at), size * share) for at in summed for axes, size in products),
                    *((axes, size * more) for axes, size in products if more),
                ]
            elif dimension in self._given:
                products = [((*axes, self._index[str(dimension)]), size) for axes, size in products]
            else:
                length = self._longest[dimension] if isinstance(dimension, str) else dimension
                products = [(axes, size * length) for axes, size in products]
        for axes, size in products:
            terms[tuple(sorted(axes))] += ceil(size)

    def _leaf(self, leaf: int | str) -> list[_Product]:
        return [((), Fraction(leaf))] if isinstance(leaf, int) else [((self._index[leaf],), Fraction(1))]


def _multiplied(operator: str, one: list[_Product], other: list[_Product]) -> list[_Product]:
    """Return the sum or the product of two sums of products."""
    if operator == "+":
        return [*one, *other]
    return [((*axes, *more), size * count) for axes, size in one for more, count in other]


def _weights_shape(site: SiteSpec) -> tuple[Dimension, ...]:
    """The shape of a site's weights, without the batch axis."""
    return (site.heads, site.query_axis, site.columns)
