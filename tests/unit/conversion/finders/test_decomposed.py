"""What counts as attention among the softmaxes of a graph, and what only looks like it.

`Steps` builds a graph of single operators, over inputs `x` and `y`; `find` yields the sites in it, the places where
attention is computed. A site whose weights cannot be returned has a reason. Look-alikes, such as classifiers and gates,
give no site.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from attnserve_server.conversion.base.sites import Probabilities
from attnserve_server.conversion.finders import find_sites
from attnserve_server.conversion.finders.decomposed import find
from attnserve_server.conversion.inspect import inspect_model
from decomposed_graphs import Decomposed
from onnx import helper
from step_graphs import WIDTH, Steps, attention

EXPERTS = 4


def test_matmul_of_two_activations_softmax_and_matmul_with_a_third_are_attention() -> None:
    steps = Steps()
    (site,) = steps.sites(attention(steps)).values()
    assert site.node.op_type == "Softmax"
    assert site.operator == "MatMul-Softmax-MatMul"
    assert isinstance(site.attention, Probabilities)
    assert site.attention.key_axis == -1
    assert site.attention.output.name == steps.nodes[-1].output[0]
    assert site.head_dim == WIDTH


def test_classifier_is_no_attention() -> None:
    steps = Steps()
    logits = steps.op("Add", steps.op("MatMul", "x", steps.const(WIDTH, 5)), steps.const(5))
    assert not steps.sites(steps.op("Softmax", logits, axis=-1))


def test_probabilities_that_multiply_no_activation_are_no_attention() -> None:
    # A prediction that becomes an embedding of the expected token.
    steps = Steps()
    similarity = steps.op("MatMul", "x", steps.turned("y"))
    assert not steps.sites(steps.op("Softmax", similarity, axis=-1))
    steps = Steps()
    logits = steps.op("Softmax", steps.op("MatMul", "x", steps.const(WIDTH, 5)), axis=-1)
    assert not steps.sites(steps.op("MatMul", logits, steps.const(5, WIDTH)))


def test_mixture_of_experts_is_no_attention() -> None:
    steps = Steps()
    gate = steps.op("Softmax", steps.op("MatMul", "x", steps.const(WIDTH, EXPERTS)), axis=-1)
    experts = steps.op(
        "MatMul", steps.op("Unsqueeze", "x", steps.const(kind=np.int64, value=[1])), steps.const(EXPERTS, WIDTH, WIDTH)
    )
    experts = steps.op("Transpose", experts, perm=[0, 2, 1, 3])
    row = steps.op("Unsqueeze", gate, steps.const(kind=np.int64, value=[2]))
    assert not steps.sites(steps.op("MatMul", row, experts))


def test_softmax_along_an_axis_of_a_constant_is_no_attention() -> None:
    # Scores over a fixed number of slots, which weight activations that are as many.
    steps = Steps()
    slots = steps.op(
        "MatMul",
        steps.const(1, EXPERTS, EXPERTS),
        steps.op(
            "MatMul",
            steps.const(1, EXPERTS, 3),
            steps.op("Slice", "y", *(steps.const(kind=np.int64, value=[at]) for at in (0, 3, 1))),
        ),
    )
    scores = steps.op("MatMul", "x", steps.const(1, WIDTH, EXPERTS))
    assert not steps.sites(attention(steps, scores=scores, value=slots))


@pytest.mark.parametrize("columns", [1, 4])
def test_pooling_by_constant_vectors_is_no_attention(columns: int) -> None:
    steps = Steps()
    scores = steps.op(
        "MatMul", steps.op("Tanh", steps.op("MatMul", "y", steps.const(WIDTH, WIDTH))), steps.const(WIDTH, columns)
    )
    assert not steps.sites(attention(steps, scores=steps.turned(scores)))


def test_constant_queries_over_keys_of_an_input_are_attention() -> None:
    steps = Steps()
    scores = steps.op("MatMul", steps.const(3, WIDTH), steps.turned(steps.op("MatMul", "y", steps.const(WIDTH, WIDTH))))
    assert len(steps.sites(attention(steps, scores=scores))) == 1


def test_one_constant_query_is_pooling() -> None:
    steps = Steps()
    assert not steps.sites(attention(steps, scores=steps.op("MatMul", steps.const(1, WIDTH), steps.turned("y"))))


def test_softmax_over_queries_is_no_attention() -> None:
    # Each key's weights over the queries sum to 1; the MatMul still sums over keys.
    steps = Steps()
    spread = steps.op("Softmax", steps.op("MatMul", "x", steps.turned("y")), axis=1)
    assert not steps.sites(steps.op("MatMul", spread, "y"))


def test_softmax_of_features_is_no_attention() -> None:
    # Efficient attention: softmax over features of the query, and over positions of each feature of the key.
    steps = Steps()
    query = steps.op("Softmax", steps.op("MatMul", "x", steps.const(WIDTH, WIDTH)), axis=-1)
    key = steps.op("Softmax", steps.turned(steps.op("MatMul", "y", steps.const(WIDTH, WIDTH))), axis=-1)
    assert not steps.sites(steps.op("MatMul", query, steps.op("MatMul", key, "y")))


def test_matmuls_behind_a_normalization_do_not_make_a_gate_attention() -> None:
    steps = Steps()
    stream = steps.op("Add", "x", attention(steps))
    centred = steps.op("Sub", stream, steps.op("ReduceMean", stream, axes=[-1]))
    features = steps.op("Softmax", centred, axis=-1)
    steps.op("MatMul", features, steps.op("MatMul", steps.turned("y"), "y"))
    assert len(steps.sites(steps.nodes[-1].output[0])) == 1


def test_keys_from_the_shape_of_an_input_alone_are_constants() -> None:
    # Positions depend on the length of an input, not on its content.
    steps = Steps()
    length = steps.op("Gather", steps.op("Shape", "x"), steps.const(kind=np.int64, value=1))
    limits = steps.const(kind=np.int64, value=0), length, steps.const(kind=np.int64, value=1)
    places = steps.op("Gather", steps.const(64, WIDTH), steps.op("Range", *limits))
    keys = steps.op("Transpose", steps.op("Unsqueeze", places, steps.const(kind=np.int64, value=[0])), perm=[0, 2, 1])
    assert not steps.sites(attention(steps, scores=steps.op("MatMul", "x", keys), value="x"))


def test_sums_of_several_matmuls_are_one_site() -> None:
    steps = Steps()
    scores = steps.op("MatMul", "x", steps.turned("y"))
    positions = steps.op("MatMul", "x", steps.turned(steps.op("MatMul", "y", steps.const(WIDTH, WIDTH))))
    (site,) = steps.sites(attention(steps, scores=steps.op("Add", scores, positions))).values()
    assert isinstance(site.attention, Probabilities)
    assert len(site.attention.scores) == 2


def test_matmul_written_as_mul_and_sum_is_a_matmul() -> None:
    steps = Steps()
    apart = steps.op("Unsqueeze", "x", steps.const(kind=np.int64, value=[2]))
    with_ = steps.op("Unsqueeze", "y", steps.const(kind=np.int64, value=[1]))
    axes = steps.const(kind=np.int64, value=[-1])
    scores = steps.op("ReduceSum", steps.op("Mul", apart, with_), axes, keepdims=0)
    (site,) = steps.sites(attention(steps, scores=scores)).values()
    assert site.operator == "ReduceSum-Softmax-MatMul"


def summed(steps: Steps, queries: str = "x", keys: str = "y") -> str:
    """Scores (B, L, S) of one number for every sum of a query and a key."""
    apart = steps.op("Unsqueeze", queries, steps.const(kind=np.int64, value=[2]))
    with_ = steps.op("Unsqueeze", keys, steps.const(kind=np.int64, value=[1]))
    one = steps.op("MatMul", steps.op("Tanh", steps.op("Add", apart, with_)), steps.const(WIDTH, 1))
    return steps.op("Squeeze", one, steps.const(kind=np.int64, value=[-1]))


def test_sums_of_queries_and_keys_are_scores() -> None:
    steps = Steps()
    (site,) = steps.sites(attention(steps, scores=summed(steps))).values()
    assert (site.operator, site.unavailable_reason) == ("Add-Softmax-MatMul", "")
    steps = Steps()
    query, key = (steps.op("MatMul", name, steps.const(WIDTH, 1)) for name in ("x", "y"))
    pairs = steps.op("LeakyRelu", steps.op("Add", query, steps.turned(key)))
    (site,) = steps.sites(attention(steps, scores=pairs)).values()
    assert (site.operator, site.unavailable_reason) == ("Add-Softmax-MatMul", "")


def test_sums_without_queries_are_no_scores() -> None:
    # The same for every query: pooling that depends on a context.
    steps = Steps()
    context = steps.op("ReduceMean", "x", axes=[1], keepdims=1)
    pooled = steps.op("MatMul", steps.op("Tanh", steps.op("Add", "y", context)), steps.const(WIDTH, 1))
    assert not steps.sites(attention(steps, scores=steps.turned(pooled)))
    # Queries that are constants, one for each unit.
    steps = Steps()
    assert not steps.sites(attention(steps, scores=summed(steps, queries=steps.const(1, 3, WIDTH))))
    # A joint of two sequences, whose softmax runs over classes.
    steps = Steps()
    apart = steps.op("Unsqueeze", "x", steps.const(kind=np.int64, value=[2]))
    joint = steps.op("Add", apart, steps.op("Unsqueeze", "y", steps.const(kind=np.int64, value=[1])))
    assert not steps.sites(steps.op("MatMul", steps.op("Softmax", joint, axis=-1), steps.turned("x")))


def test_several_softmaxes_of_one_matmul_are_one_site() -> None:
    steps = Steps()
    scores = [steps.op("MatMul", "x", steps.turned(steps.op(op_type, "y"))) for op_type in ("Tanh", "Neg")]
    both = steps.op("Sub", *(steps.op("Softmax", each, axis=-1) for each in scores))
    (site,) = steps.sites(steps.op("MatMul", both, "y")).values()
    assert isinstance(site.attention, Probabilities)
    assert site.attention.weights.name == both
    assert len(site.attention.scores) == 2
    assert not site.rows_sum_to_one


@pytest.mark.parametrize(("step", "keeps"), [("Identity", True), ("Sqrt", False), ("Relu", False), ("Tanh", False)])
def test_rows_sum_to_one_only_behind_operators_that_keep_sums(step: str, keeps: bool) -> None:
    steps = Steps()
    weights = steps.op(step, steps.op("Softmax", steps.op("MatMul", "x", steps.turned("y")), axis=-1))
    (site,) = steps.sites(steps.op("MatMul", weights, "y")).values()
    assert site.rows_sum_to_one is keeps


def test_gemm_is_a_matmul() -> None:
    steps = Steps()
    flat = [steps.op("Reshape", name, steps.const(kind=np.int64, value=[-1, WIDTH])) for name in ("x", "y")]
    weights = steps.op("Softmax", steps.op("Gemm", *flat, transB=1), axis=-1)
    (site,) = steps.sites(steps.op("Gemm", weights, flat[1])).values()
    assert site.operator == "Gemm-Softmax-Gemm"
    steps = Steps()
    linear = steps.op("Gemm", steps.op("ReduceMean", "x", axes=[1], keepdims=0), steps.const(WIDTH, 5))
    assert not steps.sites(steps.op("Gemm", steps.op("Softmax", linear, axis=-1), steps.const(5, WIDTH)))


def weighed(steps: Steps, weights: str) -> str:
    """Sum y's vectors, each times its weight of (B, S), without a MatMul."""
    column = steps.op("Unsqueeze", weights, steps.const(kind=np.int64, value=[2]))
    return steps.op("ReduceSum", steps.op("Mul", column, "y"), steps.const(kind=np.int64, value=[1]), keepdims=0)


