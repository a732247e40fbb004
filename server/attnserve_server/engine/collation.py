"""Collation: sequences into the padded arrays of one run, and the run's checked arrays back into sequences.

Each input is copied once, into the batch. On the way back, the outputs of a request with one sequence are views of the
run's arrays, because its response is serialized as soon as the run ends. The outputs of a request with several
sequences are copied, because each view would keep the whole batch in memory until the last sequence is ready.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from attnserve_server.domain.errors import AttnserveError
from attnserve_server.domain.values import Array, AttentionAnswer, EffectiveSelection, PreparedSequence
from attnserve_server.model.manifest import BATCH, LOWEST_SCORE, NUMPY_DTYPES, Dimension, InputSpec, Manifest, SiteSpec

ITEMS: Final = "items"
"""Symbol of the first axis of a tap's weights: one entry for each batch row in the tap's `items` input."""
_NO_ITEMS: Final = np.empty(0, np.int64)
"""The `items` input of a site that no sequence of the batch selects."""


class UnexpectedShape(AttnserveError):
    """A tensor of a run has a shape that its manifest does not declare: the graph or the manifest is wrong."""

    reason = "UNEXPECTED_SHAPE"

    def __init__(
        self, tensor: str, declared: Sequence[Dimension], expected: Sequence[int | None], found: Sequence[int]
    ):
        self.tensor, self.declared, self.expected, self.found = tensor, tuple(declared), tuple(expected), tuple(found)
        super().__init__(
            f"tensor {tensor!r} has the shape {self.found}; the manifest declares ({', '.join(map(str, declared))}), "
            f"which is ({', '.join('any' if length is None else str(length) for length in expected)}) in this batch"
        )


@dataclass(frozen=True, slots=True)
class CollatedBatch:
    """The feeds and fetches of one run.

    Args:
        feeds: every input of the graph by name, (B, ...), and the `items` input of every tap, int64 (n,).
        fetches: names of the outputs to fetch, without duplicates.
        rows: for each selected layer, the batch rows in the order of the tap's items.
        size: B, the number of sequences.
        useful_tokens: positions that carry data.
        computed_tokens: all positions, padding included.
        unpadded: whether the run must have exactly this shape, because a sequence in it must not be padded.
    """

    feeds: Mapping[str, Array]
    fetches: tuple[str, ...]
    rows: Mapping[int, tuple[int, ...]]
    size: int
    useful_tokens: int
    computed_tokens: int
    unpadded: bool = False


def collate(sequences: Sequence[PreparedSequence], manifest: Manifest) -> CollatedBatch:
    """Build the feeds and the list of fetches of one run.

    Args:
        sequences: one or more. Their lengths must agree along each axis that is not padded, and along all axes if one
            of them must not be padded.
        manifest: of the model that the sequences were prepared for.

    Returns:
        The batch. Each input is padded with its padding value to the greatest length in the batch along each axis.

    Raises:
        ValueError: lengths differ along an axis that is not padded, or a tensor contradicts its sequence's lengths.
        KeyError: a sequence lacks an input of the manifest.
    """
    unpadded = any(sequence.unpadded for sequence in sequences)
    greatest = _greatest_lengths(sequences, manifest, unpadded=unpadded)
    every = manifest.with_derived(greatest)
    feeds: dict[str, Array] = {}
    for spec in manifest.inputs:
        feeds[spec.name] = _padded(spec, [sequence.tensors[spec.name] for sequence in sequences], every)
    rows: dict[int, list[int]] = {}
    fetches: dict[str, None] = {}
    for row, sequence in enumerate(sequences):
        fetches.update(dict.fromkeys(sequence.outputs))
        if sequence.attention is not None:
            for layer in sequence.attention.layers:
                rows.setdefault(layer, []).append(row)
                fetches.update(dict.fromkeys(_tap_outputs(manifest.sites[layer], sequence, sequence.attention)))
    for site in manifest.sites:
        if site.items_input is None or site.weights_output is None:
            continue
        selecting = rows.get(site.layer)
        feeds[site.items_input] = _NO_ITEMS if selecting is None else np.array(selecting, np.int64)
    return CollatedBatch(
        feeds=feeds,
        fetches=tuple(fetches),
        rows={layer: tuple(selecting) for layer, selecting in rows.items()},
        size=len(sequences),
        useful_tokens=sum(sequence.tokens for sequence in sequences),
        computed_tokens=len(sequences) * (sum(greatest.values()) or 1),
        unpadded=unpadded,
    )


def outputs_of(
    batch: CollatedBatch, fetched: Mapping[str, Array], row: int, sequence: PreparedSequence, manifest: Manifest
) -> dict[str, Array]:
    """Return the outputs that the sequence in `row` requests, cropped to its own lengths.

    Args:
        batch: the batch that was run.
        fetched: the run's arrays by name, (B, ...).
        row: the sequence's row in the batch.
        sequence: the sequence.
        manifest: of the model.

    Returns:
        Arrays by output name, without the batch axis: views if `may_alias` is true, else copies.
    """
    lengths = manifest.with_derived(sequence.lengths)
    outputs: dict[str, Array] = {}
    for name in sequence.outputs:
        crop = fetched[name][row][_crop(manifest.output(name).shape, lengths)]
        outputs[name] = crop if may_alias(batch, sequence) else crop.copy()
    return outputs


def may_alias(batch: CollatedBatch, sequence: PreparedSequence) -> bool:
    """Whether a result may be a view of the run's arrays.

    True if the batch has one sequence, or if the response is serialized before the next run.
    """
    return sequence.is_whole_request or batch.size == 1


def owned(answer: AttentionAnswer, arrays: Iterable[Array]) -> AttentionAnswer:
    """Return the answer with every map that is a view of one of the run's `arrays` copied."""
    arrays = tuple(arrays)
    maps = tuple(
        replace(made, content=made.content.copy())
        if isinstance(made.content, np.ndarray) and any(np.may_share_memory(made.content, array) for array in arrays)
        else made
        for made in answer.maps
    )
    return replace(answer, maps=maps)


