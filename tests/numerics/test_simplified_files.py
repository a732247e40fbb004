"""Attention as graph tools rewrite it: fused, with pruned heads, and with rounded or approximated softmax.

The graphs are of the forms that onnxsim 0.8.1 and onnxoptimizer 0.4.2 write. References are NumPy in float64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from attnserve_server.conversion.assemble import assemble
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.graphs.reading import checked
from attnserve_server.conversion.inputs.signature import signature_of
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.model.manifest import SiteSpec
from onnx import numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]
LENGTH, HEADS, SIZE = 6, 5, 4
SHAPES = {"wq": (20, 20), "wk": (20, 8), "wv": (20, 8), "wide": (20, 60), "packed": (20, 42), "offset": (42,)}
GROUPS = [0, 0, 0, 1, 1]


def constants() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {name: (rng.normal(size=shape) * 0.4).astype(np.float32) for name, shape in SHAPES.items()}


def sites_of(nodes: str, given: str, folder: Path) -> tuple[tuple[SiteSpec, ...], RuntimeSession]:
    """Return the sites of a graph from x, (batch, seq, 20), to y, and its session with taps."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]> g (float[batch, seq, 20] x)'
        f" => (float[batch, seq, width] y) <int64[4] four = {{0, 0, -1, 4}}, int64[3] flat = {{0, 0, -1}}{given}>"
        f" {{ {nodes} }}"
    )
    used = {name for node in model.graph.node for name in node.input}
    kept = {name: array for name, array in constants().items() if name in used}
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in kept.items())
    proto = checked(model, "case")
    done = assemble(proto, Sampler(signature_of(proto.graph), 0), folder, Steps.silent())
    return done.sites, RuntimeSession.load(done.model_path, provider="CPUExecutionProvider")


def drawn() -> Array:
    return np.random.default_rng(1).normal(size=(3, LENGTH, 20)).astype(np.float32)


def weights_of(session: RuntimeSession, site: SiteSpec, others: tuple[SiteSpec, ...] = ()) -> Array:
    nothing = {other.items_input: np.zeros(0, np.int64) for other in others if other is not site}
    (found,) = session.run({"x": drawn(), **nothing, site.items_input: np.array([2, 0])}, [site.weights_output])
    return found


def scores() -> Array:
    """The scores of five heads, which share two key heads as 3 and 2, float64 (B, H, L, S)."""
    x, tables = drawn().astype(np.float64), constants()
    query = (x @ tables["wq"]).reshape(3, LENGTH, HEADS, SIZE).transpose(0, 2, 1, 3)
    key = (x @ tables["wk"]).reshape(3, LENGTH, 2, SIZE).transpose(0, 2, 1, 3)[:, GROUPS]
    return query @ key.swapaxes(2, 3) / 2


def softmax(logits: Array) -> Array:
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


QUERY = "q0 = MatMul(x, wq) q1 = Reshape(q0, four) q = Transpose<perm = [0, 2, 1, 3]>(q1)"
KEY = "k0 = MatMul(x, wk) k1 = Reshape(k0, four) kh = Transpose<perm = [0, 2, 1, 3]>(k1)"
VALUE = "v0 = MatMul(x, wv) v1 = Reshape(v0, four) vh = Transpose<perm = [0, 2, 1, 3]>(v1)"
SCORES = "kt = Transpose<perm = [0, 1, 3, 2]>(k) r = MatMul(q, kt) s = Mul(r, half)"
REST = "o = MatMul(p, v) back = Transpose<perm = [0, 2, 1, 3]>(o) y = Reshape(back, flat)"
BY_INDEX = f"{QUERY} {KEY} {VALUE} k = Gather<axis = 1>(kh, groups) v = Gather<axis = 1>(vh, groups) {SCORES}"
BY_SPLIT = (
    f"{QUERY} {KEY} {VALUE} ka, kb = Split<axis = 1>(kh, ones) ka3 = Expand(ka, three) kb2 = Expand(kb, two)"
    " k = Concat<axis = 1>(ka3, kb2) va, vb = Split<axis = 1>(vh, ones) va3 = Expand(va, three) vb2 = Expand(vb, two)"
    f" v = Concat<axis = 1>(va3, vb2) {SCORES}"
)
GIVEN = ", float half = {0.5}, int64[5] groups = {0, 0, 0, 1, 1}"
SPLIT = ", float half = {0.5}, int64[2] ones = {1, 1}, int64[4] three = {1, 3, 1, 1}, int64[4] two = {1, 2, 1, 1}"


@pytest.mark.parametrize(("nodes", "given"), [(BY_INDEX, GIVEN), (BY_SPLIT, SPLIT)], ids=["Gather", "Split"])
def test_key_heads_may_serve_unequal_numbers_of_query_heads(nodes: str, given: str, tmp_path: Path) -> None:
    (site,), session = sites_of(f"{nodes} p = Softmax(s) {REST}", given, tmp_path)
    assert (site.heads, site.head_dim, site.unavailable_reason) == (HEADS, SIZE, "")
    # float32, sums of at most 20 products.
    np.testing.assert_allclose(weights_of(session, site), softmax(scores())[[2, 0]], rtol=0, atol=1e-6)


