"""Collation: sequences into the arrays of one run, padded by axis symbols, and the run's arrays back into sequences.

Each input is copied once, into the batch. On the way back the crop of a sequence that is all of its request is a view
of the run's arrays: its answer is encoded as soon as the run ends, which is the one copy. Others wait for the rest of
their request, so their crops are copied: each would keep a whole batch in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from attnserve_server.domain.values import Array, PreparedSequence
from attnserve_server.model.manifest import NUMPY_DTYPES, Extent, InputSpec, Manifest

_NOBODY: Final = np.empty(0, np.int64)
"""The items of a site that no sequence of the batch asks about."""


@dataclass(frozen=True, slots=True)
class CollatedBatch:
    """The arrays of one run. `rows` holds, for each asked layer, the batch rows in the order of the tap's items.

    `unpadded`: the run must have just this shape, because a sequence in it must not be padded.
    """

    feeds: Mapping[str, Array]
    fetches: tuple[str, ...]
    rows: Mapping[int, tuple[int, ...]]
    size: int
    useful_tokens: int
    computed_tokens: int
    unpadded: bool = False


def collate(sequences: Sequence[PreparedSequence], manifest: Manifest) -> CollatedBatch:
    """Builds the feeds and the fetch list of one run.

    Args:
        sequences: one or more, whose lengths agree along each axis that does not pad, and along all axes where one of
            them must not be padded.
        manifest: of the model that they were prepared for.

    Returns:
        Each input as (B, ...), padded with its padding value to the batch's greatest length along each axis; each tap's
        items, int64 (n,).

    Raises:
        ValueError: lengths differ along an axis that does not pad, or a tensor contradicts its sequence's lengths.
    """
    unpadded = any(sequence.unpadded for sequence in sequences)
    greatest = _greatest(sequences, manifest, unpadded=unpadded)
    feeds: dict[str, Array] = {}
    for spec in manifest.inputs:
        feeds[spec.name] = _padded(spec, [sequence.tensors[spec.name] for sequence in sequences], greatest)
    rows: dict[int, list[int]] = {}
    wanted: dict[str, None] = {}
    for row, sequence in enumerate(sequences):
        wanted.update(dict.fromkeys(sequence.outputs))
        if sequence.attention is not None:
            for layer in sequence.attention.layers:
                rows.setdefault(layer, []).append(row)
    for site in manifest.sites:
        if site.items_input is None or site.weights_output is None:
            continue
        asking = rows.get(site.layer)
        feeds[site.items_input] = _NOBODY if asking is None else np.array(asking, np.int64)
        if asking is not None:
            wanted[site.weights_output] = None
    return CollatedBatch(
        feeds=feeds,
        fetches=tuple(wanted),
        rows={layer: tuple(asking) for layer, asking in rows.items()},
        size=len(sequences),
        useful_tokens=sum(sequence.tokens for sequence in sequences),
        computed_tokens=len(sequences) * (sum(greatest.values()) or 1),
        unpadded=unpadded,
    )


def outputs_of(
    batch: CollatedBatch, fetched: Mapping[str, Array], row: int, sequence: PreparedSequence, manifest: Manifest
) -> dict[str, Array]:
    """The outputs that the sequence in `row` wants, cropped to its own lengths, as `kept_as_view` says or copied."""
    lengths = manifest.with_derived(sequence.lengths)
    outputs: dict[str, Array] = {}
    for name in sequence.outputs:
        crop = fetched[name][row][_crop(manifest.output(name).shape, lengths)]
        outputs[name] = crop if kept_as_view(batch, sequence) else crop.copy()
    return outputs


def kept_as_view(batch: CollatedBatch, sequence: PreparedSequence) -> bool:
    """Whether an answer may lie in the run's own arrays: nobody else's do, or it is gone before anybody would mind."""
    return sequence.lone or batch.size == 1


def weights_of(
    batch: CollatedBatch, fetched: Mapping[str, Array], row: int, sequence: PreparedSequence, manifest: Manifest
) -> dict[int, Array]:
    """The weights that the sequence in `row` asked for, cropped: layer -> (H, L, S). Views into the run's arrays.

    Where the tap writes a band, (H, L, W): its columns are relative to the queries, and so the same for every length.

    Raises:
        ValueError: it asks for a site without a tap, which a resolved selection never does.
    """
    if sequence.attention is None:
        return {}
    lengths = manifest.with_derived(sequence.lengths)
    weights: dict[int, Array] = {}
    for layer in sequence.attention.layers:
        site = manifest.sites[layer]
        if site.weights_output is None:
            raise ValueError(f"site {site.name} has no tap")
        crop = _crop((site.heads, site.query_axis, site.columns), lengths)
        weights[layer] = fetched[site.weights_output][batch.rows[layer].index(row)][crop]
    return weights


def _greatest(sequences: Sequence[PreparedSequence], manifest: Manifest, *, unpadded: bool) -> dict[str, int]:
    greatest: dict[str, int] = {}
    for axis in manifest.axes:
        lengths = [sequence.lengths[axis.symbol] for sequence in sequences if axis.symbol in sequence.lengths]
        if not lengths:
            continue
        longest = max(lengths)
        if min(lengths) != longest and (unpadded or not axis.paddable):
            why = f"axis {axis.symbol} does not pad" if not axis.paddable else "a sequence must not be padded"
            raise ValueError(f"{why}: lengths {min(lengths)} and {longest} in one batch")
        greatest[axis.symbol] = longest
    return greatest


def _padded(spec: InputSpec, tensors: Sequence[Array], greatest: Mapping[str, int]) -> Array:
    shape = tuple(greatest[extent] if isinstance(extent, str) else extent for extent in spec.shape)
    dtype = NUMPY_DTYPES[spec.dtype]
    if any(tensor.ndim != len(shape) for tensor in tensors):
        raise ValueError(f"input {spec.name}: every tensor must have {len(shape)} axes")
    padded: Array
    if all(tensor.shape == shape for tensor in tensors):
        padded = np.empty((len(tensors), *shape), dtype)
        for row, tensor in enumerate(tensors):
            padded[row] = tensor
        return padded
    padded = np.full((len(tensors), *shape), spec.padding, dtype)
    for row, tensor in enumerate(tensors):
        padded[row][tuple(slice(extent) for extent in tensor.shape)] = tensor
    return padded


def _crop(shape: Sequence[Extent], lengths: Mapping[str, int]) -> tuple[slice, ...]:
    """Slices to a sequence's own lengths; an axis whose length nothing tells is left whole."""
    return tuple(slice(lengths.get(extent)) if isinstance(extent, str) else slice(None) for extent in shape)
