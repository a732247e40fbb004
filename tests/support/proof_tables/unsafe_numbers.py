"""Unsafe graphs whose cause is a number that is easily missed: NaN, overflow, integers, random numbers.

A case is a graph with the verdicts that the proof of batching must give: whether padding (`seq`) and other rows
(`batch`) can change an answer.
"""

from __future__ import annotations

from proof_cases import MASK, REFUTED, Case, X, graph

POOLED = "float[batch, 4] y"
SUM = "int64[1] over = {1}"
TURNED = "t = Transpose<perm = [1, 0, 2]>(x)"
HIDDEN = "b = Cast<to = 9>(attention_mask) u = Unsqueeze(b, last) v = Where(u, s, low) y = Softmax<axis = 1>(v)"
_HUNDRED = ", ".join("100" if row == column else "0" for row in range(4) for column in range(4))
_THOUSAND = _HUNDRED.replace("100", "1000")
_THOUSANDTH = _HUNDRED.replace("100", "0.001")
_NOTHING = ", ".join(["0"] * 16)

UNSAFE = [
    # infinities and NaN that an interval must mark, so that 0 times them does not count as 0
    Case(
        "acos outside of -1 to 1 is NaN",
        graph(
            "h = Add(x, two) g = Acos(h) k = Mul(x, g) y = ReduceSum<keepdims = 0>(k, over)",
            outputs=POOLED,
            given=f"{SUM}, float two = {{2}}",
        ),
        content={"x": (-3, -1)},
    ),
    Case(
        "a remainder of a division by 0 is NaN",
        graph(
            "h = Add(x, one) k = Mod<fmod = 1>(h, x) y = ReduceSum<keepdims = 0>(k, over)",
            outputs=POOLED,
            given=f"{SUM}, float one = {{1}}",
        ),
        content={"x": (1, 3)},
    ),
    Case(
        "exp of a constant overflows float32",
        graph(
            "h = Add(x, hundred) g = Exp(h) k = Mul(x, g) y = ReduceSum<keepdims = 0>(k, over)",
            outputs=POOLED,
            given=f"{SUM}, float hundred = {{100}}",
        ),
        content={"x": (-100, -98)},
    ),
    Case(
        "a cast to float16 makes -infinity of a low number",
        graph(
            "f = Cast<to = 1>(attention_mask) g = Sub(one, f) h = Mul(g, million) i = Cast<to = 10>(h)"
            " j = Cast<to = 1>(i) u = Unsqueeze(f, last) v = Unsqueeze(j, last) e = Add(x, v) q = Mul(e, u)"
            " y = ReduceSum<keepdims = 0>(q, over)",
            inputs=f"{X}, {MASK}",
            outputs=POOLED,
            given=f"{SUM}, int64[1] last = {{-1}}, float one = {{1}}, float million = {{1e6}}",
        ),
    ),
    # integers do not compute as floats do
    Case(
        "whole numbers are divided without a rest",
        graph(
            "p = Add(n, one) h = Div(p, two) b = Cast<to = 9>(h) c = Not(b) f = Cast<to = 1>(c) e = Exp(x)"
            " k = Mul(e, f) y = ReduceSum<keepdims = 0>(k, over)",
            inputs=f"{X}, int32[batch, seq, 4] n",
            outputs=POOLED,
            given=f"{SUM}, int32 one = {{1}}, int32 two = {{2}}",
        ),
    ),
    Case(
        "CastLike to whole numbers cuts fractions off",
        graph(
            "g = Add(x, half) k = CastLike(g, whole) b = Cast<to = 9>(k) c = Not(b) f = Cast<to = 1>(c)"
            " y = ReduceSum<keepdims = 0>(f, over)",
            outputs=POOLED,
            given=f"{SUM}, float half = {{0.5}}, int32 whole = {{0}}",
        ),
    ),
    Case(
        "a cast to int8 keeps the lowest byte alone",
        graph(
            "h = Mul(attention_mask, k) i = Cast<to = 3>(h) b = Cast<to = 9>(i) s = ReduceSum<keepdims = 0>(x, last)"
            " w = Where(b, s, low) y = Softmax<axis = 1>(w)",
            inputs=f"{X}, {MASK}",
            outputs="float[batch, seq] y",
            given="int64 k = {256}, int64[1] last = {-1}, float low = {-3e38}",
        ),
    ),
    Case(
        "unsigned numbers wrap around below 0",
        graph(
            "h = Sub(mask, one) f = Cast<to = 1>(h) s = ReduceSum<keepdims = 0>(x, last) g = Mul(f, low)"
            " t = Sub(s, g) y = Softmax<axis = 1>(t)",
            inputs=f"{X}, uint8[batch, seq] mask",
            outputs="float[batch, seq] y",
            given="uint8 one = {1}, int64[1] last = {-1}, float low = {-3e38}",
        ),
    ),
    # attributes that widen the results of an operator
    Case(
        "the alpha of Elu takes it below -1",
        graph(
            "f = Cast<to = 1>(attention_mask) d = Sub(one, f) low = Mul(d, thirty) t = Tanh(x)"
            " q = ReduceSum<keepdims = 0>(t, last) e = Elu<alpha = 40.0>(q) s = Add(e, low) p = Softmax<axis = 1>(s)"
            " u = Unsqueeze(p, last) y = Mul(x, u)",
            inputs=f"{X}, {MASK}",
            given="float one = {1}, float thirty = {-36}, int64[1] last = {-1}",
        ),
    ),
    *(
        Case(
            f"the {name} of {operator} widens what it gives",
            graph(
                f"h = Tanh(x) s = {operator}<{name} = 50.0>(h) b = Cast<to = 9>(attention_mask) u = Unsqueeze(b, last)"
                " w = Where(u, s, low) y = Softmax<axis = 1>(w)",
                inputs=f"{X}, {MASK}",
                given="int64[1] last = {-1}, float low = {-20}",
            ),
        )
        for operator, name in (("LeakyRelu", "alpha"), ("Selu", "gamma"))
    ),
    Case(
        "RNN gives more than 1 by another activation",
        graph(
            f'{TURNED} o = RNN<hidden_size = 4, activations = ["Relu"]>(t, w, r) q = Squeeze(o, over)'
            f" z = Transpose<perm = [1, 0, 2]>(q) s = Neg(z) {HIDDEN}",
            inputs=f"{X}, {MASK}",
            given=f"{SUM}, int64[1] last = {{-1}}, float low = {{-30}}, float[1, 4, 4] w = {{{_HUNDRED}}},"
            f" float[1, 4, 4] r = {{{_NOTHING}}}",
        ),
    ),
    Case(
        "GRU gives more than 1 from the state that it begins with",
        graph(
            f"{TURNED} g = Gather<axis = 1>(x, zero) wide = Mul(g, hundred) h = Unsqueeze(wide, first)"
            " o = GRU<hidden_size = 4>(t, w, r, , , h) q = Squeeze(o, over) s = Transpose<perm = [1, 0, 2]>(q)"
            f" {HIDDEN}",
            inputs=f"{X}, {MASK}",
            given=f"{SUM}, int64[1] last = {{-1}}, float low = {{-30}}, int64 zero = {{0}}, int64[1] first = {{0}},"
            " float hundred = {100}, float[1, 12, 4] w, float[1, 12, 4] r",
        ),
    ),
    Case(
        "QuantizeLinear to int16 gives more than a byte",
        graph(
            f"q = QuantizeLinear(x, scale, none) s = Cast<to = 1>(q) {HIDDEN}",
            inputs=f"{X}, {MASK}",
            given="int64[1] last = {-1}, float low = {-200}, float scale = {1}, int16 none = {0}",
        ),
        scale=1000,
    ),
    Case(
        "the bound of one transposed matrix is taken for that of another",
        graph(
            "h = LayerNormalization(x, gain, shift) p = MatMul(h, small) p2 = MatMul(h, large)"
            " q = com.microsoft.FusedMatMul<transB = 1>(h, small) r = com.microsoft.FusedMatMul<transB = 1>(h, large)"
            " f = Cast<to = 1>(attention_mask) d = Sub(one, f) m = Mul(d, low) u = Unsqueeze(m, last) s = Add(r, u)"
            " y = Softmax<axis = 1>(s)",
            inputs=f"{X}, {MASK}",
            given="int64[1] last = {-1}, float one = {1}, float low = {-1000}, float[4] gain = {1, 1, 1, 1},"
            f" float[4] shift = {{0, 0, 0, 0}}, float[4, 4] small = {{{_THOUSANDTH}}},"
            f" float[4, 4] large = {{{_THOUSAND}}}",
        ),
    ),
    # operators that draw random numbers, or take statistics of the batch, in training
    Case(
        "RandomNormalLike of a constant is folded into one",
        graph("r = RandomNormalLike(w) y = Add(x, r)", given="float[4] w"),
        batch=REFUTED,
        opset=21,
    ),
    Case(
        "RandomUniformLike of a constant is folded into one",
        graph("r = RandomUniformLike(w) y = Add(x, r)", given="float[4] w"),
        batch=REFUTED,
        opset=21,
    ),
    Case(
        "Bernoulli of a constant is folded into one",
        graph("r = Bernoulli(w) y = Add(x, r)", given="float[4] w = {0.5, 0.5, 0.5, 0.5}"),
        batch=REFUTED,
        opset=21,
    ),
    Case(
        "Dropout in training mode drops at random",
        graph("y = Dropout(x, half, training)", given="float half = {0.5}, bool training = {1}"),
        batch=REFUTED,
    ),
    Case(
        "BatchNormalization in training mode takes statistics of the batch",
        graph(
            "y, m2, v2 = BatchNormalization<training_mode = 1>(x, s, b, m, v)",
            inputs="float[batch, 3, seq] x",
            outputs="float[batch, 3, seq] y",
            given="float[3] s = {1, 1, 1}, float[3] b = {0, 0, 0}, float[3] m = {0, 0, 0}, float[3] v = {1, 1, 1}",
        ),
        batch=REFUTED,
    ),
]
"""Padding changes each answer. Where `batch` is refuted, the rest of the batch does too."""
