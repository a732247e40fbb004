"""The answer to a selection: the maps of one sequence, made from its raw weights, and the predicted size of the maps.

The steps follow the order that the contract states: heads, layers, words, special tokens, rows, features or links,
dtype. A map is the weights of one attention site, or of several joined ones, (heads, queries, keys). A selection that
`resolve` and `check_units` have accepted does not fail here. A site is a place in a model that computes attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from attnserve_server.attention.bands import BandKeys, Weights, band_keys, by_key, columns_of, key_counts, lay_out
from attnserve_server.attention.features import ITEM_BYTES, features_of
from attnserve_server.attention.reduce import (
    F,
    encode,
    encode_scores,
    join_heads,
    links_of,
    mean_of_layers,
    merge_keys,
    merge_queries,
    renormalise,
    rollout,
    take,
)
from attnserve_server.attention.units import AxisPlan, Indices, plan_axes
from attnserve_server.domain.values import (
    Array,
    AttentionAnswer,
    AttentionMap,
    AttentionUnit,
    AxisUnits,
    EffectiveSelection,
    HeadReduction,
    LayerReduction,
    Links,
    RowFeatures,
    SpecialTokens,
)
from attnserve_server.model.bands import BandSpec
from attnserve_server.model.manifest import SiteSpec

ROW_OFFSET_BYTES, KEY_BYTES, RESIDUAL_BYTES = 8, 4, 4
"""Item sizes of the other tensors of links (int64, int32, float32); a band has one int32 key per column."""


def answer(
    weights: Mapping[int, Array],
    effective: EffectiveSelection,
    sites: Sequence[SiteSpec],
    units: Mapping[str, AxisUnits],
) -> AttentionAnswer:
    """Return the maps that a selection requests of one sequence.

    Rows that the selection does not request are dropped first, not at the step where the contract names rows. This
    changes no number: heads, layer means, words and renormalisation all work within a row, and the rows of a word's
    pieces are kept together. `reduce.rollout` gives the reason for rollout.

    Args:
        weights: by layer, float32 (H, L, S), all heads, cropped to the sequence's own lengths; (H, L, W) if the tap
            writes a band. (1, L, S) or (1, L, W): the mean over all heads, where that is all that the selection reads.
            Scores, if the selection is of scores. Not modified.
        effective: the resolved selection, checked against the units.
        sites: the model's sites.
        units: the units of every axis of a chosen site.

    Returns:
        The maps in the order of their layers, with the units of each axis after merging. Every array is C-contiguous
        and owns its memory.
    """
    plans = plan_axes(effective, sites, units)
    chosen = [sites[layer] for layer in effective.layers]
    maps: tuple[AttentionMap, ...]
    if effective.layer_reduction is LayerReduction.EACH:
        maps = tuple(
            _map(_site_weights(weights, effective, sites, plans, index)[0], effective, [site], [heads], plans)
            for index, (site, heads) in enumerate(zip(chosen, effective.heads, strict=True))
        )
    else:
        joined = _join_layers(weights, effective, sites, plans)
        maps = (_map(joined, effective, chosen, effective.heads, plans),)
    return AttentionAnswer(axes=tuple(plan.merged for plan in plans.values()), maps=maps)


def predicted_bytes(effective: EffectiveSelection, sites: Sequence[SiteSpec], units: Mapping[str, AxisUnits]) -> int:
    """Predict the bytes of tensor data in the answer for one sequence.

    Time and memory grow with the sequence's length, not with its square.

    Args:
        effective: the resolved selection, checked against the units.
        sites: the model's sites.
        units: the units of every axis of a chosen site.

    Returns:
        The size of all tensors of all maps. Exact without `min_weight`; an upper bound with it, because the number of
        weights that reach it is known only after the run.
    """
    plans = plan_axes(effective, sites, units)
    total = 0
    for index, layer in enumerate(effective.layers):
        heads = len(effective.heads[index]) if effective.head_reduction is HeadReduction.EACH else 1
        queries, keys = plans[sites[layer].query_axis], plans[sites[layer].key_axis]
        alone = effective.layer_reduction is LayerReduction.EACH
        joined = [sites[layer]] if alone else [sites[each] for each in effective.layers]
        band = _band_of(effective, joined, keys.positions)
        if effective.features:
            total += heads * queries.row_count * len(effective.features) * ITEM_BYTES
        elif band is None:
            total += _map_bytes(effective, heads * queries.row_count, keys.column_count)
        else:
            total += _band_bytes(effective, heads, queries, keys, band)
        if not alone:
            break  # joined layers give one map, with the axes and heads of any of them
    return total


def _band_of(effective: EffectiveSelection, joined: Sequence[SiteSpec], keys: int) -> BandSpec | None:
    """The band of the map of one site, or of several joined sites; None if the map is over all keys.

    Words, dropped special tokens and rollout need rows over all keys, and so does a mean over different bands. If the
    band has S columns or more, rows over all S keys are the smaller map.
    """
    bands = {site.band for site in joined}
    whole_rows = (
        effective.unit is AttentionUnit.WORD
        or effective.special_tokens is SpecialTokens.DROP
        or effective.layer_reduction is LayerReduction.ROLLOUT
    )
    band = None if whole_rows or len(bands) > 1 else bands.pop()
    return band if band is not None and band.width < keys else None


def _site_weights(
    weights: Mapping[int, Array],
    effective: EffectiveSelection,
    sites: Sequence[SiteSpec],
    plans: Mapping[str, AxisPlan],
    index: int,
    *,
    all_rows: bool = False,
) -> tuple[Weights, Indices | None]:
    """The weights of the chosen site at `index` with heads joined, (heads, rows, S), and the positions of the rows.

    (heads, rows, W) if the map is a band.
    """
    layer = effective.layers[index]
    site = sites[layer]
    queries, keys = plans[site.query_axis], plans[site.key_axis]
    rows = None if all_rows else queries.row_positions()
    # One head is that of a site with one, or the mean of all, which is its own mean.
    heads = np.array(effective.heads[index] if len(weights[layer]) > 1 else (0,), dtype=np.intp)
    joined = join_heads(weights[layer], heads, effective.head_reduction, rows)
    if site.band is not None:
        is_band = _band_of(effective, _joined(effective, sites, layer), keys.positions) is not None
        if is_band == site.whole_rows:
            columns = band_keys(site.band, queries.positions, keys.positions, rows)
            if is_band:
                joined = columns_of(joined, columns, missing=-np.inf if effective.scores else 0)
            else:
                joined = lay_out(joined, columns, keys.positions)
    return joined, rows


def _joined(effective: EffectiveSelection, sites: Sequence[SiteSpec], layer: int) -> list[SiteSpec]:
    """The sites whose map includes the site at `layer`."""
    layers = (layer,) if effective.layer_reduction is LayerReduction.EACH else effective.layers
    return [sites[each] for each in layers]


def _join_layers(
    weights: Mapping[int, Array],
    effective: EffectiveSelection,
    sites: Sequence[SiteSpec],
    plans: Mapping[str, AxisPlan],
) -> Weights:
    last = len(effective.layers) - 1
    if effective.layer_reduction is LayerReduction.MEAN:
        return mean_of_layers(_site_weights(weights, effective, sites, plans, index)[0] for index in range(last + 1))

    def downwards() -> Iterator[tuple[Weights, Indices | None]]:
        for index in range(last, -1, -1):
            yield _site_weights(weights, effective, sites, plans, index, all_rows=index < last)

    return rollout(downwards())


def _map(
    weights: Weights,
    effective: EffectiveSelection,
    sites: Sequence[SiteSpec],
    heads: Sequence[tuple[int, ...]],
    plans: Mapping[str, AxisPlan],
) -> AttentionMap:
    """The steps after heads and layers are joined: words, special tokens, features or links, and dtype."""
    queries, keys = plans[sites[0].query_axis], plans[sites[0].key_axis]
    band, columns = _band_of(effective, sites, keys.positions), None
    if band is not None:
        columns = band_keys(band, queries.positions, keys.positions, queries.rows)
    elif not effective.features:
        weights = _over_units(weights, effective, queries, keys)
    content: Array | Links | RowFeatures
    if effective.features:
        content = _features(weights, effective, queries, keys, columns)
    elif effective.sparse:
        weights, names = (weights, keys.columns) if columns is None else by_key(weights, columns)
        content = links_of(weights, names, effective.top_k, effective.min_weight, effective.dtype)
    else:
        content = encode_scores(weights, effective.dtype) if effective.scores else encode(weights, effective.dtype)
    kinds, forms = {site.kind for site in sites}, {site.form for site in sites}
    return AttentionMap(
        sites=tuple(site.name for site in sites),
        layer=sites[0].layer if len(sites) == 1 else -1,
        # Joined sites get the most general kind and form among them.
        kind=next(kind for kind in ("cross", "self", "causal") if kind in kinds),
        form=next(form for form in ("dense", "windowed", "linear") if form in forms),
        heads=_head_names(effective, heads),
        query_axis=sites[0].query_axis,
        key_axis=sites[0].key_axis,
        query_indices=_names(queries.rows),
        key_indices=_names(keys.columns),
        content=content,
        band_keys=None if effective.sparse or effective.features else columns,
    )


def _over_units(
    weights: npt.NDArray[F], effective: EffectiveSelection, queries: AxisPlan, keys: AxisPlan
) -> npt.NDArray[F]:
    """Merge the rows and columns of each unit, and drop special tokens: (H, rows, S) to (H, units, units)."""
    if effective.scores:  # never words
        return take(weights, keys.columns, axis=2)
    weights = merge_queries(weights, queries.row_sizes())
    weights = merge_keys(weights, keys.starts)
    return renormalise(weights, keys.columns) if effective.special_tokens is SpecialTokens.DROP else weights


def _features(
    weights: Weights, effective: EffectiveSelection, queries: AxisPlan, keys: AxisPlan, columns: BandKeys | None
) -> RowFeatures:
    """The features of each row, (H, units, features), in float64 from the weights on, one head at a time."""
    rows = _all_or(queries.rows, queries)
    if queries.merged.axis != keys.merged.axis:
        # After a past, the queries are the last units of the keys' axis. Distances between other axes are refused.
        rows = rows + (keys.merged.length - queries.merged.length)
    over: Indices | BandKeys
    over = _all_or(keys.columns, keys) if columns is None else columns
    made = np.empty((len(weights), len(rows), len(effective.features)), dtype=np.float32)
    for head in range(len(weights)):
        exact = weights[head : head + 1].astype(np.float64)
        if columns is None:
            exact = _over_units(exact, effective, queries, keys)
        made[head] = features_of(exact, effective.features, rows, over)[0]
    return RowFeatures(made)


def _all_or(chosen: Indices | None, plan: AxisPlan) -> Indices:
    """The chosen units of an axis; None: all of them."""
    return np.arange(plan.merged.length) if chosen is None else chosen


def _head_names(effective: EffectiveSelection, heads: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The heads in a map. Joined sites may have different numbers of heads only if their heads are joined as well."""
    if effective.head_reduction is HeadReduction.EACH or len(set(heads)) == 1:
        return heads[0]
    return tuple(sorted({head for each in heads for head in each}))


def _names(indices: Indices | None) -> tuple[int, ...]:
    return () if indices is None else tuple(indices.tolist())


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
