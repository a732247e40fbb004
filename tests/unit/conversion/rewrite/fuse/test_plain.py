"""Which decomposed sites have the plain form, and the reason that is reported for every other one.

A decomposed site is attention written as separate nodes. The plain form, softmax(Q K^T * scale + masks) V, can be
rewritten to one operator. `Plain` makes a graph of it, and the functions before the table each change it so that it is
no longer plain.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from attnserve_server.conversion.finders.names import site_names
from attnserve_server.conversion.graphs.reading import checked
from attnserve_server.conversion.rewrite.fuse.candidates import ATTENTION, candidates, unfused_sites
from attnserve_server.conversion.rewrite.fuse.plain import PlainSite, plain_sites
from decomposed_graphs import Decomposed
from linear_graphs import linear_graph
from onnx import helper, numpy_helper
from plain_graphs import HEAD_DIM, HEADS, Plain


def sites(model: onnx.ModelProto) -> list[PlainSite]:
    return list(plain_sites(ir.from_proto(checked(model, "plain")).graph)[0].values())


def reasons(model: onnx.ModelProto) -> list[str]:
    return list(plain_sites(ir.from_proto(checked(model, "plain")).graph)[1].values())


@pytest.mark.parametrize("scale", ["scores", "query", "key", "both"])
@pytest.mark.parametrize("divides", [False, True])
def test_scale_is_read_from_every_place(scale: str, divides: bool) -> None:
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
    """Return a plain graph after a change, which gets the graph and its softmax."""
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


def scores_are_a_sum_of_two_matmuls(graph: onnx.GraphProto, softmax: onnx.NodeProto) -> None:
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


def weights_are_transposed(graph: onnx.GraphProto, softmax: onnx.NodeProto) -> None:
    (after,) = [node for node in graph.node if softmax.output[0] in node.input]
    insert(graph, after, helper.make_node("Transpose", [softmax.output[0]], ["swapped"], perm=[0, 1, 2, 3]))
    after.input[0] = "swapped"


def keys_are_rectified_once_transposed(graph: onnx.GraphProto, softmax: onnx.NodeProto) -> None:
    (product,) = [node for node in graph.node if softmax.input[0] in node.output]
    insert(graph, product, helper.make_node("Relu", [product.input[1]], ["rectified"]))
    product.input[1] = "rectified"


@pytest.mark.parametrize(
    ("change", "form", "reason"),
    [
        (weights_are_an_output, {}, "its weights are an output of the graph"),
        (weights_are_used_twice, {}, "its weights are read by several nodes: MatMul, ReduceMax"),
        (weights_are_transposed, {}, "Transpose is between its softmax and the MatMul with the values"),
        (weights_are_rounded, {}, "Round is between its softmax and the MatMul with the values"),
        (softmax_has_a_cap, {}, "Tanh is between the MatMul of query and key and its softmax"),
        (masked_scores_are_scaled, {"masks": ("lowest",)}, "its scores are scaled after a mask"),
        (
            scores_are_replaced_by_a_number_that_hides_nothing,
            {"masks": ("chosen",)},
            "a Where replaces its scores by -2, where -10000 or less hides a key",
        ),
        (
            bias_is_made_from_the_queries,
            {"scale": "none"},
            "its bias is computed from its own queries or keys",
        ),
        (scores_are_a_sum_of_two_matmuls, {"scale": "none"}, "its scores are a sum of several MatMuls"),
        (
            hidden_scores_get_a_bias,
            {"masks": ("chosen inverted",)},
            "a bias is added after a mask that replaces scores by -10000, and shows in hidden rows",
        ),
        (
            hidden_scores_rank,
            {"masks": ("chosen inverted",)},
            "its masks replace scores by -1e+09 and -10000, which differ",
        ),
        (
            guard_changes_weights,
            {"guard": "not a number"},
            "its guard against NaN is not Where(IsNaN(weights), 0, weights)",
        ),
        (
            keys_are_rectified_once_transposed,
            {"scale": "none"},
            "its keys are not transposed by a Transpose before the MatMul",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_site_that_is_not_plain_is_left_alone_and_its_reason_reported(
    change: Callable[[onnx.GraphProto, onnx.NodeProto], None], form: dict[str, object], reason: str
) -> None:
    assert len(sites(edited(lambda graph, softmax: None, **form))) == 1
    model = edited(change, **form)
    assert sites(model) == []
    assert reasons(model) == [reason]
    assert list(candidates(checked(model, "left alone"))) == []
    assert unfused_sites(checked(model, "left alone")) == {"encoder.layer.0.attention": reason}


def test_softmax_that_is_not_attention_is_left_alone() -> None:
    model = edited(softmax_runs_over_the_queries)
    assert (sites(model), reasons(model)) == ([], [])
    assert list(candidates(checked(model, "left alone"))) == []


def test_plain_site_has_no_reason() -> None:
    assert reasons(Plain().model()) == []


def test_softmax_written_as_exponentials_is_reported() -> None:
    (reason,) = reasons(Decomposed(spelling="Exp").model())
    assert reason == "its softmax ends in Div, not in a Softmax node"


def test_scores_of_three_axes_are_reported() -> None:
    (reason,) = reasons(Decomposed(layout="3-D").model())
    assert reason == "its scores have rank 3, not 4"


def test_linear_attention_is_reported_as_such() -> None:
    (reason,) = reasons(linear_graph("matmul"))
    assert reason == "it is linear attention, which no operator fuses"


def test_operator_that_is_fused_already_is_not_reported() -> None:
    assert reasons(Plain(opset=23, operator=True).model()) == []


def test_second_operator_reports_its_own_limits() -> None:
    model = checked(Plain(packed=True, dtype=np.float64).model(), "double")
    first, *others = candidates(model)
    assert (first.operator, first.unfused, others) == (ATTENTION, {}, [])


def test_graph_that_cannot_be_converted_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(onnx.version_converter, "convert_version", refuse)
    model = checked(Plain(dtype=np.float64).model(), "double")
    assert list(candidates(model)) == []
    assert unfused_sites(model) == {
        "encoder.layer.0.attention": "the graph cannot be converted to opset 23, which Attention needs; "
        "MultiHeadAttention computes in float32 and float16 only"
    }


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