def test_value_that_no_matmul_sums_gives_the_reason() -> None:
    steps = Steps()
    query = steps.op("ReduceMean", "x", axes=[1], keepdims=1)
    scores = steps.op("ReduceSum", steps.op("Mul", query, "y"), steps.const(kind=np.int64, value=[-1]), keepdims=0)
    (site,) = steps.sites(weighed(steps, steps.op("Softmax", scores, axis=-1))).values()
    assert not site.tappable
    assert "multiplied with the values by Mul and ReduceSum" in site.unavailable_reason
    # Pooling by a constant vector, written out in the same way.
    steps = Steps()
    scores = steps.op("MatMul", "y", steps.const(WIDTH))
    assert not steps.sites(weighed(steps, steps.op("Softmax", scores, axis=-1)))


def test_weights_divided_by_their_masked_sum_are_not_summed_with_a_value() -> None:
    steps = Steps()
    weights = steps.op("Softmax", steps.op("MatMul", "x", steps.turned("y")), axis=-1)
    kept = steps.op("Mul", weights, steps.op("Sigmoid", steps.op("MatMul", "x", steps.turned("y"))))
    total = steps.op("ReduceSum", kept, steps.const(kind=np.int64, value=[-1]), keepdims=1)
    assert not steps.sites(steps.op("Div", kept, total))


