"""Row features of raw weights, counted by bucket, and how far their distribution has drifted from a reference.

The weights are of one sequence and one site, with all heads and tokens, so that all counts are of the same kind: what a
request selects of them changes nothing. Not for scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from attnserve_server.attention.bands import BandKeys, Weights, band_keys
from attnserve_server.attention.features import exact_features
from attnserve_server.attention.units import Indices
from attnserve_server.domain.values import AttentionFeature
from attnserve_server.model.manifest import SiteSpec
from attnserve_server.model.report import ReferenceFeatures
from attnserve_server.observability.spec import FEATURES

Counts = npt.NDArray[np.int64]

WINDOW: Final = 200
"""Sequences of a window of drift. The drift is that of the newest window, which may not be full, and the one before."""
LEAST: Final = 50
"""Sequences below which a site has no drift. On MiniLM, 52 sentences that are not in the reference measured 0.02 at
most, 158 of them 0.03, and 224 lines of code after these 0.55."""
LEAST_SHARE: Final = 1e-4
"""The share of an empty bucket, because the index has a logarithm of it."""

_CHUNK: Final = 2**18
"""Weights that are computed at a time: 2 MiB in float64, and few calls where heads are small."""


@dataclass(frozen=True, slots=True)
class Observed:
    """The rows of one site of one sequence, but for those of NaN: by feature, counts by bucket, (B,), and their sum."""

    site: SiteSpec
    features: Mapping[AttentionFeature, tuple[Counts, float]]


def observe(weights: Weights, site: SiteSpec, queries: int, keys: int) -> Observed:
    """Count the features of all rows of a site, in float64, some heads at a time.

    Args:
        weights: (H, L, S), or (H, L, W) for a band. Not modified.
        site: the site.
        queries: L.
        keys: S.

    Returns:
        Counts in the buckets of `FEATURES`. Distances are left out for cross-attention, whose axes differ.
    """
    features = [one for one in AttentionFeature if one is not AttentionFeature.MEAN_DISTANCE or site.kind != "cross"]
    rows: Indices = np.arange(keys - queries, keys) if site.kind != "cross" else np.arange(queries)
    columns: Indices | BandKeys = np.arange(keys)
    if site.band is not None and not site.whole_rows:
        columns = band_keys(site.band, queries, keys)
    made = {one: (np.zeros(len(FEATURES[one].buckets) + 1, np.int64), 0.0) for one in features}
    step = max(1, _CHUNK // max(1, weights[0].size))
    for head in range(0, len(weights), step):
        exact = exact_features(weights[head : head + step].astype(np.float64), features, rows, columns)
        for at, one in enumerate(features):
            values = exact[:, :, at][np.isfinite(exact[:, :, at])]
            counts, total = made[one]
            # The first bound that a value does not exceed, as in a histogram of Prometheus.
            places = np.searchsorted(FEATURES[one].buckets, values, side="left")
            made[one] = counts + np.bincount(places, minlength=len(counts)), total + float(values.sum())
    return Observed(site, made)


def stability_index(counts: Counts, reference: Counts) -> float:
    """Return the population stability index of two distributions over the same buckets, at least 0.

        sum over buckets of (p - q) ln (p / q)

    p and q are the shares of a bucket, at least `LEAST_SHARE`. It is the sum of both Kullback-Leibler divergences.

    Source: Siddiqi 2006, "Credit Risk Scorecards", chapter 9, also for the limits of 0.1 and 0.25; Kullback and Leibler
    1951, "On Information and Sufficiency", for the divergence.
    """
    share, expected = (np.maximum(one / max(int(one.sum()), 1), LEAST_SHARE) for one in (counts, reference))
    return float(((share - expected) * np.log(share / expected)).sum())


class Drift:
    """The drift of one model's row features from its reference. One thread only."""

    def __init__(self, reference: ReferenceFeatures) -> None:
        """Begin without sequences. Sites, and features with other buckets than this release has, are left out."""
        self._reference = {
            site: {
                one: np.array(counts, np.int64)
                for one, counts in features.items()
                if reference.buckets[one] == FEATURES[one].buckets
            }
            for site, features in reference.sites.items()
        }
        self._windows: dict[str, list[tuple[int, dict[AttentionFeature, Counts]]]] = {}

    def add(self, observed: Observed) -> bool:
        """Add the rows of one site of one sequence. Return whether the site has a drift by now."""
        windows = self._windows.setdefault(observed.site.name, [(0, {})])
        count, sums = windows[-1]
        if count >= WINDOW:
            windows.append((0, {}))
            del windows[:-2]
            count, sums = windows[-1]
        for one, (counts, _) in observed.features.items():
            sums[one] = sums.get(one, 0) + counts
        windows[-1] = count + 1, sums
        return observed.site.name in self._reference and sum(count for count, _ in windows) >= LEAST

    def of(self, feature: AttentionFeature) -> float:
        """Return the mean index of a feature over the sites with enough sequences; NaN if there is none."""
        found = []
        for site, windows in self._windows.items():
            reference = self._reference.get(site, {}).get(feature)
            if reference is None or sum(count for count, _ in windows) < LEAST:
                continue
            counts = sum((sums[feature] for _, sums in windows if feature in sums), np.zeros_like(reference))
            found.append(stability_index(counts, reference))
        return math.fsum(found) / len(found) if found else math.nan
