"""From a graph's layout of windows to rows in the order of the windows."""

from __future__ import annotations

import numpy as np

from attnserve_server.conversion.base.sites import WeightAxes
from attnserve_server.domain.values import Array

_ORDER = {"batch": 0, "head": 1, "one": 2, "window": 3, "query": 4, "key": 5}


def arranged(array: Array, axes: WeightAxes, batch: int) -> Array:
    """An array in a graph's layout as (B, H, M, W), M counting the rows of all windows in order.

    Args:
        array: with `axes`, or broadcast to them.
        axes: what each counts.
        batch: B.
    """
    sizes: list[int] = []
    for factors, size in zip(axes, array.shape, strict=True):
        known = [batch if factor.role == "batch" else factor.extent for factor in factors]
        rest = size // int(np.prod([each for each in known if each is not None], dtype=int))
        sizes += [rest if each is None else each for each in known]
    roles = [factor.role for each in axes for factor in each]
    order = sorted(range(len(roles)), key=lambda place: _ORDER[roles[place]])
    apart = array.reshape(sizes).transpose(order)
    heads = int(np.prod([size for size, role in zip(sizes, roles, strict=True) if role == "head"], dtype=int))
    return apart.reshape(batch, heads, -1, apart.shape[-1])
