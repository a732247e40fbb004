"""Resolving a selection against a model's sites: chosen sites, defaults, and violations by field.

A site is a place in a model where attention is computed. `resolve` raises InvalidRequest, with a violation for each
wrong field, and AttentionUnavailable where the model or a named site has no weights.
"""

from __future__ import annotations

import math

import pytest
from attnserve_server.attention import resolve
from attnserve_server.domain.errors import AttentionUnavailable, InvalidRequest
from attnserve_server.domain.values import AttentionSelection, HeadReduction, LayerReduction
from attnserve_server.model.manifest import SiteSpec


def site(layer, *, heads=4, kind="self", axes=("seq", "seq"), reason=""):
    return SiteSpec(
        name=f"encoder.{layer}",
        layer=layer,
        kind=kind,
        form="dense",
        operator="Attention",
        heads=heads,
        kv_heads=heads,
        head_dim=8,
        query_axis=axes[0],
        key_axis=axes[1],
        items_input=None if reason else f"attention_items.{layer}",
        weights_output=None if reason else f"attention.{layer}",
        unavailable_reason=reason,
    )


SITES = [site(layer) for layer in range(4)]


def violations(selection, sites=SITES):
    with pytest.raises(InvalidRequest) as refused:
        resolve(selection, sites, "m")
    return {violation.field: violation.description for violation in refused.value.violations}


def test_empty_selection_means_every_site_and_head_separately():
    effective = resolve(AttentionSelection(), SITES, "m")
    assert effective.layers == (0, 1, 2, 3)
    assert effective.heads == ((0, 1, 2, 3),) * 4
    assert effective.head_reduction is HeadReduction.EACH
    assert effective.layer_reduction is LayerReduction.EACH
    assert effective.all_heads
    assert not effective.sparse


def test_sites_and_layers_are_united_in_order_without_duplicates():
    selection = AttentionSelection(sites=("encoder.3", "encoder.1", "encoder.3"), layers=(-1, 0, -4))
    assert resolve(selection, SITES, "m").layers == (0, 1, 3)


def test_heads_count_from_the_end_of_each_site_and_keep_their_order():
    effective = resolve(AttentionSelection(heads=(-1, 0)), [site(0, heads=4), site(1, heads=2)], "m")
    assert effective.heads == ((3, 0), (1, 0))
    assert not effective.all_heads


def test_rollout_joins_heads_by_mean_by_default():
    rollout = AttentionSelection(layer_reduction=LayerReduction.ROLLOUT)
    assert resolve(rollout, SITES, "m").head_reduction is HeadReduction.MEAN
    greatest = AttentionSelection(layer_reduction=LayerReduction.ROLLOUT, head_reduction=HeadReduction.MAX)
    assert resolve(greatest, SITES, "m").head_reduction is HeadReduction.MAX


def test_rollout_of_each_head_is_refused():
    each = AttentionSelection(layer_reduction=LayerReduction.ROLLOUT, head_reduction=HeadReduction.EACH)
    assert list(violations(each)) == ["attention.head_reduction"]


@pytest.mark.parametrize("layer", [4, -5, 2**31 - 1, -(2**31)])
def test_layer_out_of_range_is_refused_with_limit_and_value(layer):
    found = violations(AttentionSelection(layers=(0, layer)))
    assert found == {"attention.layers[1]": f"layer {layer} is out of range; the model has 4 sites: -4 to 3"}


def test_unknown_site_is_refused_with_the_known_ones():
    found = violations(AttentionSelection(sites=("encoder.0", "decoder.0")))
    assert list(found) == ["attention.sites[1]"]
    assert "encoder.0, encoder.1, encoder.2, encoder.3" in found["attention.sites[1]"]


def test_list_of_known_sites_is_bounded():
    found = violations(AttentionSelection(sites=("x",)), [site(layer) for layer in range(500)])
    assert found["attention.sites[0]"].endswith("encoder.19, ...")


@pytest.mark.parametrize("head", [4, -5])
def test_head_out_of_range_is_refused_once_and_not_once_for_each_site(head):
    found = violations(AttentionSelection(heads=(0, head)))
    assert list(found) == ["attention.heads[1]"]
    assert "has 4 heads: -4 to 3" in found["attention.heads[1]"]


def test_head_that_only_some_chosen_sites_have_is_refused():
    assert list(violations(AttentionSelection(heads=(2,)), [site(0, heads=4), site(1, heads=2)])) == [
        "attention.heads[0]"
    ]


