"""Warm-up: runs of synthetic sequences that are valid for a model, timed runs for the cost model, and prepared shapes.

A model that cannot run them, or returns other shapes than its manifest declares, fails to load.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from attnserve_server.domain.clock import Clock
from attnserve_server.domain.values import (
    Array,
    AttentionUnit,
    AttentionValue,
    EffectiveSelection,
    HeadReduction,
    LayerReduction,
    PreparedSequence,
    SpecialTokens,
    WeightDtype,
)
from attnserve_server.engine.collation import CollatedBatch, ShapeCheck, collate, past_length
from attnserve_server.engine.cost import CostModel, TimedRun
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.engine.shapes import ShapePlan, buckets
from attnserve_server.model.manifest import NUMPY_DTYPES, InputRole, InputSpec, Manifest

_FIRST_SHAPES: Final = ((1, 8), (4, 8), (1, 32), (4, 32), (1, 128))
"""(batch size, length) of the runs that are always timed: the minimum that determines the four coefficients."""
_MORE_SHAPES: Final = (
    (16, 8), (16, 32), (4, 128), (1, 512), (16, 128), (64, 32), (4, 512), (64, 128), (32, 512),
)  # fmt: skip
"""Larger runs, in order of size, timed while `more_s` lasts. A fast device is measured at large sizes too."""
_MORE_SECONDS: Final = 1.0
"""Default of `more_s`."""
_REPEATS: Final = 3
"""Runs of each shape. The first one also allocates memory and starts threads, so the fastest one counts."""

_NEW_SHAPES: Final = ((1, 11), (1, 19), (3, 21))
"""(batch size, length) of the runs that measure what a new shape costs; no other run of the warm-up has them."""
_DEAR: Final = 2.0
"""Ratio of a shape's first run to later ones from which shapes are prepared. Below it, padding costs more."""
_BUCKETS: Final = 64
"""Number of shapes, unless the operator sets another: runs of up to 32 rows and some hundred tokens."""
_BUCKETS_S: Final = 10.0
"""Seconds that one run of every prepared shape may take, as predicted."""


def touch(session: RuntimeSession, manifest: Manifest) -> None:
    """Run small batches with every output and with all outputs of every tap, on the calling thread.

    Raises:
        RunFailed: the model cannot run on these inputs.
        UnexpectedShape: a returned tensor has another shape than the manifest declares.
    """
    everything = selection_of_all(manifest, HeadReduction.MEAN)
    for size, length in ((1, 4), (2, 16)):
        one = replace(synthetic(manifest, length, attention=everything), keep_values=True)
        sequences = [one] * min(size, manifest.max_batch_size)
        run(session, manifest, sequences)
    scores = selection_of_all(manifest, values=AttentionValue.SCORES)
    if scores is not None:
        run(session, manifest, [synthetic(manifest, 4, attention=scores)])


def measure(
    session: RuntimeSession, manifest: Manifest, clock: Clock, *, repeats: int = _REPEATS, more_s: float = _MORE_SECONDS
) -> tuple[TimedRun, ...]:
    """Time runs over a small grid of (batch size, length) with every output, on the calling thread.

    Args:
        session: the model, loaded and touched.
        manifest: of the model; its maximum batch size and lengths bound the grid.
        clock: measures the runs: processor time on a CPU, monotonic time elsewhere.
        repeats: runs of each shape; the fastest one counts.
        more_s: seconds for all larger runs together, as predicted from the largest run so far.

    Returns:
        The timed runs, one for each shape.

    Raises:
        RunFailed: the model cannot run on these inputs.
        UnexpectedShape: a returned tensor has another shape than the manifest declares.
    """
    seen: dict[tuple[int, int], TimedRun] = {}
    left_s = more_s
    for shapes, bounded in ((_FIRST_SHAPES, False), (_MORE_SHAPES, True)):
        for size, length in shapes:
            sequences = [synthetic(manifest, length)] * min(size, manifest.max_batch_size)
            tokens = sequences[0].tokens
            if (len(sequences), tokens) in seen:
                continue  # the model's bounds reduce this shape to one that was timed
            if bounded:
                # Linear in positions. With long sequences a run takes more, which is close enough for a time limit.
                largest = max(seen.values(), key=lambda run: run.size * run.tokens)
                predicted_s = repeats * largest.seconds * len(sequences) * tokens / (largest.size * largest.tokens)
                if predicted_s > left_s:
                    break
                left_s -= predicted_s
            fastest_s = min(_seconds(session, manifest, sequences, clock) for _ in range(repeats))
            seen[len(sequences), tokens] = TimedRun(len(sequences), tokens, fastest_s)
    return tuple(seen.values())


def _seconds(session: RuntimeSession, manifest: Manifest, sequences: list[PreparedSequence], clock: Clock) -> float:
    """Seconds of one run, with collation."""
    started = clock.now()
    batch = collate(sequences, manifest)
    outputs = session.run(batch.feeds, batch.fetches)
    seconds = clock.now() - started
    _check(session, manifest, batch, outputs)
    return seconds


def plan_of(manifest: Manifest, shapes: Sequence[tuple[int, int]]) -> ShapePlan | None:
    """Return a plan of these shapes; None if no shape remains, or the inputs do not share one padded axis."""
    if {spec.shape for spec in manifest.inputs} != {(axis.symbol,) for axis in manifest.axes if axis.paddable}:
        return None
    # Rows that fill up a shape are batch neighbours too.
    held = tuple(shape for shape in shapes if shape[0] <= manifest.max_batch_size)
    return ShapePlan(held, {spec.name: spec.padding for spec in manifest.inputs}) if held else None


