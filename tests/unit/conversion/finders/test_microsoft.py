"""Site finders of onnxruntime's operators: what is read, what cannot be tapped and why, and how shapes are found.

`Packed`, `MultiHead` and `GroupQuery` make a graph of one operator. A tap is the nodes that are added to return the
weights. A site that cannot be tapped is listed with a reason; it is no error. A site is a place in a graph that
computes attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from attnserve_server.conversion.base.sites import FoundSite, KeyPadding, Scores
from attnserve_server.conversion.finders import find_sites
from attnserve_server.conversion.finders.operator_nodes import last_dimension_of
from attnserve_server.conversion.graphs.reading import checked
from attnserve_server.conversion.graphs.walk import rank_of
from attnserve_server.conversion.rewrite.taps import with_plain_values
from microsoft_graphs import DOMAIN, GroupQuery, MultiHead, Packed
from onnx import TensorProto, helper, numpy_helper


def sites_of(model: onnx.ModelProto) -> list[FoundSite]:
    return list(find_sites(ir.from_proto(onnx.shape_inference.infer_shapes(model)).graph).values())


def only_site(model: onnx.ModelProto) -> FoundSite:
    (site,) = sites_of(model)
    return site


def with_input(model: onnx.ModelProto, position: int, name: str, kind: int, shape: Sequence[Any]) -> onnx.ModelProto:
    (node,) = model.graph.node
    node.input.extend([""] * (position + 1 - len(node.input)))
    node.input[position] = name
    model.graph.input.append(helper.make_tensor_value_info(name, kind, shape))
    return model


def without_shapes(model: onnx.ModelProto, *names: str) -> onnx.ModelProto:
    for info in model.graph.input:
        if info.name in names:
            info.type.tensor_type.ClearField("shape")
    return model


def test_attributes_of_attention_are_read() -> None:
    attributes = {"scale": 0.5, "unidirectional": 1, "mask_filter_value": -3.0}
    site = only_site(Packed(heads=3, value_dim=6, mask=np.ones((2, 5), np.int32), attributes=attributes).model())
    assert isinstance(site.attention, Scores)
    assert (site.operator, site.heads, site.kv_heads, site.head_dim) == ("com.microsoft.Attention-1", 3, 3, 4)
    assert (site.attention.scale, site.causal, site.attention.zeroed) == (0.5, True, False)
    assert [part.columns for part in (site.attention.query, site.attention.key, site.attention.value)] == [
        (0, 12),
        (12, 24),
        (24, 42),
    ]
    (padding,) = site.attention.masks
    assert isinstance(padding, KeyPadding)
    assert (padding.rank, padding.filter_value) == (2, -3.0)


def test_attributes_of_grouped_attention_are_read() -> None:
    attributes = {"softcap": 2.0, "local_window_size": 3, "rotary_interleaved": 1}
    site = only_site(GroupQuery(rotary=8, packed=True, attributes=attributes).model())
    assert isinstance(site.attention, Scores)
    assert (site.heads, site.kv_heads, site.head_dim, site.causal) == (4, 2, 16, True)
    assert (site.attention.softcap, site.attention.window, site.attention.scale) == (2.0, 3, 0.25)
    assert site.attention.key.columns == (64, 96)
    assert site.attention.key.rotary is not None
    assert site.attention.key.rotary.interleaved


def test_scale_of_zero_means_the_default() -> None:
    # onnxruntime reads it like that.
    scores = only_site(MultiHead(head_dim=16, attributes={"scale": 0.0}).model()).attention
    assert isinstance(scores, Scores)
    assert scores.scale == 0.25


REASONS = [
    (with_input(Packed().model(), 4, "past", TensorProto.FLOAT, [2, 2, 2, 3, 4]), "it takes past: weights over"),
    (Packed(attributes={"do_rotary": 1}).model(), "it rotates query and key itself"),
    (Packed(attributes={"qkv_hidden_sizes": [8, 4, 8]}).model(), "the widths of query, key and value, 8, 4 and 8"),
    (Packed(attributes={"num_heads": 3}).model(), "8, 8 and 8, are not divisible by 3 heads"),
    (Packed(attributes={"num_heads": 0}).model(), "it has no num_heads"),
    (with_input(Packed().model(), 3, "mask", TensorProto.INT32, [1] * 5), "has rank 5; 1, 2, 3, 4 are supported"),
    (
        without_shapes(Packed(mask=np.ones((2, 5), np.int32)).model(), "mask"),
        "the rank of its mask 'mask' is not known",
    ),
    (with_input(Packed().model(), 1, "wide", TensorProto.FLOAT, [6, None]), ""),
    (
        with_input(Packed(projection_bias=False).model(), 1, "wide", TensorProto.FLOAT, [6, None]),
        "the width of its packed weights is not in the graph",
    ),
    (with_input(MultiHead().model(), 6, "past_key", TensorProto.FLOAT, [2, 2, 3, 4]), "it takes past_key"),
    (with_input(MultiHead().model(), 9, "cache", TensorProto.INT32, [2, 1, 9]), "it takes cache_indirection"),
    (without_shapes(MultiHead().model(), "key"), "the rank of its key 'key' is not known"),
    (with_input(MultiHead().model(), 1, "strange", TensorProto.FLOAT, [2, 5]), "its key has rank 2"),
    (MultiHead(heads=2, attributes={"num_heads": 3}).model(), "the width of 'query', 8, is not divisible by 3 heads"),
    (
        with_input(
            with_input(MultiHead().model(), 0, "blank", TensorProto.FLOAT, [2, 5, None]),
            1,
            "void",
            TensorProto.FLOAT,
            [2, 5, None],
        ),
        "the head size of 'blank' is not in the graph",
    ),
    (GroupQuery(heads=3, kv_heads=2).model(), "3 query heads are no multiple of 2 key heads"),
    (GroupQuery(attributes={"kv_num_heads": 0}).model(), "it has no kv_num_heads"),
    (with_input(GroupQuery().model(), 3, "past_key", TensorProto.FLOAT, [2, 2, None, 16]), "it takes past_key"),
    (with_input(GroupQuery().model(), 12, "k_scale", TensorProto.FLOAT, [1]), "it takes k_scale: weights over"),
    (with_input(GroupQuery().model(), 14, "gain", TensorProto.FLOAT, [16]), "it takes q_norm_weight"),
    (with_input(GroupQuery().model(), 16, "chunks", TensorProto.INT32, [2]), "it takes query_seqlens"),
    (GroupQuery(attributes={"do_rotary": 1}).model(), "its cos_cache is missing"),
    (
        with_input(GroupQuery(rotary=8).model(), 7, "tables", TensorProto.FLOAT, [32, None]),
        "the width of 'tables' is not in the graph",
    ),
    (
        with_input(GroupQuery().model(), 0, "blank", TensorProto.FLOAT, [2, 5, None]),
        "the head size of 'blank' is not in the graph",
    ),
]


@pytest.mark.parametrize(
    ("model", "words"), REASONS, ids=[f"{at} {words[:40]}" for at, (_, words) in enumerate(REASONS)]
)
def test_what_cannot_be_tapped_is_listed_with_its_reason(model: onnx.ModelProto, words: str) -> None:
    site = only_site(model)
    assert site.tappable == (not words)
    assert words in site.unavailable_reason


@pytest.mark.parametrize(
    ("operator", "words"),
    [
        ("AttnLSTM", "each step of a recurrence"),
        ("DecoderAttention", "no kernel for it on the CPU"),
        ("DecoderMaskedMultiHeadAttention", "one token at a time"),
        ("GatedDeltaNet", "a state of earlier tokens"),
        ("PackedAttention", "the tokens of all sequences in one row"),
        ("SparseAttention", "blocks of keys"),
    ],
)
def test_operators_without_a_tap_are_listed_with_their_reason(operator: str, words: str) -> None:
    model = MultiHead().model()
    model.graph.node[0].op_type = operator
    model.graph.node[0].attribute.append(helper.make_attribute("kv_num_heads", 1))
    site = only_site(model)
    assert (site.operator, site.heads, site.kv_heads) == (f"com.microsoft.{operator}-1", 2, 1)
    assert words in site.unavailable_reason
    assert not site.tappable


def test_site_inside_a_subgraph_is_listed_with_its_reason() -> None:
    model = MultiHead().model()
    branches = []
    for name in ("then", "else"):
        node = onnx.NodeProto()
        node.CopyFrom(model.graph.node[0])
        node.output[:] = [f"{name}_output"]
        output = helper.make_tensor_value_info(f"{name}_output", TensorProto.FLOAT, None)
        branches.append(helper.make_graph([node], name, [], [output]))
    choose = helper.make_node("If", ["wanted"], ["output"], then_branch=branches[0], else_branch=branches[1])
    model.graph.ClearField("node")
    model.graph.node.append(choose)
    model.graph.input.append(helper.make_tensor_value_info("wanted", TensorProto.BOOL, []))
    assert ["inside a subgraph" in site.unavailable_reason for site in sites_of(model)] == [True, True]


def made(nodes: list[onnx.NodeProto], shape: list[Any] | None, constants: dict[str, Any] | None = None) -> ir.Value:
    """Return the result of the last node, for an input `x` whose shape inference loses at the first node."""
    opaque = helper.make_node("BiasAdd", ["x", "x", "x"], ["lost"], domain=DOMAIN)
    last = nodes[-1].output[0] if nodes else "lost"
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in (constants or {}).items()]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [opaque, *nodes],
        "made",
        [info("x", TensorProto.FLOAT, shape)],
        [onnx.ValueInfoProto(name=last)],
        initializers,
    )
    versions = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=versions)).graph.outputs[0]


CONTRIB = {"domain": DOMAIN}


@pytest.mark.parametrize(
    ("node", "rank"),
    [
        (helper.make_node("Transpose", ["lost"], ["y"], perm=[0, 2, 1, 3]), 4),
        (helper.make_node("Reshape", ["lost", "shape"], ["y"]), 4),
        (helper.make_node("MatMul", ["lost", "matrix"], ["y"]), None),
        (helper.make_node("Attention", ["lost", "matrix", "row"], ["y"], num_heads=2, **CONTRIB), 3),
        (helper.make_node("EmbedLayerNormalization", ["lost"], ["z", "y"], **CONTRIB), 1),
        (helper.make_node("EmbedLayerNormalization", ["lost"], ["y", "z"], **CONTRIB), 3),
        (helper.make_node("Sigmoid", ["lost"], ["y"]), None),
    ],
    ids=lambda part: part.op_type if isinstance(part, onnx.NodeProto) else str(part),
)
def test_ranks_that_inference_loses_follow_from_the_nodes_behind(node: onnx.NodeProto, rank: int | None) -> None:
    constants = {
        "shape": np.array([0, 0, 2, -1]),
        "matrix": np.zeros((4, 8), np.float32),
        "row": np.zeros(8, np.float32),
    }
    end = helper.make_node("Identity", ["y"], ["end"])
    assert rank_of(made([node, end], [2, 5, 4], constants)) == rank


def test_rank_that_no_node_implies_is_unknown() -> None:
    assert rank_of(made([], [2, 5, 4])) is None
    assert rank_of(None) is None
    chain = [helper.make_node("Identity", [f"v{at}" if at else "lost"], [f"v{at + 1}"]) for at in range(40)]
    assert rank_of(made(chain, [2, 5, 4])) is None


@pytest.mark.parametrize(
    ("nodes", "width"),
    [
        ([helper.make_node("MatMul", ["lost", "matrix"], ["y"])], 8),
        ([helper.make_node("MatMul", ["lost", "matrix"], ["z"]), helper.make_node("Add", ["row", "z"], ["y"])], 8),
        ([helper.make_node("SkipLayerNormalization", ["lost", "lost", "row"], ["y"], **CONTRIB)], 8),
        ([helper.make_node("Sigmoid", ["lost"], ["y"])], None),
        ([helper.make_node("MatMul", ["matrix", "lost"], ["y"])], None),
    ],
    ids=["MatMul", "Add", "normalization", "unknown", "MatMul with the unknown"],
)
def test_widths_that_inference_loses_follow_from_the_nodes_behind(
    nodes: list[onnx.NodeProto], width: int | None
) -> None:
    constants = {"matrix": np.zeros((4, 8), np.float32), "row": np.zeros(8, np.float32)}
    assert last_dimension_of(made(nodes, None, constants)) == width


def test_values_inside_operators_are_computed_for_checks() -> None:
    model = ir.from_proto(checked(Packed().model(), "case"))
    sites = find_sites(model.graph)
    plain = with_plain_values(model.graph, sites)
    before, after = (site.attention for found in (sites, plain) for site in found.values())
    assert isinstance(before, Scores)
    assert isinstance(after, Scores)
    assert (before.value.plain, after.value.plain) == (False, True)
    assert after.value.value.producer() in list(model.graph)


@pytest.mark.parametrize(("width", "stop"), [(12, 28), (None, 24)])
def test_bias_of_unknown_width_ends_where_the_value_does(width: int | None, stop: int) -> None:
    model = with_input(MultiHead(value_dim=6).model(), 3, "offsets", TensorProto.FLOAT, [None])
    model.graph.input[2].type.tensor_type.shape.dim[2].Clear()
    if width is not None:
        model.graph.input[2].type.tensor_type.shape.dim[2].dim_value = width
    scores = only_site(model).attention
    assert isinstance(scores, Scores)
    value = scores.value
    assert value.bias is not None
    # Where no shape states it, the value's heads are as wide as the key's.
    assert (value.bias.start, value.bias.stop) == (16, stop)


def test_values_that_are_in_the_graph_are_left_unchanged() -> None:
    model = ir.from_proto(checked(MultiHead().model(), "case"))
    sites = find_sites(model.graph)
    assert with_plain_values(model.graph, sites) == sites
