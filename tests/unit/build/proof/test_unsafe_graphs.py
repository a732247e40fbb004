"""Graphs whose answers depend on padding in ways that are easily missed: none may be proved. Runs show why."""

from __future__ import annotations

import pytest
from proof_cases import MASK, PROVED, REFUTED, Case, X, graph
from proof_runs import Runs

POOLED = "float[batch, 4] y"
LENGTH = "n = Shape<start = 1, end = 2>(x)"
"""The length of the sequence, int64 (1,)."""
PLACES = f"{LENGTH} length = Squeeze(n) count = Range(zero, length, one) back = Sub(count, length)"
"""Positions counted from the end, where padding stands: int64 (S,), from -S to -1."""
COUNTING = "int64 zero = {0}, int64 one = {1}, int64[1] last = {-1}"
SUM = "int64[1] over = {1}"

UNSAFE = [
    # intervals: infinities and NaN that are not announced, so that 0 times them counts as 0
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
    # intervals: whole numbers do not compute as fractions do
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
    # intervals: attributes that widen what an operator gives
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
    # places in the whole tensor
    Case(
        "the places that MaxPool gives count through the whole tensor",
        graph(
            "p, i = MaxPool<kernel_shape = [1]>(x) y = Cast<to = 1>(i)",
            inputs="float[batch, 3, seq] x",
            outputs="float[batch, 3, seq] y",
        ),
        batch=REFUTED,
    ),
    Case(
        "a place one before that of the greatest may be -1, the last padded position",
        graph(
            "k = ArgMax<axis = 1, keepdims = 0>(attention_mask) j = Sub(k, one) i = Unsqueeze(j, last)"
            " y = GatherND<batch_dims = 1>(x, i)",
            inputs=f"{X}, {MASK}",
            outputs=POOLED,
            given="int64 one = {1}, int64[1] last = {-1}",
        ),
    ),
    # sizes and places that depend on the padded length, and are taken for numbers that do not
    Case(
        "a loop carries the padded length",
        graph(
            f"{LENGTH} s0 = Cast<to = 1>(n)"
            " s = Loop(two, yes, s0) <body = b (int64 i, bool c, float[1] s1) => (bool c2, float[1] s2)"
            " { c2 = Identity(c) s2 = Identity(s1) }> y = Mul(x, s)",
            given="int64 two = {2}, bool yes = {1}",
        ),
    ),
    Case(
        "one branch of an If gives the padded length",
        graph(
            "first = Slice(x, starts, ends) r = ReduceMax<keepdims = 0>(first) q = Greater(r, zero)"
            " n = If(q) <then_branch = t () => (float[1] o1) { k = Shape<start = 1, end = 2>(x) o1 = Cast<to = 1>(k) },"
            " else_branch = u () => (float[1] o2) { o2 = Constant<value = float[1] {1}>() }> y = Mul(x, n)",
            given="int64[3] starts = {0, 0, 0}, int64[3] ends = {1, 1, 1}, float zero = {0}",
        ),
        batch=PROVED,
    ),
    Case(
        "places from the end, taken at the place of the greatest",
        graph(
            f"{PLACES} k = Relu(x) i = ArgMax<axis = 1>(k) g = Gather(back, i) f = Cast<to = 1>(g) y = Add(x, f)",
            inputs="float[batch, seq] x",
            outputs="float[batch, seq] y",
            given=COUNTING,
        ),
    ),
    Case(
        "places from the end, cut along another axis",
        graph(
            f"{PLACES} u = Unsqueeze(back, last) shape = Concat<axis = 0>(n, four) e = Expand(u, shape)"
            " s = Slice(e, nought, two, last) f = Cast<to = 1>(s) xs = Slice(x, nought, two, last) y = Add(xs, f)",
            outputs="float[batch, seq, 2] y",
            given=f"{COUNTING}, int64[1] four = {{4}}, int64[1] two = {{2}}, int64[1] nought = {{0}}",
        ),
    ),
    Case(
        "places from the end, joined into columns and transposed",
        graph(
            f"{PLACES} u = Unsqueeze(back, last) e = Concat<axis = -1>(u, u, u, u) t = Transpose(e) s = Transpose(t)"
            " f = Cast<to = 1>(s) y = Add(x, f)",
            given=COUNTING,
        ),
    ),
    Case(
        "an axis is filled up with the padded length",
        graph(
            f"{LENGTH} length = Squeeze(n) f = Cast<to = 1>(length) y = Pad(x, pads, f)",
            outputs="float[batch, seq, 5] y",
            given="int64[6] pads = {0, 0, 0, 0, 0, 1}",
        ),
    ),
    Case(
        "OneHot marks with the padded length",
        graph(
            f"{LENGTH} v = Concat<axis = 0>(nought, n) f = Cast<to = 1>(v) r = Relu(x) i = Cast<to = 7>(r)"
            " y = OneHot(i, depth, f)",
            inputs="float[batch, seq] x",
            given="int64 depth = {4}, int64[1] nought = {0}",
        ),
    ),
    Case(
        "a normalisation is scaled by the padded length",
        graph(
            f"{LENGTH} v = Concat<axis = 0>(n, n, n, n) f = Cast<to = 1>(v) y = LayerNormalization(x, f, b)",
            given="float[4] b",
        ),
    ),
    # what is behind the sequence's own part
    Case(
        "the end is cut off by a negative pad",
        graph(
            "k = Pad(x, pads) y = ReduceSum<keepdims = 0>(k, over)",
            outputs=POOLED,
            given=f"{SUM}, int64[6] pads = {{0, 0, 0, 0, -1, 0}}",
        ),
        shortest=2,
    ),
    Case(
        "EyeLike above the diagonal has ones behind the sequence",
        graph(
            f"{LENGTH} square = Concat<axis = 0>(n, n) g = ConstantOfShape(square) e = EyeLike<k = 1>(g)"
            " s = ReduceSum(e, over) y = Mul(s, x)",
            given=SUM,
        ),
    ),
    Case(
        "QLinearConv fills the ends with its zero point, not with zeros",
        graph(
            "y = QLinearConv<pads = [1, 1]>(x, s, z, w, s, w0, s1, y0)",
            inputs="uint8[batch, 3, seq] x",
            outputs="uint8[batch, 2, seq] y",
            given="float s = {0.1}, uint8 z = {5}, uint8[2, 3, 3] w, uint8 w0 = {0}, float s1 = {1}, uint8 y0 = {0}",
        ),
        content={"x": (0, 200)},
    ),
]
"""Of each, padding changes the answer; of those with `batch` refuted, the rest of the batch does too."""