def _tap_outputs(site: SiteSpec, sequence: PreparedSequence, selection: EffectiveSelection) -> Iterator[str]:
    """Yield the outputs of a site's tap that a sequence reads. Its batch has no part in this choice."""
    output, mean = site.output_of(selection.values), site.mean_of(selection)
    if mean is not None:
        yield mean
    # Whole weights are compared, because a mean hides differences.
    if output is not None and (mean is None or sequence.keep_values):
        yield output


def weights_of(
    batch: CollatedBatch,
    fetched: Mapping[str, Array],
    row: int,
    sequence: PreparedSequence,
    manifest: Manifest,
    *,
    whole: bool = False,
) -> dict[int, Array]:
    """Return the weights, or the scores, that the sequence in `row` selects, cropped to its own lengths.

    Args:
        batch: the batch that was run.
        fetched: the run's arrays by name; a tap's is (n, H, L, S), or (n, H, L, W) for a band. A mean has no H.
        row: the sequence's row in the batch.
        sequence: the sequence.
        manifest: of the model.
        whole: return all heads where the sequence reads their mean. It must have `keep_values`.

    Returns:
        Views of the run's arrays by layer, (H, L, S), or (H, L, W) for a band: its columns are relative to the query,
        so W is the same for every length. (1, L, S) where the sequence reads the mean over all heads. Scores are
        copies, with minus infinity for hidden keys.

    Raises:
        ValueError: the sequence selects a site without a tap, which a resolved selection never does.
    """
    if sequence.attention is None:
        return {}
    lengths = manifest.with_derived(sequence.lengths)
    weights: dict[int, Array] = {}
    for layer in sequence.attention.layers:
        site = manifest.sites[layer]
        output = site.output_of(sequence.attention.values)
        if output is None:
            raise ValueError(f"site {site.name} has no tap for {sequence.attention.values}")
        mean = None if whole else site.mean_of(sequence.attention)
        own = fetched[mean or output][batch.rows[layer].index(row)]
        own = own if mean is None else own[np.newaxis]
        own = own[_crop((len(own), site.query_axis, site.columns), lengths)]
        weights[layer] = np.where(own <= LOWEST_SCORE, np.float32(-np.inf), own) if sequence.attention.scores else own
    return weights


def past_length(lengths: Mapping[str, int], manifest: Manifest) -> int:
    """Return the positions of a sequence's past; 0 for a manifest of a prompt graph."""
    plus = (axis.derived.plus for axis in manifest.axes if axis.derived is not None and axis.derived.plus)
    return next((lengths[symbol] for symbol in plus), 0)


def is_finite(values: Array) -> bool:
    """Whether an array of any shape and dtype holds neither NaN nor an infinity."""
    return values.dtype.kind != "f" or bool(np.isfinite(values).all())


def invalid_tensor(
    outputs: Mapping[str, Array], weights: Mapping[int, Array], manifest: Manifest, *, scores: bool = False
) -> str | None:
    """Return the name of the first invalid tensor: an output with NaN, or weights with NaN or an infinity; else None.

    An infinity is valid in an output, such as the logits of masked positions, and minus infinity is the score of a
    hidden key.

    Args:
        outputs: cropped outputs by name.
        weights: cropped weights, or scores, by layer.
        manifest: of the model.
        scores: whether `weights` are scores.
    """
    for name, values in outputs.items():
        if values.dtype.kind == "f" and np.isnan(values).any():
            return name
    for layer, values in weights.items():
        if not is_finite(values[values > -np.inf] if scores and not np.isnan(values).any() else values):
            return manifest.sites[layer].name
    return None


