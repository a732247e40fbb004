"""One sequence's raw weights to its answer: the steps of a selection, in the order that the contract states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from attnserve_server.attention.bands import band_keys, band_of, by_key, columns_of, lay_out
from attnserve_server.attention.links import encode, links_of
from attnserve_server.attention.reduce import (
    Weights,
    join_heads,
    mean_of_layers,
    merge_keys,
    merge_queries,
    renormalise,
    rollout,
)
from attnserve_server.attention.units import AxisPlan, Indices, plan_axes
from attnserve_server.domain.selection import EffectiveSelection, HeadReduction, LayerReduction, SpecialTokens
from attnserve_server.domain.values import Array, AttentionAnswer, AttentionMap, AxisUnits, Links
from attnserve_server.model.manifest import SiteSpec


def answer(
    weights: Mapping[int, Array],
    effective: EffectiveSelection,
    sites: Sequence[SiteSpec],
    units: Mapping[str, AxisUnits],
) -> AttentionAnswer:
    """The maps that a selection asks of one sequence.

    Rows that nobody asked for are left out before anything else, not at the step where the contract names them: heads,
    layer means, words and the division by what is left all work within a row (a word's row being the mean of its
    pieces' rows, which are kept together), so this changes no number; rollout says for itself why it may.

    Args:
        weights: layer -> (H, L, S) float32, all heads, cropped to the sequence's own lengths; (H, L, W) where the tap
            writes a band. Not written to.
        effective: the resolved selection, checked against the units.
        sites: the model's sites.
        units: the units of every axis that a chosen site names.

    Returns:
        The maps in order of their layers, every array C-contiguous and its own, with the units of each axis after
        merging.
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


def _site_weights(
    weights: Mapping[int, Array],
    effective: EffectiveSelection,
    sites: Sequence[SiteSpec],
    plans: Mapping[str, AxisPlan],
    index: int,
    *,
    all_rows: bool = False,
) -> tuple[Weights, Indices | None]:
    """Of the chosen site at `index`: its weights with heads joined, (heads, rows, S), and the positions of the rows.

    A band stays one, (heads, rows, W), where its map is to be one.
    """
    layer = effective.layers[index]
    site = sites[layer]
    queries, keys = plans[site.query_axis], plans[site.key_axis]
    rows = None if all_rows else queries.row_positions()
    heads = np.array(effective.heads[index], dtype=np.intp)
    joined = join_heads(weights[layer], heads, effective.head_reduction, rows)
    if site.band is not None:
        is_band = band_of(effective, _joined(effective, sites, layer), keys.positions) is not None
        if is_band == site.whole_rows:
            columns = band_keys(site.band, queries.positions, keys.positions, rows)
            joined = columns_of(joined, columns) if is_band else lay_out(joined, columns, keys.positions)
    return joined, rows


def _joined(effective: EffectiveSelection, sites: Sequence[SiteSpec], layer: int) -> list[SiteSpec]:
    """The sites whose map the site at `layer` goes into."""
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
    """Words, special tokens, links and dtype: what is left to do once heads and layers are joined."""
    queries, keys = plans[sites[0].query_axis], plans[sites[0].key_axis]
    band, columns = band_of(effective, sites, keys.positions), None
    if band is not None:
        columns = band_keys(band, queries.positions, keys.positions, queries.rows)
    else:
        weights = merge_queries(weights, queries.row_sizes())
        weights = merge_keys(weights, keys.starts)
        if effective.special_tokens is SpecialTokens.DROP:
            weights = renormalise(weights, keys.columns)
    content: Array | Links
    if effective.sparse:
        weights, names = (weights, keys.columns) if columns is None else by_key(weights, columns)
        content = links_of(weights, names, effective.top_k, effective.min_weight, effective.dtype)
    else:
        content = encode(weights, effective.dtype)
    kinds, forms = {site.kind for site in sites}, {site.form for site in sites}
    return AttentionMap(
        sites=tuple(site.name for site in sites),
        layer=sites[0].layer if len(sites) == 1 else -1,
        # Joined sites go by the most general kind and form among them.
        kind=next(kind for kind in ("cross", "self", "causal") if kind in kinds),
        form=next(form for form in ("dense", "windowed", "linear") if form in forms),
        heads=_head_names(effective, heads),
        query_axis=sites[0].query_axis,
        key_axis=sites[0].key_axis,
        query_indices=_names(queries.rows),
        key_indices=_names(keys.columns),
        content=content,
        band_keys=None if effective.sparse else columns,
    )


def _head_names(effective: EffectiveSelection, heads: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The heads that went in. Joined sites may differ in number of heads only where heads are joined as well."""
    if effective.head_reduction is HeadReduction.EACH or len(set(heads)) == 1:
        return heads[0]
    return tuple(sorted({head for each in heads for head in each}))


def _names(indices: Indices | None) -> tuple[int, ...]:
    return () if indices is None else tuple(indices.tolist())
