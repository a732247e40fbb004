"""The parts of an answer beside its numbers: units, indices, names; and the dtypes of weights.

`answer` makes the maps of one sequence from the raw weights of each site, a place in a model where attention is
computed. Units are the rows and columns of a map: tokens or words. Selections that the units cannot satisfy raise
InvalidRequest or AttentionUnavailable.
"""

from __future__ import annotations

import numpy as np
import pytest
from attnserve_server.attention import answer, check_units, predicted_bytes, resolve
from attnserve_server.attention.reduce import encode, links_of
from attnserve_server.domain.errors import AttentionUnavailable, InvalidRequest
from attnserve_server.domain.values import (
    AttentionSelection,
    AttentionUnit,
    AxisUnits,
    HeadReduction,
    LayerReduction,
    SpecialTokens,
    WeightDtype,
)
from attnserve_server.model.manifest import SiteSpec

TEXT = "a metformin"
UNITS = AxisUnits(
    axis="seq",
    length=6,
    texts=("[CLS]", "a", "met", "##form", "##in", "[SEP]"),
    starts=(0, 0, 2, 5, 9, 0),
    ends=(0, 1, 5, 9, 11, 0),
    special=(True, False, False, False, False, True),
    segments=(0, 0, 0, 0, 0, 0),
    word_ids=(-1, 0, 1, 1, 1, -1),
    words=("a", "metformin"),
    word_spans=((0, 0, 1), (0, 2, 11)),
)
WORD = AttentionUnit.WORD


def site(layer=0, *, heads=2, kind="self", form="dense", axes=("seq", "seq")):
    return SiteSpec(
        name=f"encoder.{layer}",
        layer=layer,
        kind=kind,
        form=form,
        operator="Attention",
        heads=heads,
        kv_heads=heads,
        head_dim=8,
        query_axis=axes[0],
        key_axis=axes[1],
        items_input=f"attention_items.{layer}",
        weights_output=f"attention.{layer}",
    )


def uniform(heads=2, queries=6, keys=6):
    return np.full((heads, queries, keys), 1 / keys, dtype=np.float32)


def ask(selection, sites=None, units=None, weights=None):
    """Return the answer to a selection; by default of one site with six tokens, whose weights are uniform."""
    sites = sites or [site()]
    units = units or {"seq": UNITS}
    effective = resolve(selection, sites, "m")
    check_units(effective, sites, units, "m", 0)
    weights = weights or {
        layer: uniform(each.heads, units[each.query_axis].length, units[each.key_axis].length)
        for layer, each in enumerate(sites)
    }
    return answer(weights, effective, sites, units)


def test_tokens_keep_the_given_units():
    result = ask(AttentionSelection())
    assert result.axes == (UNITS,)
    assert result.maps[0].query_indices == result.maps[0].key_indices == ()


def test_words_have_the_spans_of_the_callers_text():
    [axis] = ask(AttentionSelection(unit=WORD)).axes
    assert axis.length == 4
    assert axis.texts == ("[CLS]", "a", "metformin", "[SEP]")
    assert [TEXT[start:end] for start, end in zip(axis.starts, axis.ends, strict=True)] == ["", "a", "metformin", ""]
    assert axis.special == (True, False, False, True)
    assert axis.segments == (0, 0, 0, 0)


def test_word_is_the_sum_of_its_keys_and_the_mean_of_its_queries():
    content = ask(AttentionSelection(unit=WORD)).maps[0].content
    np.testing.assert_allclose(content[0], [[1 / 6, 1 / 6, 3 / 6, 1 / 6]] * 4, atol=1e-6)


def test_words_without_a_text_have_no_spans():
    units = AxisUnits(
        "seq", 3, texts=("met", "##form", "x"), special=(False,) * 3, word_ids=(0, 0, 1), words=("a", "b")
    )
    [axis] = ask(AttentionSelection(unit=WORD), units={"seq": units}).axes
    assert (axis.texts, axis.starts, axis.ends, axis.segments) == (("a", "b"), (), (), ())


def test_units_without_words_keep_their_texts_and_spans():
    blank = AxisUnits(
        axis="seq",
        length=2,
        texts=("[CLS]", "[SEP]"),
        starts=(0, 0),
        ends=(0, 0),
        special=(True, True),
        segments=(0, 0),
        word_ids=(-1, -1),
    )
    [axis] = ask(AttentionSelection(unit=WORD), units={"seq": blank}, weights={0: uniform(keys=2, queries=2)}).axes
    assert (axis.texts, axis.starts, axis.ends, axis.segments) == (("[CLS]", "[SEP]"), (0, 0), (0, 0), (0, 0))


