"""Weights against what a graph itself computes with them: weights @ value beside each site's own output."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from attnserve_server.conversion.base.sites import (
    Learnt,
    Linear,
    Probabilities,
    Scores,
    Tappable,
    WeightAxes,
    value_and_output,
)
from attnserve_server.conversion.base.tolerances import product_error
from attnserve_server.conversion.finders.decomposed_products import Product
from attnserve_server.conversion.learning.windows import band_error
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.domain.values import Array


def product_errors(
    checker: GraphRunner,
    sites: Mapping[str, Tappable],
    learnt: Mapping[str, Learnt],
    weights: Mapping[str, Array],
    feeds: Mapping[str, Array],
) -> dict[str, float]:
    """For each site whose weights are given, how far weights @ value is from its own output.

    Args:
        checker: a graph that gives every site's value and output.
        sites: by name, those of `weights` among them.
        learnt: the layouts of sites that have their own weights.
        weights: (B, H, L, S) by site, or (B, H, L, W) where it has windows.
        feeds: what they were computed for.
    """
    inner = _inner_values(checker, {name: sites[name] for name in weights}, feeds)
    errors: dict[str, float] = {}
    for name, own in weights.items():
        value, output = inner[name]
        match sites[name]:
            case Probabilities() as site:
                errors[name] = _error_of_own(site, learnt[name], own, value, output)
            case Scores() | Linear() as site:
                errors[name] = product_error(site, own, value, output)
    return errors


def _inner_values(
    checker: GraphRunner, sites: Mapping[str, Tappable], feeds: Mapping[str, Array]
) -> dict[str, tuple[Array, Array]]:
    """Value and own output of each site, as the graph computes them for these feeds."""
    constants: dict[str, Array] = {}
    places: dict[str, tuple[str, str]] = {}
    for name, site in sites.items():
        value, output = value_and_output(site)
        places[name] = str(value.name), str(output.name)
        if value.const_value is not None:
            constants[str(value.name)] = value.const_value.numpy()
    known = {**constants, **feeds}
    fetches: Collection[str] = sorted({name for pair in places.values() for name in pair} - set(known))
    known.update(checker.run(feeds, fetches) if fetches else {})
    return {name: (known[value], known[output]) for name, (value, output) in places.items()}


def _error_of_own(site: Probabilities, learnt: Learnt, weights: Array, value: Array, output: Array) -> float:
    if learnt.windows is not None:
        return band_error(learnt.windows, learnt.layout.axes, weights, value, output)
    return _decomposed_error(site, learnt.layout.axes, weights, value, output)


def _decomposed_error(
    probabilities: Probabilities, axes: WeightAxes, weights: Array, value: Array, output: Array
) -> float:
    """In parts of the greatest value, where that is beyond 1; rows that the graph itself makes NaN do not count."""
    product = Product.of(probabilities.product)
    assert product is not None
    own = in_graph_layout(axes, weights.astype(np.float64))
    operands = [own, value.astype(np.float64)]
    if probabilities.position == 1:
        operands.reverse()
    again = np.einsum(product.equation, *operands) * product.node.attributes.get_float("alpha", 1.0)
    difference = np.where(np.isnan(output), 0.0, again - output.astype(np.float64))
    return float(np.abs(difference).max(initial=0.0)) / max(
        1.0, float(np.abs(np.nan_to_num(value, posinf=0.0, neginf=0.0)).max())
    )


def in_graph_layout(axes: WeightAxes, weights: Array) -> Array:
    """Weights (B, H, L, S) in the layout that the graph has them in."""
    factors = [factor for axis in axes for factor in axis]
    batch, _, queries, keys = weights.shape
    extents = {"batch": batch, "query": queries, "key": keys, "one": 1}
    order = sorted(
        range(len(factors)), key=lambda place: ("batch", "head", "one", "query", "key").index(factors[place].role)
    )
    sizes = [factors[place].extent or extents[factors[place].role] for place in order]
    apart = weights.reshape(sizes).transpose(np.argsort(order))
    shape: list[int] = []
    at = 0
    for axis in axes:
        shape.append(int(np.prod(apart.shape[at : at + len(axis)], dtype=int)))
        at += len(axis)
    return apart.reshape(shape)
