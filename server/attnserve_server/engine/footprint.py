"""How many bytes of tensors a sequence brings into a run, as terms in the run's padded lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from fractions import Fraction
from math import ceil

from attnserve_server.domain.values import PreparedSequence
from attnserve_server.model.manifest import NUMPY_DTYPES, Extent, InputSpec, Manifest, OutputSpec, SiteSpec

Terms = Mapping[tuple[int, ...], int]
"""Axis indices -> bytes for each position of the product of those axes' padded lengths; () is constant."""

_SCRATCH_COPIES = 2
"""While a tap computes its weights, it also holds the scores before and after the mask."""


class Footprint:
    """Counts bytes for one model. Counts every output, asked or not: what one asks for, the run makes for all."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._index = {axis.symbol: at for at, axis in enumerate(manifest.axes)}
        self._longest = {axis.symbol: axis.max_length for axis in manifest.axes}
        self._derived = {axis.symbol: axis.derived for axis in manifest.axes if axis.derived is not None}
        self._given = {extent for spec in manifest.inputs for extent in spec.shape if isinstance(extent, str)}
        rows: Counter[tuple[int, ...]] = Counter()
        arrays: tuple[InputSpec | OutputSpec, ...] = (*manifest.inputs, *manifest.outputs)
        for spec in arrays:
            self._count(rows, spec.shape, NUMPY_DTYPES[spec.dtype].itemsize)
        self._rows: Terms = dict(rows)
        self._by_layers: dict[tuple[int, ...], Terms] = {}  # bounded by the distinct choices of layers, see `of`

    def of(self, sequence: PreparedSequence) -> Terms:
        """The terms of one sequence."""
        if sequence.attention is None:
            return self._rows
        layers = sequence.attention.layers
        known = self._by_layers.get(layers)
        if known is None:
            known = self._with_layers(layers)
            if len(self._by_layers) < 1024:  # callers choose layers: remember the common choices, not all of them
                self._by_layers[layers] = known
        return known

    def _with_layers(self, layers: Iterable[int]) -> Terms:
        terms = Counter(self._rows)
        for layer in layers:
            site = self._manifest.sites[layer]
            self._count(terms, _weights(site), 4)
        scratch: Counter[tuple[int, ...]] = Counter()
        for site in (self._manifest.sites[layer] for layer in layers):
            one: Counter[tuple[int, ...]] = Counter()
            self._count(one, _weights(site), 4 * _SCRATCH_COPIES)
            scratch |= one
        return dict(terms + scratch)

    def _count(self, terms: Counter[tuple[int, ...]], shape: tuple[Extent, ...], item_bytes: int) -> None:
        """Adds an array; an axis whose length no input tells is counted at its greatest.

        A derived extent of at most T / stride + offset / stride makes two products out of each.
        """
        products: list[tuple[tuple[int, ...], Fraction]] = [((), Fraction(item_bytes))]
        for extent in shape:
            derived = self._derived.get(extent) if isinstance(extent, str) else None
            if derived is not None and derived.source in self._given:
                at, share = self._index[derived.source], Fraction(1, derived.stride)
                more = max(derived.offset, 0) * share
                products = [
                    *(((*axes, at), size * share) for axes, size in products),
                    *((axes, size * more) for axes, size in products if more),
                ]
            elif extent in self._given:
                products = [((*axes, self._index[str(extent)]), size) for axes, size in products]
            else:
                length = self._longest[extent] if isinstance(extent, str) else extent
                products = [(axes, size * length) for axes, size in products]
        for axes, size in products:
            terms[tuple(sorted(axes))] += ceil(size)


def _weights(site: SiteSpec) -> tuple[Extent, ...]:
    """The shape of a site's weights, without the batch axis."""
    return (site.heads, site.query_axis, site.columns)