def test_dropped_special_tokens_are_in_neither_axis_and_rows_sum_to_1():
    [each] = ask(AttentionSelection(special_tokens=SpecialTokens.DROP)).maps
    assert each.query_indices == each.key_indices == (1, 2, 3, 4)
    np.testing.assert_allclose(each.content.sum(axis=2), 1, atol=1e-6)


def test_special_token_named_as_a_query_stays_when_special_tokens_are_dropped():
    [each] = ask(AttentionSelection(special_tokens=SpecialTokens.DROP, queries=(-1, 1))).maps
    assert each.query_indices == (5, 1)
    assert each.key_indices == (1, 2, 3, 4)


def test_queries_that_are_all_units_in_order_have_no_indices():
    [each] = ask(AttentionSelection(unit=WORD, queries=(0, 1, -2, -1))).maps
    assert each.query_indices == ()


def test_links_name_keys_with_special_tokens_counted():
    weights = np.zeros((1, 6, 6), dtype=np.float32)
    weights[0, :, 3] = 1
    [each] = ask(
        AttentionSelection(special_tokens=SpecialTokens.DROP, top_k=1), sites=[site(heads=1)], weights={0: weights}
    ).maps
    assert each.content.keys.tolist() == [3, 3, 3, 3]


def test_cross_attention_has_units_of_both_axes():
    units = {"target": AxisUnits("target", 2), "source": AxisUnits("source", 5)}
    result = ask(AttentionSelection(), [site(kind="cross", axes=("target", "source"))], units)
    assert [axis.axis for axis in result.axes] == ["target", "source"]
    assert result.maps[0].content.shape == (2, 2, 5)


def test_maps_of_sites_name_their_layer_and_heads():
    maps = ask(AttentionSelection(layers=(2, 0), heads=(-1,)), [site(layer) for layer in range(3)]).maps
    assert [(each.sites, each.layer, each.heads) for each in maps] == [
        (("encoder.0",), 0, (1,)),
        (("encoder.2",), 2, (1,)),
    ]


@pytest.mark.parametrize("layer_reduction", [LayerReduction.MEAN, LayerReduction.ROLLOUT])
def test_map_of_joined_layers_names_all_of_them_and_no_layer(layer_reduction):
    selection = AttentionSelection(layer_reduction=layer_reduction, head_reduction=HeadReduction.MEAN)
    [each] = ask(selection, [site(0), site(1, heads=4, kind="causal")]).maps
    assert (each.sites, each.layer, each.heads) == (("encoder.0", "encoder.1"), -1, (0, 1, 2, 3))
    assert each.kind == "self"
    [alone] = ask(AttentionSelection(layers=(1,), layer_reduction=layer_reduction), [site(0), site(1)]).maps
    assert alone.layer == 1


def test_query_past_the_units_is_refused_with_sequence_limit_and_value():
    effective = resolve(AttentionSelection(queries=(0, 4, -5), unit=WORD), [site()], "m")
    with pytest.raises(InvalidRequest) as refused:
        check_units(effective, [site()], {"seq": UNITS}, "m", 3)
    assert [violation.field for violation in refused.value.violations] == [
        "attention.queries[1]",
        "attention.queries[2]",
    ]
    assert refused.value.violations[0].description == (
        "query 4 is out of range of sequence 3 along axis 'seq'; it has 4 words: -4 to 3"
    )


def test_queries_of_cross_attention_are_checked_along_the_query_axis_alone():
    sites = [site(kind="cross", axes=("target", "source"))]
    units = {"target": AxisUnits("target", 5), "source": AxisUnits("source", 2)}
    effective = resolve(AttentionSelection(queries=(4,)), sites, "m")
    check_units(effective, sites, units, "m", 0)
    assert predicted_bytes(effective, sites, units) == 2 * 1 * 2 * 4


@pytest.mark.parametrize(
    "selection", [AttentionSelection(unit=WORD), AttentionSelection(special_tokens=SpecialTokens.DROP)]
)
def test_words_and_special_tokens_that_are_not_known_are_refused(selection):
    effective = resolve(selection, [site()], "m")
    with pytest.raises(AttentionUnavailable, match="'seq' of sequence 0 are not known"):
        check_units(effective, [site()], {"seq": AxisUnits("seq", 3)}, "m", 0)


def test_size_of_a_huge_map_is_predicted_without_computing_it():
    length = 200_000
    units = {"seq": AxisUnits("seq", length)}
    effective = resolve(AttentionSelection(), [site(heads=16)], "m")
    assert predicted_bytes(effective, [site(heads=16)], units) == 16 * length * length * 4


def test_uint8_rounds_to_nearest_even_and_clips():
    weights = np.array([[[0.0, 0.5 / 255, 1.5 / 255, 2.5 / 255, 1.0, 1.2]]], dtype=np.float32)
    # 2.5 / 255 in float32 is slightly greater; times 255 it is 2.5 again.
    assert encode(weights, WeightDtype.UINT8).tolist() == [[[0, 0, 2, 2, 255, 255]]]


