"""Attention as one operator, standard and onnxruntime's, and the operators before it: embeddings and rotations.

A case is a graph with the verdicts that the proof of batching must give: whether padding (`seq`) and other rows
(`batch`) can change an answer. By default both are proved: they cannot.
"""

from __future__ import annotations

from proof_cases import MASK, PROVED, REFUTED, UNKNOWN, X

from proof_tables.masks import ALL, LENGTH, MASKED, SHARE, SOME, TRUTHS, case

STANDARD = "Attention<q_num_heads = 2, kv_num_heads = 2>"
CAUSAL = "Attention<q_num_heads = 2, kv_num_heads = 2, is_causal = 1>"
SUMS = 'LinearAttention<q_num_heads = 2, kv_num_heads = 2, update_rule = "linear">'
LEFT = "Attention<q_num_heads = 2, kv_num_heads = 2, left_window_size = 1>"
WIDE = f"{TRUTHS} {LENGTH} shape = Concat<axis = 0>(over, over, n, over) all = Expand(keys, shape)"
INTS = "k = Cast<to = 6>(attention_mask)"
LOWEST = "mask_filter_value = -3.4e38"
PACKED = "float[4, 12] w, float[12] c"
COUNT = "k = ReduceSum<keepdims = 0>(attention_mask, over)"
HEADS = "float[batch, 2, seq, 4]"
TWO = f"{X}, float[batch, frames, 4] z"
ANGLES = "float[64, 2] cos, float[64, 2] sin"