def bucket_plan(manifest: Manifest, cost: CostModel, count: int | None) -> ShapePlan | None:
    """Return the shapes to prepare; None if runs of this model must not be padded.

    Args:
        manifest: of the model, under the server's batching policy.
        cost: of its runs.
        count: the most shapes; None: `_BUCKETS`.
    """
    longest = max((axis.max_length for axis in manifest.axes if axis.free), default=0)
    chosen = buckets(cost, manifest.max_batch_size, longest, count or _BUCKETS, _BUCKETS_S) if longest else ()
    return plan_of(manifest, chosen)


def new_shape_ratio(session: RuntimeSession, manifest: Manifest, clock: Clock) -> float:
    """Return the time of a shape's first run over that of its third: the median of three shapes, on this thread.

    Raises:
        RunFailed: the model cannot run on these inputs.
        UnexpectedShape: a returned tensor has another shape than the manifest declares.
    """
    ratios = []
    for size, length in _NEW_SHAPES:
        sequences = [synthetic(manifest, length)] * min(size, manifest.max_batch_size)
        first, _, later = (_seconds(session, manifest, sequences, clock) for _ in range(3))
        ratios.append(first / max(later, 1e-9))
    return statistics.median(ratios)


def are_dear(ratio: float) -> bool:
    """Whether new shapes cost so much, by `new_shape_ratio`, that padding runs to prepared ones pays."""
    return ratio >= _DEAR


def prepare(session: RuntimeSession, manifest: Manifest, plan: ShapePlan) -> None:
    """Run every shape of a plan once, on the calling thread.

    Raises:
        RunFailed: the model cannot run on these inputs.
        UnexpectedShape: a returned tensor has another shape than the manifest declares.
    """
    for rows, tokens in plan.shapes:
        run(session, manifest, [synthetic(manifest, tokens)] * rows)


def selection_of_all(
    manifest: Manifest,
    head_reduction: HeadReduction = HeadReduction.EACH,
    values: AttentionValue = AttentionValue.WEIGHTS,
) -> EffectiveSelection | None:
    """Return a selection of every head of every site that gives these values, in whole maps; None if no site does."""
    layers = tuple(site.layer for site in manifest.sites if site.output_of(values) is not None)
    if not layers:
        return None
    return EffectiveSelection(
        layers=layers,
        heads=tuple(tuple(range(manifest.sites[layer].heads)) for layer in layers),
        head_reduction=head_reduction,
        layer_reduction=LayerReduction.EACH,
        queries=(),
        unit=AttentionUnit.TOKEN,
        special_tokens=SpecialTokens.KEEP,
        top_k=0,
        min_weight=0.0,
        dtype=WeightDtype.FLOAT32,
        values=values,
    )


def synthetic(manifest: Manifest, length: int, *, attention: EffectiveSelection | None = None) -> PreparedSequence:
    """Return a valid sequence with every output.

    Args:
        manifest: of the model.
        length: positions along every axis, that of a past included; an axis with a smaller maximum gets that.
        attention: the resolved selection; None: no attention.
    """
    given = (axis for axis in manifest.axes if axis.free)
    lengths = {axis.symbol: min(length, axis.max_length) for axis in given} | manifest.fixed_lengths
    for axis in manifest.axes:
        if axis.derived is not None and axis.derived.plus:
            # New positions and the past share the greatest length, and each has at least one.
            new = lengths[axis.derived.source] = min(length, axis.max_length // 2)
            lengths[axis.derived.plus] = min(length, axis.max_length - new)
    extents = manifest.with_derived(lengths)
    tensors = {spec.name: _values(spec, extents, manifest.vocabulary_of(spec)) for spec in manifest.inputs}
    outputs = tuple(spec.name for spec in manifest.outputs)
    return PreparedSequence(tensors, lengths, outputs, attention, past=past_length(lengths, manifest))


def _values(spec: InputSpec, lengths: dict[str, int], vocabulary_size: int) -> Array:
    shape = tuple(lengths[extent] if isinstance(extent, str) else extent for extent in spec.shape)
    dtype = NUMPY_DTYPES[spec.dtype]
    if spec.role is InputRole.ATTENTION_MASK:
        return np.full(shape, spec.data_value, dtype)
    if spec.role is InputRole.TOKEN_IDS and vocabulary_size:
        return (np.arange(np.prod(shape)) % vocabulary_size).astype(dtype).reshape(shape)
    filled = np.full(shape, spec.fill or 0, dtype)
    if spec.fill is None and spec.index_ranges:
        filled[...] = spec.resting if spec.columns > 1 else spec.resting[0]
    return filled


def run(session: RuntimeSession, manifest: Manifest, sequences: list[PreparedSequence]) -> None:
    """Run one batch, check the shapes of its outputs, and discard them.

    Raises:
        RunFailed: the model cannot run on these inputs.
        UnexpectedShape: a returned tensor has another shape than the manifest declares.
    """
    batch = collate(sequences, manifest)
    _check(session, manifest, batch, session.run(batch.feeds, batch.fetches))


def _check(session: RuntimeSession, manifest: Manifest, batch: CollatedBatch, outputs: list[Array]) -> None:
    fetched = dict(zip(batch.fetches, outputs, strict=True))
    ShapeCheck(manifest).check(batch, fetched, filled_up=session.fills_up)
