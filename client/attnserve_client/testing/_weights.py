"""Encoding of the fake server's attention weights: whole, as bands, as links, or as features of their rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from attnserve.v1 import attention_pb2

from attnserve_client._selection import AttentionSelection
from attnserve_client._tensors import to_tensor

Array = npt.NDArray[Any]


def band_keys(length: int, window: int) -> Array:
    """Return the key of each column of a band, int32 (L, 2 * window + 1); -1 past either end."""
    keys = np.arange(length)[:, None] + np.arange(-window, window + 1)
    return np.where((keys >= 0) & (keys < length), keys, -1).astype(np.int32)


def fill(
    target: attention_pb2.AttentionMap,
    weights: Array,
    keys: list[int],
    selection: AttentionSelection,
    band: Array | None,
) -> None:
    """Write weights (H, L, S) into a message: as links if the selection limits them, else as a band if there is one."""
    if not selection.top_k and not selection.min_weight:
        if band is not None:
            outside = -np.inf if selection.values == "scores" else 0
            weights = np.where(band >= 0, np.take_along_axis(weights, np.maximum(band, 0)[None], axis=2), outside)
            target.band_keys.CopyFrom(to_tensor("", band))
        target.weights.CopyFrom(to_tensor("", _encoded(weights, selection.dtype)))
        return
    rows = weights.reshape(-1, weights.shape[-1])
    offsets, columns, kept, residual = [0], list[int](), list[float](), list[float]()
    for number, row in enumerate(rows):
        order = np.argsort(-row, kind="stable")
        if band is not None:
            order = order[np.isin(order, band[number % len(band)])]
        order = order[: selection.top_k or len(row)]
        order = order[row[order] >= selection.min_weight]
        columns.extend(keys[place] for place in order)
        kept.extend(row[order])
        residual.append(row.sum() - row[order].sum())
        offsets.append(len(columns))
    target.links.row_offsets.CopyFrom(to_tensor("", np.array(offsets, dtype=np.int64)))
    target.links.keys.CopyFrom(to_tensor("", np.array(columns, dtype=np.int32)))
    target.links.weights.CopyFrom(to_tensor("", _encoded(np.array(kept, dtype=np.float32), selection.dtype)))
    left_out = np.array(residual, dtype=np.float32).reshape(weights.shape[:2])
    target.links.residual.CopyFrom(to_tensor("", left_out))


def fill_features(
    target: attention_pb2.AttentionMap,
    weights: Array,
    queries: list[int],
    keys: list[int],
    selection: AttentionSelection,
) -> None:
    """Write the selected features of each row of weights (H, L, S) into a message.

    Args:
        target: The message.
        weights: The rows, over all keys.
        queries: The unit of each row.
        keys: The unit of each column.
        selection: A selection with features.
    """
    distances = abs(np.array(queries)[:, None] - np.array(keys)[None, :])
    logarithms = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    of_rows = {
        "entropy": -(weights * logarithms).sum(axis=2),
        "top1_share": weights.max(axis=2, initial=0),
        "first_token": weights[:, :, :1].sum(axis=2),
        "mean_distance": (weights * distances).sum(axis=2),
    }
    made = np.stack([of_rows[name] for name in selection.features], axis=2)
    target.features.CopyFrom(to_tensor("", made.astype(np.float32)))


def _encoded(weights: Array, dtype: str | None) -> Array:
    if dtype == "uint8":
        return np.asarray(np.rint(weights * 255), dtype=np.uint8)
    return weights.astype(np.float16 if dtype == "float16" else np.float32)
