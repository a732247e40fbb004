"""Bands: the key of each column, and the maps, links and sizes that follow from them.

A band lists which key each column of a windowed site's weights is, for each query; -1 is no key. Bands and sites whose
parts disagree raise ValueError. A site is a place in a graph that computes attention.
"""

from __future__ import annotations

import numpy as np
import pytest
from attnserve_server.attention import answer, check_units, predicted_bytes, resolve
from attnserve_server.attention.bands import band_keys, key_counts, lay_out
from attnserve_server.domain.values import (
    AttentionSelection,
    AttentionUnit,
    AxisUnits,
    HeadReduction,
    LayerReduction,
    SpecialTokens,
    WeightDtype,
)
from attnserve_server.model.bands import BlockBand, GridBand, SlidingBand, TableBand
from attnserve_server.model.manifest import SiteSpec
from hypothesis import given
from hypothesis import strategies as st

LENGTH = 7
UNITS = {
    "seq": AxisUnits(
        axis="seq",
        length=LENGTH,
        texts=("[CLS]", "a", "b", "##c", "d", "##e", "[SEP]"),
        special=(True, False, False, False, False, False, True),
        word_ids=(-1, 0, 1, 1, 2, 2, -1),
        words=("a", "bc", "de"),
    )
}
counts = st.integers(0, 5)
BANDS = st.one_of(
    st.builds(SlidingBand, before=st.integers(0, 2), after=st.integers(0, 2), global_keys=st.integers(0, 1)),
    st.builds(SlidingBand, before=counts, after=counts, dilation=st.integers(1, 3), global_keys=counts),
    st.builds(
        BlockBand, block=st.integers(1, 4), before=st.integers(0, 2), after=st.integers(0, 2), global_keys=counts
    ),
)


def site(layer, band, heads=2, *, whole_rows=False):
    return SiteSpec(
        name=f"encoder.{layer}",
        layer=layer,
        kind="self",
        form="dense" if band is None else "windowed",
        operator="Softmax",
        heads=heads,
        kv_heads=heads,
        head_dim=8,
        query_axis="seq",
        key_axis="seq",
        items_input=f"attention_items.{layer}",
        weights_output=f"attention.{layer}",
        band=band,
        whole_rows=whole_rows,
    )


def weights_in(band, seed=0, heads=2, length=LENGTH):
    """Random rows of sum 1 over the columns with a key: (heads, length, W)."""
    columns = band_keys(band, length, length)
    drawn = np.random.default_rng(seed).random((heads, *columns.shape)) * (columns >= 0)
    return (drawn / np.maximum(drawn.sum(axis=2, keepdims=True), 1e-9)).astype(np.float32)


def ask(selection, bands, weights, *, whole_rows=False):
    """The answer and its predicted bytes."""
    sites = [site(layer, band, whole_rows=whole_rows and band is not None) for layer, band in enumerate(bands)]
    effective = resolve(selection, sites, "m")
    check_units(effective, sites, UNITS, "m", 0)
    return answer(weights, effective, sites, UNITS), predicted_bytes(effective, sites, UNITS)


def dense_twin(bands, weights):
    """The same weights over all keys, for sites without a band."""
    return {layer: lay_out(weights[layer], band_keys(band, LENGTH, LENGTH), LENGTH) for layer, band in enumerate(bands)}


def test_sliding_band_has_the_neighbours_of_each_query():
    assert band_keys(SlidingBand(before=2, after=1), 5, 5).tolist() == [
        [-1, -1, 0, 1],
        [-1, 0, 1, 2],
        [0, 1, 2, 3],
        [1, 2, 3, 4],
        [2, 3, 4, -1],
    ]


def test_dilated_band_has_gaps():
    assert band_keys(SlidingBand(before=1, after=1, dilation=3), 6, 6, np.array([3])).tolist() == [[0, 3, -1]]


def test_global_keys_come_first_and_are_not_repeated():
    assert band_keys(SlidingBand(before=1, after=1, global_keys=2), 4, 4).tolist() == [
        [0, 1, -1, -1, -1],
        [0, 1, -1, -1, 2],
        [0, 1, -1, 2, 3],
        [0, 1, 2, 3, -1],
    ]


def test_columns_of_global_keys_past_the_end_have_no_key():
    assert band_keys(SlidingBand(before=0, after=0, global_keys=3), 2, 2).tolist() == [[0, 1, -1, -1]] * 2


def test_queries_of_a_block_share_the_keys_of_the_blocks_around_it():
    table = band_keys(BlockBand(block=2, before=1, after=0), 5, 5).tolist()
    assert table == [[-1, -1, 0, 1]] * 2 + [[0, 1, 2, 3]] * 2 + [[2, 3, 4, -1]]