OPERATORS = [
    case("Attention without a mask", f"y = {STANDARD}(x, x, x)", seq=REFUTED, why=SHARE),
    case("Attention with a boolean mask", f"{WIDE} y = {STANDARD}(x, x, x, all)", MASKED, needs=SOME),
    case(
        "Attention with a mask of -infinity",
        f"{WIDE} m = Where(all, nought, low) y = {STANDARD}(x, x, x, m)",
        MASKED,
        given="float low = {-inf}",
        needs=SOME,
    ),
    case(
        "Attention with a mask of -10000",
        f"g = Add(x, gain) {WIDE} m = Where(all, nought, low) y = {STANDARD}(g, g, g, m)",
        MASKED,
        given="float low = {-10000}",
        seq=UNKNOWN,
        why={"seq": "finite mask"},
        needs=SOME,
    ),
    case("causal Attention", f"y = {CAUSAL}(x, x, x)", needs={}),
    case(
        "Attention with counts of keys",
        f"{COUNT} y = {STANDARD}(x, x, x, , , , k)",
        MASKED,
        opset=24,
        needs=ALL,
    ),
    case(
        "causal Attention with counts of keys",
        f"{COUNT} y = {CAUSAL}(x, x, x, , , , k)",
        MASKED,
        opset=24,
        seq=REFUTED,
        why={"seq": "from the last one"},
    ),
    case(
        "a window of Attention with counts of keys",
        f"{COUNT} y = {LEFT}(x, x, x, , , , k)",
        MASKED,
        opset=25,
        seq=REFUTED,
        why={"seq": "from the last one"},
    ),
    case(
        "causal Attention with counts of another sequence's keys",
        f"k = ReduceSum<keepdims = 0>(frames_mask, over) y = {CAUSAL}(x, z, z, , , , k)",
        f"{TWO}, int64[batch, frames] frames_mask",
        opset=24,
        seq={"seq": REFUTED, "frames": PROVED},
    ),
    case(
        "Attention with a window",
        "y = Attention<q_num_heads = 2, kv_num_heads = 2, left_window_size = 1, right_window_size = 1>(x, x, x)",
        opset=25,
        seq=REFUTED,
        why=SHARE,
    ),
    case(
        "Attention with a window that ends at the query",
        "y = Attention<q_num_heads = 2, kv_num_heads = 2, left_window_size = 2, right_window_size = 0>(x, x, x)",
        opset=28,
        needs={},
    ),
    case("causal Attention with a boolean mask", f"{WIDE} y = {CAUSAL}(x, x, x, all)", MASKED, needs=ALL),
    case(
        "MultiHeadAttention without a mask",
        "y = com.microsoft.MultiHeadAttention<num_heads = 2>(x, x, x)",
        seq=REFUTED,
        why=SHARE,
    ),
    case(
        "MultiHeadAttention with a mask of keys",
        f"{INTS} y = com.microsoft.MultiHeadAttention<num_heads = 2, {LOWEST}>(x, x, x, , k)",
        MASKED,
        needs=SOME,
    ),
    case(
        "MultiHeadAttention with a finite mask of keys",
        f"g = Add(x, gain) {INTS} y = com.microsoft.MultiHeadAttention<num_heads = 2>(g, g, g, , k)",
        MASKED,
        seq=UNKNOWN,
        why={"seq": "finite mask"},
        needs=SOME,
    ),
    case(
        "causal MultiHeadAttention",
        "y = com.microsoft.MultiHeadAttention<num_heads = 2, unidirectional = 1>(x, x, x)",
        needs={},
    ),
    case(
        "Attention of onnxruntime without a mask",
        "y = com.microsoft.Attention<num_heads = 2>(x, w, c)",
        given=PACKED,
        seq=REFUTED,
        why=SHARE,
    ),
    case(
        "Attention of onnxruntime with a mask of keys",
        f"{INTS} y = com.microsoft.Attention<num_heads = 2, {LOWEST}>(x, w, c, k)",
        MASKED,
        given=PACKED,
        needs=SOME,
    ),
    case(
        "Attention of onnxruntime with a count of keys",
        f"{COUNT} i = Cast<to = 6>(k) y = com.microsoft.Attention<num_heads = 2, {LOWEST}>(x, w, c, i)",
        MASKED,
        given=PACKED,
        needs=ALL,
    ),
    case(
        "causal Attention of onnxruntime",
        "y = com.microsoft.Attention<num_heads = 2, unidirectional = 1>(x, w, c)",
        given=PACKED,
        needs={},
    ),
    case(
        "causal QAttention",
        "q = QuantizeLinear(x, s, z)"
        " y = com.microsoft.QAttention<num_heads = 2, unidirectional = 1>(q, v, c, s, s, , z, z)",
        given="float s = {0.1}, uint8 z = {3}, uint8[4, 12] v, float[12] c",
    ),
    case(
        "GroupQueryAttention",
        f"{COUNT} e = Sub(k, step) ends = Cast<to = 6>(e) {LENGTH} l = Squeeze(n) whole = Cast<to = 6>(l)"
        " y, pk, pv = com.microsoft.GroupQueryAttention<num_heads = 1, kv_num_heads = 1>(x, x, x, , , ends, whole)",
        f"float[batch, seq, 8] x, {MASK}",
        "float[batch, seq, 8] y",
        needs=SOME,
    ),
    case(
        "GroupQueryAttention of packed queries, keys and values",
        f"{COUNT} e = Sub(k, step) ends = Cast<to = 6>(e) {LENGTH} l = Squeeze(n) whole = Cast<to = 6>(l)"
        " y, pk, pv = com.microsoft.GroupQueryAttention<num_heads = 2, kv_num_heads = 1>(x, , , , , ends, whole)",
        f"float[batch, seq, 32] x, {MASK}",
        "float[batch, seq, 16] y",
        needs=SOME,
    ),
    case(
        "GroupQueryAttention of packed queries beside the keys of the mean of all rows",
        f"{COUNT} e = Sub(k, step) ends = Cast<to = 6>(e) {LENGTH} l = Squeeze(n) whole = Cast<to = 6>(l)"
        " m = ReduceMean<keepdims = 1>(x, first) d = Sub(x, m) packed = Concat<axis = 2>(x, d)"
        " y, pk, pv = com.microsoft.GroupQueryAttention<num_heads = 2, kv_num_heads = 1>(packed, , , , , ends, whole)",
        f"float[batch, seq, 16] x, {MASK}",
        "float[batch, seq, 16] y",
        given="int64[1] first = {0}",
        batch=REFUTED,
        needs=SOME,
    ),
    case(
        "EmbedLayerNormalization",
        "y, counts = com.microsoft.EmbedLayerNormalization(input_ids, , w, p, , gain, shift, attention_mask)",
        "int32[batch, seq] input_ids, int32[batch, seq] attention_mask",
        given="float[6, 4] w, float[64, 4] p",
    ),
    case(
        "RotaryEmbedding",
        "y = RotaryEmbedding(x, cos, sin, places)",
        f"{HEADS} x, int64[batch, seq] places",
        f"{HEADS} y",
        ANGLES,
    ),
    case(
        "RotaryEmbedding of onnxruntime",
        "y = com.microsoft.RotaryEmbedding(x, places, cos, sin)",
        f"{HEADS} x, int64[batch, seq] places",
        f"{HEADS} y",
        ANGLES,
    ),
    case(
        "Attention with a soft cap and a boolean mask",
        f"{WIDE} y = Attention<q_num_heads = 2, kv_num_heads = 2, softcap = 1.0>(x, x, x, all)",
        MASKED,
        needs=SOME,
    ),
    case(
        "MultiHeadAttention with a bias that hides keys",
        f"{WIDE} m = Where(all, nought, low) y = com.microsoft.MultiHeadAttention<num_heads = 2>(x, x, x, , , m)",
        MASKED,
        given="float low = {-inf}",
        needs=SOME,
    ),
    case(
        "MultiHeadAttention with a mask of queries and keys",
        f"{INTS} u = Unsqueeze(k, over) {LENGTH} shape = Concat<axis = 0>(over, n, over) m = Expand(u, shape)"
        f" y = com.microsoft.MultiHeadAttention<num_heads = 2, {LOWEST}>(x, x, x, , m)",
        MASKED,
        needs=SOME,
    ),
    case(
        "GroupQueryAttention with a window",
        f"{COUNT} e = Sub(k, step) ends = Cast<to = 6>(e) {LENGTH} l = Squeeze(n) whole = Cast<to = 6>(l) y, pk, pv ="
        " com.microsoft.GroupQueryAttention<num_heads = 1, kv_num_heads = 1, local_window_size = 2>"
        "(x, x, x, , , ends, whole)",
        f"float[batch, seq, 8] x, {MASK}",
        "float[batch, seq, 8] y",
        needs=SOME,
    ),
    case("LinearAttention", f"y, s = {SUMS}(x, x, x)", opset=27),
    case("LinearAttention of onnxruntime", f"y, s = com.microsoft.{SUMS}(x, x, x)"),
    case(
        "LinearAttention with a decay and an update rate",
        "d = Softplus(x) decay = Neg(d) r = ReduceSum(x, last) rate = Sigmoid(r) k = Tanh(x) y, s ="
        " com.microsoft.LinearAttention<q_num_heads = 4, kv_num_heads = 2>(wide, k, x, , decay, rate)",
        f"{X}, float[batch, seq, 8] wide",
        "float[batch, seq, 8] y",
    ),
    case(
        "LinearAttention with its weights",
        f"{LENGTH} e = Squeeze(n) r = Range(zero, e, step) rq = Unsqueeze(r, over) same = Equal(rq, r)"
        " f = Cast<to = 1>(same) u = Unsqueeze(f, over) b = Shape<start = 0, end = 1>(x) two = Add(over, over)"
        " shape = Concat<axis = 0>(b, n, two, n) wide = Expand(u, shape) width = Mul(n, two)"
        " flat = Concat<axis = 0>(b, n, width) units = Reshape(wide, flat)"
        f" o, t = com.microsoft.{SUMS}(x, x, units) apart = Reshape(o, shape)"
        f" weights = Transpose<perm = [0, 2, 1, 3]>(apart) y, s = com.microsoft.{SUMS}(x, x, x)",
        outputs="float[batch, seq, 4] y, float[batch, 2, seq, seq] weights",
        weights="weights",
    ),
    case(
        "the state of LinearAttention",
        f"g = Add(x, gain) t, y = com.microsoft.{SUMS}(g, g, g)",
        outputs="float[batch, 2, 2, 2] y",
        seq=REFUTED,
        why={"seq": "after padded positions"},
    ),
    case(
        "LinearAttention over the batch",
        f"t = Transpose<perm = [1, 0, 2]>(x) u, s = com.microsoft.{SUMS}(t, t, t) y = Transpose<perm = [1, 0, 2]>(u)",
        batch=UNKNOWN,
        why={"batch": "over the rows of the batch"},
    ),
    case(
        "LinearAttention over features",
        "t = Transpose<perm = [0, 2, 1]>(x) u, s = com.microsoft.LinearAttention"
        '<q_num_heads = 1, kv_num_heads = 1, update_rule = "linear">(t, t, t) y = Transpose<perm = [0, 2, 1]>(u)',
        seq=UNKNOWN,
        why={"seq": "features that are padded"},
    ),
    case(
        "CausalConvWithState",
        'c = Transpose<perm = [0, 2, 1]>(x) d, s = com.microsoft.CausalConvWithState<activation = "silu">(c, w)'
        " y = Transpose<perm = [0, 2, 1]>(d)",
        given="float[4, 1, 3] w",
    ),
    case(
        "the state of CausalConvWithState",
        "c = Transpose<perm = [0, 2, 1]>(x) d, y = com.microsoft.CausalConvWithState(c, w)",
        outputs="float[batch, 4, 2] y",
        given="float[4, 1, 3] w",
        seq=REFUTED,
        why={"seq": "after padded positions"},
    ),
    case(
        "queries of one sequence and keys of another, with a separate mask",
        "t = Transpose<perm = [0, 2, 1]>(z) raw = MatMul(x, t) b = Cast<to = 9>(frames_mask) k = Unsqueeze(b, over)"
        " s = Where(k, raw, low) p = Softmax(s) y = MatMul(p, z)",
        f"{TWO}, int64[batch, frames] frames_mask",
        given="float low = {-inf}",
        needs={"frames_mask": "some"},
    ),
    case(
        "queries of one sequence and keys of another, without a mask",
        "t = Transpose<perm = [0, 2, 1]>(z) raw = MatMul(x, t) p = Softmax(raw) y = MatMul(p, z)",
        TWO,
        seq={"seq": PROVED, "frames": REFUTED},
        why={"frames": "get weight"},
    ),
    case(
        "causal Attention of one sequence over another",
        f"y = {CAUSAL}(x, z, z)",
        TWO,
        seq={"seq": PROVED, "frames": REFUTED},
        why={"frames": "get weight"},
    ),
]
