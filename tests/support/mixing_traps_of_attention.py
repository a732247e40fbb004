"""Traps in which padding reaches an answer through attention whose mask does not hide it.

Each function is a trap by its name: from a writer, `x` and the mask it writes the nodes of `y`, and it is registered
with the axes along which padding changes `y`. It may return the shape of `y` too, where that is not (B, t, 8).
"""

from __future__ import annotations

import numpy as np
from mixing_traps import Made, attended, kept, ones, scored, trap
from mixing_writer import Writer
from onnx import TensorProto


@trap("t")
def reciprocal_behind_a_mask(w: Writer, x: str, mask: str) -> Made:
    far = w.op("Where", w.unsqueeze(kept(w, mask), 1), scored(w, x), w.const(-np.inf))
    return attended(w, far, w.op("Reciprocal", x))


@trap("t")
def scores_times_mask(w: Writer, x: str, mask: str) -> Made:
    return attended(w, w.op("Mul", scored(w, x), w.unsqueeze(ones(w, mask), 1)), x)


@trap("t")
def bias_of_the_wrong_sign(w: Writer, x: str, mask: str) -> Made:
    hidden = w.op("Sub", ones(w, mask), w.const(1.0))
    return attended(w, w.op("Add", scored(w, x), w.unsqueeze(w.op("Mul", hidden, w.const(-1e9)), 1)), x)


@trap("t")
def mask_behind_the_softmax(w: Writer, x: str, mask: str) -> Made:
    weights = w.op("Softmax", scored(w, x), axis=2)
    return w.op("MatMul", w.op("Mul", weights, w.unsqueeze(ones(w, mask), 1)), w.op("Add", x, w.const(1.0)))


@trap("t")
def frontier_from_the_end(w: Writer, x: str, mask: str) -> Made:
    place = w.range(w.length(x))
    earlier = w.op("Greater", w.unsqueeze(place, 1), w.unsqueeze(place, 0))
    return attended(w, w.op("Where", earlier, w.const(-np.inf), scored(w, x)), w.op("Add", x, w.const(1.0)))


@trap("t")
def upper_part_is_kept(w: Writer, x: str, mask: str) -> Made:
    length = w.extent(x, 1)
    square = w.op("Expand", w.const(-1e9), w.op("Concat", length, length, axis=0))
    return attended(w, w.op("Add", scored(w, x), w.op("Trilu", square, w.const(-1, np.int64), upper=0)), x)


@trap("t")
def frontier_then_shifted(w: Writer, x: str, mask: str) -> Made:
    place = w.range(w.length(x))
    later = w.op("Less", w.unsqueeze(place, 1), w.unsqueeze(place, 0))
    made = attended(w, w.op("Where", later, w.const(-np.inf), scored(w, x)), w.op("Add", x, w.const(1.0)))
    return w.op("Add", w.slice(w.op("Concat", made, made, axis=1), 1, 1, w.op("Add", w.extent(x, 1), w.ints(1))), x)


@trap("t")
def mask_of_the_future_alone(w: Writer, x: str, mask: str) -> Made:
    hidden = w.op("Where", kept(w, mask), w.const(0.0), w.const(-1e9))
    moved = w.op("Concat", w.slice(hidden, 1, 0, 1), w.slice(hidden, 1, 0, -1), axis=1)
    return attended(w, w.op("Add", scored(w, x), w.unsqueeze(moved, 1)), w.op("Add", x, w.const(1.0)))


@trap("t")
def either_mask(w: Writer, x: str, mask: str) -> Made:
    square = w.op("Or", w.unsqueeze(kept(w, mask), 1), w.unsqueeze(kept(w, mask), 2))
    return attended(w, w.op("Where", square, scored(w, x), w.const(-np.inf)), w.op("Add", x, w.const(1.0)))


@trap("t")
def frontier_or_mask(w: Writer, x: str, mask: str) -> Made:
    place = w.range(w.length(x))
    square = w.op("Less", w.unsqueeze(place, 0), w.op("Add", w.unsqueeze(place, 1), w.const(3, np.int64)))
    seen = w.op("Or", square, w.unsqueeze(kept(w, mask), 1))
    return attended(w, w.op("Where", seen, scored(w, x), w.const(-np.inf)), w.op("Add", x, w.const(1.0)))


@trap("t", opset=23)
def operator_with_a_bias_of_zeros(w: Writer, x: str, mask: str) -> Made:
    length = w.extent(x, 1)
    shape = w.op("Concat", w.extent(x, 0), w.ints(1), length, length, axis=0)
    bias = w.op("Expand", w.unsqueeze(w.op("Sub", ones(w, mask), w.const(1.0)), 1, 2), shape)
    return w.op("Attention", x, x, w.op("Add", x, w.const(1.0)), bias, q_num_heads=2, kv_num_heads=2)


@trap("s", opset=23, memory=True)
def operator_causal_over_a_shorter_memory(w: Writer, x: str, mask: str) -> Made:
    # Query i attends to keys up to i, also to those behind a memory of fewer positions.
    return w.op("Attention", x, "memory", "memory", q_num_heads=2, kv_num_heads=2, is_causal=1)


@trap("s", memory=True)
def triangle_over_a_shorter_memory(w: Writer, x: str, mask: str) -> Made:
    scores = w.op("MatMul", x, w.op("Transpose", "memory", perm=[0, 2, 1]))
    shape = w.op("Concat", w.extent(x, 1), w.extent("memory", 1), axis=0)
    bias = w.op("Trilu", w.op("Expand", w.const(-np.inf), shape), w.const(1, np.int64), upper=1)
    return attended(w, w.op("Add", scores, bias), w.op("Add", "memory", w.const(1.0)))


@trap("t", "s", memory=True)
def joined_behind_each_other(w: Writer, x: str, mask: str) -> Made:
    both = w.op("Concat", "memory", x, axis=1)
    weights = w.op("Softmax", w.op("MatMul", x, w.op("Transpose", both, perm=[0, 2, 1])), axis=2)
    return w.op("MatMul", weights, w.op("Add", both, w.const(1.0)))


@trap("t")
def fused_operator_without_its_mask(w: Writer, x: str, mask: str) -> Made:
    return w.op("MultiHeadAttention", x, x, w.op("Add", x, w.const(1.0)), domain="com.microsoft", num_heads=2)


@trap("t")
def fused_operator_with_its_default_filler(w: Writer, x: str, mask: str) -> Made:
    # -10000 against scores of any size.
    rows = w.cast(mask, TensorProto.INT32)
    query = w.op("Mul", x, w.const(100.0))
    key, bias = w.op("Neg", query), w.const(np.full(24, 1.0))
    return w.op("MultiHeadAttention", query, key, query, bias, rows, domain="com.microsoft", num_heads=2)


@trap("t", opset=23)
def operator_with_a_mask_of_queries(w: Writer, x: str, mask: str) -> Made:
    length = w.extent(x, 1)
    shape = w.op("Concat", w.extent(x, 0), w.ints(1), length, length, axis=0)
    keep = w.op("Expand", w.unsqueeze(kept(w, mask), 1, 3), shape)
    return w.op("Attention", x, x, w.op("Add", x, w.const(1.0)), keep, q_num_heads=2, kv_num_heads=2)


@trap("t")
def queries_and_keys_change_places(w: Writer, x: str, mask: str) -> Made:
    far = w.op("Where", w.unsqueeze(kept(w, mask), 1), scored(w, x), w.const(-1e9))
    weights = w.op("Transpose", w.op("Softmax", far, axis=2), perm=[0, 2, 1])
    return w.op("MatMul", weights, w.op("Add", x, w.const(1.0)))
