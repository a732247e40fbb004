"""Unsafe graphs whose cause is a place or a length that is easily missed.

A case is a graph with the verdicts that the proof of batching must give: whether padding (`seq`) and other rows
(`batch`) can change an answer.
"""

from __future__ import annotations

from proof_cases import MASK, PROVED, REFUTED, Case, X, graph

POOLED = "float[batch, 4] y"
LENGTH = "n = Shape<start = 1, end = 2>(x)"
"""The length of the sequence, int64 (1,)."""
PLACES = f"{LENGTH} length = Squeeze(n) count = Range(zero, length, one) back = Sub(count, length)"
"""Positions counted from the end, where the padding is: int64 (S,), from -S to -1."""
COUNTING = "int64 zero = {0}, int64 one = {1}, int64[1] last = {-1}"
SUM = "int64[1] over = {1}"

UNSAFE = [
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
    # sizes and places that depend on the padded length, and are easily taken for numbers that do not
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
    *(
        Case(
            f"{operator} is scaled by the padded length",
            graph(
                f"n = Shape<start = {axis}, end = {axis + 1}>(x) f = Cast<to = 1>(n) g = Concat<axis = 0>({parts})"
                f" y = {nodes}",
                inputs,
                outputs,
                given,
            ),
        )
        for operator, axis, parts, nodes, inputs, outputs, given in (
            (
                "BatchNormalization",
                2,
                "f, f, f",
                "BatchNormalization(x, g, b, b, v)",
                "float[batch, 3, seq] x",
                "float[batch, 3, seq] y",
                "float[3] b, float[3] v = {1, 1, 1}",
            ),
            (
                "SkipLayerNormalization",
                1,
                "f, f, f, f",
                "com.microsoft.SkipLayerNormalization(x, x, g)",
                X,
                "float[batch, seq, 4] y",
                "float[4] unused",
            ),
            (
                "MatMulNBits",
                1,
                "f, f, f, f",
                "com.microsoft.MatMulNBits<K = 32, N = 4, bits = 4, block_size = 32>(x, w, g)",
                "float[batch, seq, 32] x",
                "float[batch, seq, 4] y",
                "uint8[4, 1, 16] w",
            ),
        )
    ),
    # masks and frontiers
    Case(
        "a float mask of ones and zeros is added to scores, and hides nothing",
        graph(
            "b = Unsqueeze(attention_mask, middle) n = Shape<start = 1, end = 2>(x)"
            " shape = Concat<axis = 0>(over, over, n, over) e = Expand(b, shape) m = Cast<to = 1>(e)"
            " y = Attention<q_num_heads = 2, kv_num_heads = 2>(x, x, x, m)",
            inputs=f"{X}, {MASK}",
            given=f"{SUM}, int64[2] middle = {{1, 2}}",
        ),
    ),
    Case(
        "the frontier of onnxruntime's kernel moves with the number of queries",
        graph(
            "y = com.microsoft.MultiHeadAttention<num_heads = 2, unidirectional = 1>(x, z, z)",
            inputs=f"{X}, float[batch, frames, 4] z",
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
"""Padding changes each answer. Where `batch` is refuted, the rest of the batch does too."""