def test_softmax_of_an_old_opset_over_several_axes_gives_the_reason() -> None:
    steps = Steps(opset=11)
    scores = steps.op("MatMul", "x", steps.turned("y"))
    (site,) = steps.sites(steps.op("MatMul", steps.op("Softmax", scores, axis=1), "y")).values()
    assert not site.tappable
    assert site.unavailable_reason == "its softmax (opset 11) runs over several axes at once"


def test_parts_of_the_keys_with_separate_values_give_the_reason() -> None:
    steps = Steps()

    def part(value: str, axis: int, start: int, end: int) -> str:
        return steps.op("Slice", value, *(steps.const(kind=np.int64, value=[number]) for number in (start, end, axis)))

    weights = steps.op("Softmax", steps.op("MatMul", "x", steps.turned("y")), axis=-1)
    near = steps.op("MatMul", part(weights, 2, 0, 2), part("y", 1, 0, 2))
    far = steps.op("MatMul", part(weights, 2, 2, 9), part("y", 1, 2, 9))
    (site,) = steps.sites(steps.op("Add", near, far)).values()
    assert site.unavailable_reason == "parts of its keys are multiplied with values in separate MatMuls"


def test_site_in_a_subgraph_gives_the_reason() -> None:
    steps = Steps()
    inner = Steps()
    answer = inner.op("Identity", attention(inner))
    info = helper.make_tensor_value_info(answer, onnx.TensorProto.FLOAT, None)
    inner.nodes[-1].output[0] = "inside"
    info.name = "inside"
    branch = helper.make_graph(inner.nodes, "branch", [], [info])
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["outside"])],
        "other",
        [],
        [helper.make_tensor_value_info("outside", onnx.TensorProto.FLOAT, None)],
    )
    condition = steps.op("Greater", steps.op("ReduceSum", "x", keepdims=0), steps.const(value=0.0))
    (site,) = steps.sites(steps.op("If", condition, then_branch=branch, else_branch=other)).values()
    assert "subgraph" in site.unavailable_reason