OPEN = frozenset(
    {
        "acos outside of -1 to 1 is NaN",
        "a remainder of a division by 0 is NaN",
        "exp of a constant overflows float32",
        "a cast to float16 makes -infinity of a low number",
        "whole numbers are divided without a rest",
        "CastLike to whole numbers cuts fractions off",
        "a cast to int8 keeps the lowest byte alone",
        "unsigned numbers wrap around below 0",
        "the alpha of Elu takes it below -1",
        "RandomNormalLike of a constant is folded into one",
        "RandomUniformLike of a constant is folded into one",
        "Bernoulli of a constant is folded into one",
        "Dropout in training mode drops at random",
        "BatchNormalization in training mode takes statistics of the batch",
        "the places that MaxPool gives count through the whole tensor",
        "a place one before that of the greatest may be -1, the last padded position",
        "a loop carries the padded length",
        "one branch of an If gives the padded length",
        "places from the end, taken at the place of the greatest",
        "places from the end, cut along another axis",
        "places from the end, joined into columns and transposed",
        "an axis is filled up with the padded length",
        "OneHot marks with the padded length",
        "a normalisation is scaled by the padded length",
        "the end is cut off by a negative pad",
        "EyeLike above the diagonal has ones behind the sequence",
        "QLinearConv fills the ends with its zero point, not with zeros",
    }
)
"""Those that the proof still calls safe: a rule that is mended takes its case out of here."""


@pytest.mark.parametrize("case", UNSAFE, ids=lambda case: case.name)
def test_a_run_shows_that_the_graph_is_not_safe(case: Case) -> None:
    runs = Runs(case, case.proof())
    assert runs.worst("seq") > 1
    if case.batch is REFUTED:
        assert runs.worst("batch") > 1


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=case.name,
            marks=[pytest.mark.xfail(strict=True, reason="proved, and unsafe")] if case.name in OPEN else [],
        )
        for case in UNSAFE
    ],
)
def test_what_a_run_shows_to_be_unsafe_is_not_proved(case: Case) -> None:
    verdicts = {clause.axis: clause.verdict for clause in case.proof().clauses}
    assert verdicts["seq"] is not PROVED
    if case.batch is REFUTED:
        assert verdicts["batch"] is not PROVED
