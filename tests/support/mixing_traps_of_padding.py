"""Traps in which padding reaches an answer.

Each function is a trap by its name: from a writer, `x` and the mask it writes the nodes of `y`, and it is registered
with the axes along which padding changes `y`. It may return the shape of `y` too, where that is not (B, t, 8).
"""

from __future__ import annotations

import numpy as np
from attnserve_server.model.manifest import DerivedLength
from mixing_traps import Made, number, ones, trap
from mixing_writer import Writer
from onnx import TensorProto


@trap("t")
def unit_length_is_nan_where_padded(w: Writer, x: str, mask: str) -> Made:
    unit = w.op("Div", x, w.reduce("L2", x, -1))
    return w.reduce("Sum", w.op("Mul", unit, w.unsqueeze(ones(w, mask), 2)), 1, keep=False), (8,)


@trap("t")
def logarithm_of_zero_times_zero(w: Writer, x: str, mask: str) -> Made:
    logs = w.op("Log", w.op("Abs", x))
    return w.reduce("Sum", w.op("Mul", logs, w.unsqueeze(ones(w, mask), 2)), 1, keep=False), (8,)


@trap("t")
def masked_sum_over_the_padded_length(w: Writer, x: str, mask: str) -> Made:
    total = w.reduce("Sum", w.op("Mul", x, w.unsqueeze(ones(w, mask), 2)), 1, keep=False)
    return w.op("Div", total, number(w, x)), (8,)


@trap("t")
def masked_minimum_with_zeros(w: Writer, x: str, mask: str) -> Made:
    high = w.op("Add", w.op("Abs", x), w.const(1.0))
    return w.reduce("Min", w.op("Mul", high, w.unsqueeze(ones(w, mask), 2)), 1, keep=False), (8,)


@trap("t")
def greatest_of_masked_zeros(w: Writer, x: str, mask: str) -> Made:
    low = w.op("Neg", w.op("Add", w.op("Abs", x), w.const(1.0)))
    return w.reduce("Max", w.op("Mul", low, w.unsqueeze(ones(w, mask), 2)), 1, keep=False), (8,)


@trap("t")
def reshape_without_transpose(w: Writer, x: str, mask: str) -> Made:
    turned = w.reshape(x, w.extent(x, 0), 8, w.extent(x, 1))
    return w.op("Transpose", turned, perm=[0, 2, 1])


@trap("t")
def heads_without_transpose(w: Writer, x: str, mask: str) -> Made:
    apart = w.reshape(x, w.extent(x, 0), 2, w.extent(x, 1), 4)
    return w.reshape(w.op("Transpose", apart, perm=[0, 2, 1, 3]), 0, 0, 8)


@trap("t")
def heads_folded_without_transpose(w: Writer, x: str, mask: str) -> Made:
    flat = w.reshape(x, -1, w.extent(x, 1), 4)
    place = w.cast(w.range(w.length(x)), TensorProto.FLOAT)
    moved = w.op("Add", flat, w.unsqueeze(place, 1))
    return w.op("Reshape", moved, w.op("Shape", x))


@trap("t")
def layer_norm_over_positions_too(w: Writer, x: str, mask: str) -> Made:
    centred = w.op("Sub", x, w.reduce("Mean", x, 1, 2))
    return w.op("Div", centred, w.op("Sqrt", w.op("Add", w.reduce("Mean", w.op("Mul", x, x), -2, -1), w.const(1e-5))))


@trap("t", opset=11)
def old_softmax_of_positions_and_width(w: Writer, x: str, mask: str) -> Made:
    return w.op("Softmax", x)


@trap("t", opset=12)
def old_log_softmax_flattens(w: Writer, x: str, mask: str) -> Made:
    return w.op("LogSoftmax", x, axis=1)


@trap("t")
def norm_along_the_sequence(w: Writer, x: str, mask: str) -> Made:
    return w.op("LpNormalization", w.op("Add", x, w.const(1.0)), axis=1, p=2)


@trap("t")
def last_window_filled_up(w: Writer, x: str, mask: str) -> Made:
    turned = w.op("Transpose", w.op("Add", x, w.const(1.0)), perm=[0, 2, 1])
    made = w.op("MaxPool", w.op("Neg", turned), kernel_shape=[2], strides=[2], ceil_mode=1)
    return w.op("Transpose", w.op("Slice", made, w.ints(0), w.ints(1), w.ints(2)), perm=[0, 2, 1]), (1, 8)


@trap("t")
def average_with_its_own_padding(w: Writer, x: str, mask: str) -> Made:
    turned = w.op("Transpose", w.op("Mul", x, w.unsqueeze(ones(w, mask), 2)), perm=[0, 2, 1])
    # Without the padding in its count, only the last window has two positions. Over zeros it has three.
    made = w.op("AveragePool", turned, kernel_shape=[3], strides=[1], pads=[1, 1], count_include_pad=0)
    return w.op("Transpose", made, perm=[0, 2, 1])


@trap("t")
def zeros_with_a_bias_convolved_twice(w: Writer, x: str, mask: str) -> Made:
    value = w.op("Transpose", w.op("Mul", x, w.unsqueeze(ones(w, mask), 2)), perm=[0, 2, 1])
    for _ in range(2):
        value = w.op("Conv", value, w.const(w.drawn(8, 8, 3)), w.const(w.drawn(8) + 1), pads=[1, 1])
    return w.op("Transpose", value, perm=[0, 2, 1])


