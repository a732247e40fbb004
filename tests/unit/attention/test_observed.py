"""Row features counted by bucket, and their drift, against NumPy from the definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from attnserve_server.attention.bands import band_keys, columns_of
from attnserve_server.attention.observed import LEAST, LEAST_SHARE, WINDOW, Drift, Observed, observe, stability_index
from attnserve_server.domain.values import AttentionFeature
from attnserve_server.model.bands import SlidingBand
from attnserve_server.model.manifest import SiteSpec
from attnserve_server.model.report import ReferenceFeatures
from attnserve_server.observability.spec import FEATURES

ENTROPY = AttentionFeature.ENTROPY
BUCKETS = {feature: spec.buckets for feature, spec in FEATURES.items()}


def site(name: str = "a", kind: str = "self", **fields: object) -> SiteSpec:
    given = {"layer": 0, "form": "dense", "operator": "x", "heads": 3, "kv_heads": 3, "head_dim": 4}
    axes = {"query_axis": "seq", "key_axis": "seq", "items_input": "i", "weights_output": "w"}
    return SiteSpec.model_validate({"name": name, "kind": kind, **given, **axes, **fields})


def weights(heads: int, queries: int, keys: int, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).gamma(0.5, size=(heads, queries, keys)).astype(np.float32)
    return drawn / drawn.sum(axis=2, keepdims=True)


def expected(given: np.ndarray, offset: int = 0) -> dict[AttentionFeature, np.ndarray]:
    """The features of all rows, in float64, from their formulas."""
    exact = given.astype(np.float64)
    places = np.arange(exact.shape[2])
    distances = np.abs(np.arange(exact.shape[1])[:, np.newaxis] + offset - places)
    return {
        AttentionFeature.ENTROPY: -np.sum(np.where(exact > 0, exact * np.log(np.maximum(exact, 1e-300)), 0), axis=2),
        AttentionFeature.TOP1_SHARE: exact.max(axis=2),
        AttentionFeature.FIRST_TOKEN: exact[:, :, 0],
        AttentionFeature.MEAN_DISTANCE: (exact * distances).sum(axis=2),
    }


def counted(values: np.ndarray, feature: AttentionFeature) -> list[int]:
    """Rows by bucket, as NumPy's own histogram has them, whose buckets take their lower bound and not the upper."""
    edges = [-math.inf, *(-bound for bound in reversed(BUCKETS[feature])), math.inf]
    return np.histogram(-values.ravel(), edges)[0][::-1].tolist()


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (5, 9)])
def test_counts_and_sums_are_those_of_the_definitions(queries: int, keys: int) -> None:
    given = weights(3, queries, keys)
    found = observe(given, site(), queries, keys).features
    for feature, values in expected(given, offset=keys - queries).items():
        counts, total = found[feature]
        assert counts.tolist() == counted(values, feature)
        # Sums of at most 45 terms in float64.
        assert total == pytest.approx(values.sum(), rel=1e-12)


def test_a_band_counts_as_the_same_rows_over_all_keys() -> None:
    band = SlidingBand(kind="sliding", before=2, after=1)
    columns = band_keys(band, 9, 9)
    rows = weights(3, 9, 9)
    inside = np.zeros((9, 9), bool)
    for at, keys in enumerate(columns):
        inside[at, keys[keys >= 0]] = True
    rows = np.where(inside, rows, 0).astype(np.float32)
    windowed = site(form="windowed", band=band)
    found = observe(columns_of(rows, columns), windowed, 9, 9).features
    whole = observe(rows, site(), 9, 9).features
    for feature, (counts, total) in whole.items():
        assert found[feature][0].tolist() == counts.tolist()
        assert found[feature][1] == pytest.approx(total, rel=1e-12)


def test_cross_attention_has_no_distances_and_rows_of_nan_are_left_out() -> None:
    given = weights(3, 4, 6)
    given[0, 0, 0] = -0.1  # of linear attention: a row without an entropy
    found = observe(given, site(kind="cross", key_axis="other"), 4, 6).features
    assert AttentionFeature.MEAN_DISTANCE not in found
    assert found[ENTROPY][0].sum() == 3 * 4 - 1
    assert found[AttentionFeature.TOP1_SHARE][0].sum() == 3 * 4


def test_the_index_is_that_of_the_formula_and_zero_for_equal_distributions() -> None:
    one, other = np.array([10, 30, 60, 0]), np.array([40, 40, 10, 10])
    p, q = np.maximum(one / 100, LEAST_SHARE), other / 100
    assert stability_index(one, other) == pytest.approx(((p - q) * np.log(p / q)).sum(), rel=1e-12)
    assert stability_index(other, one) == pytest.approx(stability_index(one, other), rel=1e-12)
    assert stability_index(one * 7, one) == 0


def reference(counts: dict[str, list[int]], buckets: tuple[float, ...] = BUCKETS[ENTROPY]) -> ReferenceFeatures:
    sites = {name: {ENTROPY: tuple(own)} for name, own in counts.items()}
    return ReferenceFeatures(inputs="x", sequences=1, buckets={ENTROPY: buckets}, sites=sites)


def rows(name: str, *places: int) -> Observed:
    """The rows of one sequence, by bucket."""
    counts = np.bincount(places, minlength=len(BUCKETS[ENTROPY]) + 1)
    return Observed(site(name), {ENTROPY: (counts, 0.0)})


EVEN = [10] * (len(BUCKETS[ENTROPY]) + 1)


def test_drift_is_the_mean_over_sites_and_needs_enough_sequences() -> None:
    drift = Drift(reference({"a": EVEN, "b": EVEN}))
    everywhere = range(len(EVEN))
    for number in range(LEAST):
        assert math.isnan(drift.of(ENTROPY))
        assert drift.add(rows("a", *everywhere)) is (number == LEAST - 1)
    assert drift.of(ENTROPY) == 0
    for _ in range(LEAST):
        drift.add(rows("b", 3))
    alone = np.bincount([3] * LEAST, minlength=len(EVEN))
    assert drift.of(ENTROPY) == pytest.approx(stability_index(alone, np.array(EVEN)) / 2, rel=1e-12)
    assert drift.of(ENTROPY) > 0.25
    assert not drift.add(rows("unknown", 3)), "a site without a reference"


def test_drift_forgets_what_was_before_the_last_two_windows() -> None:
    drift = Drift(reference({"a": EVEN}))
    for _ in range(WINDOW):
        drift.add(rows("a", 3))
    before = drift.of(ENTROPY)
    for _ in range(2 * WINDOW):
        drift.add(rows("a", *range(len(EVEN))))
    assert before > 1
    assert drift.of(ENTROPY) == 0


def test_buckets_of_another_release_give_no_drift() -> None:
    drift = Drift(reference({"a": [1, 2]}, (0.5,)))
    for _ in range(LEAST):
        drift.add(rows("a", 3))
    assert math.isnan(drift.of(ENTROPY))
    with pytest.raises(ValueError, match="reference_features: a has 3 counts"):
        reference({"a": [1, 2, 3]}, (0.5,))
