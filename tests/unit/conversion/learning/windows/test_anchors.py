"""Where queries and keys are still sequences: the nearest earlier value (B, T, C), and its second axis.

Windowed attention cuts a sequence into windows; the anchor is the value before that. `anchors` returns the anchors of a
graph with one site, or the reason why it has none. A site without two known products raises NotTraced. A site is a
place in a graph that computes attention.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from attnserve_server.conversion.finders import find_probabilities
from attnserve_server.conversion.inputs.signature import signature_of
from attnserve_server.conversion.learning.provenance import NotTraced
from attnserve_server.conversion.learning.windows.anchors import Anchors, anchors_of, products_of
from attnserve_server.conversion.probing.feeds import Sampler
from batch_graphs import graph

ATTEND = """
    kt = Transpose<perm=[0, 1, 3, 2]>(k)
    s = MatMul(q, kt)
    p = Softmax<axis=-1>(s)
    z = MatMul(p, k)
"""
HEADS = """
    q4 = Reshape(qs, apart) q = Transpose<perm=[0, 2, 1, 3]>(q4)
    k4 = Reshape(ks, apart) k = Transpose<perm=[0, 2, 1, 3]>(k4)
"""


def model_of(nodes: str, inputs: str = "float[b, t, 4] x, float[b, s, 4] y") -> onnx.ModelProto:
    constants = {
        "w": np.ones((4, 4), np.float32),
        "apart": np.array([0, 0, 2, 2]),
        "one": np.array([1]),
        "grid": np.array([0, 2, 3, 4]),
    }
    return onnx.shape_inference.infer_shapes(graph(f"g ({inputs}) => (float z) {{ {nodes} }}", **constants))


def anchors(model: onnx.ModelProto, folder: Path) -> Anchors | str:
    sampler = Sampler(signature_of(model.graph))
    (found,) = anchors_of(model, ["attention_0"], sampler, folder / "anchors.onnx").values()
    return str(found) if isinstance(found, NotTraced) else found


def test_the_nearest_value_along_an_axis_of_the_inputs_is_the_anchor(tmp_path: Path) -> None:
    model = model_of(f"qs = MatMul(x, w) h = MatMul(x, w) ks = Tanh(h) {HEADS} {ATTEND}")
    assert anchors(model, tmp_path) == Anchors("qs", "ks", "t", "t")


def test_a_value_of_fixed_length_is_the_anchor_where_none_follows_an_input(tmp_path: Path) -> None:
    nodes = f"q = Reshape(x, grid) k = Tanh(q) {ATTEND}"
    assert anchors(model_of(nodes, "float[b, 6, 4] x"), tmp_path) == Anchors("x", "x", 6, 6)


def test_keys_of_another_sequence_have_no_common_anchors(tmp_path: Path) -> None:
    model = model_of(f"qs = MatMul(x, w) ks = MatMul(y, w) {HEADS} {ATTEND}")
    assert anchors(model, tmp_path) == "its keys are of another sequence than its queries"


def test_a_site_that_comes_from_no_sequence_has_no_anchor(tmp_path: Path) -> None:
    model = model_of(f"q = Tanh(x) k = Neg(x) {ATTEND}", "float[b, h, t, 4] x")
    assert anchors(model, tmp_path) == "nothing that its query comes from is a sequence"


def test_the_two_products_of_a_site_are_found() -> None:
    model = ir.from_proto(model_of(f"q = Reshape(x, grid) k = Tanh(q) {ATTEND}", "float[b, 6, 4] x"))
    (site,) = find_probabilities(model.graph).values()
    products = products_of(site)
    named = {side: getattr(products, side).name for side in ("query", "key", "scores", "weights", "value")}
    assert named == {"query": "q", "key": "kt", "scores": "s", "weights": "p", "value": "k"}


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        (ATTEND.replace("s = MatMul(q, kt)", "a = MatMul(q, kt) b = MatMul(k, kt) s = Add(a, b)"), "not one product"),
        (ATTEND.replace("MatMul(p, k)", 'Einsum<equation="bhsd, bhqs -> bhqd">(k, p)'), "in no known layout"),
    ],
    ids=["sum of products", "weights second"],
)
def test_other_products_are_not_traced(nodes: str, reason: str) -> None:
    model = ir.from_proto(model_of(f"q = Reshape(x, grid) k = Tanh(q) {nodes}", "float[b, 6, 4] x"))
    (site,) = find_probabilities(model.graph).values()
    with pytest.raises(NotTraced, match=reason):
        products_of(site)