def test_shifted_windows_wrap_around_the_edges_of_the_grid():
    table = band_keys(GridBand(rows=4, columns=4, window=2, shift=1), 16, 16)
    assert table[5].tolist() == [5, 6, 9, 10]
    assert sorted(table[0].tolist()) == [0, 3, 12, 15]
    assert (np.sort(band_keys(GridBand(rows=4, columns=4, window=2), 16, 16)[0]) == [0, 1, 4, 5]).all()


def test_grid_that_windows_do_not_divide_is_padded_at_its_end():
    table = band_keys(GridBand(rows=3, columns=3, window=2), 9, 9)
    assert table[8].tolist() == [8, -1, -1, -1]
    assert table[2].tolist() == [2, -1, 5, -1]


def test_table_has_the_window_of_each_query():
    band = TableBand(windows=((0, 2), (1, -1)), window_of=(0, 1, 0))
    assert band_keys(band, 3, 3).tolist() == [[0, 2], [1, -1], [0, 2]]
    assert key_counts(band, 3, 3).tolist() == [2, 1, 2]


@pytest.mark.parametrize(
    ("windows", "window_of", "fault"), [(((0,), (0, 1)), (0,), "same number"), (((0,),), (1,), "not among")]
)
def test_incomplete_table_is_refused(windows, window_of, fault):
    with pytest.raises(ValueError, match=fault):
        TableBand(windows=windows, window_of=window_of)


def test_only_windowed_sites_have_a_band():
    with pytest.raises(ValueError, match="only windowed sites have a band"):
        SiteSpec.model_validate(site(0, SlidingBand(before=1, after=1)).model_dump() | {"form": "dense"})


def test_band_reads_back_as_written():
    for band in (
        SlidingBand(before=1, after=2),
        BlockBand(block=2, before=1, after=1),
        GridBand(rows=1, columns=2, window=1),
    ):
        spec = site(0, band)
        assert SiteSpec.model_validate_json(spec.model_dump_json()) == spec


@given(BANDS, st.integers(1, 12), st.integers(1, 12))
def test_no_row_has_a_key_twice_and_counts_match_the_table(band, queries, keys):
    table = band_keys(band, queries, keys)
    assert table.shape == (queries, band.width)
    assert table.max(initial=-1) < keys
    for row in table:
        named = row[row >= 0]
        assert len(set(named)) == len(named)
    assert key_counts(band, queries, keys).tolist() == np.count_nonzero(table >= 0, axis=1).tolist()
    rows = np.arange(queries)[::-2]
    np.testing.assert_array_equal(band_keys(band, queries, keys, rows), table[rows])
    np.testing.assert_array_equal(key_counts(band, queries, keys, rows), key_counts(band, queries, keys)[rows])


@given(BANDS, st.sampled_from([(), (0,), (-1, 2)]), st.sampled_from(list(HeadReduction)), st.sampled_from(WeightDtype))
def test_map_of_a_band_has_the_predicted_size(band, queries, heads, dtype):
    weights = {0: weights_in(band)}
    selection = AttentionSelection(queries=queries, head_reduction=heads, dtype=dtype)
    result, said = ask(selection, [band], weights)
    [each] = result.maps
    if band.width >= LENGTH:  # whole rows are the smaller map
        assert each.band_keys is None
        assert said == each.content.nbytes
        return
    rows = [query % LENGTH for query in queries] or list(range(LENGTH))
    assert each.content.shape == (2 if heads is HeadReduction.EACH else 1, len(rows), band.width)
    np.testing.assert_array_equal(each.band_keys, band_keys(band, LENGTH, LENGTH)[rows])
    assert said == each.content.nbytes + each.band_keys.nbytes
    [twin] = ask(selection, [None], dense_twin([band], weights))[0].maps
    laid_out = np.zeros_like(twin.content)
    for row, keys in enumerate(each.band_keys):
        laid_out[:, row, keys[keys >= 0]] = each.content[:, row, keys >= 0]
    np.testing.assert_array_equal(laid_out, twin.content)


@given(BANDS, st.integers(0, 4), st.sampled_from([0.0, 0.2]))
def test_links_of_a_band_are_those_of_the_same_weights_over_all_keys(band, top_k, min_weight):
    if not top_k and not min_weight:
        top_k = 3
    weights = {0: weights_in(band)}
    selection = AttentionSelection(top_k=top_k, min_weight=min_weight)
    result, said = ask(selection, [band], weights)
    links = result.maps[0].content
    assert result.maps[0].band_keys is None
    size = sum(array.nbytes for array in (links.row_offsets, links.keys, links.weights, links.residual))
    assert size == said if not min_weight else size <= said
    twin = ask(selection, [None], dense_twin([band], weights))[0].maps[0].content
    np.testing.assert_allclose(links.residual, twin.residual, atol=1e-6)  # one rounding of a float32 sum

    if band.width >= LENGTH:
        np.testing.assert_array_equal(links.keys, twin.keys)

    def positive(found):
        """Links without those of weight 0, which fill up a row over all keys but not one of a band."""
        rows = np.repeat(np.arange(len(found.row_offsets) - 1), np.diff(found.row_offsets))
        return [
            (row, key, weight)
            for row, key, weight in zip(rows.tolist(), found.keys.tolist(), found.weights.tolist(), strict=True)
            if weight > 0
        ]

    assert positive(links) == positive(twin)


