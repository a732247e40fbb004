"""Which value of a mask hides a position is learnt from runs, and the server pads and fills the mask accordingly.

`FORMS` has graphs in which a 1 hides a key, and graphs in which a 0 does. An input that hides no position stays data.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from attnserve_server.conversion.inputs.signature import Signature, signature_of
from attnserve_server.conversion.learning.inputs import with_free_length
from attnserve_server.conversion.learning.polarity import with_polarity
from attnserve_server.model.manifest import InputRole, InputSpec
from onnx import helper, numpy_helper
from onnx.parser import parse_model
from onnx_files import encoder

WIDTH = 8
FORMS = {
    "chosen": ("bool", "wide = Unsqueeze(marks, one) masked = Where(wide, low, scores)", 1),
    "negated": ("bool", "kept = Not(marks) wide = Unsqueeze(kept, one) masked = Where(wide, scores, low)", 1),
    "scaled": ("int64", "m = Cast<to = 1>(marks) s = Mul(m, finite) w = Unsqueeze(s, one) masked = Add(scores, w)", 1),
    "kept": ("bool", "wide = Unsqueeze(marks, one) masked = Where(wide, scores, low)", 0),
    "subtracted": (
        "int64",
        "m = Cast<to = 1>(marks) r = Sub(unit, m) s = Mul(r, finite) w = Unsqueeze(s, one) masked = Add(scores, w)",
        0,
    ),
    "causal": (
        "bool",
        """wide = Unsqueeze(marks, one) chosen = Where(wide, low, scores) size = Shape(scores)
        lows = Expand(low, size) future = Trilu<upper = 1>(lows, next) inf = IsInf(future)
        masked = Where(inf, low, chosen)""",
        1,
    ),
    "causal, scaled": (
        "int64",
        """m = Cast<to = 1>(marks) s = Mul(m, finite) w = Unsqueeze(s, one) chosen = Add(scores, w) size = Shape(scores)
        lows = Expand(low, size) future = Trilu<upper = 1>(lows, next) inf = IsInf(future)
        masked = Where(inf, low, chosen)""",
        1,
    ),
    "causal, subtracted": (
        "int64",
        """m = Cast<to = 1>(marks) r = Sub(unit, m) s = Mul(r, finite) w = Unsqueeze(s, one) chosen = Add(scores, w)
        size = Shape(scores) lows = Expand(low, size) future = Trilu<upper = 1>(lows, next) inf = IsInf(future)
        masked = Where(inf, low, chosen)""",
        0,
    ),
}
"""By name: type of the mask, nodes from `scores` to `masked`, and the value that hides a key."""


def attention(kind: str, nodes: str, *, name: str = "marks", shape: str = "B, T", before: str = "") -> onnx.ModelProto:
    """Self-attention of features (B, T, 8), with an input of marks."""
    model = parse_model(f"""
        <ir_version: 10, opset_import: ["": 17]>
        marked (float[B, T, {WIDTH}] x, {kind}[{shape}] {name}) => (float[B, T, {WIDTH}] y)
        <int64[1] one = {{1}}, int64[1] last = {{2}}, int64 next = {{1}}, float unit = {{1.0}}, float finite = {{-1e9}}>
        {{ {before or "h = Identity(x)"}
           q = MatMul(h, wq) k = MatMul(h, wk) kt = Transpose<perm = [0, 2, 1]>(k) scores = MatMul(q, kt)
           {nodes.replace("marks", name)}
           weights = Softmax(masked)
           y = MatMul(weights, h) }}
    """)
    rng = np.random.default_rng(1)
    for weight in ("wq", "wk"):
        model.graph.initializer.append(
            numpy_helper.from_array((rng.normal(size=(WIDTH, WIDTH)) * 0.4).astype(np.float32), weight)
        )
    model.graph.initializer.append(numpy_helper.from_array(np.array(-np.inf, np.float32), "low"))
    model.graph.initializer.append(numpy_helper.from_array(np.eye(WIDTH, dtype=np.uint8), "eye"))
    return onnx.shape_inference.infer_shapes(model)


def learnt(model: onnx.ModelProto, folder: Path) -> tuple[Signature, InputSpec]:
    """The signature, and its last input."""
    signature = with_polarity(model, signature_of(model.graph), folder)
    return signature, signature.inputs[-1]


@pytest.mark.parametrize("form", FORMS)
def test_value_that_hides_a_position_is_learnt(form: str, tmp_path: Path) -> None:
    kind, nodes, hiding = FORMS[form]
    _, mask = learnt(attention(kind, nodes), tmp_path)
    assert (mask.role, mask.padding, mask.fill) == (InputRole.ATTENTION_MASK, hiding, 1 - hiding)
    assert (mask.inverted, mask.data_value) == (bool(hiding), 1 - hiding)


@pytest.mark.parametrize("form", FORMS)
def test_graph_decides_what_a_named_attention_mask_hides(form: str, tmp_path: Path) -> None:
    kind, nodes, hiding = FORMS[form]
    _, mask = learnt(attention(kind, nodes, name="attention_mask"), tmp_path)
    assert (mask.role, mask.inverted, mask.fill) == (InputRole.ATTENTION_MASK, bool(hiding), 1 - hiding)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["marks", "attention_mask"])
def test_one_scale_for_all_positions_does_not_turn_a_mask_round(form: str, name: str, tmp_path: Path) -> None:
    kind, nodes, hiding = FORMS[form]
    # The last position has the greatest value: without it, the step is another, and the other answers change.
    quantized = """
        none = Sub(x, x) ones = Add(none, unit) places = CumSum(ones, next) far = Add(x, places)
        steps, scale, zero = DynamicQuantizeLinear(far) whole = MatMulInteger(steps, eye, zero)
        wide_steps = Cast<to = 1>(whole) near = Mul(wide_steps, scale) h = Sub(near, places)
    """
    _, mask = learnt(attention(kind, nodes, name=name, before=quantized), tmp_path)
    assert (mask.role, mask.inverted, mask.fill) == (InputRole.ATTENTION_MASK, bool(hiding), 1 - hiding)


@pytest.mark.parametrize("form", ["chosen", "kept", "causal"])
def test_mask_of_a_fixed_length_is_filled_with_the_value_that_hides_nothing(form: str, tmp_path: Path) -> None:
    kind, nodes, hiding = FORMS[form]
    model = attention(kind, nodes, name="attention_mask")
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[1].dim_value = 6
    _, mask = learnt(onnx.shape_inference.infer_shapes(model), tmp_path)
    assert (mask.role, mask.shape, mask.fill) == (InputRole.ATTENTION_MASK, (6,), 1 - hiding)


def test_fixed_length_is_made_dynamic_under_a_mask_whose_one_hides(tmp_path: Path) -> None:
    model = encoder(length=12)
    [at] = [place for place, node in enumerate(model.graph.node) if list(node.output) == ["kept"]]
    model.graph.node[at].output[0] = "hidden_ones"
    model.graph.node.insert(at + 1, helper.make_node("Not", ["hidden_ones"], ["kept"]))
    model = onnx.shape_inference.infer_shapes(model)
    freed = with_free_length(model, signature_of(model.graph), tmp_path)
    assert freed is not None
    _, mask = learnt(freed[0], tmp_path)
    assert (mask.shape, mask.inverted, mask.padding, mask.fill) == (("seq",), True, 1, 0)


def test_mask_of_queries_and_keys_is_padded_with_the_value_that_hides(tmp_path: Path) -> None:
    _, mask = learnt(attention("bool", "masked = Where(marks, low, scores)", shape="B, T, T"), tmp_path)
    assert (mask.role, mask.padding, mask.fill, mask.inverted) == (InputRole.DATA, 1, None, False)


@pytest.mark.parametrize(
    ("nodes", "before"),
    [
        ("masked = Identity(scores)", ""),  # not used
        ("masked = Identity(scores)", "m = Cast<to = 1>(marks) w = Unsqueeze(m, last) h = Mul(x, w)"),  # keys stay
    ],
)
def test_marks_that_hide_no_position_stay_data(nodes: str, before: str, tmp_path: Path) -> None:
    signature, marks = learnt(attention("bool", nodes, before=before), tmp_path)
    assert (marks.role, marks.padding, marks.fill) == (InputRole.DATA, 0, None)
    assert signature.inputs == signature_of(attention("bool", nodes, before=before).graph).inputs


@pytest.mark.parametrize("hiding", [(1, 1), (0, 1), (1, 0)])
def test_masks_of_two_sequences_are_learnt_apart(hiding: tuple[int, int], tmp_path: Path) -> None:
    def masked(name: str, value: int) -> str:
        return f"Where({name}, low, {{0}})" if value else f"Where({name}, {{0}}, low)"

    own, other = masked("own_wide", hiding[0]).format("self_scores"), masked("far_wide", hiding[1]).format("far_scores")
    model = parse_model(f"""
        <ir_version: 10, opset_import: ["": 17]>
        crossed (float[B, T, {WIDTH}] x, float[B, S, {WIDTH}] memory, bool[B, T] own, bool[B, S] far)
            => (float[B, T, {WIDTH}] y)
        <int64[1] one = {{1}}>
        {{ own_wide = Unsqueeze(own, one) far_wide = Unsqueeze(far, one)
           xt = Transpose<perm = [0, 2, 1]>(x) self_scores = MatMul(x, xt) self_masked = {own}
           self_weights = Softmax(self_masked) h = MatMul(self_weights, x)
           mt = Transpose<perm = [0, 2, 1]>(memory) far_scores = MatMul(h, mt) far_masked = {other}
           weights = Softmax(far_masked) attended = MatMul(weights, memory) y = Add(h, attended) }}
    """)
    model.graph.initializer.append(numpy_helper.from_array(np.array(-np.inf, np.float32), "low"))
    model.graph.initializer.append(numpy_helper.from_array(np.eye(WIDTH, dtype=np.uint8), "eye"))
    signature, _ = learnt(onnx.shape_inference.infer_shapes(model), tmp_path)
    assert tuple(spec.padding for spec in signature.inputs[2:]) == hiding
    assert {spec.role for spec in signature.inputs[2:]} == {InputRole.ATTENTION_MASK}