def test_keys_that_cannot_be_followed_give_the_reason() -> None:
    steps = Steps()
    eight = steps.op("Slice", "y", *(steps.const(kind=np.int64, value=[number]) for number in (0, 8, 1)))
    eight = steps.op("Reshape", eight, steps.const(kind=np.int64, value=[0, 8, WIDTH]))
    weights = steps.op("Softmax", steps.op("MatMul", "x", steps.turned(eight)), axis=-1)
    halves = steps.op("Reshape", weights, steps.const(kind=np.int64, value=[0, -1, 4]))
    values = steps.op("Reshape", eight, steps.const(kind=np.int64, value=[0, 4, -1]))
    (site,) = steps.sites(steps.op("MatMul", halves, values)).values()
    assert site.unavailable_reason == "its keys cannot be followed from softmax to the MatMul with the values"


def test_matmuls_of_the_runtime_are_matmuls() -> None:
    steps = Steps()
    scores = steps.op("FusedMatMul", "x", "y", domain="com.microsoft", transB=1, alpha=0.5)
    weights = steps.op("Softmax", scores, axis=-1)
    (site,) = steps.sites(steps.op("FusedMatMul", weights, "y", domain="com.microsoft")).values()
    assert site.operator == "FusedMatMul-Softmax-FusedMatMul"
    assert site.tappable


def test_site_is_named_after_the_module_that_either_exporter_stores() -> None:
    steps = Steps()
    scores = steps.op("MatMul", "x", steps.turned("y"))
    weights = steps.op("Softmax", scores, axis=-1, name="/encoder/layer.0/attention/self/Softmax")
    assert list(steps.sites(steps.op("MatMul", weights, "y"))) == ["encoder.layer.0.attention"]
    steps = Steps()
    scopes = {"pkg.torch.onnx.name_scopes": "['', 'encoder', 'encoder.layers.0.self_attn', 'softmax']"}
    assert list(steps.sites(attention(steps), scopes)) == ["encoder.layers.0.self_attn"]


@pytest.mark.parametrize(
    ("layout", "heads"),
    [("4-D", (4, 4)), ("5-D", (4, 2)), ("einsum grouped", (4, 2)), ("head-major", (4, 4)), ("repeated", (4, 2))],
)
def test_heads_are_reported_where_shapes_state_them(layout: str, heads: tuple[int, int]) -> None:
    model = onnx.shape_inference.infer_shapes(Decomposed(layout=layout).model())
    (site,) = find_sites(ir.from_proto(model).graph).values()
    assert (site.heads, site.kv_heads) == heads


