"""Subgraphs, recurrent operators, functions, and quantization.

A case is a graph with the verdicts that the proof of batching must give: whether padding (`seq`) and other rows
(`batch`) can change an answer. By default both are proved: they cannot.
"""

from __future__ import annotations

from proof_cases import MASK, PROVED, REFUTED, Case, X, graph

POOLED = "float[batch, 4] y"
SEQUENCE = "float[batch, seq, 4]"
STATE = "float[batch, 4]"
NUMBERS = (
    "int64 zero = {0}, int64 two = {2}, int64[1] first = {0}, int64[1] over = {1}, bool yes = {1}, float nought = {0},"
    " float much = {1.5}"
)
LENGTH = "n = Shape<start = 1, end = 2>(x) count = Squeeze(n)"
BRANCHES = (
    f"y = If(q) <then_branch = t () => ({SEQUENCE} o1) {{ o1 = Neg(x) }},"
    f" else_branch = u () => ({SEQUENCE} o2) {{ o2 = Tanh(x) }}>"
)
BODY = f"<body = b (int64 i, bool c, {SEQUENCE} s1) => (bool c2, {SEQUENCE} s2) {{ c2 = Identity(c) s2 = Tanh(s1) }}>"
STEP = f"({STATE} s, {STATE} e) => ({STATE} s2, {STATE} o1) {{ r = Exp(e) s2 = Add(s, r) o1 = Identity(s2) }}"
TURNED = "t = Transpose<perm = [1, 0, 2]>(x) begin = Gather<axis = 1>(x, zero)"
BACK = "y = Transpose<perm = [1, 0, 2]>(o)"
BEHIND = {"seq": "carries a state over padded positions"}
FROM_END = {"seq": "from the end, where the padding is"}


def _case(
    name: str, nodes: str, inputs: str = X, outputs: str = f"{SEQUENCE} y", given: str = "", **more: object
) -> Case:
    return Case(name, graph(nodes, inputs, outputs, f"{NUMBERS}, {given}" if given else NUMBERS), **more)  # type: ignore[arg-type]


CONTROL = [
    _case("If on the rank", f"n = Shape(x) r = Shape(n) k = Squeeze(r) q = Greater(k, two) {BRANCHES}"),
    _case(
        "If on the length",
        f"{LENGTH} q = Greater(count, two) {BRANCHES}",
        seq=REFUTED,
        why={"seq": "chooses between two graphs"},
    ),
    _case(
        "If on the number of rows",
        f"n = Shape<start = 0, end = 1>(x) k = Squeeze(n) q = Greater(k, two) {BRANCHES}",
        batch=REFUTED,
        why={"batch": "chooses between two graphs"},
    ),
    _case(
        "If on the content",
        f"h = Exp(x) s = ReduceSum<keepdims = 0>(h) q = Greater(s, much) {BRANCHES}",
        given="float[1] unused = {0}",
        batch=REFUTED,
        seq=REFUTED,
        why={"batch": "chooses between two graphs", "seq": "chooses between two graphs"},
        content={"x": (-5, 0)},
    ),
    _case("Loop of a fixed number of turns", f"y = Loop(two, yes, x) {BODY}"),
    _case(
        "Loop with one iteration for each position",
        f"{LENGTH} y = Loop(count, yes, x) {BODY}",
        seq=REFUTED,
        why={"seq": "repeats a graph a number of times that depends on the padded length"},
    ),
    _case("Scan forward", f"{TURNED} end, o = Scan<num_scan_inputs = 1, body = b {STEP}>(begin, t) {BACK}"),
    _case(
        "Scan forward, with its last state read",
        f"{TURNED} y, o = Scan<num_scan_inputs = 1, body = b {STEP}>(begin, t)",
        outputs=POOLED,
        seq=REFUTED,
        why=BEHIND,
    ),
    _case(
        "Scan backward",
        f"{TURNED} end, o = Scan<num_scan_inputs = 1, scan_input_directions = [1], scan_output_directions = [1],"
        f" body = b {STEP}>(begin, t) {BACK}",
        seq=REFUTED,
    ),
    _case(
        "Scan over rows",
        "rows = Transpose<perm = [1, 0, 2]>(x) begin = ReduceMax<keepdims = 0>(x, first)"
        f" end, y = Scan<num_scan_inputs = 1, body = b {STEP}>(begin, x)",
        batch=REFUTED,
    ),
    *(
        _case(
            f"{name} forward",
            f"t = Transpose<perm = [1, 0, 2]>(x) q = {name}<hidden_size = 2>(t, w, r) o = Squeeze(q, over) {BACK}",
            outputs="float[batch, seq, 2] y",
            given=f"float[1, {gates * 2}, 4] w, float[1, {gates * 2}, 2] r",
        )
        for name, gates in (("LSTM", 4), ("GRU", 3), ("RNN", 1))
    ),
    *(
        _case(
            f"the last state of {name}",
            f"g = Exp(x) t = Transpose<perm = [1, 0, 2]>(g) q, h = {name}<hidden_size = 2>(t, w, r)"
            " y = Squeeze(h, first)",
            outputs="float[batch, 2] y",
            given=f"float[1, {gates * 2}, 4] w, float[1, {gates * 2}, 2] r",
            seq=REFUTED,
            why=BEHIND,
        )
        for name, gates in (("LSTM", 4), ("GRU", 3), ("RNN", 1))
    ),
    _case(
        "LSTM in reverse",
        'g = Exp(x) t = Transpose<perm = [1, 0, 2]>(g) q = LSTM<hidden_size = 2, direction = "reverse">(t, w, r)'
        f" o = Squeeze(q, over) {BACK}",
        outputs="float[batch, seq, 2] y",
        given="float[1, 8, 4] w, float[1, 8, 2] r",
        seq=REFUTED,
        why=FROM_END,
    ),
    _case(
        "the last states of a bidirectional LSTM with lengths that a mask counts",
        "k = ReduceSum<keepdims = 0>(attention_mask, over) l = Cast<to = 6>(k) t = Transpose<perm = [1, 0, 2]>(x)"
        ' o, h = LSTM<hidden_size = 2, direction = "bidirectional">(t, w, r, , l) y = Transpose<perm = [1, 0, 2]>(h)',
        f"{X}, {MASK}",
        "float[batch, 2, 2] y",
        "float[2, 8, 4] w, float[2, 8, 2] r",
        needs={"attention_mask": "some"},
    ),
    _case(
        "LSTM over rows",
        "q = LSTM<hidden_size = 2>(x, w, r) y = Squeeze(q, over)",
        outputs="float[batch, seq, 2] y",
        given="float[1, 8, 4] w, float[1, 8, 2] r",
        batch=REFUTED,
        why={"batch": "carries a state from one row of the batch to the next"},
    ),
    _case(
        "a local function",
        "y = local.Double(x)",
        functions='<domain: "local", opset_import: ["" : 23]> Double (a) => (b) { b = Add(a, a) }',
    ),
    _case(
        "a local function that takes a mean",
        "y = local.Center(x)",
        functions='<domain: "local", opset_import: ["" : 23]> Center (a) => (b)'
        " { o = Constant<value_ints = [1]>() m = ReduceMean(a, o) b = Sub(a, m) }",
        seq=REFUTED,
        why={"seq": "takes the mean over padded positions too"},
    ),
]