@pytest.mark.parametrize("heads", [(1, 1), (3, -1)])
def test_repeated_head_is_refused(heads):
    assert list(violations(AttentionSelection(heads=heads))) == ["attention.heads[1]"]


def test_repeated_query_is_refused():
    assert list(violations(AttentionSelection(queries=(3, 0, 3)))) == ["attention.queries[2]"]


@pytest.mark.parametrize("min_weight", [-0.1, 1.1, math.nan, math.inf, -math.inf])
def test_minimum_weight_outside_0_to_1_is_refused(min_weight):
    assert list(violations(AttentionSelection(min_weight=min_weight))) == ["attention.min_weight"]


@pytest.mark.parametrize("min_weight", [0.0, 1.0])
def test_minimum_weights_0_and_1_are_accepted(min_weight):
    assert resolve(AttentionSelection(min_weight=min_weight), SITES, "m").sparse == (min_weight > 0)


def test_negative_number_of_links_is_refused():
    assert list(violations(AttentionSelection(top_k=-1))) == ["attention.top_k"]


@pytest.mark.parametrize("field", ["queries", "heads", "layers", "sites"])
def test_number_of_reported_violations_is_bounded(field):
    """Quadratic work here would delay every other request by a minute."""
    values = tuple(f"x{number}" * 100 if field == "sites" else number // 2 + 9 for number in range(100_000))
    found = violations(AttentionSelection(**{field: values}))
    assert len(found) == 16
    assert sum(len(description) for description in found.values()) < 4096


def test_field_that_is_invalid_for_several_sites_is_reported_once():
    with pytest.raises(InvalidRequest) as refused:
        resolve(AttentionSelection(heads=(9,)), SITES, "m")
    assert len(refused.value.violations) == 1


def test_all_violations_are_reported_together():
    selection = AttentionSelection(
        sites=("nowhere",), layers=(9, 0), heads=(7,), queries=(1, 1), min_weight=2.0, top_k=-3
    )
    assert set(violations(selection)) == {
        "attention.sites[0]",
        "attention.layers[0]",
        "attention.heads[0]",
        "attention.queries[1]",
        "attention.min_weight",
        "attention.top_k",
    }


def test_layers_of_different_axes_cannot_be_joined():
    sites = [site(0), site(1, kind="cross", axes=("seq", "source"))]
    assert list(violations(AttentionSelection(layer_reduction=LayerReduction.MEAN), sites)) == [
        "attention.layer_reduction"
    ]


@pytest.mark.parametrize(("kind", "axes"), [("cross", ("seq", "source")), ("cross", ("seq", "seq"))])
def test_rollout_of_cross_attention_is_refused(kind, axes):
    sites = [site(0, kind=kind, axes=axes)]
    assert list(violations(AttentionSelection(layer_reduction=LayerReduction.ROLLOUT), sites)) == [
        "attention.layer_reduction"
    ]


def test_mean_of_cross_attention_sites_is_accepted():
    sites = [site(layer, kind="cross", axes=("seq", "source")) for layer in range(2)]
    assert resolve(AttentionSelection(layer_reduction=LayerReduction.MEAN), sites, "m").layers == (0, 1)


def test_mean_of_layers_with_each_head_needs_equal_numbers_of_heads():
    sites = [site(0, heads=4), site(1, heads=2)]
    mean = LayerReduction.MEAN
    assert list(violations(AttentionSelection(layer_reduction=mean), sites)) == ["attention.layer_reduction"]
    resolve(AttentionSelection(layer_reduction=mean, head_reduction=HeadReduction.MEAN), sites, "m")
    resolve(AttentionSelection(layer_reduction=mean, heads=(0, -1)), sites, "m")


def test_model_without_sites_refuses_every_selection():
    with pytest.raises(AttentionUnavailable, match="no attention sites"):
        resolve(AttentionSelection(layers=(3,)), [], "m")


def test_named_site_that_cannot_be_tapped_is_refused_with_its_reason():
    sites = [site(0), site(1, reason="its softmax is fused away")]
    with pytest.raises(AttentionUnavailable, match=r"'encoder\.1': its softmax is fused away"):
        resolve(AttentionSelection(layers=(1,)), sites, "m")


def test_empty_selection_selects_the_available_sites():
    sites = [site(0), site(1, reason="fused"), site(2)]
    assert resolve(AttentionSelection(), sites, "m").layers == (0, 2)


def test_empty_selection_without_available_sites_lists_every_reason():
    sites = [site(0, reason="fused"), site(1, reason="linear")]
    with pytest.raises(AttentionUnavailable, match=r"fused.*linear"):
        resolve(AttentionSelection(), sites, "m")