class ShapeCheck:
    """Compares the shapes of a run's tensors with the manifest, so that no answer is cropped from a wrong place.

    Immutable: any thread may use it.
    """

    def __init__(self, manifest: Manifest) -> None:
        """Read the manifest once, so that a check costs a few integer comparisons for each tensor."""
        self._declared: dict[str, tuple[Dimension, ...]] = {
            spec.name: (BATCH, *spec.shape) for spec in manifest.outputs
        }
        self._taps: dict[str, int] = {}
        for site in manifest.sites:
            for output in site.outputs:
                heads = () if output == site.mean_output else (site.heads,)
                self._taps[output] = site.layer
                self._declared[output] = (ITEMS, *heads, site.query_axis, site.columns)
        self._places = {
            dimension: (spec.name, place)
            for spec in manifest.inputs
            for place, dimension in enumerate(spec.shape, start=1)
            if isinstance(dimension, str)
        }
        # A fixed dimension maps to itself, so that one look-up serves symbols and numbers.
        self._fixed: dict[Dimension, int] = {
            dimension: dimension
            for shape in self._declared.values()
            for dimension in shape
            if isinstance(dimension, int)
        }
        self._fixed.update(manifest.fixed_lengths)
        self._derived = {axis.symbol: axis.follows for axis in manifest.axes if axis.follows is not None}

    def check(self, batch: CollatedBatch, fetched: Mapping[str, Array], *, filled_up: bool = False) -> None:
        """Compare every fetched tensor's shape with the declared one, at this batch's rows and padded lengths.

        Args:
            batch: what was run.
            fetched: the run's tensors by name.
            filled_up: whether the session may have run more rows and positions than the batch has.

        Raises:
            UnexpectedShape: for the first tensor whose shape differs.
        """
        given: dict[Dimension, int] = {
            symbol: batch.feeds[name].shape[place] for symbol, (name, place) in self._places.items()
        }
        lengths: dict[Dimension, int] = {**self._fixed, **given, BATCH: batch.size}
        for symbol, form in self._derived.items():
            if symbol not in given and all(source in lengths for source in form.symbols):
                lengths[symbol] = form.length_at(lengths)
        for name, array in fetched.items():
            declared = self._declared[name]
            if name in self._taps:
                lengths[ITEMS] = len(batch.rows[self._taps[name]])
            expected = tuple(map(lengths.get, declared))
            if expected != array.shape and not _fits(array.shape, expected, filled_up=filled_up):
                raise UnexpectedShape(name, declared, expected, array.shape)


def _greatest_lengths(sequences: Sequence[PreparedSequence], manifest: Manifest, *, unpadded: bool) -> dict[str, int]:
    greatest: dict[str, int] = {}
    for axis in manifest.axes:
        lengths = [sequence.lengths[axis.symbol] for sequence in sequences if axis.symbol in sequence.lengths]
        if not lengths or axis.formula:
            continue
        longest = max(lengths)
        if min(lengths) != longest and (unpadded or not axis.paddable):
            why = f"axis {axis.symbol} is not padded" if not axis.paddable else "a sequence must not be padded"
            raise ValueError(f"{why}: lengths {min(lengths)} and {longest} in one batch")
        greatest[axis.symbol] = longest
    return greatest


def _padded(spec: InputSpec, tensors: Sequence[Array], greatest: Mapping[str, int]) -> Array:
    shape = tuple(greatest[dimension] if isinstance(dimension, str) else dimension for dimension in spec.shape)
    dtype = NUMPY_DTYPES[spec.dtype]
    if any(tensor.ndim != len(shape) for tensor in tensors):
        raise ValueError(f"input {spec.name}: every tensor must have {len(shape)} axes")
    padded: Array
    if all(tensor.shape == shape for tensor in tensors):
        if len(tensors) == 1 and tensors[0].flags.aligned:
            return tensors[0][np.newaxis]  # the runtime reads it where it is
        padded = np.empty((len(tensors), *shape), dtype)
        for row, tensor in enumerate(tensors):
            padded[row] = tensor
        return padded
    padded = np.full((len(tensors), *shape), spec.padding, dtype)
    for row, tensor in enumerate(tensors):
        padded[row][tuple(slice(length) for length in tensor.shape)] = tensor
    return padded


def _crop(shape: Sequence[Dimension], lengths: Mapping[str, int]) -> tuple[slice, ...]:
    """Slices to a sequence's own lengths. An axis of unknown length is kept whole."""
    return tuple(slice(lengths.get(dimension)) if isinstance(dimension, str) else slice(None) for dimension in shape)


def _fits(found: tuple[int, ...], expected: tuple[int | None, ...], *, filled_up: bool) -> bool:
    """Whether a shape is as expected; None means any length, and `filled_up` permits greater ones."""
    return len(found) == len(expected) and all(
        length is None or length == own or (filled_up and length < own)
        for own, length in zip(found, expected, strict=True)
    )
