"""Checks the shapes of a run's tensors against what the manifest declares, so that no answer is cropped wrongly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from attnserve_server.domain.errors import AttnserveError
from attnserve_server.domain.values import Array
from attnserve_server.engine.collation import CollatedBatch
from attnserve_server.model.manifest import BATCH, Extent, Manifest

ITEMS: Final = "items"
"""The first axis of a tap's weights, one entry for each row that is listed in its items."""


class UnexpectedShape(AttnserveError):
    """A tensor of a run has another shape than its manifest declares: the model is at fault, or the manifest is."""

    reason = "UNEXPECTED_SHAPE"

    def __init__(self, tensor: str, declared: Sequence[Extent], expected: Sequence[int | None], found: Sequence[int]):
        self.tensor, self.declared, self.expected, self.found = tensor, tuple(declared), tuple(expected), tuple(found)
        super().__init__(
            f"tensor {tensor!r} has the shape {self.found}; the manifest declares ({', '.join(map(str, declared))}), "
            f"which is ({', '.join('any' if extent is None else str(extent) for extent in expected)}) in this batch"
        )


class ShapeCheck:
    """What each fetched tensor of a model must look like. Immutable, so that any thread may use it."""

    def __init__(self, manifest: Manifest) -> None:
        """Reads the manifest once: a check is a few comparisons of numbers for each tensor."""
        self._declared: dict[str, tuple[Extent, ...]] = {spec.name: (BATCH, *spec.shape) for spec in manifest.outputs}
        self._taps = {site.weights_output: site.layer for site in manifest.sites if site.weights_output is not None}
        for site in manifest.sites:
            if site.weights_output is not None:
                self._declared[site.weights_output] = (ITEMS, site.heads, site.query_axis, site.columns)
        self._places = {
            extent: (spec.name, place)
            for spec in manifest.inputs
            for place, extent in enumerate(spec.shape, start=1)
            if isinstance(extent, str)
        }
        # Whole numbers stand for themselves, so that one look-up serves every extent.
        self._fixed: dict[Extent, int] = {
            extent: extent for shape in self._declared.values() for extent in shape if isinstance(extent, int)
        }
        self._fixed.update(manifest.fixed_lengths)
        self._derived = {axis.symbol: axis.derived for axis in manifest.axes if axis.derived is not None}

    def check(self, batch: CollatedBatch, fetched: Mapping[str, Array], *, filled_up: bool = False) -> None:
        """Compare every fetched tensor's shape with the declared one, at this batch's rows and padded lengths.

        Args:
            batch: what was run.
            fetched: the run's tensors by name.
            filled_up: whether the session may have run more rows and positions than the batch has.

        Raises:
            UnexpectedShape: of the first that differs.
        """
        given: dict[Extent, int] = {
            symbol: batch.feeds[name].shape[place] for symbol, (name, place) in self._places.items()
        }
        lengths: dict[Extent, int] = {**self._fixed, **given, BATCH: batch.size}
        for symbol, form in self._derived.items():
            if form.source in lengths:
                lengths[symbol] = form.of(lengths[form.source])
        for name, array in fetched.items():
            declared = self._declared[name]
            if name in self._taps:
                lengths[ITEMS] = len(batch.rows[self._taps[name]])
            expected = tuple(map(lengths.get, declared))
            if expected != array.shape and not _fits(array.shape, expected, filled_up=filled_up):
                raise UnexpectedShape(name, declared, expected, array.shape)


def _fits(found: tuple[int, ...], expected: tuple[int | None, ...], *, filled_up: bool) -> bool:
    """Whether a shape is as expected where an extent may be any (None), or more than expected with `filled_up`."""
    return len(found) == len(expected) and all(
        length is None or length == own or (filled_up and length < own)
        for own, length in zip(found, expected, strict=True)
    )
