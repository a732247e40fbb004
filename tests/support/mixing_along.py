"""Pieces of generated graphs that read along the sequence, from its front only.

A piece takes the graph in construction (`Context`) and a `Stream`: a value (B, T, width) with what is known of it. It
adds nodes, and returns the new stream. Those of `FROM_FRONT` need no mask, and leave nothing mixed: neither padding nor
another row changes a sequence's own positions.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from mixing_pieces import Piece, by_position
from mixing_values import Context, Stream, over
from onnx import TensorProto, helper


def positions(context: Context, stream: Stream) -> Stream:
    """Positions counted from the front, from a table or computed; by the mask's running sum where there is one."""
    writer, width, value = context.writer, stream.width, stream.name
    mask = context.masks.get(stream.symbol)
    kind = writer.pick("sliced", "gathered", "computed", *(["cumsum", "cumsum"] if mask else []))
    table = writer.const(writer.drawn(520, width))
    state = stream.state
    if kind == "sliced":
        added = writer.unsqueeze(writer.slice(table, 0, 0, writer.extent(value, 1)), 0)
    elif kind == "gathered":
        added = writer.op("Gather", table, writer.range(writer.length(value)), axis=0)
    elif kind == "computed":
        place = writer.cast(writer.range(writer.length(value)), TensorProto.FLOAT)
        angles = writer.op("Mul", writer.unsqueeze(place, 1), writer.const(np.linspace(0.01, 1, width)[None]))
        added = writer.op(writer.pick("Sin", "Cos"), angles)
    else:
        assert mask is not None
        whole = writer.cast(mask.keep, TensorProto.INT64)
        count = writer.op("CumSum", whole, writer.const(1, np.int64))
        added = writer.op("Gather", table, writer.op("Mul", count, whole), axis=0)
    return replace(stream, name=writer.op("Add", value, added), state=state.finite())


def causal(context: Context, stream: Stream) -> Stream:
    """Return a stream in which each position depends only on those before it."""
    writer, width, value = context.writer, stream.width, stream.name
    kinds = [
        "running sum",
        "previous",
        "convolution",
        "lstm",
        "gru",
        "prefix mean",
        "scan",
        "state",
        "kept convolution",
    ]
    kind = writer.pick(*kinds)
    if kind == "running sum":
        name = writer.op("CumSum", writer.op("Tanh", value), writer.const(1, np.int64))
    elif kind == "prefix mean":
        total = writer.op("CumSum", value, writer.const(1, np.int64))
        place = writer.cast(writer.range(writer.length(value)), TensorProto.FLOAT)
        count = writer.op("Add", writer.unsqueeze(place, 1), writer.const(1.0))
        name = writer.op("Div", total, count)
    elif kind == "previous":
        first = writer.op("Mul", writer.slice(value, 1, 0, 1), writer.const(0.5))
        shifted = writer.slice(writer.op("Concat", first, value, axis=1), 1, 0, -1)
        name = writer.op("Add", value, writer.matmul(shifted, width, width))
    elif kind == "convolution":
        turned = writer.op("Transpose", value, perm=[0, 2, 1])
        weights = writer.const(writer.drawn(width, width, 3))
        name = writer.op("Transpose", writer.op("Conv", turned, weights, pads=[2, 0]), perm=[0, 2, 1])
    elif kind == "scan":
        name = scanned(context, stream)
    elif kind == "state":
        name = linear(context, stream)
    elif kind == "kept convolution":
        turned = writer.op("Transpose", value, perm=[0, 2, 1])
        weights = writer.const(writer.drawn(width, 1, 3))
        kept = writer.ops("CausalConvWithState", turned, weights, outputs=2, domain="com.microsoft", activation="silu")
        name = writer.op("Transpose", kept[0], perm=[0, 2, 1])
    else:
        name = recurrent(context, stream, kind.upper())
    behind = over(stream.state, stream.symbol, "", hidden="causal")
    return replace(stream, name=name, state=behind)


def linear(context: Context, stream: Stream) -> str:
    """Return a LinearAttention of two heads over the positions, (B, T, width)."""
    writer, width = context.writer, stream.width
    rule = writer.pick("linear", "gated", "delta", "gated_delta")
    query, value = (writer.matmul(stream.name, width, width) for _ in range(2))
    key = writer.op("Tanh", writer.matmul(stream.name, width, width))
    decay = rate = ""
    if "gated" in rule:
        decay = writer.op("Neg", writer.op("Softplus", writer.matmul(stream.name, width, 2)))
    if "delta" in rule:
        rate = writer.op("Sigmoid", writer.matmul(stream.name, width, 2))
    given = [query, key, value, "", decay, rate]
    heads = {"q_num_heads": 2, "kv_num_heads": 2, "update_rule": rule}
    return writer.ops("LinearAttention", *given, outputs=2, domain="com.microsoft", **heads)[0]


def recurrent(context: Context, stream: Stream, kind: str, direction: str = "forward", lengths: str = "") -> str:
    """Return an LSTM or GRU over the positions, (B, T, width).

    `lengths` names the operator's input of lengths, int32 (B,). Empty: none.
    """
    writer, width = context.writer, stream.width
    gates = {"LSTM": 4, "GRU": 3}[kind]
    time_first = writer.op("Transpose", stream.name, perm=[1, 0, 2])
    weights = [writer.const(writer.drawn(1, gates * width, width)) for _ in range(2)]
    bias = writer.const(writer.drawn(1, 2 * gates * width, scale=0.1))
    extra = [lengths] if lengths else []
    output = writer.op(kind, time_first, *weights, bias, *extra, hidden_size=width, direction=direction)
    return writer.op("Transpose", writer.squeeze(output, 1), perm=[1, 0, 2])


def scanned(context: Context, stream: Stream, *, backwards: bool = False) -> str:
    """A Scan over the positions: state = (state + x) / 2, (B, T, width)."""
    writer = context.writer
    first = writer.squeeze(writer.slice(stream.name, 1, 0, 1), 1)
    start = writer.op("Mul", first, writer.const(0.0))
    names = {key: writer.fresh(key) for key in ("state", "item", "sum", "next", "out", "half")}
    kind = TensorProto.FLOAT
    body = helper.make_graph(
        [
            helper.make_node("Add", [names["state"], names["item"]], [names["sum"]]),
            helper.make_node("Mul", [names["sum"], names["half"]], [names["next"]]),
            helper.make_node("Identity", [names["next"]], [names["out"]]),
        ],
        writer.fresh("body"),
        [helper.make_tensor_value_info(names[key], kind, ["rows", stream.width]) for key in ("state", "item")],
        [helper.make_tensor_value_info(names[key], kind, ["rows", stream.width]) for key in ("next", "out")],
        [helper.make_tensor(names["half"], kind, [], [0.5])],
    )
    way = int(backwards)
    return writer.ops(
        "Scan",
        start,
        stream.name,
        outputs=2,
        body=body,
        num_scan_inputs=1,
        scan_input_axes=[1],
        scan_output_axes=[1],
        scan_input_directions=[way],
        scan_output_directions=[way],
    )[1]


def shared_first(context: Context, stream: Stream) -> Stream:
    """The first position added to each."""
    writer = context.writer
    first = writer.op("Gather", stream.name, writer.const(writer.pick([0], [0]), np.int64), axis=1)
    name = writer.op("Add", stream.name, writer.matmul(first, stream.width, stream.width))
    return by_position(stream, name)


FROM_FRONT: dict[str, Piece] = {"positions": positions, "causal": causal, "shared first": shared_first}
