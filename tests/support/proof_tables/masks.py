"""Softmax under masks, frontiers and windows, and decomposed attention with its tap.

A case is a graph with the verdicts that the proof of batching must give: whether padding (`seq`) and other rows
(`batch`) can change an answer. By default both are proved: they cannot.
"""

from __future__ import annotations

from proof_cases import MASK, REFUTED, UNKNOWN, Case, X, graph

MASKED = f"{X}, {MASK}"
SHARES = "float[batch, seq] y"
WEIGHTS = "float[batch, seq, 4] y, float[batch, 1, seq, seq] weights"
NUMBERS = (
    "int64[1] over = {1}, int64[1] last = {-1}, int64[2] middle = {1, 2}, float one = {1}, float nought = {0},"
    " int64 zero = {0}, int64 step = {1}, float[4] gain = {1, 1, 1, 1}, float[4] shift = {0, 0, 0, 0}"
)
FLOAT_MASK = "f = Cast<to = 1>(attention_mask) d = Sub(one, f) m = Mul(d, low)"
SCORES = "h = Unsqueeze(x, over) t = Transpose<perm = [0, 1, 3, 2]>(h) raw = MatMul(h, t)"
REST = "weights = Softmax(s) o = MatMul(weights, h) y = Squeeze(o, over)"
TRUTHS = "b = Cast<to = 9>(attention_mask) keys = Unsqueeze(b, middle)"
LENGTH = "n = Shape<start = 1, end = 2>(x)"
DISTANCE = f"{LENGTH} end = Squeeze(n) r = Range(zero, end, step) rq = Unsqueeze(r, last) far = Sub(rq, r)"
TRIANGLE = (
    f"{LENGTH} nn = Concat<axis = 0>(n, n) ones = ConstantOfShape<value = float[1] {{1}}>(nn)"
    " tri = Trilu<upper = 0>(ones) earlier = Cast<to = 9>(tri)"
)
_TABLE = ", ".join("1" if key <= query else "0" for query in range(16) for key in range(16))
SOME, ALL = {"attention_mask": "some"}, {"attention_mask": "all"}
SHARE = {"seq": "get weight"}


def case(
    name: str, nodes: str, inputs: str = X, outputs: str = "float[batch, seq, 4] y", given: str = "", **more: object
) -> Case:
    body = graph(nodes, inputs, outputs, f"{NUMBERS}, {given}" if given else NUMBERS)
    return Case(name, body, **more)  # type: ignore[arg-type]


def _shares(name: str, inner: str, low: str, **more: object) -> Case:
    """Softmax over the positions of scores that an additive mask lowers."""
    nodes = f"{inner} {FLOAT_MASK} t = Add(s, m) y = Softmax<axis = 1>(t)"
    return case(name, nodes, MASKED, SHARES, f"float low = {{{low}}}, float[4] column", **more)


def _site(name: str, mask: str, inputs: str = X, **more: object) -> Case:
    """Return a case of decomposed attention, with its weights as the tap of a site."""
    low = "float low = {-inf}" if "given" not in more else f"float low = {{-inf}}, {more.pop('given')}"
    return case(name, f"{SCORES} {mask} {REST}", inputs, WEIGHTS, low, weights="weights", **more)


ANY_SCORE = "h = Add(x, gain) s = ReduceSum<keepdims = 0>(h, last)"
BOUNDED = "h = LayerNormalization(x, gain, shift) s = MatMul(h, column)"

