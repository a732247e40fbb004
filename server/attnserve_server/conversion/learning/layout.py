"""Finds, by running a graph, what the axes of an attention site's weights are: batch, heads, windows, queries, keys.

The sizes of an axis in three runs show what it follows; a fourth run with the rows of the batch in another order shows
which factor of a folded axis is slower. For weights (4 heads folded with the batch) and two sets of lengths, 5 and 7:

    run         rows  length   shape of the weights
    fewer       2     5        ( 8, 5, 5)
    base        3     5        (12, 5, 5)
    longer      3     7        (12, 7, 7)
    reordered   3     5        (12, 5, 5), rows 1, 2, 0 of the batch of `base`

    axis 2   softmax runs over it                                                            key
    axis 1   the value that the weights multiply does not have it                            query
    axis 0   8 : 12 = 2 : 3, so it follows the batch; 12 / 3 = 4 are left at both lengths    batch and head, 4

    If axis 0 is (batch, head), `reordered` is `base` with its blocks of 4 in the order 1, 2, 0; if it is
    (head, batch), each block of 3 is in that order. The order that explains the numbers is taken.

What is left of an axis without the batch is heads if it is the same at both lengths, and windows if it grows. A site is
a place in a graph that computes attention. One that is not understood becomes `Untappable`, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np

from attnserve_server.conversion.base.sites import Factor, Layout, Probabilities, Untappable, WeightAxes, heads_in
from attnserve_server.conversion.graphs.contraction import Contraction
from attnserve_server.conversion.learning.layout_runs import ORDER, Runs, fixed_keys, lengthen, run_all
from attnserve_server.conversion.probing.feeds import Lengths, Sampler
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.domain.values import Array

_SAME = 1e-3
"""The greatest change of a row's weights with its place in the batch: far above rounding, far below another row's."""
KEYS_OF_ALL_ROWS = "its keys follow the batch"
"""The reason of a site whose queries attend to keys of other rows."""


class _NotUnderstood(Exception):
    """The reason why a layout is unknown."""


def layouts_of(
    runner: GraphRunner, sampler: Sampler, sites: Mapping[str, Probabilities], lengths: tuple[Lengths, Lengths]
) -> dict[str, Layout | Untappable]:
    """Return for each site what the axes of its weights are, or the reason why they are unknown.

    Args:
        runner: a graph whose outputs include every site's weights and value.
        sampler: draws sequences for it.
        sites: the sites' own weights, by the site's name.
        lengths: two sets of lengths, in which no symbol has the same length.

    Raises:
        BuildRefused: the graph does not run on such lengths.
    """
    names = {name: (str(own.weights.name), str(own.value.name)) for name, own in sites.items()}
    fetches = sorted({value for pair in names.values() for value in pair})
    runs = run_all(runner, sampler, lengths, fetches)
    suspects = {
        weights: keys for name, (weights, _) in names.items() if (keys := fixed_keys(sites[name], runs[weights]))
    }
    if suspects and lengths[0]:
        lengthen(runner, sampler, runs, suspects)
    return {name: _layout(sites[name], runs[weights], runs[value].base) for name, (weights, value) in names.items()}


def product_of(site: Probabilities) -> Contraction:
    """Return the product of weights and value."""
    product = Contraction.of(site.product)
    assert product is not None  # the finder chose the node because it is one
    return product


def _layout(site: Probabilities, weights: Runs, value: Array) -> Layout | Untappable:
    try:
        axes = _axes(weights, site.key_axis, site.query_axes)
        if weights.reordered is not None:
            axes = _in_order(axes, weights.base, weights.reordered)
    except _NotUnderstood as why:
        return Untappable(str(why))
    layout = Layout(axes, kv_heads=heads_in(axes), head_dim=value.shape[-1], ambiguous=_ambiguous(weights, axes))
    if layout.windowed:
        # `learning.windows` finds which query each row of a window is, and which key each column.
        return layout
    return replace(layout, kv_heads=_kv_heads(axes, weights.base.shape, value, site))


def _ambiguous(runs: Runs, axes: WeightAxes) -> Literal["", "queries", "all"]:
    """Return whether heads may be windows: there are several, and queries, or keys too, follow no axis of an input."""
    if heads_in(axes) == 1 or _follows(runs, axes, "query"):
        return ""
    return "queries" if _follows(runs, axes, "key") else "all"


def _follows(runs: Runs, axes: WeightAxes, role: Literal["query", "key"]) -> bool:
    """Whether an axis of the weights is as long as one of the inputs."""
    place = next(place for place, factors in enumerate(axes) if factors[0].role == role)
    sizes = runs.base.shape[place], runs.longer.shape[place]
    short, long = runs.lengths
    return any(sizes == (short[symbol], long[symbol]) for symbol in short)


def _axes(runs: Runs, key_axis: int, query_axes: tuple[int, ...]) -> WeightAxes:
    """Return the factors of every axis; in an axis that folds the batch, the batch comes first, which is a guess."""
    rank = runs.base.ndim
    if {runs.fewer.ndim, runs.longer.ndim} != {rank}:
        raise _NotUnderstood("its weights have no fixed number of axes")
    own = [axis + rank for axis in query_axes]
    key = key_axis + rank
    parts = [_part(runs, place) for place in range(rank)]
    if parts[key][0]:
        raise _NotUnderstood(KEYS_OF_ALL_ROWS)
    batches = [place for place in range(rank) if parts[place][0]]
    query = _query(own, parts, key)
    if times := _multiple(parts[query][1], runs.lengths):
        raise _NotUnderstood(f"its queries are {times} times as many as an input's: heads may be folded into them")
    shared = [place for place in range(rank) if place not in {key, query}]
    if runs.reordered is None:
        batches = [_lone_batch(shared, parts)]
    if len(batches) != 1:
        raise _NotUnderstood(f"{len(batches) or 'no'} axes of its weights follow the batch, where one should")
    axes: list[tuple[Factor, ...]] = []
    for place in range(rank):
        _, sizes = parts[place]
        if place == key:
            axes.append((Factor("key"),))
        elif place == query:
            axes.append((Factor("query"),))
        elif place in batches:
            axes.append((Factor("batch"), *_rest(sizes, folded=len(shared) == 1)))
        else:
            axes.append(_rest(sizes, folded=True) or (Factor("one", 1),))
    return tuple(axes)


def _part(runs: Runs, place: int) -> tuple[bool, tuple[int, int]]:
    """Return whether an axis follows the batch, and its sizes without the batch at both sets of lengths."""
    fewer, base, longer = runs.fewer.shape[place], runs.base.shape[place], runs.longer.shape[place]
    if fewer == base:
        return False, (base, longer)
    if fewer * 3 != base * 2 or longer % 3:
        raise _NotUnderstood(f"axis {place} of its weights follows the batch in no simple way")
    return True, (base // 3, longer // 3)


def _query(own: list[int], parts: list[tuple[bool, tuple[int, int]]], key: int) -> int:
    """Return, of the axes that the value does not share, the one that follows lengths, else the nearest to the keys."""
    dynamic = [place for place in own if parts[place][1][0] != parts[place][1][1]]
    if len(dynamic) > 1:
        raise _NotUnderstood("several axes of its weights may be that of its queries")
    query = dynamic[0] if dynamic else min(own, key=lambda place: abs(place - key))
    if parts[query][0]:
        raise _NotUnderstood("its queries are folded into the batch")
    return query


def _multiple(sizes: tuple[int, int], lengths: tuple[Lengths, Lengths]) -> int:
    """Return how many times an input's axis the sizes are, at both sets of lengths; 0 where that is not above 1."""
    for symbol, short in lengths[0].items():
        times = sizes[0] // short
        if times > 1 and sizes == (times * short, times * lengths[1][symbol]):
            return times
    return 0


