"""Features of rows against their formulas in plain loops over float64; scores; and the fields that features exclude.

A feature is a number computed from a row of weights, such as its entropy, that is returned in place of the row. Scores
are the numbers whose softmax is the weights. A field that features exclude raises InvalidRequest. Scores of a named
site that has none raise AttentionUnavailable. A site is a place in a model that computes attention.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from attnserve_server.attention import answer, check_units, predicted_bytes, resolve
from attnserve_server.attention.bands import band_keys
from attnserve_server.domain.errors import AttentionUnavailable, InvalidRequest
from attnserve_server.domain.values import (
    AttentionFeature,
    AttentionSelection,
    AttentionUnit,
    AttentionValue,
    AxisUnits,
    HeadReduction,
    LayerReduction,
    RowFeatures,
    SpecialTokens,
    WeightDtype,
)
from attnserve_server.model.bands import SlidingBand
from attnserve_server.model.manifest import SiteSpec

ALL = tuple(AttentionFeature)
HEADS, LENGTH = 3, 7
UNITS = AxisUnits(
    axis="seq",
    length=LENGTH,
    texts=("[CLS]", "a", "met", "##form", "##in", "b", "[SEP]"),
    special=(True, False, False, False, False, False, True),
    word_ids=(-1, 0, 1, 1, 1, 2, -1),
    words=("a", "metformin", "b"),
)
WORDS = [[0], [1], [2, 3, 4], [5], [6]]
# The reference sums in float64, as the code does; the answer is rounded once to float32 (6e-8 of numbers below 8).
TOLERANCE = 1e-6


def site(**fields):
    plain = {"kind": "self", "form": "dense", "query_axis": "seq", "key_axis": "seq"}
    taps = {"items_input": "attention_items.x", "weights_output": "attention.x"}
    sizes = {"heads": HEADS, "kv_heads": HEADS, "head_dim": 8}
    return SiteSpec(**{"name": "x", "layer": 0, "operator": "Attention", **plain, **taps, **sizes, **fields})


def random_weights(columns=LENGTH, seed=0):
    scores = np.exp(3 * np.random.default_rng(seed).standard_normal((HEADS, LENGTH, columns)))
    return (scores / scores.sum(axis=2, keepdims=True)).astype(np.float32)


def reference(row, query, keys):
    """The four features of one row, by the formulas of the contract."""
    entropy = -sum(weight * math.log(weight) for weight in row if weight > 0)
    distance = sum(weight * abs(query - key) for weight, key in zip(row, keys, strict=True))
    return [entropy, max(row, default=0), row[0] if len(row) else 0, distance]


def features(weights, chosen=None, *, features=ALL, **selection):
    """The features of one site, and a check that their size was predicted exactly."""
    sites = [chosen or site()]
    effective = resolve(AttentionSelection(features=features, **selection), sites, "m")
    units = {"seq": UNITS}
    check_units(effective, sites, units, "m", 0)
    [found] = answer({0: weights}, effective, sites, units).maps
    assert isinstance(found.content, RowFeatures)
    assert found.content.values.dtype == np.float32
    assert predicted_bytes(effective, sites, units) == found.content.values.nbytes
    assert found.band_keys is None
    return found


def test_features_of_tokens_equal_their_formulas():
    weights = random_weights()
    expected = [
        [reference(row.astype(float), query, range(LENGTH)) for query, row in enumerate(head)] for head in weights
    ]
    found = features(weights)
    np.testing.assert_allclose(found.content.values, expected, rtol=0, atol=TOLERANCE)
    assert found.query_indices == found.key_indices == ()


def test_features_come_in_the_order_of_the_selection_for_the_chosen_heads_and_rows():
    weights = random_weights()
    whole = features(weights).content.values
    some = features(
        weights,
        features=(AttentionFeature.FIRST_TOKEN, AttentionFeature.ENTROPY),
        heads=(2, 0),
        queries=(-1, 3),
    )
    np.testing.assert_array_equal(some.content.values, whole[[2, 0]][:, [6, 3]][:, :, [2, 0]])
    assert (some.heads, some.query_indices) == ((2, 0), (6, 3))


def test_features_of_words_are_those_of_merged_rows():
    weights = random_weights()
    expected = np.empty((HEADS, len(WORDS), 4))
    for head, row in np.ndindex(HEADS, len(WORDS)):
        pieces = weights[head].astype(float)[WORDS[row]].mean(axis=0)
        expected[head, row] = reference([sum(pieces[key] for key in word) for word in WORDS], row, range(len(WORDS)))
    found = features(weights, unit=AttentionUnit.WORD)
    np.testing.assert_allclose(found.content.values, expected, rtol=0, atol=TOLERANCE)


def test_dropped_special_tokens_leave_rows_of_sum_1_and_distances_of_the_text():
    weights = random_weights()
    plain = range(1, LENGTH - 1)
    expected = np.empty((HEADS, len(plain), 4))
    for head, (place, query) in [(head, each) for head in range(HEADS) for each in enumerate(plain)]:
        row = weights[head, query].astype(float)[list(plain)]
        expected[head, place] = reference(row / row.sum(), query, plain)
    found = features(weights, special_tokens=SpecialTokens.DROP)
    np.testing.assert_allclose(found.content.values, expected, rtol=0, atol=TOLERANCE)
    assert found.key_indices == tuple(plain)


@pytest.mark.parametrize("whole_rows", [False, True])
def test_features_of_a_band_are_those_of_its_rows_over_all_keys(whole_rows):
    band = SlidingBand(before=1, after=2, global_keys=0)
    columns = band_keys(band, LENGTH, LENGTH)
    weights = np.where(columns >= 0, random_weights(columns.shape[1]), 0).astype(np.float32)
    dense = np.zeros((HEADS, LENGTH, LENGTH), np.float32)
    for head, row, column in np.ndindex(*weights.shape):
        if columns[row, column] >= 0:
            dense[head, row, columns[row, column]] = weights[head, row, column]
    windowed = site(form="windowed", band=band, whole_rows=whole_rows)
    found = features(dense if whole_rows else weights, windowed)
    np.testing.assert_allclose(found.content.values, features(dense).content.values, rtol=0, atol=TOLERANCE)


def test_the_filling_of_a_window_counts_to_no_feature():
    band = SlidingBand(before=1, after=1)
    weights = np.full((HEADS, LENGTH, band.width), 1 / band.width, np.float32)
    first = features(weights, site(form="windowed", band=band)).content.values[0, 0]
    # The first column of the first row has no key: two weights of 1/3 are left, for keys 0 and 1.
    np.testing.assert_allclose(first, [2 / 3 * math.log(3), 1 / 3, 1 / 3, 1 / 3], rtol=0, atol=TOLERANCE)


def test_a_row_of_zeros_and_a_row_of_one_key_have_an_entropy_of_0():
    weights = np.zeros((HEADS, LENGTH, LENGTH), np.float32)
    weights[0, 0, 0] = 1
    values = features(weights).content.values
    np.testing.assert_array_equal(values[0, 0], [0, 1, 1, 0])
    assert not np.signbit(values).any()
    assert not values[1:].any()


def test_entropy_is_not_a_number_where_a_weight_is_below_0():
    weights = random_weights()
    weights[1, 2, 3] = -0.01
    entropy = features(weights).content.values[:, :, 0]
    assert np.argwhere(np.isnan(entropy)).tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("selection", "field"),
    [
        ({"head_reduction": HeadReduction.MEAN}, "head_reduction"),
        ({"layer_reduction": LayerReduction.MEAN}, "layer_reduction"),
        ({"layer_reduction": LayerReduction.ROLLOUT}, "layer_reduction"),
        ({"top_k": 2}, "top_k"),
        ({"min_weight": 0.5}, "min_weight"),
        ({"dtype": WeightDtype.UINT8}, "dtype"),
        ({"features": (ALL[0], ALL[1], ALL[0])}, "features[2]"),
    ],
)
def test_fields_that_features_exclude_are_refused(selection, field):
    resolve(AttentionSelection(features=ALL), [site()], "m")
    with pytest.raises(InvalidRequest) as refused:
        resolve(AttentionSelection(**{"features": ALL, **selection}), [site()], "m")
    assert [each.field for each in refused.value.violations] == [f"attention.{field}"]


@pytest.mark.parametrize("fields", [{"kind": "cross"}, {"key_axis": "source"}])
def test_distances_between_two_sequences_are_refused(fields):
    with pytest.raises(InvalidRequest, match="mean_distance needs one sequence"):
        resolve(AttentionSelection(features=ALL), [site(**fields)], "m")
    assert resolve(AttentionSelection(features=ALL[:3]), [site(**fields)], "m").features == ALL[:3]


def scores_of(scores, chosen=None, **selection):
    sites = [chosen or site(scores_output="attention_scores.x")]
    effective = resolve(AttentionSelection(values=AttentionValue.SCORES, **selection), sites, "m")
    [found] = answer({0: scores}, effective, sites, {"seq": UNITS}).maps
    band = 0 if found.band_keys is None else found.band_keys.nbytes
    assert predicted_bytes(effective, sites, {"seq": UNITS}) == found.content.nbytes + band
    return found


def hidden_above():
    scores = np.random.default_rng(1).normal(size=(HEADS, LENGTH, LENGTH)).astype(np.float32) * 10
    return np.where(np.tri(LENGTH, dtype=bool), scores, np.float32(-np.inf))


def test_scores_without_special_tokens_lose_rows_and_columns_alone():
    found = scores_of(hidden_above(), special_tokens=SpecialTokens.DROP)
    np.testing.assert_array_equal(found.content, hidden_above()[:, 1:-1, 1:-1])
    assert found.query_indices == found.key_indices == (1, 2, 3, 4, 5)


def test_scores_are_joined_as_plain_numbers_and_overflow_in_float16():
    scores = hidden_above()
    [mean] = scores_of(scores, head_reduction=HeadReduction.MEAN).content
    np.testing.assert_allclose(mean, scores.mean(axis=0), rtol=1e-6)
    half = scores_of(scores * np.float32(1e5), dtype=WeightDtype.FLOAT16).content
    assert (half.dtype, half.flags.c_contiguous) == (np.float16, True)
    assert np.isposinf(half).any()


def test_a_band_of_scores_has_minus_infinity_where_a_column_has_no_key():
    band = SlidingBand(before=2, after=0)
    windowed = site(form="windowed", band=band, whole_rows=True, scores_output="attention_scores.x")
    found = scores_of(hidden_above(), windowed)
    assert np.isneginf(found.content[:, found.band_keys < 0]).all()
    assert np.isfinite(found.content[:, found.band_keys >= 0]).all()


def test_sites_without_scores_are_left_out_unless_they_are_named():
    sites = [site(), site(name="y", layer=1, scores_output="attention_scores.y", weights_output="attention.y")]
    assert resolve(AttentionSelection(values=AttentionValue.SCORES), sites, "m").layers == (1,)
    linear = site(scores_unavailable_reason="it is linear attention")
    with pytest.raises(AttentionUnavailable, match="scores of site 'x': it is linear attention"):
        resolve(AttentionSelection(values=AttentionValue.SCORES, layers=(0,)), [linear], "m")
