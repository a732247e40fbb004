"""Which decomposed sites are plain, and which are left to their graphs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from attnserve_server.conversion.finders.names import site_names
from attnserve_server.conversion.graphs.reading import checked
from attnserve_server.conversion.rewrite.fuse.candidates import candidates
from attnserve_server.conversion.rewrite.fuse.plain import PlainSite, plain_sites
from onnx import helper, numpy_helper
from plain_graphs import HEAD_DIM, HEADS, Plain


def sites(model: onnx.ModelProto) -> list[PlainSite]:
    return list(plain_sites(ir.from_proto(checked(model, "plain")).graph))


@pytest.mark.parametrize("scale", ["scores", "query", "key", "both"])
@pytest.mark.parametrize("divides", [False, True])
def test_scale_is_read_wherever_it_stands(scale: str, divides: bool) -> None:
    (site,) = sites(Plain(scale=scale, divides=divides).model())
    assert site.scale == pytest.approx(HEAD_DIM**-0.5)


def test_packed_values_and_heads_are_found_behind_split_and_transpose() -> None:
    (site,) = sites(Plain(turn="folded").model())
    for carried in (site.query, site.key, site.value):
        assert carried.packed is not None
        assert (carried.heads, carried.head_dim) == (HEADS, HEAD_DIM)


def test_masks_are_listed_in_the_order_in_which_they_apply() -> None:
    (site,) = sites(Plain(masks=("bias", "causal", "chosen inverted")).model())
    assert [(step.fill is None, step.inverted) for step in site.masks] == [(True, False), (False, False), (False, True)]


def edited(change: Callable[[onnx.GraphProto, onnx.NodeProto], None], **form: object) -> onnx.ModelProto:
    """A plain graph with one thing changed, given its softmax."""
    model = Plain(**form).model()  # type: ignore[arg-type]
    (softmax,) = [node for node in model.graph.node if node.op_type == "Softmax"]
    change(model.graph, softmax)
    return model


def insert(graph: onnx.GraphProto, node: onnx.NodeProto, *made: onnx.NodeProto) -> None:
    place = list(graph.node).index(node)
    for offset, new in enumerate(made):
        graph.node.insert(place + offset, new)


def constant(graph: onnx.GraphProto, name: str, number: float) -> str:
    graph.initializer.append(numpy_helper.from_array(np.array(number, np.float32), name))
    return name


def weights_are_an_output(graph: onnx.GraphProto, softmax: onnx.NodeProto) -> None:
    graph.output.append(helper.make_tensor_value_info(softmax.output[0], 1, ["batch", HEADS, "target", "target"]))


def weights_are_used_twice(graph: onnx.GraphProto, softmax: onnx.NodeProto) -> None:
    graph.node.append(helper.make_node("ReduceMax", [softmax.output[0]], ["most"], keepdims=0))
    graph.output.append(helper.make_tensor_value_info("most", 1, []))


def before_softmax(graph: onnx.GraphProto, softmax: onnx.NodeProto, *nodes: onnx.NodeProto) -> None:
    insert(graph, softmax, *nodes)
    softmax.input[0] = nodes[-1].output[0]


def softmax_has_a_cap(graph: onnx.GraphProto, softmax: onnx.NodeProto) -> None:
    before_softmax(graph, softmax, helper.make_node("Tanh", [softmax.input[0]], ["capped"]))


def masked_scores_are_scaled(graph: onnx.GraphProto, softmax: onnx.NodeProto) -> None:
    half = constant(graph, "half", 0.5)
    before_softmax(graph, softmax, helper.make_node("Mul", [softmax.input[0], half], ["tempered"]))


def scores_are_replaced_by_a_number_that_hides_nothing(graph: onnx.GraphProto, softmax: onnx.NodeProto) -> None:
    (chosen,) = [node for node in graph.node if node.op_type == "Where"]
    chosen.input[2] = constant(graph, "mild", -2.0)


def bias_is_made_from_the_queries(graph: onnx.GraphProto, softmax: onnx.NodeProto) -> None:
    (product,) = [node for node in graph.node if softmax.input[0] in node.output]
    query = product.input[0]
    before_softmax(
        graph,
        softmax,
        helper.make_node("ReduceSum", [query, "axes"], ["per_query"], keepdims=1),
        helper.make_node("Add", [softmax.input[0], "per_query"], ["disentangled"]),
    )
    graph.initializer.append(numpy_helper.from_array(np.array([-1]), "axes"))


def scores_are_a_sum_of_two_products(graph: onnx.GraphProto, softmax: onnx.NodeProto) -> None:
    (product,) = [node for node in graph.node if softmax.input[0] in node.output]
    before_softmax(
        graph,
        softmax,
        helper.make_node("MatMul", list(product.input), ["again"]),
        helper.make_node("Add", [softmax.input[0], "again"], ["twofold"]),
    )


def hidden_scores_get_a_bias(graph: onnx.GraphProto, softmax: onnx.NodeProto) -> None:
    graph.initializer.append(numpy_helper.from_array(np.ones((1, HEADS, 1, 1), np.float32), "late"))
    before_softmax(graph, softmax, helper.make_node("Add", [softmax.input[0], "late"], ["biased"]))


def hidden_scores_rank(graph: onnx.GraphProto, softmax: onnx.NodeProto) -> None:
    (chosen,) = [node for node in graph.node if node.op_type == "Where"]
    lower = constant(graph, "lower", -1e9)
    before_softmax(graph, softmax, helper.make_node("Where", [chosen.input[0], softmax.input[0], lower], ["lowered"]))


def softmax_runs_over_the_queries(graph: onnx.GraphProto, softmax: onnx.NodeProto) -> None:
    softmax.attribute[0].i = 2


def guard_changes_weights(graph: onnx.GraphProto, softmax: onnx.NodeProto) -> None:
    (guard,) = [node for node in graph.node if node.op_type == "Where"]
    guard.input[1] = constant(graph, "one", 1.0)


def weights_are_rounded(graph: onnx.GraphProto, softmax: onnx.NodeProto) -> None:
    (after,) = [node for node in graph.node if softmax.output[0] in node.input]
    insert(graph, after, helper.make_node("Round", [softmax.output[0]], ["rounded"]))
    after.input[0] = "rounded"


@pytest.mark.parametrize(
    ("change", "form"),
    [
        (weights_are_an_output, {}),
        (weights_are_used_twice, {}),
        (softmax_has_a_cap, {}),
        (masked_scores_are_scaled, {"masks": ("lowest",)}),
        (scores_are_replaced_by_a_number_that_hides_nothing, {"masks": ("chosen",)}),
        (bias_is_made_from_the_queries, {"scale": "none"}),
        (scores_are_a_sum_of_two_products, {"scale": "none"}),
        (hidden_scores_get_a_bias, {"masks": ("chosen inverted",)}),
        (hidden_scores_rank, {"masks": ("chosen inverted",)}),
        (softmax_runs_over_the_queries, {}),
        (guard_changes_weights, {"guard": "not a number"}),
        (weights_are_rounded, {}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_not_plain_is_left_alone(
    change: Callable[[onnx.GraphProto, onnx.NodeProto], None], form: dict[str, object]
) -> None:
    assert len(sites(edited(lambda graph, softmax: None, **form))) == 1
    model = edited(change, **form)
    assert sites(model) == []
    assert list(candidates(checked(model, "left alone"))) == []


@pytest.mark.parametrize("opset", [13, 23])
def test_fused_site_keeps_its_name(opset: int) -> None:
    model = Plain(opset=opset, name="softmax").model()
    (softmax,) = [node for node in model.graph.node if node.op_type == "Softmax"]
    entry = softmax.metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.name_scopes", "['', 'encoder.layer.0.attention.self', 'softmax']"
    for fused in candidates(checked(model, "plain")):
        (node,) = [
            each for each in ir.from_proto(fused.proto).graph if each.op_type in {"Attention", "MultiHeadAttention"}
        ]
        assert site_names([node]) == ["encoder.layer.0.attention"]


def test_name_of_the_node_names_the_fused_site_too() -> None:
    fused = next(candidates(checked(Plain(opset=14).model(), "plain")))
    (node,) = [each for each in ir.from_proto(fused.proto).graph if each.op_type == "Attention"]
    assert site_names([node]) == ["encoder.layer.0.attention"]
