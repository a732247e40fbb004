"""Traps in which other rows of the batch reach an answer.

Each function is a trap by its name: from a writer, `x` and the mask it writes the nodes of `y`, and it is registered
with the axes along which other rows change `y`. It may return the shape of `y` too, where that is not (B, t, 8).
"""

from __future__ import annotations

import numpy as np
from mixing_traps import Made, attended, kept, ones, scored, trap
from mixing_writer import Writer
from onnx import TensorProto


@trap("batch")
def count_of_the_whole_batch(w: Writer, x: str, mask: str) -> Made:
    total = w.reduce("Sum", w.op("Mul", x, w.unsqueeze(ones(w, mask), 2)), 1, keep=False)
    return w.op("Div", total, w.reduce("Sum", ones(w, mask), 0, 1, keep=False)), (8,)


@trap("batch")
def mask_without_its_own_axis(w: Writer, x: str, mask: str) -> Made:
    # (B, t) with scores (B, t, t): the mask's rows align with queries. A batch of other than one or t rows does not
    # run.
    return attended(w, w.op("Where", kept(w, mask), scored(w, x), w.const(-np.inf)), x)


@trap("batch")
def recurrence_over_rows(w: Writer, x: str, mask: str) -> Made:
    weights = [w.const(w.drawn(1, 32, 8)) for _ in range(2)]
    made = w.op("LSTM", x, *weights, w.const(w.drawn(1, 64)), hidden_size=8)
    return w.squeeze(made, 1)


@trap("batch")
def moments_with_default_axes(w: Writer, x: str, mask: str) -> Made:
    made = w.op("MeanVarianceNormalization", w.unsqueeze(w.op("Transpose", x, perm=[0, 2, 1]), 3))
    return w.op("Transpose", w.squeeze(made, 3), perm=[0, 2, 1])


@trap("batch")
def norm_over_rows(w: Writer, x: str, mask: str) -> Made:
    return w.op("LpNormalization", w.op("Add", x, w.const(1.0)), axis=0, p=2)


@trap("batch")
def running_sum_by_a_negative_axis(w: Writer, x: str, mask: str) -> Made:
    return w.op("CumSum", x, w.const(-3, np.int64))


@trap("batch")
def sum_without_axes(w: Writer, x: str, mask: str) -> Made:
    return w.op("Add", x, w.op("Tanh", w.op("ReduceMax", x, keepdims=0)))


@trap("batch")
def sum_with_empty_axes(w: Writer, x: str, mask: str) -> Made:
    return w.op("Add", x, w.op("Tanh", w.op("ReduceSum", x, w.const([], np.int64), keepdims=1)))


@trap("batch", opset=12)
def old_softmax_of_everything(w: Writer, x: str, mask: str) -> Made:
    return w.op("Softmax", x, axis=0)


@trap("batch")
def rows_times_rows(w: Writer, x: str, mask: str) -> Made:
    first = w.op("Gather", x, w.const(0, np.int64), axis=1)
    weights = w.op("Softmax", w.op("Gemm", first, first, transB=1), axis=1)
    return w.op("MatMul", weights, first), (8,)


@trap("batch")
def einsum_over_rows(w: Writer, x: str, mask: str) -> Made:
    return w.op("Add", x, w.op("Einsum", x, equation="btd->td"))


@trap("batch")
def einsum_with_an_ellipsis(w: Writer, x: str, mask: str) -> Made:
    return w.op("Add", x, w.op("Tanh", w.op("Einsum", x, equation="b...->...")))


@trap("batch")
def einsum_with_implied_output(w: Writer, x: str, mask: str) -> Made:
    first = w.op("Gather", x, w.const(0, np.int64), axis=1)
    return w.op("MatMul", first, w.op("Einsum", first, first, equation="ba,bc")), (8,)


@trap("batch")
def reversed_by_default_axes(w: Writer, x: str, mask: str) -> Made:
    lengths = w.op("Expand", w.extent(x, 0), w.extent(x, 1))
    return w.op("ReverseSequence", x, lengths)


@trap("batch")
def scan_over_rows(w: Writer, x: str, mask: str) -> Made:
    from mixing_along import scanned  # noqa: PLC0415 - the one piece that is used here
    from mixing_values import Context, State, Stream  # noqa: PLC0415

    turned = w.op("Transpose", x, perm=[1, 0, 2])
    made = scanned(Context(w), Stream(turned, "t", 8, State()))
    return w.op("Transpose", made, perm=[1, 0, 2])