def _lone_batch(shared: list[int], parts: list[tuple[bool, tuple[int, int]]]) -> int:
    """Return the axis of a batch that is always 1: one of size 1, else the first, folded with the heads."""
    if not shared:
        raise _NotUnderstood("its weights have no axis for the batch")
    return next((place for place in shared if parts[place][1] == (1, 1)), shared[0])


def _rest(sizes: tuple[int, int], *, folded: bool) -> tuple[Factor, ...]:
    """Return what an axis counts besides the batch: heads, whose number is the same at any length, or windows.

    Args:
        sizes: at both sets of lengths, without the batch.
        folded: False for an axis that folds the batch beside another axis of heads; its other factor is windows.
    """
    if sizes == (1, 1):
        return ()
    if sizes[0] != sizes[1]:
        return (Factor("window"),)
    return (Factor("head" if folded else "window", sizes[0]),)


def _in_order(axes: WeightAxes, base: Array, reordered: Array) -> WeightAxes:
    """Put batch and heads into the order that explains how weights move with the rows of the batch."""
    at = next(place for place, factors in enumerate(axes) if factors[0].role == "batch")
    orders = [axes[at]] if len(axes[at]) == 1 else [axes[at], axes[at][::-1]]
    errors = [_error(order, np.moveaxis(base, at, 0), np.moveaxis(reordered, at, 0)) for order in orders]
    best = int(np.argmin(errors))
    if not errors[best] <= _SAME:
        raise _NotUnderstood("its weights do not follow the rows of the batch")
    return (*axes[:at], orders[best], *axes[at + 1 :])


def _error(order: tuple[Factor, ...], base: Array, reordered: Array) -> float:
    rows = len(ORDER)
    sizes = [rows if factor.role == "batch" else base.shape[0] // rows for factor in order]
    expected = np.take(base.reshape(*sizes, *base.shape[1:]), ORDER, axis=[f.role for f in order].index("batch"))
    difference = expected.astype(np.float64) - reordered.reshape(expected.shape)
    return float(np.abs(np.nan_to_num(difference)).max(initial=0.0))


def _kv_heads(axes: WeightAxes, weights: tuple[int, ...], value: Array, site: Probabilities) -> int:
    """Return the heads that the value has for itself: the axes that it shares with the weights, without repetitions."""
    product = product_of(site)
    heads = 1
    for place, factors in enumerate(axes):
        same = product.counterpart(site.position, place - len(axes))
        if same is None or -same > value.ndim or value.shape[same] != weights[place]:
            continue
        for at, factor in enumerate(factors):
            if factor.role == "head" and factor.size is not None:
                first = np.moveaxis(value, same, 0)
                apart = first.reshape(*_sizes(factors, weights[place]), -1)
                heads *= _distinct_heads(np.moveaxis(apart, at, 0))
    return heads


def _sizes(factors: tuple[Factor, ...], size: int) -> list[int]:
    """Return the size of each factor of an axis; the one that is not known is what the others leave."""
    known = int(np.prod([factor.size or 1 for factor in factors], dtype=int))
    return [factor.size or size // known for factor in factors]


def _distinct_heads(values: Array) -> int:
    """Return how many of the heads (H, ...) are left when each one replaces the equal ones that follow it."""
    heads = len(values)
    for count in range(1, heads):
        if heads % count == 0 and np.array_equal(values, np.repeat(values[:: heads // count], heads // count, axis=0)):
            return count
    return heads