def test_rounded_weights_are_those_that_multiply_the_values(tmp_path: Path) -> None:
    rounded = "w = Softmax(s) d = Div(w, step) n = Round(d) c = Clip(n, low, high) p = Mul(c, step)"
    given = f"{GIVEN}, float step = {{0.0625}}, float low = {{0}}, float high = {{15}}"
    (site,), session = sites_of(f"{BY_INDEX} {rounded} {REST}", given, tmp_path)
    exact = softmax(scores())[[2, 0]] / 0.0625
    expected = np.clip(np.round(exact), 0, 15) * 0.0625
    clear = np.abs(exact - np.floor(exact) - 0.5) > 1e-4  # beside a half, float32 may round to the other side
    found = weights_of(session, site)
    np.testing.assert_allclose(found[clear], expected[clear], rtol=0, atol=1e-7)
    assert clear.mean() > 0.9
    assert site.unavailable_reason == ""


def test_softmax_by_a_polynomial_and_powers_of_two_is_found(tmp_path: Path) -> None:
    approximated = (
        "m = ReduceMax(s, last) z = Sub(s, m) g = Neg(z) t = Div(g, ln) f = Floor(t) h = Mul(f, ln) e = Add(z, h)"
        " e2 = Mul(e, e) a2 = Mul(e2, a) b1 = Mul(e, b) ab = Add(a2, b1) poly = Add(ab, one) i = Neg(f)"
        " power = Pow(base, i) exps = Mul(poly, power) total = ReduceSum(exps, last) p = Div(exps, total)"
    )
    given = (
        f"{GIVEN}, int64[1] last = {{-1}}, float ln = {{0.6931472}}, float a = {{0.3585}}, float b = {{0.9732}},"
        " float one = {1}, float base = {2}"
    )
    (site,), session = sites_of(f"{BY_INDEX} {approximated} {REST}", given, tmp_path)
    low = scores() - scores().max(axis=-1, keepdims=True)
    halvings = np.floor(-low / 0.6931472)
    rest = low + halvings * 0.6931472
    exponentials = (0.3585 * rest**2 + 0.9732 * rest + 1) * 2.0**-halvings
    expected = exponentials / exponentials.sum(axis=-1, keepdims=True)
    assert site.unavailable_reason == ""
    np.testing.assert_allclose(weights_of(session, site), expected[[2, 0]], rtol=0, atol=1e-6)


def test_layers_with_unequal_numbers_of_heads_and_widths_have_their_own(tmp_path: Path) -> None:
    # As onnxsim fuses and prunes: the first layer keeps 3 heads of 4 (values of 6), the second is not fused.
    nodes = (
        "h = com.microsoft.Attention<num_heads = 3, qkv_hidden_sizes = [12, 12, 18], scale = 0.5>(x, packed, offset)"
        " full = Pad(h, pads) qkv = MatMul(full, wide) q0, k0, v0 = Split<axis = 2>(qkv, parts) q1 = Reshape(q0, four)"
        " q = Transpose<perm = [0, 2, 1, 3]>(q1) k1 = Reshape(k0, four) k = Transpose<perm = [0, 2, 1, 3]>(k1)"
        f" v1 = Reshape(v0, four) v = Transpose<perm = [0, 2, 1, 3]>(v1) {SCORES} p = Softmax(s) {REST}"
    )
    given = ", float half = {0.5}, int64[6] pads = {0, 0, 0, 0, 0, 2}, int64[3] parts = {20, 20, 20}"
    sites, session = sites_of(nodes, given, tmp_path)
    assert [(site.heads, site.head_dim, site.unavailable_reason) for site in sites] == [(3, 4, ""), (5, 4, "")]
    x, tables = drawn().astype(np.float64), constants()
    parts = x @ tables["packed"] + tables["offset"]

    def split(array: Array, heads: int) -> Array:
        return array.reshape(3, LENGTH, heads, -1).transpose(0, 2, 1, 3)

    query, key, value = (split(part, 3) for part in np.split(parts, [12, 24], axis=2))
    first = softmax(query @ key.swapaxes(2, 3) / 2)
    hidden = np.pad((first @ value).transpose(0, 2, 1, 3).reshape(3, LENGTH, 18), ((0, 0), (0, 0), (0, 2)))
    query, key, _ = (split(part, 5) for part in np.split(hidden @ tables["wide"], 3, axis=2))
    second = softmax(query @ key.swapaxes(2, 3) / 2)
    for site, expected in zip(sites, (first, second), strict=True):
        np.testing.assert_allclose(weights_of(session, site, sites), expected[[2, 0]], rtol=0, atol=2e-6)