@trap("t")
def padded_by_copies_of_the_end(w: Writer, x: str, mask: str) -> Made:
    longer = w.op("Pad", w.op("Add", x, w.const(1.0)), w.ints(0, 0, 0, 0, 1, 0), mode="edge")
    return w.op("Add", w.slice(longer, 1, 1, 2**31), w.op("Tanh", x))


@trap("t")
def resized_there_and_back(w: Writer, x: str, mask: str) -> Made:
    made = w.op("Resize", w.op("Add", x, w.const(1.0)), "", w.const([1.0, 2.0, 1.0]), mode="linear")
    return w.slice(made, 1, 1, 2**31, 2)


@trap("t")
def bidirectional_recurrence(w: Writer, x: str, mask: str) -> Made:
    weights = [w.const(w.drawn(2, 16, 8)), w.const(w.drawn(2, 16, 4))]
    bias = w.const(w.drawn(2, 32))
    made = w.op("LSTM", w.op("Transpose", x, perm=[1, 0, 2]), *weights, bias, hidden_size=4, direction="bidirectional")
    return w.reshape(w.op("Transpose", made, perm=[2, 0, 1, 3]), 0, 0, 8)


@trap("t")
def last_state_of_a_recurrence(w: Writer, x: str, mask: str) -> Made:
    weights = [w.const(w.drawn(1, 32, 8)) for _ in range(2)]
    made = w.ops(
        "LSTM", w.op("Transpose", x, perm=[1, 0, 2]), *weights, w.const(w.drawn(1, 64)), outputs=2, hidden_size=8
    )
    return w.squeeze(made[1], 0), (8,)


@trap("t")
def split_in_halves(w: Writer, x: str, mask: str) -> Made:
    doubled = w.op("Concat", x, x, w.op("Add", x, w.const(1.0)), w.op("Add", x, w.const(1.0)), axis=1)
    quarter = w.op("Div", w.extent(x, 1), w.ints(2))
    return w.op("Add", x, w.op("Gather", doubled, quarter, axis=1))


@trap("t")
def last_three(w: Writer, x: str, mask: str) -> Made:
    return w.reduce("Sum", w.slice(w.op("Add", x, w.const(1.0)), 1, -3, 2**31), 1, keep=False), (8,)


@trap("t")
def place_over_length(w: Writer, x: str, mask: str) -> Made:
    place = w.cast(w.range(w.length(x)), TensorProto.FLOAT)
    return w.op("Add", x, w.unsqueeze(w.op("Div", place, number(w, x)), 1))


@trap("t")
def count_of_padding(w: Writer, x: str, mask: str) -> Made:
    padding = w.op("Sub", number(w, x), w.reduce("Sum", ones(w, mask), 1))
    return w.op("Add", x, w.unsqueeze(padding, 2))


@trap("t")
def length_is_odd(w: Writer, x: str, mask: str) -> Made:
    odd = w.op("Mod", w.length(x), w.const(2, np.int64))
    return w.op("Add", x, w.cast(odd, TensorProto.FLOAT))


@trap("t", "batch")
def size_of_all(w: Writer, x: str, mask: str) -> Made:
    return w.op("Add", x, w.cast(w.op("Size", x), TensorProto.FLOAT))


@trap("t")
def sorted_positions(w: Writer, x: str, mask: str) -> Made:
    return w.ops("TopK", x, w.extent(x, 1), outputs=2, axis=1)[0]


@trap("t")
def place_of_the_greatest(w: Writer, x: str, mask: str) -> Made:
    place = w.op("ArgMax", x, axis=1, keepdims=0)
    # Below zero everywhere, so that a padded zero is the maximum.
    low = w.op("ArgMax", w.op("Neg", w.op("Abs", x)), axis=1, keepdims=0)
    return w.cast(w.op("Add", place, low), TensorProto.FLOAT), (8,)


@trap("t", derived=DerivedLength(source="t", stride=1, offset=2))
def convolution_that_widens(w: Writer, x: str, mask: str) -> Made:
    turned = w.op("Transpose", w.op("Add", x, w.const(1.0)), perm=[0, 2, 1])
    made = w.op("ConvTranspose", turned, w.const(w.drawn(8, 8, 3)))
    return w.op("Transpose", made, perm=[0, 2, 1]), ("t + 2", 8)


@trap("t", memory=True)
def memory_gathered_by_the_length(w: Writer, x: str, mask: str) -> Made:
    place = w.op("Mod", w.extent(x, 1), w.extent("memory", 1))
    return w.op("Add", x, w.op("Gather", "memory", place, axis=1))


@trap("s", memory=True)
def positions_behind_the_memory(w: Writer, x: str, mask: str) -> Made:
    both = w.op("Concat", w.op("Add", "memory", w.const(1.0)), x, axis=1)
    own = w.slice(w.op("CumSum", both, w.const(1, np.int64)), 1, w.extent("memory", 1), 2**31)
    return w.op("Add", own, w.const(1.0))