@given(BANDS, st.sampled_from([{}, {"top_k": 2}, {"unit": AttentionUnit.WORD}, {"queries": (3, 0)}]))
def test_tap_that_writes_whole_rows_gives_the_same_answers(band, choice):
    banded = {0: weights_in(band)}
    selection = AttentionSelection(**choice)
    expected, said = ask(selection, [band], banded)
    result, said_of_rows = ask(selection, [band], dense_twin([band], banded), whole_rows=True)
    assert said == said_of_rows
    [each], [other] = result.maps, expected.maps
    if selection.top_k:
        np.testing.assert_array_equal(each.content.keys, other.content.keys)
    else:
        np.testing.assert_array_equal(each.content, other.content)
        np.testing.assert_array_equal(each.band_keys is None, other.band_keys is None)


def test_whole_rows_without_a_band_are_refused():
    with pytest.raises(ValueError, match="whole_rows needs a band"):
        SiteSpec.model_validate(site(0, None).model_dump() | {"whole_rows": True})


WHOLE_ROWS = [
    AttentionSelection(unit=AttentionUnit.WORD),
    AttentionSelection(special_tokens=SpecialTokens.DROP),
    AttentionSelection(unit=AttentionUnit.WORD, special_tokens=SpecialTokens.DROP, queries=(1,), top_k=2),
    AttentionSelection(layer_reduction=LayerReduction.ROLLOUT, queries=(2, 0)),
]


@pytest.mark.parametrize("selection", [*WHOLE_ROWS, AttentionSelection(layer_reduction=LayerReduction.MEAN)])
def test_maps_that_need_whole_rows_equal_those_of_dense_sites(selection):
    bands = [SlidingBand(before=1, after=2, global_keys=1), BlockBand(block=2, before=1, after=0)]
    weights = {layer: weights_in(band, layer) for layer, band in enumerate(bands)}
    result, said = ask(selection, bands, weights)
    twin, said_of_twin = ask(selection, [None, None], dense_twin(bands, weights))
    assert said == said_of_twin
    for each, other in zip(result.maps, twin.maps, strict=True):
        assert each.band_keys is None
        if selection.top_k:
            np.testing.assert_array_equal(each.content.keys, other.content.keys)
            np.testing.assert_array_equal(each.content.weights, other.content.weights)
        else:
            np.testing.assert_array_equal(each.content, other.content)


def test_mean_over_sites_of_one_band_is_a_band():
    band = SlidingBand(before=1, after=1)
    weights = {0: weights_in(band, 0), 1: weights_in(band, 1)}
    result, said = ask(AttentionSelection(layer_reduction=LayerReduction.MEAN), [band, band], weights)
    [each] = result.maps
    np.testing.assert_allclose(each.content, (weights[0] + weights[1]) / 2, atol=1e-7)
    assert said == each.content.nbytes + each.band_keys.nbytes


def test_mean_of_a_band_and_a_dense_site_is_over_all_keys():
    band = SlidingBand(before=1, after=1)
    weights = {0: weights_in(band), 1: np.full((2, LENGTH, LENGTH), 1 / LENGTH, np.float32)}
    selection = AttentionSelection(layer_reduction=LayerReduction.MEAN)
    result, said = ask(selection, [band, None], weights)
    [each] = result.maps
    assert each.band_keys is None
    assert said == each.content.nbytes == 4 * 2 * LENGTH * LENGTH
    np.testing.assert_allclose(each.content.sum(axis=2), 1, atol=1e-6)


def test_predicting_the_size_of_a_band_takes_linear_memory():
    length = 1_000_000
    sites = [site(0, SlidingBand(before=256, after=256), heads=16)]
    units = {"seq": AxisUnits("seq", length)}
    effective = resolve(AttentionSelection(), sites, "m")
    assert predicted_bytes(effective, sites, units) == 16 * length * 513 * 4 + length * 513 * 4
    links = resolve(AttentionSelection(top_k=600), sites, "m")
    seen = length * 513 - 2 * sum(range(1, 257))
    assert predicted_bytes(links, sites, units) == (16 * length + 1) * 8 + 16 * seen * 8 + 16 * length * 4
