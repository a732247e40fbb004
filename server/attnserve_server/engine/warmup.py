"""Warm-up: synthetic sequences that are valid for a model, and what its runs cost."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

from attnserve_server.domain.clock import Clock
from attnserve_server.domain.selection import (
    AttentionUnit,
    EffectiveSelection,
    HeadReduction,
    LayerReduction,
    SpecialTokens,
    WeightDtype,
)
from attnserve_server.domain.values import Array, PreparedSequence
from attnserve_server.engine.collation import collate
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.model.manifest import NUMPY_DTYPES, InputRole, InputSpec, Manifest

_SHAPES: Final = ((1, 8), (1, 32), (4, 32), (1, 128), (8, 64))
"""(batch size, length) of the timed runs: from what launches dominate to what arithmetic does."""
_REPEATS: Final = 3
"""The first repeat also pays for memory and threads; the quickest of them is what a run costs."""
_LEAST_SECONDS: Final = 1e-9


@dataclass(frozen=True, slots=True)
class CostModel:
    """A run costs `run_overhead_s` + `seconds_per_token` for each padded token."""

    run_overhead_s: float
    seconds_per_token: float

    @property
    def run_overhead_tokens(self) -> float:
        """How many padded tokens one run's overhead is worth."""
        return self.run_overhead_s / self.seconds_per_token


class ThreadCpuClock:
    """The calling thread's own processor time: what a run costs on a CPU, whoever else uses the cores meanwhile."""

    def now(self) -> float:
        """Processor seconds of the calling thread, from an arbitrary origin."""
        return time.thread_time()


def touch(session: RuntimeSession, manifest: Manifest) -> None:
    """Runs two small batches with every output and with attention of every site, on the calling thread.

    Raises:
        RunFailed: the model cannot run on these inputs.
    """
    everything = selection_of_all(manifest)
    for size, length in ((1, 4), (2, 16)):
        sequences = [synthetic(manifest, length, attention=everything)] * min(size, manifest.max_batch_size)
        _run(session, manifest, sequences)


def measure(session: RuntimeSession, manifest: Manifest, clock: Clock) -> CostModel:
    """Runs a few shapes with every output and times them, on the calling thread.

    Raises:
        RunFailed: the model cannot run on these inputs.
    """
    seen: list[tuple[int, float]] = []
    for size, length in _SHAPES:
        sequences = [synthetic(manifest, length)] * min(size, manifest.max_batch_size)
        timings = []
        for _ in range(_REPEATS):
            started = clock.now()
            tokens = _run(session, manifest, sequences)
            timings.append(clock.now() - started)
        seen.append((tokens, min(timings)))
    return fit(seen)


def fit(seen: Iterable[tuple[int, float]]) -> CostModel:
    """The line through (padded tokens, seconds) that errs least in relation to each time; neither part is negative."""
    tokens, seconds = (np.array(column, np.float64) for column in zip(*seen, strict=True))
    seconds = np.maximum(seconds, _LEAST_SECONDS)
    terms = np.stack([1 / seconds, tokens / seconds], axis=1)
    overhead, slope = np.linalg.lstsq(terms, np.ones_like(seconds), rcond=None)[0]
    return CostModel(max(float(overhead), 0.0), max(float(slope), _LEAST_SECONDS))


def selection_of_all(manifest: Manifest) -> EffectiveSelection | None:
    """Every head of every site that can be tapped, whole; None where there is none."""
    layers = tuple(site.layer for site in manifest.sites if site.available)
    if not layers:
        return None
    return EffectiveSelection(
        layers=layers,
        heads=tuple(tuple(range(manifest.sites[layer].heads)) for layer in layers),
        head_reduction=HeadReduction.EACH,
        layer_reduction=LayerReduction.EACH,
        queries=(),
        unit=AttentionUnit.TOKEN,
        special_tokens=SpecialTokens.KEEP,
        top_k=0,
        min_weight=0.0,
        dtype=WeightDtype.FLOAT32,
    )


def synthetic(manifest: Manifest, length: int, *, attention: EffectiveSelection | None = None) -> PreparedSequence:
    """A valid sequence of `length` along every axis, or of the axis's greatest length where that is less."""
    given = (axis for axis in manifest.axes if axis.derived is None)
    lengths = {axis.symbol: min(length, axis.max_length) for axis in given} | manifest.fixed_lengths
    tensors = {spec.name: _values(spec, lengths, manifest.vocabulary_of(spec)) for spec in manifest.inputs}
    return PreparedSequence(tensors, lengths, tuple(spec.name for spec in manifest.outputs), attention)


def _values(spec: InputSpec, lengths: dict[str, int], vocabulary_size: int) -> Array:
    shape = tuple(lengths[extent] if isinstance(extent, str) else extent for extent in spec.shape)
    dtype = NUMPY_DTYPES[spec.dtype]
    if spec.role is InputRole.ATTENTION_MASK:
        return np.ones(shape, dtype)
    if spec.role is InputRole.TOKEN_IDS and vocabulary_size:
        return (np.arange(np.prod(shape)) % vocabulary_size).astype(dtype).reshape(shape)
    return np.full(shape, spec.fill or 0, dtype)


def _run(session: RuntimeSession, manifest: Manifest, sequences: list[PreparedSequence]) -> int:
    batch = collate(sequences, manifest)
    session.run(batch.feeds, batch.fetches)
    return batch.padded_tokens
