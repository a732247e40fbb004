"""Weights @ value against the graph's own output, and weights in the graph's layout and out of it.

A graph may have weights as (B * H, L, S), or window by window. Arrays and graphs are small and made by hand. The error
is the greatest difference of the two, so that wrong weights have a large one.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnserve_server.conversion.base.sites import Factor, Layout, Learnt, Probabilities, WeightAxes, Windows
from attnserve_server.conversion.learning.products import arranged, band_error, in_graph_layout, product_errors
from attnserve_server.conversion.learning.sites import tappable_of
from attnserve_server.model.bands import BlockBand, SlidingBand
from batch_graphs import graph
from opened import exposed

Array = np.ndarray[Any, np.dtype[Any]]

BATCH, HEADS, QUERIES, KEYS = 2, 3, 4, 5
LETTERS = {"b": Factor("batch"), "h": Factor("head", HEADS), "q": Factor("query"), "k": Factor("key")}


def axes_of(layout: str) -> WeightAxes:
    """`bh q k`: batch and head folded into one axis, the batch slower; 1 is an axis of size 1."""
    return tuple(
        tuple(Factor("one", 1) if letter == "1" else LETTERS[letter] for letter in axis) for axis in layout.split()
    )


def in_layout(weights: Array, layout: str) -> Array:
    """Weights (B, H, L, S) in a layout, by its definition."""
    letters = layout.replace(" ", "").replace("1", "")
    sizes = {"b": BATCH, "h": HEADS, "q": QUERIES, "k": KEYS, "1": 1}
    apart = np.einsum(f"bhqk->{letters}", weights)
    return apart.reshape([int(np.prod([sizes[letter] for letter in axis])) for axis in layout.split()])


LAYOUTS = [
    *(" ".join(order) for order in permutations("bhqk")),
    *("bh q k", "hb q k", "q bh k", "b 1 h q k", "q k hb"),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_go_into_the_graphs_layout_and_back(layout: str) -> None:
    weights = np.random.default_rng(0).normal(size=(BATCH, HEADS, QUERIES, KEYS))
    own = in_graph_layout(axes_of(layout), weights)
    np.testing.assert_array_equal(own, in_layout(weights, layout))
    np.testing.assert_array_equal(arranged(own, axes_of(layout), BATCH), weights)


def test_rows_of_windows_are_arranged_in_the_order_of_the_windows() -> None:
    # (windows * B, H, queries of a window, columns) of 3 windows of 2 queries.
    axes = ((Factor("window"), Factor("batch")), (Factor("head", HEADS),), (Factor("query"),), (Factor("key"),))
    by_row = np.random.default_rng(0).normal(size=(BATCH, HEADS, 3, 2, 4))
    own = np.einsum("bhwqk->wbhqk", by_row).reshape(3 * BATCH, HEADS, 2, 4)
    np.testing.assert_array_equal(arranged(own, axes, BATCH), by_row.reshape(BATCH, HEADS, 6, 4))


FOLDED = """
    q4 = Reshape(x, apart) qh = Transpose<perm=[0, 2, 1, 3]>(q4) q = Reshape(qh, folded)
    k4 = Reshape(y, apart) kh = Transpose<perm=[0, 2, 1, 3]>(k4) k = Reshape(kh, folded)
    kt = Transpose<perm=[0, 2, 1]>(k)
    s = MatMul(q, kt)
    p = Softmax<axis=-1>(s)
    z = {product}
"""
"""Weights (B * H, L, S) of 2 heads."""


@pytest.mark.parametrize("product", ["MatMul(p, k)", 'Einsum<equation="nks, nqk -> nqs">(k, p)'])
def test_the_error_is_that_of_the_weights(product: str, tmp_path: Path) -> None:
    constants = {"apart": np.array([0, 5, 2, 4]), "folded": np.array([-1, 5, 4])}
    nodes = FOLDED.format(product=product)
    model = graph(f"g (float[b, 5, 8] x, float[b, 5, 8] y) => (float z) {{ {nodes} }}", **constants)
    runner, found = exposed(model, tmp_path)
    (name, site), *_ = found.items()
    assert isinstance(site.attention, Probabilities)
    rng = np.random.default_rng(0)
    feeds = {key: rng.normal(size=(3, 5, 8)).astype(np.float32) for key in ("x", "y")}
    own = runner.run(feeds, ["p"])["p"]
    axes = ((Factor("batch"), Factor("head", 2)), (Factor("query"),), (Factor("key"),))
    layout = Layout(axes, kv_heads=2, head_dim=4)
    weights = {name: arranged(own, axes, 3)}
    learnt = {name: Learnt(layout)}
    errors = product_errors(runner, tappable_of(found), learnt, weights, feeds)
    assert errors[name] < 1e-6  # float32 sums
    # Positive control: the heads of two rows exchanged.
    swapped = {name: Learnt(replace(layout, axes=((Factor("head", 2), Factor("batch")), *axes[1:])))}
    assert product_errors(runner, tappable_of(found), swapped, weights, feeds)[name] > 0.1


def blocks(order: tuple[int, ...] = ()) -> tuple[Windows, WeightAxes]:
    """Windows of two queries that attend to their own block and the one before it."""
    axes = ((Factor("batch"),), (Factor("window"),), (Factor("query"),), (Factor("key"),))
    return Windows(BlockBand(block=2, before=1, after=0), "x", 6, order), axes


def windowed() -> tuple[Array, Array, Array]:
    """Weights (B, 1, 6, 4), and value and output (B, windows, rows, D) as a graph has them; zeros precede the first."""
    rng = np.random.default_rng(0)
    sequence = np.concatenate([np.zeros((2, 2, 4)), rng.normal(size=(2, 6, 4))], axis=1)
    value = np.stack([sequence[:, start : start + 4] for start in (0, 2, 4)], axis=1)
    weights = rng.dirichlet(np.ones(4), size=(2, 1, 6))
    output = np.einsum("bwqk,bwkd->bwqd", weights.reshape(2, 3, 2, 4), value)
    return weights, value, output


def test_a_band_that_is_right_has_no_error() -> None:
    windows, axes = blocks()
    assert band_error(windows, axes, *windowed()) < 1e-12  # float64 sums


def test_wrong_weights_and_wrong_keys_of_a_band_have_an_error() -> None:
    windows, axes = blocks()
    weights, value, output = windowed()
    assert band_error(windows, axes, weights[..., ::-1], value, output) > 0.1
    # Under a wrong band, the values of one key differ from query to query.
    wrong = replace(windows, band=SlidingBand(before=3, after=0))
    assert band_error(wrong, axes, weights, value, output) > 0.1


def test_rows_in_another_order_are_compared_with_their_queries() -> None:
    order = (1, 0, 3, 2, 5, 4)
    windows, axes = blocks(order)
    weights, value, output = windowed()
    exchanged = output[:, :, ::-1]  # the two rows of each window
    assert band_error(windows, axes, weights, value, exchanged) < 1e-12
    assert band_error(replace(windows, order=()), axes, weights, value, exchanged) > 0.1