SCALE = "float s = {0.1}, uint8 z = {128}"
ROUNDED = "q = QuantizeLinear(x, s, z)"
UNROUNDED = "y = DequantizeLinear(m, s, z)"
ONE_SCALE = "one scale spans all elements"


def _rounded(name: str, nodes: str, **more: object) -> Case:
    """Return a case with x quantized, an operator on the integers, and the result dequantized."""
    given = f"{SCALE}, uint8[4, 4] w"
    return _case(name, f"{ROUNDED} {nodes} {UNROUNDED}", given=given, **more)


def _masked(name: str, scale: str, zero: int, shares: str, **more: object) -> Case:
    """Return a case with masked scores that are quantized, and their softmax over the positions."""
    nodes = (
        "f = Cast<to = 1>(attention_mask) d = Sub(one, f) low = Mul(d, lowest) t = ReduceSum<keepdims = 0>(x, last)"
        f" u = Add(t, low) q = QuantizeLinear(u, s, z) {shares}"
    )
    given = (
        f"float one = {{1}}, float lowest = {{-3.4028234663852886e38}}, int64[1] last = {{-1}}, float s = {{{scale}}},"
        f" uint8 z = {{{zero}}}, float part = {{0.00390625}}, uint8 none = {{0}}"
    )
    return _case(name, nodes, f"{X}, {MASK}", "float[batch, seq] y", given, **more)


FLOAT_SHARES = "p = DequantizeLinear(q, s, z) y = Softmax<axis = 1>(p)"
INTEGER_SHARES = (
    "m = com.microsoft.QLinearSoftmax<axis = 1, opset = 13>(q, s, z, part, none) y = DequantizeLinear(m, part, none)"
)
BOUNDED = {"seq": "a mask subtracts only 2"}

