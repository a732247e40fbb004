"""Site finders: what of an `Attention` operator is read, what cannot be tapped and why, and how sites are named.

A site is a place in a graph where attention is computed; a tap is the nodes added to return its weights. `Case` makes a
graph of one operator. A site that cannot be tapped is listed with a reason; it is no error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from attention_graphs import Case
from attnserve_server.conversion.base.sites import FoundSite, Scores, Untappable
from attnserve_server.conversion.finders import find_sites
from attnserve_server.conversion.finders.names import NAME_SCOPES, site_names
from attnserve_server.conversion.inputs.vocabulary import vocabulary_size_of
from attnserve_server.model.bands import SlidingBand
from onnx import helper, numpy_helper


def sites_of(model: onnx.ModelProto) -> dict[str, FoundSite]:
    return find_sites(ir.from_proto(onnx.shape_inference.infer_shapes(model)).graph)


def only_site(model: onnx.ModelProto) -> FoundSite:
    (site,) = sites_of(model).values()
    return site


def with_input(model: onnx.ModelProto, position: int, name: str, kind: int, shape: list[Any]) -> onnx.ModelProto:
    (node,) = model.graph.node
    node.input.extend([""] * (position - len(node.input)))
    node.input.append(name)
    model.graph.input.append(helper.make_tensor_value_info(name, kind, shape))
    return model


def test_attributes_are_read() -> None:
    case = Case(heads=6, kv_heads=2, packed=True, attributes={"scale": 0.5, "softcap": 3.0, "is_causal": 1})
    site = only_site(case.model())
    assert isinstance(site.attention, Scores)
    assert (site.operator, site.heads, site.kv_heads, site.head_dim) == ("ai.onnx.Attention-23", 6, 2, 8)
    assert (site.attention.scale, site.attention.softcap, site.attention.causal) == (0.5, 3.0, True)
    assert site.attention.query.packed


@pytest.mark.parametrize(("opset", "version"), [(23, 23), (24, 24), (25, 25), (28, 25)])
def test_sites_name_the_version_of_the_operator_and_not_that_of_the_opset(opset: int, version: int) -> None:
    assert only_site(Case(opset=opset).model()).operator == f"ai.onnx.Attention-{version}"


def test_scale_defaults_to_one_over_the_root_of_the_head_size() -> None:
    scores = only_site(Case(head_dim=16).model()).attention
    assert isinstance(scores, Scores)
    assert scores.scale == 0.25


@pytest.mark.parametrize(
    ("position", "name", "words"), [(4, "past_key", "it takes past_key"), (5, "past_value", "it takes past_value")]
)
def test_caches_are_listed_with_their_reason(position: int, name: str, words: str) -> None:
    site = only_site(with_input(Case().model(), position, name, onnx.TensorProto.FLOAT, [1, 4, 2, 8]))
    assert not site.tappable
    assert words in site.unavailable_reason
    assert site.heads == 4


def test_mask_of_unknown_rank_is_listed_with_its_reason() -> None:
    model = with_input(Case().model(), 3, "mask", onnx.TensorProto.BOOL, [1])
    model.graph.input[-1].type.tensor_type.ClearField("shape")
    assert "the rank of its mask 'mask' is not known" in only_site(model).unavailable_reason


@pytest.mark.parametrize(("rank", "words"), [(1, "has rank 1"), (5, "has rank 5")])
def test_mask_of_unsupported_rank_is_listed_with_its_reason(rank: int, words: str) -> None:
    model = with_input(Case().model(), 3, "mask", onnx.TensorProto.BOOL, [1] * rank)
    site = next(iter(find_sites(ir.from_proto(model).graph).values()))
    assert words in site.unavailable_reason


def test_mask_of_integers_is_listed_with_its_reason() -> None:
    model = with_input(Case().model(), 3, "mask", onnx.TensorProto.INT64, [1, 1])
    site = next(iter(find_sites(ir.from_proto(model).graph).values()))
    assert "the type of its mask" in site.unavailable_reason


def test_heads_that_the_graph_does_not_state_are_listed_with_their_reason() -> None:
    model = Case().model()
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "heads"
    assert "the number of heads of 'query' is not in the graph" in only_site(model).unavailable_reason


def test_head_size_that_the_graph_does_not_state_is_listed_with_its_reason() -> None:
    model = Case().model()
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_param = "size"
    assert "the head size of 'query' is not in the graph" in only_site(model).unavailable_reason


def test_uneven_groups_are_listed_with_their_reason() -> None:
    site = next(iter(find_sites(ir.from_proto(Case(heads=3, kv_heads=2).model()).graph).values()))
    assert "3 query heads are no multiple of 2 key heads" in site.unavailable_reason


@pytest.mark.parametrize(
    ("attributes", "band"),
    [
        ({"left_window_size": 2, "right_window_size": 1}, SlidingBand(before=2, after=1)),
        ({"left_window_size": 2, "is_causal": 1}, SlidingBand(before=2, after=0)),
        ({"left_window_size": 2}, None),
        ({"right_window_size": 0}, None),
    ],
)
def test_a_window_with_an_end_on_both_sides_is_a_band(attributes: dict[str, int], band: SlidingBand | None) -> None:
    site = only_site(Case(opset=25, attributes=attributes).model())
    assert site.form == "windowed"
    assert isinstance(site.attention, Scores)
    assert site.attention.band == band


def test_a_window_that_moves_with_counts_of_keys_is_no_band() -> None:
    attributes = {"left_window_size": 2, "right_window_size": 1}
    site = only_site(Case(opset=25, counts=np.array([5, 3, 1]), attributes=attributes).model())
    assert isinstance(site.attention, Scores)
    assert site.form == "windowed"
    assert site.attention.band is None
    assert site.attention.key_counts is not None


def test_site_inside_a_subgraph_is_listed_with_its_reason() -> None:
    inner = Case().model().graph
    branches = []
    for name in ("then", "else"):
        (attend,) = inner.node
        node = onnx.NodeProto()
        node.CopyFrom(attend)
        node.output[:] = [f"{name}_output"]
        output = helper.make_tensor_value_info(f"{name}_output", onnx.TensorProto.FLOAT, None)
        branches.append(helper.make_graph([node], name, [], [output]))
    choose = helper.make_node("If", ["wanted"], ["output"], then_branch=branches[0], else_branch=branches[1])
    wanted = helper.make_tensor_value_info("wanted", onnx.TensorProto.BOOL, [])
    graph = helper.make_graph([choose], "choice", [*inner.input, wanted], list(inner.output))
    sites = find_sites(ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])).graph)
    assert list(sites) == ["attention_0", "attention_1"]
    assert {site.unavailable_reason for site in sites.values()} == {
        "it is inside a subgraph, whose values the outer graph cannot read"
    }


def test_same_operator_of_another_domain_is_no_site() -> None:
    model = Case().model()
    model.graph.node[0].domain = "com.example"
    assert find_sites(ir.from_proto(model).graph) == {}


def test_site_of_the_first_finder_counts() -> None:
    model = ir.from_proto(Case().model())
    node = next(iter(model.graph))
    first = FoundSite(node, "first", 1, 1, 1, Untappable("for the test"))
    second = FoundSite(node, "second", 1, 1, 1, Untappable("for the test"))
    sites = find_sites(model.graph, [lambda graph: [first], lambda graph: [second]])
    assert [site.operator for site in sites.values()] == ["first"]


def named(name: str = "", scopes: object = None) -> ir.Node:
    metadata = {} if scopes is None else {NAME_SCOPES: str(scopes)}
    return ir.node("Attention", [], name=name, metadata_props=metadata)


@pytest.mark.parametrize(
    ("node", "name"),
    [
        (named("node_attention_3"), "attention_0"),
        (named(), "attention_0"),
        (named("/encoder/layer.2/attention/self/MatMul"), "encoder.layer.2.attention"),
        (named("/encoder/layers.0/attn/softmax/Softmax"), "encoder.layers.0.attn"),
        (named("/encoder/attention/softmax_1/Softmax"), "encoder.attention"),
        (named("/Attention"), "attention_0"),
        (named(scopes="{[]: 1}"), "attention_0"),  # not a literal: its key has no hash
        (named("n", ["", "model.h.0.attn", "sdpa"]), "model.h.0.attn"),
        (named("n", ["", "attnserve_source.encoder.layer.0.attention.self", "sdpa"]), "encoder.layer.0.attention"),
        (named("n", ["", "a b.c/d", "sdpa"]), "a_b.c_d"),
        (named("n", "no list"), "attention_0"),
        (named("n", [1, 2]), "attention_0"),
        (named("n", "["), "attention_0"),
    ],
)
def test_sites_are_named_after_their_module(node: ir.Node, name: str) -> None:
    assert site_names([node]) == [name]


def test_sites_of_one_module_get_numbers() -> None:
    shared = ["", "encoder.shared", "sdpa"]
    nodes = [named("a", shared), named("b", shared), named("c"), named("d", shared)]
    assert site_names(nodes) == ["encoder.shared", "encoder.shared_1", "attention_2", "encoder.shared_2"]


def lookup(axis: int = 0) -> onnx.GraphProto:
    nodes = [
        helper.make_node("Cast", ["ids"], ["narrow"], to=onnx.TensorProto.INT32),
        helper.make_node("DequantizeLinear", ["small", "scale"], ["table"]),
        helper.make_node("Gather", ["table", "narrow"], ["words"], axis=axis),
        helper.make_node("Gather", ["other", "words"], ["elsewhere"]),
    ]
    tables = {"small": np.zeros((30, 4), np.int8), "scale": np.array(1, np.float32), "other": np.zeros((9, 2))}
    initializers = [numpy_helper.from_array(array, name) for name, array in tables.items()]
    ids = helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["batch", "seq"])
    return helper.make_graph(nodes, "lookup", [ids], [], initializers)


def test_vocabulary_is_that_of_the_table_behind_casts_and_quantisation() -> None:
    assert vocabulary_size_of(lookup(), "ids") == 30


def test_unknown_vocabulary_is_zero() -> None:
    assert vocabulary_size_of(lookup(axis=1), "ids") == 0
    assert vocabulary_size_of(lookup(), "others") == 0
