"""Compares weights @ value with each site's own output, in the layout that the graph has them in.

A site is a place in a graph that computes attention.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from attnserve_server.attention.bands import band_keys
from attnserve_server.conversion.base.sites import (
    Factor,
    Learnt,
    Linear,
    Probabilities,
    Recurrent,
    Scores,
    Tappable,
    WeightAxes,
    Windows,
    value_and_output,
)
from attnserve_server.conversion.base.tolerances import product_error
from attnserve_server.conversion.learning.layout import product_of
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.domain.values import Array

_ORDER = ("batch", "head", "one", "window", "query", "key")
"""Roles of factors, in the order of (B, H, M, W)."""


def product_errors(
    checker: GraphRunner,
    sites: Mapping[str, Tappable],
    learnt: Mapping[str, Learnt],
    weights: Mapping[str, Array],
    feeds: Mapping[str, Array],
) -> dict[str, float]:
    """Return the greatest difference of weights @ value from each site's own output, for the given weights.

    Differences are relative to the greatest value of a site where that exceeds 1.

    Args:
        checker: a graph whose outputs include every site's value and output.
        sites: by name, those of `weights` among them.
        learnt: the layouts of sites with `Probabilities`.
        weights: (B, H, L, S) by site, or (B, H, L, W) where it has windows.
        feeds: the inputs that the weights were computed for.

    Raises:
        BuildRefused: the graph does not run.
        ValueError: the shapes of weights and value do not fit.
    """
    inner = _inner_values(checker, {name: sites[name] for name in weights}, feeds)
    errors: dict[str, float] = {}
    for name, own in weights.items():
        value, output = inner[name]
        match sites[name]:
            case Probabilities() as site:
                layout, windows = learnt[name].layout, learnt[name].windows
                if windows is None:
                    errors[name] = _error_in_layout(site, layout.axes, own, value, output)
                else:
                    errors[name] = band_error(windows, layout.axes, own, value, output)
            case Scores() | Linear() | Recurrent() as site:
                errors[name] = product_error(site, own, value, output)
    return errors


def _inner_values(
    checker: GraphRunner, sites: Mapping[str, Tappable], feeds: Mapping[str, Array]
) -> dict[str, tuple[Array, Array]]:
    """Return the value and the output of each site, as the graph computes them for these feeds."""
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


def _error_in_layout(site: Probabilities, axes: WeightAxes, weights: Array, value: Array, output: Array) -> float:
    """Compare in the graph's layout; rows that the graph itself makes NaN do not count.

    Where a quantizer rounds the product, one of its steps does not count, and the product is bounded as it bounds it.
    """
    product = product_of(site)
    operands = [in_graph_layout(axes, weights.astype(np.float64)), value.astype(np.float64)]
    if site.position == 1:
        operands.reverse()
    again = np.einsum(product.equation, *operands) * product.node.attributes.get_float("alpha", 1.0)
    levels = site.levels
    if levels is not None:
        again = np.clip(again, levels.low, levels.high)
    difference = np.where(np.isnan(output), 0.0, again - output.astype(np.float64))
    greatest = max(float(np.abs(difference).max(initial=0.0)) - (0.0 if levels is None else levels.step), 0.0)
    return greatest / max(1.0, float(np.abs(np.nan_to_num(value, posinf=0.0, neginf=0.0)).max()))


def in_graph_layout(axes: WeightAxes, weights: Array) -> Array:
    """Rearrange weights (B, H, L, S) into the axes that the graph has them in: the inverse of `arranged`."""
    factors = [factor for axis in axes for factor in axis]
    batch, _, queries, keys = weights.shape
    sizes = {"batch": batch, "query": queries, "key": keys, "one": 1}
    order = sorted(range(len(factors)), key=lambda place: _ORDER.index(factors[place].role))
    split = weights.reshape([factors[place].size or sizes[factors[place].role] for place in order])
    apart = split.transpose(np.argsort(order))
    shape: list[int] = []
    at = 0
    for axis in axes:
        shape.append(int(np.prod(apart.shape[at : at + len(axis)], dtype=int)))
        at += len(axis)
    return apart.reshape(shape)


def arranged(array: Array, axes: WeightAxes, batch: int) -> Array:
    """Rearrange an array in the graph's layout into (B, H, M, W), where M counts the rows of all windows in order.

    Args:
        array: with `axes`, or broadcast to them.
        axes: the factors of each axis.
        batch: B.

    Raises:
        ValueError: the array has another number of axes, or sizes that the factors do not divide.
    """
    sizes: list[int] = []
    for factors, size in zip(axes, array.shape, strict=True):
        known = [batch if factor.role == "batch" else factor.size for factor in factors]
        rest = size // int(np.prod([each for each in known if each is not None], dtype=int))
        sizes += [rest if each is None else each for each in known]
    roles = [factor.role for each in axes for factor in each]
    order = sorted(range(len(roles)), key=lambda place: _ORDER.index(roles[place]))
    apart = array.reshape(sizes).transpose(order)
    heads = int(np.prod([size for size, role in zip(sizes, roles, strict=True) if role == "head"], dtype=int))
    return apart.reshape(batch, heads, -1, apart.shape[-1])


def band_error(windows: Windows, axes: WeightAxes, weights: Array, value: Array, output: Array) -> float:
    """Return the greatest difference of weights @ value, over the keys of the band, from the site's own output.

    The result also covers the differences of one key's values in the windows that hold it: if a column represented
    another key than its band states, they would differ. Both are relative to the greatest value where that exceeds 1.

    Args:
        windows: of the site.
        axes: of the graph's own weights.
        weights: (B, H, L, W).
        value: in the graph's layout, window by window.
        output: in the graph's layout, the product of the graph's own weights with the value.
    """
    batch, _, queries, width = weights.shape
    of_vectors = (*axes[:-2], (Factor("query"),), (Factor("key"),))
    values = arranged(value.astype(np.float64), of_vectors, batch)
    outputs = arranged(output.astype(np.float64), of_vectors, batch)
    count = values.shape[2] // width
    at = np.array(windows.order or range(queries))
    window_of = at // (outputs.shape[2] // count)
    held = values.reshape(*values.shape[:2], count, width, -1)[:, :, window_of]
    error = np.abs(np.nan_to_num(np.einsum("bhqw,bhqwd->bhqd", weights, held) - outputs[:, :, at])).max(initial=0.0)
    keys = band_keys(windows.band, queries, queries)
    rows, columns = np.nonzero(keys >= 0)
    named = held[:, :, rows, columns]
    of_key = np.zeros((*values.shape[:2], queries, values.shape[-1]))
    of_key[:, :, keys[rows, columns]] = named
    apart = np.abs(named - of_key[:, :, keys[rows, columns]]).max(initial=0.0)
    return float(max(error, apart)) / max(1.0, float(np.abs(values).max(initial=0.0)))
