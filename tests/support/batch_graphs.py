"""Small graphs whose answers depend on padding or on batch neighbours, and graphs whose answers do not.

The numbers C1 to C53 in docstrings are those of the bug reports that `batching_cases` reproduces. Nodes that ONNX
cannot parse or check raise its errors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper, parser

Array = np.ndarray[Any, np.dtype[Any]]

WIDTH = 8
_HEADER = '<ir_version: 9, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n'
_SCORES = "xt = Transpose<perm=[0,2,1]>(x) raw = MatMul(x, xt) scores = Mul(raw, scale)"
_ATTEND = "p = Softmax<axis=-1>(scores_in) y = MatMul(p, x)"
_LENGTH = "length_1 = Shape<start=1, end=2>(x) length = Squeeze(length_1) length_f = Cast<to=1>(length)"


def graph(body: str, *, opset: int = 17, **constants: Array | float) -> onnx.ModelProto:
    """A model from text; every constant is an initializer of its name."""
    proto = parser.parse_model(_HEADER.format(opset=opset) + body)
    for name, value in constants.items():
        array = np.float32(value) if isinstance(value, float) else value
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    onnx.checker.check_model(proto, full_check=False)
    return proto


def on_floats(nodes: str, *, width: int = WIDTH, opset: int = 17, **constants: Array | float) -> onnx.ModelProto:
    """From x, float (B, t, width), to y of the same shape."""
    return graph(f"g (float[b, t, {width}] x) => (float[b, t, {width}] y) {{ {nodes} }}", opset=opset, **constants)


def on_masked_floats(nodes: str, y: str = f"float[b, t, {WIDTH}]", **constants: Array | float) -> onnx.ModelProto:
    """From x, float (B, t, width), and an attention mask, int64 (B, t); `kept` is the mask as a float (B, 1, t)."""
    kept = "kept_2 = Cast<to=1>(attention_mask) kept = Unsqueeze(kept_2, axis_1)"
    return graph(
        f"g (float[b, t, {WIDTH}] x, int64[b, t] attention_mask) => ({y} y) {{ {kept} {nodes} }}",
        **{"axis_1": np.array([1]), **constants},
    )


def unmasked_attention(width: int = 64) -> onnx.ModelProto:
    """softmax(x x^T) x without a mask: with values of ordinary size its softmax is saturated (C3)."""
    nodes = f"{_SCORES} scores_in = Identity(scores) {_ATTEND}"
    return on_floats(nodes, width=width, scale=1.0)


def sharp_attention() -> onnx.ModelProto:
    """The same behind a LayerNorm, with large projections: saturated for values of any size but zero (C4)."""
    rng = np.random.default_rng(1)
    nodes = (
        "n = LayerNormalization<axis=-1>(x, gain) q = MatMul(n, wq) k = MatMul(n, wk) kt = Transpose<perm=[0,2,1]>(k) "
        "raw = MatMul(q, kt) scores_in = Mul(raw, scale) p = Softmax<axis=-1>(scores_in) y = MatMul(p, n)"
    )
    wq, wk = (4 * rng.normal(size=(64, 64)).astype(np.float32) for _ in range(2))
    return on_floats(nodes, width=64, scale=1 / 8, gain=np.ones(64, np.float32), wq=wq, wk=wk)


def unmasked_text() -> onnx.ModelProto:
    """Weights over embedded ids without a mask: only padding ids inside a text attend to padding (C5)."""
    table = np.random.default_rng(2).normal(size=(30, 64)).astype(np.float32)
    nodes = "x = Gather(table, input_ids) xt = Transpose<perm=[0,2,1]>(x) s = MatMul(x, xt) y = Softmax<axis=-1>(s)"
    return graph(f"g (int64[b, t] input_ids) => (float[b, t, t] y) {{ {nodes} }}", table=table)


def softmax_over_all_axes() -> onnx.ModelProto:
    """Opset 11: a softmax of axis 1 is one distribution over every axis behind it (C6)."""
    nodes = f"{_SCORES} p = Softmax(scores) y = MatMul(p, x)"
    return on_floats(nodes, opset=11, scale=1.0)


def masked_attention(filler: float = -np.inf, scale: float = 0.35) -> onnx.ModelProto:
    """Attention with a mask of any filler that is added to the scores; exact with -inf (C53 where it is -10)."""
    added = "hides = Less(kept, half) added = Where(hides, filler, zero) scores_in = Add(scores, added)"
    nodes = f"{_SCORES} {added} {_ATTEND}"
    return on_masked_floats(nodes, scale=scale, half=0.5, zero=0.0, filler=float(filler))


def log_length_scale() -> onnx.ModelProto:
    """Masked attention whose scores grow with the logarithm of the padded length beyond 32 (C7)."""
    nodes = (
        f"{_SCORES} {_LENGTH} log = Log(length_f) ratio = Div(log, log_32) factor = Max(ratio, one) "
        f"more = Mul(scores, factor) hides = Less(kept, half) scores_in = Where(hides, filler, more) {_ATTEND}"
    )
    constants = {"log_32": float(np.log(32)), "one": 1.0, "half": 0.5, "filler": -np.inf}
    return on_masked_floats(nodes, scale=0.35, **constants)


def scale_switched_by_length(step: float = 40.0) -> onnx.ModelProto:
    """Masked attention whose scale switches where the padded length exceeds a step (C8)."""
    nodes = (
        f"{_SCORES} {_LENGTH} long = Greater(length_f, step) factor = Where(long, three, one) "
        f"more = Mul(scores, factor) hides = Less(kept, half) scores_in = Where(hides, filler, more) {_ATTEND}"
    )
    constants = {"step": step, "one": 1.0, "three": 3.0, "half": 0.5, "filler": -np.inf}
    return on_masked_floats(nodes, scale=0.35, **constants)


def branch_by_length(step: float = 64.0) -> onnx.ModelProto:
    """An If on the padded length (C9)."""
    branches = (
        f"then_branch = then () => (float[b, t, {WIDTH}] a) {{ a = Mul(x, three) }}, "
        f"else_branch = other () => (float[b, t, {WIDTH}] c) {{ c = Identity(x) }}"
    )
    return on_floats(f"{_LENGTH} long = Greater(length_f, step) y = If(long) <{branches}>", step=step, three=3.0)


def mean_of_last(count: int = 10) -> onnx.ModelProto:
    """The masked mean of the last positions of the padded length (C10)."""
    nodes = (
        "columns = Transpose<perm=[0,2,1]>(kept) masked = Mul(x, columns) last = Slice(masked, from, end, axis_1) "
        "last_kept = Slice(columns, from, end, axis_1) sum = ReduceSum<keepdims=0>(last, axis_1) "
        "number = ReduceSum<keepdims=0>(last_kept, axis_1) divisor = Max(number, one) y = Div(sum, divisor)"
    )
    constants = {"from": np.array([-count]), "end": np.array([1 << 40]), "one": np.array([1.0], np.float32)}
    return on_masked_floats(nodes, f"float[b, {WIDTH}]", **constants)


def scale_by_greatest_length() -> onnx.ModelProto:
    """Divides by the greatest length in the batch (C11)."""
    nodes = (
        "lengths = ReduceSum<keepdims=0>(attention_mask, axis_1) most = ReduceMax<keepdims=0>(lengths) "
        "most_f = Cast<to=1>(most) y = Div(x, most_f)"
    )
    return on_masked_floats(nodes)


def capacity(most: int = 40) -> onnx.ModelProto:
    """Zeros the positions that are beyond a capacity over all positions of all rows (C12)."""
    nodes = (
        "sizes = Shape<start=0, end=2>(x) flat = Reshape(x, rows_of) ones = Mul(flat, zero_v) plus = Add(ones, one_v) "
        "first = Slice(plus, zero_1, one_1, one_1) number = CumSum(first, zero) kept = LessOrEqual(number, most) "
        "chosen = Where(kept, flat, zero_v) shape = Shape(x) y = Reshape(chosen, shape)"
    )
    constants: dict[str, Array | float] = {"rows_of": np.array([-1, WIDTH]), "zero_v": 0.0, "one_v": 1.0}
    constants |= {"zero_1": np.array([0]), "one_1": np.array([1]), "zero": np.array(0), "most": float(most)}
    return on_floats(nodes, **constants)


def small_mean() -> onnx.ModelProto:
    """An unmasked mean of outputs of 1e-5 (C13)."""
    nodes = "mean = ReduceMean<axes=[1], keepdims=0>(x) y = Mul(mean, f)"
    return graph(f"g (float[b, t, {WIDTH}] x) => (float[b, {WIDTH}] y) {{ {nodes} }}", f=1e-5)


def dynamically_quantized(*, fused: bool = False) -> onnx.ModelProto:
    """x quantized by one scale for the whole batch (C1)."""
    if fused:
        weights = 127 * np.eye(4, dtype=np.int8)
        body = "y = com.microsoft.DynamicQuantizeMatMul(x, w, s)"
        return on_floats(body, width=4, w=weights, s=np.array(1 / 127, np.float32))
    nodes = (
        "q, scale, zero = DynamicQuantizeLinear(x) product = MatMulInteger(q, w, zero) wide = Cast<to=1>(product) "
        "y = Mul(wide, scale)"
    )
    return on_floats(nodes, width=4, w=np.eye(4, dtype=np.int8))


def quantized_by_row() -> onnx.ModelProto:
    """x rounded to steps that depend on the greatest value of the same position only."""
    nodes = (
        "a = Abs(x) most = ReduceMax<axes=[2], keepdims=1>(a) safe = Max(most, tiny) step = Div(safe, steps) "
        "n = Div(x, step) r = Round(n) y = Mul(r, step)"
    )
    return on_floats(nodes, tiny=1e-30, steps=127.0)


def pointwise() -> onnx.ModelProto:
    """A layer of the usual kind without attention: every position for itself."""
    rng = np.random.default_rng(3)
    w = rng.normal(size=(WIDTH, WIDTH)).astype(np.float32)
    nodes = "n = LayerNormalization<axis=-1>(x, gain) m = MatMul(n, w) e = Erf(m) y = Add(e, x)"
    return on_floats(nodes, w=w, gain=np.ones(WIDTH, np.float32))


def causal_attention() -> onnx.ModelProto:
    """Attention in which no query attends to keys behind it."""
    nodes = (
        f"{_SCORES} shape = Shape(scores) square = Expand(one, shape) seen = Trilu<upper=0>(square) "
        f"hides = Less(seen, half) scores_in = Where(hides, filler, scores) {_ATTEND}"
    )
    return on_floats(nodes, scale=0.35, one=1.0, half=0.5, filler=-np.inf)


def masked_mean() -> onnx.ModelProto:
    """The mean over the positions that the mask keeps."""
    nodes = (
        "columns = Transpose<perm=[0,2,1]>(kept) masked = Mul(x, columns) sum = ReduceSum<keepdims=0>(masked, axis_1) "
        "number = ReduceSum<keepdims=0>(columns, axis_1) divisor = Max(number, one) y = Div(sum, divisor)"
    )
    return on_masked_floats(nodes, f"float[b, {WIDTH}]", one=np.array([1.0], np.float32))


def scaled_by_rows() -> onnx.ModelProto:
    """Divides by the number of rows of the batch: copies of a sequence answer otherwise than it does alone."""
    nodes = "rows = Shape<start=0, end=1>(x) rows_f = Cast<to=1>(rows) y = Div(x, rows_f)"
    return on_floats(nodes)


def barely_scaled_by_rows(share: float = 1e-5) -> onnx.ModelProto:
    """Scales by 1, and a share more for each row."""
    nodes = "rows = Shape<start=0, end=1>(x) n = Cast<to=1>(rows) d = Mul(n, small) f = Add(d, one) y = Mul(x, f)"
    return on_floats(nodes, small=share, one=1.0)


def cross_attention(*, masked: bool) -> onnx.ModelProto:
    """Queries (B, t, width) attend to a memory (B, s, width), of which a mask may hide the padding."""
    inputs = f"float[b, t, {WIDTH}] x, float[b, s, {WIDTH}] memory, int64[b, s] attention_mask"
    scores_in = "scores_in = Where(hides, filler, scores)" if masked else "scores_in = Identity(scores)"
    nodes = (
        "keys = Transpose<perm=[0,2,1]>(memory) raw = MatMul(x, keys) scores = Mul(raw, scale) "
        "kept_2 = Cast<to=1>(attention_mask) kept = Unsqueeze(kept_2, axis_1) hides = Less(kept, half) "
        f"{scores_in} p = Softmax<axis=-1>(scores_in) y = MatMul(p, memory)"
    )
    constants: dict[str, Array | float] = {"axis_1": np.array([1]), "half": 0.5, "filler": -np.inf, "scale": 0.35}
    return graph(f"g ({inputs}) => (float[b, t, {WIDTH}] y) {{ {nodes} }}", **constants)


def causal_cross_attention() -> onnx.ModelProto:
    """Queries attend to the keys up to their own number: padded keys show where queries outnumber the keys."""
    inputs = f"float[b, t, {WIDTH}] x, float[b, s, {WIDTH}] memory"
    nodes = (
        "keys = Transpose<perm=[0,2,1]>(memory) raw = MatMul(x, keys) scores = Mul(raw, scale) shape = Shape(scores) "
        "square = Expand(one, shape) seen = Trilu<upper=0>(square) hides = Less(seen, half) "
        "scores_in = Where(hides, filler, scores) p = Softmax<axis=-1>(scores_in) y = MatMul(p, memory)"
    )
    constants: dict[str, Array | float] = {"one": 1.0, "half": 0.5, "filler": -np.inf, "scale": 0.35}
    return graph(f"g ({inputs}) => (float[b, t, {WIDTH}] y) {{ {nodes} }}", **constants)


def text_with_derived_mask() -> onnx.ModelProto:
    """Attention over embedded ids; the mask is derived from the padding id, 0."""
    table = np.random.default_rng(2).normal(size=(30, WIDTH)).astype(np.float32)
    nodes = (
        "x = Gather(table, input_ids) hides_2 = Equal(input_ids, zero) hides = Unsqueeze(hides_2, axis_1) "
        f"{_SCORES} scores_in = Where(hides, filler, scores) {_ATTEND}"
    )
    constants: dict[str, Array | float] = {"axis_1": np.array([1]), "zero": np.array(0), "filler": -np.inf}
    return graph(
        f"g (int64[b, t] input_ids) => (float[b, t, {WIDTH}] y) {{ {nodes} }}", table=table, scale=0.35, **constants
    )


def centred() -> onnx.ModelProto:
    """Each value less the mean over the kept positions: what is left of equal values is rounding alone."""
    nodes = (
        "columns = Transpose<perm=[0,2,1]>(kept) moved = Add(x, tenth) masked = Mul(moved, columns) "
        "sum = ReduceSum<keepdims=1>(masked, axis_1) number = ReduceSum<keepdims=1>(columns, axis_1) "
        "divisor = Max(number, one) mean = Div(sum, divisor) y = Sub(moved, mean)"
    )
    return on_masked_floats(nodes, one=np.array([1.0], np.float32), tenth=0.1)


def sharp_masked_attention(filler: float = -np.inf) -> onnx.ModelProto:
    """Masked attention with random projections: large values have scores of millions, far below a finite filler too."""
    rng = np.random.default_rng(4)
    nodes = (
        "q = MatMul(x, wq) k = MatMul(x, wk) kt = Transpose<perm=[0,2,1]>(k) raw = MatMul(q, kt) "
        f"hides = Less(kept, half) added = Where(hides, filler, zero) scores_in = Add(raw, added) {_ATTEND}"
    )
    wq, wk = (rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) for _ in range(2))
    return on_masked_floats(nodes, half=0.5, zero=0.0, filler=float(filler), wq=wq, wk=wk)


def dynamically_quantized_text() -> onnx.ModelProto:
    """Embedded ids behind a LayerNorm, quantized by one scale for the batch, words of padding included (C2)."""
    table = np.random.default_rng(5).normal(size=(30, WIDTH)).astype(np.float32)
    nodes = (
        "x = Gather(table, input_ids) n = LayerNormalization<axis=-1>(x, gain) "
        "q, scale, zero = DynamicQuantizeLinear(n) product = MatMulInteger(q, w, zero) "
        "wide = Cast<to=1>(product) h = Mul(wide, scale) y = Mul(h, small)"
    )
    w = np.random.default_rng(6).integers(-100, 100, (WIDTH, WIDTH)).astype(np.int8)
    constants: dict[str, Array | float] = {"gain": np.ones(WIDTH, np.float32), "w": w, "small": 0.01}
    return graph(f"g (int64[b, t] input_ids) => (float[b, t, {WIDTH}] y) {{ {nodes} }}", table=table, **constants)


def scale_by_greatest_position() -> onnx.ModelProto:
    """Scales by two where any position in the batch is above 60, as rotary bases that switch do."""
    nodes = (
        "most = ReduceMax<keepdims=0>(position_ids) far = Greater(most, step) factor = Where(far, two, one) "
        "y = Mul(x, factor)"
    )
    inputs = f"float[b, t, {WIDTH}] x, int64[b, t] position_ids"
    constants: dict[str, Array | float] = {"step": np.array(60), "two": 2.0, "one": 1.0}
    return graph(f"g ({inputs}) => (float[b, t, {WIDTH}] y) {{ {nodes} }}", **constants)


def scale_by_token_types_of_the_batch() -> onnx.ModelProto:
    """Scales by two where any token of the batch is of the second type."""
    nodes = "most = ReduceMax<keepdims=0>(token_type_ids) more = Cast<to=1>(most) f = Add(more, one) y = Mul(x, f)"
    inputs = f"float[b, t, {WIDTH}] x, int64[b, t] token_type_ids"
    return graph(f"g ({inputs}) => (float[b, t, {WIDTH}] y) {{ {nodes} }}", one=1.0)


def scale_where_both_are_long(step: int = 20) -> onnx.ModelProto:
    """Scales by two where two axes are both longer than a step: padding one of them may change nothing."""
    nodes = (
        "t = Shape<start=1, end=2>(x) s = Shape<start=1, end=2>(memory) least = Min(t, s) far = Greater(least, step) "
        "factor = Where(far, two, one) y = Mul(x, factor)"
    )
    inputs = f"float[b, t, {WIDTH}] x, float[b, s, {WIDTH}] memory"
    constants: dict[str, Array | float] = {"step": np.array(step), "two": 2.0, "one": 1.0}
    return graph(f"g ({inputs}) => (float[b, t, {WIDTH}] y) {{ {nodes} }}", **constants)


def mean_over_rows_of_fixed_length() -> onnx.ModelProto:
    """Subtracts the mean over the batch; no axis but the batch is dynamic."""
    nodes = "mean = ReduceMean<axes=[0], keepdims=1>(x) y = Sub(x, mean)"
    return graph(f"g (float[b, 6, {WIDTH}] x) => (float[b, 6, {WIDTH}] y) {{ {nodes} }}")
