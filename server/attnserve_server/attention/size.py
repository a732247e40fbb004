"""How many bytes of tensor data an answer will hold, told before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from attnserve_server.attention.bands import band_of, key_counts
from attnserve_server.attention.units import AxisPlan, plan_axes
from attnserve_server.domain.selection import EffectiveSelection, HeadReduction, LayerReduction
from attnserve_server.domain.values import AxisUnits
from attnserve_server.model.bands import BandSpec
from attnserve_server.model.manifest import SiteSpec

ROW_OFFSET_BYTES, KEY_BYTES, RESIDUAL_BYTES = 8, 4, 4
"""int64, int32 and float32: the other tensors of links, and the keys of a band."""


def predicted_bytes(effective: EffectiveSelection, sites: Sequence[SiteSpec], units: Mapping[str, AxisUnits]) -> int:
    """Bytes of tensor data in the answer for one sequence.

    Args:
        effective: the resolved selection, checked against the units.
        sites: the model's sites.
        units: the units of every axis that a chosen site names.

    Returns:
        The sum of the sizes of all tensors of all maps: exact, but with `min_weight` an upper bound, since how many
        weights reach it is known only afterwards. Costs time and memory in proportion to the sequence's length.
    """
    plans = plan_axes(effective, sites, units)
    total = 0
    for index, layer in enumerate(effective.layers):
        heads = len(effective.heads[index]) if effective.head_reduction is HeadReduction.EACH else 1
        queries, keys = plans[sites[layer].query_axis], plans[sites[layer].key_axis]
        alone = effective.layer_reduction is LayerReduction.EACH
        joined = [sites[layer]] if alone else [sites[each] for each in effective.layers]
        band = band_of(effective, joined, keys.positions)
        if band is None:
            total += _map_bytes(effective, heads * queries.row_count, keys.column_count)
        else:
            total += _band_bytes(effective, heads, queries, keys, band)
        if not alone:
            break  # joined layers come back as one map, of the axes and heads of any of them
    return total


def _band_bytes(effective: EffectiveSelection, heads: int, queries: AxisPlan, keys: AxisPlan, band: BandSpec) -> int:
    rows = heads * queries.row_count
    if not effective.sparse:
        return rows * band.width * effective.dtype.item_bytes + queries.row_count * band.width * KEY_BYTES
    counts = key_counts(band, queries.positions, keys.positions, queries.rows)
    links = heads * int(np.minimum(counts, effective.top_k or band.width).sum())
    return _link_bytes(effective, rows, links)


def _map_bytes(effective: EffectiveSelection, rows: int, keys: int) -> int:
    if not effective.sparse:
        return rows * keys * effective.dtype.item_bytes
    return _link_bytes(effective, rows, rows * (min(effective.top_k, keys) if effective.top_k else keys))


def _link_bytes(effective: EffectiveSelection, rows: int, links: int) -> int:
    return (rows + 1) * ROW_OFFSET_BYTES + links * (KEY_BYTES + effective.dtype.item_bytes) + rows * RESIDUAL_BYTES