def test_heads_folded_into_the_batch_are_not_guessed() -> None:
    model = onnx.shape_inference.infer_shapes(Decomposed(layout="3-D").model())
    (site,) = find_sites(ir.from_proto(model).graph).values()
    assert (site.heads, site.kv_heads) == (0, 0)


def test_inspect_reports_the_axes_of_decomposed_sites(tmp_path: Path) -> None:
    onnx.save(Decomposed(cross=True).model(), tmp_path / "case.onnx")
    (site,) = inspect_model(tmp_path / "case.onnx").sites
    assert (site.query_axis, site.key_axis, site.kind) == ("target", "source", "cross")


def number(steps: Steps, *numbers: int) -> str:
    return steps.const(kind=np.int64, value=list(numbers))


def there_and_back(steps: Steps, weights: str, way: str) -> str:
    """Return weights (B, L, S) after layout changes."""
    if way == "an axis inserted and removed":
        return steps.op("Squeeze", steps.op("Unsqueeze", weights, number(steps, 1)), number(steps, 1))
    if way == "gathered by a list":
        return steps.op("Gather", weights, number(steps, 0, 1), axis=1)
    if way == "gathered by a number":
        apart = steps.op("Unsqueeze", weights, number(steps, 0))
        return steps.op("Gather", apart, steps.const(kind=np.int64, value=0), axis=0)
    if way == "keys in front":
        return steps.op("Transpose", steps.op("Transpose", weights, perm=[2, 0, 1]), perm=[1, 2, 0])
    batch, *sizes = (steps.op("Shape", weights, start=at, end=at + 1) for at in range(3))
    apart = steps.op("Reshape", weights, steps.op("Concat", batch, number(steps, 1), *sizes, axis=0))
    return steps.op("Reshape", apart, steps.op("Shape", weights))


@pytest.mark.parametrize(
    "way",
    ["an axis inserted and removed", "gathered by a list", "gathered by a number", "keys in front", "reshaped twice"],
)
@pytest.mark.parametrize("constant", [False, True])
def test_keys_are_followed_through_layouts(way: str, constant: bool) -> None:
    # With constant queries, the keys must also be found backwards from the scores.
    steps = Steps()
    keys = steps.turned("y")
    queries = steps.const(1, 3, WIDTH) if constant else "x"
    scores = there_and_back(steps, steps.op("MatMul", queries, keys), way)
    weights = there_and_back(steps, steps.op("Softmax", scores, axis=-1), way)
    (site,) = steps.sites(steps.op("MatMul", weights, "y")).values()
    assert site.tappable


def test_exponentials_times_the_reciprocal_of_their_sum_are_softmax() -> None:
    steps = Steps()
    exponents = steps.op("Exp", steps.op("MatMul", "x", steps.turned("y")))
    total = steps.op("ReduceSum", exponents, number(steps, 2), keepdims=1)
    weights = steps.op("Mul", exponents, steps.op("Reciprocal", total))
    (site,) = steps.sites(steps.op("MatMul", weights, "y")).values()
    assert site.operator == "MatMul-Exp-ReduceSum-Mul-MatMul"


def test_matmuls_divided_by_their_sum_are_no_softmax() -> None:
    # Linear attention has no exponentials.
    steps = Steps()
    scores = steps.op("Relu", steps.op("MatMul", "x", steps.turned("y")))
    total = steps.op("ReduceSum", scores, number(steps, -1), keepdims=1)
    model = steps.model(steps.op("MatMul", steps.op("Div", scores, total), "y"))
    assert not list(find(ir.from_proto(model).graph))


def test_bias_softmax_of_the_runtime_is_softmax() -> None:
    steps = Steps()
    scores = steps.op("MatMul", "x", steps.turned("y"))
    bias = steps.const(1, 1, value=[[[0.0]]])
    weights = steps.op("BiasSoftmax", scores, bias, domain="com.microsoft", axis=2, is_inner_broadcast=0)
    (site,) = steps.sites(steps.op("MatMul", weights, "y")).values()
    assert site.operator == "MatMul-BiasSoftmax-MatMul"


def test_matmul_that_transposes_its_batch_is_not_read() -> None:
    steps = Steps()
    scores = steps.op("FusedMatMul", "x", "y", domain="com.microsoft", transB=1, transBatchB=1)
    assert not steps.sites(attention(steps, scores=scores))
