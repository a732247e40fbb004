"""Weights of a band against what the graph computes with them."""

from __future__ import annotations

import numpy as np

from attnserve_server.attention.bands import band_keys
from attnserve_server.conversion.base.sites import Factor, WeightAxes, Windows
from attnserve_server.conversion.learning.windows.arrange import arranged
from attnserve_server.domain.values import Array


def band_error(windows: Windows, axes: WeightAxes, weights: Array, value: Array, output: Array) -> float:
    """How far weights @ value, over the keys that the band names, are from the site's own output.

    And how far the values of one key are from each other in the windows that it is in: were a column to stand for
    another key than its band says, they would differ. In parts of the greatest value, where that is beyond 1.

    Args:
        windows: of the site.
        axes: of the graph's own weights.
        weights: (B, H, L, W).
        value: as the graph has it, window by window.
        output: likewise, the product of the graph's own weights with it.
    """
    batch, _, queries, width = weights.shape
    of_vectors = (*axes[:-2], (Factor("query"),), (Factor("key"),))
    values = arranged(value.astype(np.float64), of_vectors, batch)
    outputs = arranged(output.astype(np.float64), of_vectors, batch)
    count = values.shape[2] // width
    at = np.array(windows.order or range(queries))
    window_of = at // (outputs.shape[2] // count)
    seen = values.reshape(*values.shape[:2], count, width, -1)[:, :, window_of]
    error = np.abs(np.nan_to_num(np.einsum("bhqw,bhqwd->bhqd", weights, seen) - outputs[:, :, at])).max(initial=0.0)
    keys = band_keys(windows.band, queries, queries)
    rows, columns = np.nonzero(keys >= 0)
    named = seen[:, :, rows, columns]
    of_key = np.zeros((*values.shape[:2], queries, values.shape[-1]))
    of_key[:, :, keys[rows, columns]] = named
    apart = np.abs(named - of_key[:, :, keys[rows, columns]]).max(initial=0.0)
    return float(max(error, apart)) / max(1.0, float(np.abs(values).max(initial=0.0)))