MASKS = [
    case(
        "Softmax over positions without a mask",
        "s = ReduceSum<keepdims = 0>(x, last) y = Softmax<axis = 1>(s)",
        outputs=SHARES,
        seq=REFUTED,
        why={"seq": "no mask hides them"},
    ),
    case("Softmax of each vector", "y = Softmax(x)"),
    case("LogSoftmax of each vector", "y = LogSoftmax(x)"),
    case("Hardmax of each vector", "y = Hardmax(x)"),
    case(
        "LogSoftmax over positions",
        "y = LogSoftmax<axis = 1>(x)",
        seq=REFUTED,
        why=SHARE,
    ),
    case(
        "Hardmax over positions",
        "h = Neg(x) g = Sub(h, one) y = Hardmax<axis = 1>(g)",
        seq=REFUTED,
        why={"seq": "get weight"},
        content={"x": (1, 2)},
    ),
    case(
        "Softmax over rows",
        "y = Softmax<axis = 0>(x)",
        batch=REFUTED,
        why={"batch": "computes a softmax over the rows of the batch"},
    ),
    case(
        "Softmax over several axes, in opset 11",
        "y = Softmax<axis = 1>(x)",
        opset=11,
        seq=REFUTED,
        why=SHARE,
    ),
    _shares("the lowest number added", ANY_SCORE, "-3.4028234663852886e38", needs=SOME),
    _shares(
        "-10000 added to scores without a bound",
        ANY_SCORE,
        "-10000",
        seq=UNKNOWN,
        why={"seq": "finite mask, unbounded scores"},
        needs=SOME,
    ),
    _shares(
        "-10 added",
        ANY_SCORE,
        "-10",
        seq=REFUTED,
        why={"seq": "a mask subtracts only 10 from the scores"},
        content={"x": (-1.5, -1)},
    ),
    case(
        "-1e9 instead of scores behind a normalisation",
        f"{BOUNDED} b = Cast<to = 9>(attention_mask) t = Where(b, s, low) y = Softmax<axis = 1>(t)",
        MASKED,
        SHARES,
        "float low = {-1e9}, float[4] column",
        needs=SOME,
    ),
    case(
        "-infinity instead of scores",
        "s = ReduceSum<keepdims = 0>(x, last) b = Cast<to = 9>(attention_mask) t = Where(b, s, low)"
        " y = Softmax<axis = 1>(t)",
        MASKED,
        SHARES,
        "float low = {-inf}",
        needs=SOME,
    ),
    case(
        "a float mask that is padded with -infinity",
        "s = ReduceSum<keepdims = 0>(x, last) t = Add(s, hidden) y = Softmax<axis = 1>(t)",
        f"{X}, float[batch, seq] hidden",
        SHARES,
        padding={"hidden": float("-inf")},
        needs={"hidden": "some"},
    ),
    case(
        "a mask of ids other than the padding id",
        "b = Equal(input_ids, zero) e = Gather(w, input_ids) t = Where(b, low, e) y = Softmax<axis = 1>(t)",
        "int64[batch, seq] input_ids",
        SHARES,
        "float low = {-inf}, float[6] w",
        needs={"input_ids": "some"},
    ),
    case(
        "a decomposed softmax",
        "s = ReduceSum<keepdims = 0>(x, last) b = Cast<to = 9>(attention_mask) t = Where(b, s, low)"
        " g = ReduceMax(t, over) d = Sub(t, g) e = Exp(d) total = ReduceSum(e, over) y = Div(e, total)",
        MASKED,
        SHARES,
        "float low = {-inf}",
        needs=SOME,
    ),
]

SITES = [
    _site("no mask", "s = Identity(raw)", seq=REFUTED, why=SHARE),
    _site("a mask of keys", f"{TRUTHS} s = Where(keys, raw, low)", MASKED, needs=SOME),
    _site("causal by Trilu", f"{TRIANGLE} s = Where(earlier, raw, low)", causal=True, needs={}),
    _site(
        "causal by positions",
        f"{DISTANCE} earlier = GreaterOrEqual(rq, r) s = Where(earlier, raw, low)",
        causal=True,
        needs={},
    ),
    _site(
        "causal by a part of a constant",
        f"{LENGTH} rows = Slice(tri, first, n, over) earlier = Slice(rows, first, n, first)"
        " s = Where(earlier, raw, low)",
        given=f"int64[1] first = {{0}}, bool[16, 16] tri = {{{_TABLE}}}",
        causal=True,
        longest=16,
        needs={},
    ),
    _site(
        "causal, with a mask of keys",
        f"{TRIANGLE} {TRUTHS} both = And(earlier, keys) s = Where(both, raw, low)",
        MASKED,
        causal=True,
        needs=ALL,
    ),
    _site(
        "the frontier reversed",
        f"{DISTANCE} later = LessOrEqual(rq, r) s = Where(later, raw, low)",
        seq=REFUTED,
        why=SHARE,
    ),
    _site(
        "a window on both sides",
        f"{DISTANCE} wide = Abs(far) near = LessOrEqual(wide, step) s = Where(near, raw, low)",
        seq=REFUTED,
        why=SHARE,
    ),
    _site(
        "a window on both sides, with a mask of keys",
        f"{DISTANCE} wide = Abs(far) near = LessOrEqual(wide, step) {TRUTHS} both = And(near, keys)"
        " s = Where(both, raw, low)",
        MASKED,
        needs=ALL,
    ),
    _site(
        "a causal window",
        f"{DISTANCE} near = LessOrEqual(far, step) earlier = GreaterOrEqual(far, zero) both = And(near, earlier)"
        " s = Where(both, raw, low)",
        causal=True,
        needs={},
    ),
    _site(
        "a bias by distance, with a mask of keys",
        f"{DISTANCE} wide = Abs(far) f = Cast<to = 1>(wide) g = Sub(raw, f) {TRUTHS} s = Where(keys, g, low)",
        MASKED,
        needs=SOME,
    ),
]
