"""Features: numbers computed from each row of weights, which an answer holds in place of the row.

The input is rows in float64 as a map would have them, after words and special tokens. No selection that `resolve`
accepts makes a function here fail.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from attnserve_server.attention.bands import BandKeys
from attnserve_server.attention.units import Indices
from attnserve_server.domain.values import AttentionFeature

ITEM_BYTES = 4
"""Bytes of one feature in an answer: float32."""

Rows = npt.NDArray[np.float64]


def features_of(
    weights: Rows, features: Sequence[AttentionFeature], queries: Indices, keys: Indices | BandKeys
) -> npt.NDArray[np.float32]:
    """Compute features of rows w over the keys j of a query i.

        entropy        -sum of w[j] ln w[j], in nats; NaN in a row with a weight below 0
        top1_share     max of w[j], at least 0
        first_token    w of the first key
        mean_distance  sum of w[j] |i - j|

    A row of zeros has 0 for each of them. Rows that sum to less than 1, for example beside an attention sink, are
    used as they are.

    Args:
        weights: (H, L, K). Not modified.
        features: F features, in order.
        queries: the unit i of each row, (L,).
        keys: the unit j of each column, ascending, (K,); or (L, K) if rows differ, -1 for a column without a key.

    Returns:
        float32 (H, L, F). The sums are in float64.

    Source: Clark et al. 2019, "What Does BERT Look At? An Analysis of BERT's Attention", section 3.3, for entropy;
    Voita et al. 2019, "Analyzing Multi-Head Self-Attention", section 4, for the greatest weight; Xiao et al. 2024,
    "Efficient Streaming Language Models with Attention Sinks", section 3.1, for the first token; Vig and Belinkov 2019,
    "Analyzing the Structure of Attention in a Transformer Language Model", for distance.
    """
    return exact_features(weights, features, queries, keys).astype(np.float32)


def exact_features(
    weights: Rows, features: Sequence[AttentionFeature], queries: Indices, keys: Indices | BandKeys
) -> Rows:
    """Compute features of rows, as `features_of`, in float64."""
    if keys.ndim == 2:
        # The filling of a window is no key: what it takes is in no map over all keys either.
        weights = np.where(keys >= 0, weights, 0)
    return np.stack([_feature(weights, feature, queries, keys) for feature in features], axis=2)


def _feature(weights: Rows, feature: AttentionFeature, queries: Indices, keys: Indices | BandKeys) -> Rows:
    """One feature of each row, (H, L)."""
    made: Rows
    match feature:
        case AttentionFeature.ENTROPY:
            return _entropy(weights)
        case AttentionFeature.TOP1_SHARE:
            made = weights.max(axis=2, initial=0)
        case AttentionFeature.FIRST_TOKEN if keys.ndim == 2:
            made = np.where(keys == 0, weights, 0).sum(axis=2)
        case AttentionFeature.FIRST_TOKEN:
            made = weights[:, :, :1].sum(axis=2)
        case AttentionFeature.MEAN_DISTANCE:
            distances = np.abs(queries[:, np.newaxis] - keys)
            made = (weights * distances).sum(axis=2)
    return made


def _entropy(weights: Rows) -> Rows:
    """-sum of w ln w over the last axis; NaN in a row with a weight below 0."""
    logarithms = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    logarithms *= weights
    # Adding 0 converts the -0 of a row with a single weight of 1.
    entropy: Rows = 0 - logarithms.sum(axis=2)
    entropy[(weights < 0).any(axis=2)] = np.nan
    return entropy