QUANTIZED = [
    _masked("Softmax of a quantized mask", "1.3e36", 255, FLOAT_SHARES, needs={"attention_mask": "some"}),
    _masked("Softmax of a mask that a quantizer bounds", "0.01", 200, FLOAT_SHARES, seq=REFUTED, why=BOUNDED),
    _masked("QLinearSoftmax of a quantized mask", "1.3e36", 255, INTEGER_SHARES, needs={"attention_mask": "some"}),
    _masked("QLinearSoftmax of a mask that a quantizer bounds", "0.01", 200, INTEGER_SHARES, seq=REFUTED, why=BOUNDED),
    _case("QuantizeLinear and DequantizeLinear", f"m = QuantizeLinear(x, s, z) {UNROUNDED}", given=SCALE),
    _case(
        "a scale for each channel",
        "m = QuantizeLinear<axis = 2>(x, s, z) y = DequantizeLinear<axis = 2>(m, s, z)",
        given="float[4] s = {0.1, 0.2, 0.3, 0.4}, uint8[4] z = {128, 3, 4, 5}",
    ),
    _case(
        "QuantizeLinear and DequantizeLinear of onnxruntime",
        "m = com.microsoft.QuantizeLinear(x, s, z) y = com.microsoft.DequantizeLinear(m, s, z)",
        given=SCALE,
    ),
    _case(
        "DynamicQuantizeLinear",
        "h = Exp(x) m, s, z = DynamicQuantizeLinear(h) y = DequantizeLinear(m, s, z)",
        batch=REFUTED,
        seq=REFUTED,
        why={"batch": ONE_SCALE, "seq": ONE_SCALE},
        content={"x": (-3, -2)},
    ),
    _case(
        "DynamicQuantizeLinear over zeros",
        "m, s, z = DynamicQuantizeLinear(x) y = DequantizeLinear(m, s, z)",
        batch=REFUTED,
        seq=PROVED,
        why={"batch": ONE_SCALE},
    ),
    _case(
        "MatMulInteger behind DynamicQuantizeLinear",
        "q, s, z = DynamicQuantizeLinear(x) m = MatMulInteger(q, w, z) f = Cast<to = 1>(m) y = Mul(f, s)",
        given="uint8[4, 4] w",
        batch=REFUTED,
        why={"batch": ONE_SCALE},
    ),
    _case(
        "MatMulInteger", f"{ROUNDED} m = MatMulInteger(q, w, z) y = Cast<to = 1>(m)", given=f"{SCALE}, uint8[4, 4] w"
    ),
    _case(
        "MatMulInteger16",
        "q = Cast<to = 5>(x) m = com.microsoft.MatMulInteger16(q, w) y = Cast<to = 1>(m)",
        given="int16[4, 4] w",
    ),
    _case(
        "MatMulIntegerToFloat",
        f"{ROUNDED} y = com.microsoft.MatMulIntegerToFloat(q, w, s, s, z, z)",
        given=f"{SCALE}, uint8[4, 4] w",
    ),
    _case(
        "DynamicQuantizeMatMul",
        "y = com.microsoft.DynamicQuantizeMatMul(x, w, s, z)",
        given=f"{SCALE}, uint8[4, 4] w",
        batch=REFUTED,
        why={"batch": ONE_SCALE},
    ),
    _rounded("QLinearMatMul", "m = QLinearMatMul(q, s, z, w, s, z, s, z)"),
    _rounded("QLinearAdd", "m = com.microsoft.QLinearAdd(q, s, z, q, s, z, s, z)"),
    _rounded("QLinearMul", "m = com.microsoft.QLinearMul(q, s, z, q, s, z, s, z)"),
    _rounded("QLinearSigmoid", "m = com.microsoft.QLinearSigmoid(q, s, z, s, z)"),
    _rounded("QLinearLeakyRelu", "m = com.microsoft.QLinearLeakyRelu(q, s, z, s, z)"),
    _rounded("QLinearSoftmax of each vector", "m = com.microsoft.QLinearSoftmax<axis = 2, opset = 13>(q, s, z, s, z)"),
    _rounded(
        "QLinearSoftmax over positions without a mask",
        "m = com.microsoft.QLinearSoftmax<axis = 1, opset = 13>(q, s, z, s, z)",
        seq=REFUTED,
        why={"seq": "no mask hides them"},
    ),
    _case(
        "QLinearConcat",
        f"{ROUNDED} m = com.microsoft.QLinearConcat<axis = 2>(s, z, q, s, z, q, s, z) y = DequantizeLinear(m, s, z)",
        outputs="float[batch, seq, 8] y",
        given=SCALE,
    ),
    _case(
        "QGemm",
        f"{ROUNDED} y = com.microsoft.QGemm(q, s, z, w, s, z)",
        "float[batch, 4] x",
        POOLED,
        f"{SCALE}, uint8[4, 4] w",
    ),
    _case(
        "MatMulNBits",
        "y = com.microsoft.MatMulNBits<K = 32, N = 4, bits = 4, block_size = 32>(x, w, s)",
        "float[batch, seq, 32] x",
        given="uint8[4, 1, 16] w, float[4] s",
    ),
    _case(
        "MatMulBnb4",
        "y = com.microsoft.MatMulBnb4<K = 4, N = 4, block_size = 16, quant_type = 1>(x, w, s)",
        given="uint8[8] w, float[1] s",
    ),
]