@trap("batch")
def diagonal_of_rows(w: Writer, x: str, mask: str) -> Made:
    first = w.op("Gather", x, w.const(0, np.int64), axis=1)
    return w.op("Add", first, w.op("EyeLike", first)), (8,)


@trap("batch")
def triangle_over_rows(w: Writer, x: str, mask: str) -> Made:
    first = w.op("Gather", x, w.const(0, np.int64), axis=1)
    return w.op("Trilu", first, upper=1), (8,)


@trap("batch")
def elements_of_another_row(w: Writer, x: str, mask: str) -> Made:
    indices = w.op("ConstantOfShape", w.op("Shape", x))
    return w.op("Add", x, w.op("GatherElements", x, w.cast(indices, TensorProto.INT64), axis=0))


@trap("batch")
def row_named_by_the_request(w: Writer, x: str, mask: str) -> Made:
    # The number of the request's own positions, modulo the batch, as a row.
    count = w.reduce("Sum", mask, 1, keep=False)
    row = w.op("Mod", count, w.length(x, 0))
    return w.op("Gather", x, row, axis=0)


@trap("batch")
def scattered_into_the_first_row(w: Writer, x: str, mask: str) -> Made:
    indices = w.const(np.zeros((1, 1, 8)), np.int64)
    return w.op("ScatterElements", x, indices, w.const(np.full((1, 1, 8), 9.0)), axis=0)


@trap("batch")
def gather_by_fixed_tuples(w: Writer, x: str, mask: str) -> Made:
    one = w.op("GatherND", x, w.const([[0, 0]], np.int64))
    return w.op("Add", x, w.op("Tanh", one))


@trap("batch")
def positions_of_all_rows_in_a_row(w: Writer, x: str, mask: str) -> Made:
    flat = w.op("Transpose", w.reshape(x, 1, -1, 8), perm=[0, 2, 1])
    made = w.op("Conv", flat, w.const(w.drawn(8, 8, 3)), pads=[2, 0])
    return w.op("Reshape", w.op("Transpose", made, perm=[0, 2, 1]), w.op("Shape", x))


@trap("batch")
def flattened_from_the_front(w: Writer, x: str, mask: str) -> Made:
    flat = w.op("Softmax", w.op("Flatten", x, axis=0), axis=1)
    return w.op("Reshape", flat, w.op("Shape", x))


@trap("batch")
def branch_by_the_greatest(w: Writer, x: str, mask: str) -> Made:
    high = w.op("Greater", w.op("ReduceMax", x, keepdims=0), w.const(2.0))
    return w.op("Mul", x, w.op("Where", high, w.const(0.5), w.const(1.0)))


@trap("batch")
def shortest_mask(w: Writer, x: str, mask: str) -> Made:
    everybody = w.op("ReduceMin", ones(w, mask), w.ints(0), keepdims=1)
    return w.op("Mul", x, w.unsqueeze(everybody, 2))


@trap("batch")
def fused_product_that_turns_the_batch(w: Writer, x: str, mask: str) -> Made:
    far = w.op("FusedMatMul", x, x, domain="com.microsoft", transA=1, transBatchA=1, transBatchB=1)
    return w.op("Add", x, w.op("Tanh", w.reduce("Mean", far, 0)))


@trap("batch")
def scaled_by_the_greatest_size(w: Writer, x: str, mask: str) -> Made:
    greatest = w.op("ReduceMax", w.op("Abs", x), keepdims=0)
    step = w.op("Div", w.op("Max", greatest, w.const(1e-6)), w.const(127.0))
    return w.op("Mul", w.op("Round", w.op("Div", x, step)), step)


@trap("batch")
def quantized_recurrently(w: Writer, x: str, mask: str) -> Made:
    whole, scale, zero = w.ops("DynamicQuantizeLinear", w.op("Transpose", x, perm=[1, 0, 2]), outputs=3)
    back = w.op("DequantizeLinear", whole, scale, zero)
    return w.op("Transpose", back, perm=[1, 0, 2])


@trap("batch")
def repeated_in_the_wrong_order(w: Writer, x: str, mask: str) -> Made:
    twice = w.op("Tile", x, w.ints(2, 1, 1))
    return w.reduce("Mean", w.reshape(twice, w.extent(x, 0), 2, w.extent(x, 1), 8), 1, keep=False)


@trap("batch")
def chosen_rows(w: Writer, x: str, mask: str) -> Made:
    score = w.reduce("Sum", x, 1, 2, keep=False)
    order = w.ops("TopK", score, w.extent(x, 0), outputs=2, axis=0)[1]
    return w.op("Gather", x, order, axis=0)