def test_float16_rounds_to_nearest_even():
    halfway = np.array([1 + 2.0**-11, 1 + 3 * 2.0**-11], dtype=np.float32)
    assert encode(halfway, WeightDtype.FLOAT16).tolist() == [1.0, 1 + 2 * 2.0**-10]


def test_float16_equals_numpy_for_every_half_its_midpoints_and_their_neighbours():
    halves = np.arange(0x3C01, dtype=np.uint16).view(np.float16).astype(np.float32)  # all of 0 to 1
    midpoints = (halves[:-1] + halves[1:]) / np.float32(2)  # exact: float32 has 13 bits more
    around = [halves, midpoints, np.nextafter(midpoints, np.float32(0)), np.nextafter(midpoints, np.float32(2))]
    weights = np.concatenate([*around, np.float32([1e-45, 1e-38, 2.0**-25])])
    np.testing.assert_array_equal(
        encode(weights, WeightDtype.FLOAT16).view(np.uint16), weights.astype(np.float16).view(np.uint16)
    )


def test_residual_is_never_negative_and_zero_if_all_weights_are_kept():
    random = np.random.default_rng(5)
    weights = random.dirichlet(np.ones(300), (4, 50)).astype(np.float32)
    assert (links_of(weights, None, 300, 0.0, WeightDtype.UINT8).residual == 0).all()
    assert (links_of(weights, None, 299, 0.0, WeightDtype.FLOAT32).residual >= 0).all()
    wanted = np.sort(weights.astype(float), axis=2)[:, :, :-3].sum(axis=2)
    # The residual is of the weights before they are rounded to uint8.
    np.testing.assert_allclose(links_of(weights, None, 3, 0.0, WeightDtype.UINT8).residual, wanted, atol=1e-6)


def test_minimum_above_all_weights_keeps_none():
    links = links_of(uniform(), None, 0, 1.0, WeightDtype.FLOAT16)
    assert links.row_offsets.tolist() == [0] * 13
    assert links.keys.size == links.weights.size == 0
    np.testing.assert_allclose(links.residual, 1, atol=1e-6)


def test_minimum_weight_and_number_of_links_apply_together():
    weights = np.array([[[0.1, 0.4, 0.3, 0.2], [0.97, 0.01, 0.01, 0.01]]], dtype=np.float32)
    links = links_of(weights, None, 2, 0.25, WeightDtype.FLOAT32)
    assert links.row_offsets.tolist() == [0, 2, 3]
    assert links.keys.tolist() == [1, 2, 0]
    np.testing.assert_allclose(links.residual, [[0.3, 0.03]], atol=1e-6)


def test_example_by_hand_in_the_guide():
    """docs/explanation/attention.md, "By hand": change both together."""
    rest = [[0.2, 0.2, 0.4, 0.2], [0.0, 0.6, 0.2, 0.2], [0.1, 0.1, 0.1, 0.7]]
    weights = {0: np.array([[[0.6, 0.0, 0.2, 0.2], *rest], [[0.2, 0.2, 0.2, 0.4], *rest]], dtype=np.float32)}
    units = {"seq": AxisUnits("seq", 4, special=(False, False, False, True), word_ids=(0, 1, 1, -1))}

    def content(**fields):
        selection = AttentionSelection(head_reduction=HeadReduction.MEAN, unit=WORD, **fields)
        return ask(selection, units=units, weights=weights).maps[0].content

    np.testing.assert_allclose(content(), [[[0.4, 0.3, 0.3], [0.1, 0.7, 0.2], [0.1, 0.2, 0.7]]], atol=1e-6)
    drop = {"special_tokens": SpecialTokens.DROP}
    np.testing.assert_allclose(content(**drop), [[[4 / 7, 3 / 7], [0.125, 0.875]]], atol=1e-6)
    links = content(**drop, queries=(1,), top_k=1, dtype=WeightDtype.UINT8)
    assert (links.keys.tolist(), links.weights.tolist()) == ([1], [223])
    np.testing.assert_allclose(links.residual, [[0.125]], atol=1e-6)


def test_weight_equal_to_the_minimum_is_kept():
    weights = np.array([[[0.25, 0.1, 0.65]]], dtype=np.float32)
    assert links_of(weights, None, 0, 0.25, WeightDtype.FLOAT32).keys.tolist() == [2, 0]
    # 0.1 is not a float32: the bound is rounded like the weights.
    assert links_of(weights, None, 0, 0.1, WeightDtype.FLOAT32).keys.tolist() == [2, 0, 1]
