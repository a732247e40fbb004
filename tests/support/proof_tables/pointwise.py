"""Elementwise operators: proved where each element depends on its own place only, else refuted.

A case is a graph with the verdicts that the proof of batching must give: whether padding (`seq`) and other rows
(`batch`) can change an answer.
"""

from __future__ import annotations

from proof_cases import REFUTED, Case, X, graph

NOT_RUN = {"FastGelu", "QuickGelu", "Swish", "BitwiseAnd", "BitwiseOr", "BitwiseXor"}
"""Operators without an onnxruntime CPU kernel in the standard domain at this opset."""
_FLOATS = (
    "Abs Acos Atan Ceil Celu Cos Elu Erf Exp Floor Gelu FastGelu QuickGelu HardSigmoid HardSwish Identity LeakyRelu Log"
    " Mish Neg Reciprocal Relu Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu"
)
_TRUTHS = "IsInf IsNaN"
_BINARY = "Add Div Max Min Mul Pow PRelu Sub Sum Mean"
_COMPARED = "Equal Greater GreaterOrEqual Less LessOrEqual"
_LOGICAL = "And Or Xor"
_BITS = "BitwiseAnd BitwiseOr BitwiseXor"

LENGTH = "n = Shape<start = 1, end = 2>(x)"
ROWS = "n = Shape<start = 0, end = 1>(x)"


def _op(name: str, nodes: str, **more: str) -> Case:
    return Case(name, graph(nodes, **more), run=name not in NOT_RUN)


CASES = [
    *(
        _op(name, f"h = Abs(x) y = {name}(h)" if name in {"Log", "Sqrt"} else f"y = {name}(x)")
        for name in _FLOATS.split()
    ),
    *(_op(name, f"b = {name}(x) y = Cast<to = 1>(b)") for name in _TRUTHS.split()),
    *(_op(name, f"h = Abs(x) y = {name}(h, x)" if name == "Pow" else f"y = {name}(x, x)") for name in _BINARY.split()),
    *(_op(name, f"b = {name}(x, w) y = Cast<to = 1>(b)", given="float[4] w") for name in _COMPARED.split()),
    *(
        _op(name, f"a = Greater(x, w) c = Less(x, w) b = {name}(a, c) y = Cast<to = 1>(b)", given="float[4] w")
        for name in _LOGICAL.split()
    ),
    *(_op(name, f"i = Cast<to = 7>(x) b = {name}(i, i) y = Cast<to = 1>(b)") for name in _BITS.split()),
    _op("Not", "a = Greater(x, w) b = Not(a) y = Cast<to = 1>(b)", given="float[4] w"),
    _op("Mod", "y = Mod<fmod = 1>(x, two)", given="float two = {2}"),
    _op(
        "BitShift",
        'b = BitShift<direction = "LEFT">(n, one) y = Cast<to = 1>(b)',
        inputs="uint8[batch, seq, 4] n",
        given="uint8 one = {1}",
    ),
    _op("Where", "c = Greater(x, w) y = Where(c, x, w)", given="float[4] w"),
    _op("Clip", "y = Clip(x, low, high)", given="float low = {-0.5}, float high = {0.5}"),
    _op("Cast to a whole number and back", "i = Cast<to = 7>(x) y = Cast<to = 1>(i)"),
    _op("CastLike", "y = CastLike(x, x)"),
    _op("Dropout at inference", "y = Dropout(x)"),
    _op(
        "BatchNormalization",
        "y = BatchNormalization(x, s, b, m, v)",
        inputs="float[batch, 3, seq] x",
        outputs="float[batch, 3, seq] y",
        given="float[3] s, float[3] b, float[3] m, float[3] v = {1, 1, 1}",
    ),
    *(_op(f"{name} of onnxruntime", f"y = com.microsoft.{name}(x)") for name in ("Gelu", "FastGelu", "QuickGelu")),
    _op("BiasGelu of onnxruntime", "y = com.microsoft.BiasGelu(x, w)", given="float[4] w"),
    Case(
        "a number divided by the padded length",
        graph(f"{LENGTH} f = Cast<to = 1>(n) y = Div(x, f)"),
        seq=REFUTED,
        why={"seq": "computes with the padded length"},
    ),
    Case(
        "a number divided by the number of rows",
        graph(f"{ROWS} f = Cast<to = 1>(n) y = Div(x, f)"),
        batch=REFUTED,
        why={"batch": "computes with the number of rows in the batch"},
    ),
    Case(
        "neighbours of one row added to another by broadcasting",
        graph("g = Gather<axis = 0>(x, first) y = Add(x, g)", given="int64[1] first = {0}"),
        batch=REFUTED,
        why={"batch": "takes fixed rows of the batch"},
    ),
    Case(
        "positions from the first on",
        graph(
            f"{LENGTH} end = Squeeze(n) r = Range(zero, end, one) e = Gather(w, r) y = Add(x, e)",
            given="float[64, 4] w, int64 zero = {0}, int64 one = {1}",
        ),
    ),
    Case(
        "positions counted from the end",
        graph(
            f"{LENGTH} end = Squeeze(n) r = Range(zero, end, one) q = Sub(end, r) q1 = Sub(q, one) e = Gather(w, q1)"
            " y = Add(x, e)",
            given="float[64, 4] w, int64 zero = {0}, int64 one = {1}",
        ),
        seq=REFUTED,
        why={"seq": "positions counted from the padded end"},
    ),
    Case("rows of one vector", graph("y = Mul(x, w)", inputs=X, given="float[4] w")),
]
