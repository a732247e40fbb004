"""Attention of generated graphs: decomposed and fused, with each form of mask, and what each form really hides.

A piece takes the graph in construction (`Context`) and a `Stream`: a value (B, T, width) with what is known of it. It
adds nodes, and returns the new stream. A stream is mixed if padding or other rows change a sequence's own positions;
the returned state names the fault.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from mixing_values import LONGEST, LOWEST, NAN_BEHIND, UNSAID, Context, MaskInput, State, Stream
from onnx import TensorProto

NO_MASK = "attention without a mask"
UNBOUNDED = "finite mask, unbounded scores"
TOO_SMALL = "finite mask too small"
BY_QUERY = "mask of queries and keys"
WRONG_SOFTMAX = "softmax over a wrong axis"
LOG_LENGTH = "scores scaled by the logarithm of the length"

HIDING = (
    *("add -inf", "add -inf", "where -inf", "add lowest", "one minus times lowest", "where lowest"),
    *("add -1e9", "one minus times -1e4", "where -1e9", "where -1e4"),
)
"""How keys are hidden: a bias added to the scores, or scores replaced."""
FORWARD = ("trilu -inf", "less -inf", "buffer lowest", "buffer -inf")
"""How later keys are hidden from a query."""
BOUNDED_BELOW = 200.0
"""The greatest bound on scores for which the grammar claims that -1e4 hides a key, far below the bound where it does
not."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One attention: `hiding` of padded keys and `forward` frontier, empty for none. Both apply to (B, H, T, S).

    `by_query`: the mask hides queries too. `wrong_softmax`: softmax over queries, not keys. `log_length`: scores are
    multiplied by the logarithm of the padded length. `filler`: the number that hides; 0: the one that `hiding` names.
    """

    hiding: str = ""
    forward: str = ""
    by_query: bool = False
    wrong_softmax: bool = False
    log_length: bool = False
    filler: float = 0.0


def attention(context: Context, stream: Stream, keys: Stream | None = None) -> Stream:
    """Attention that leaves nothing mixed, if the masks allow one. A residual is added."""
    mask = context.masks.get((keys or stream).symbol)
    if mask is None or (keys is None and context.writer.rng.random() < 0.35):
        plan = Plan(forward=context.writer.pick(*FORWARD), hiding=_also(context, mask))
        return attend(context, stream, stream, plan)
    return attend(context, stream, keys or stream, Plan(hiding=context.writer.pick(*HIDING)))


def _also(context: Context, mask: MaskInput | None) -> str:
    if mask is None or context.writer.rng.random() < 0.5:
        return ""
    return str(context.writer.pick(*HIDING[:6]))


def attend(context: Context, stream: Stream, keys: Stream, plan: Plan) -> Stream:
    """Decomposed attention: (B, T, W) over (B, S, W). AssertionError if the plan hides keys that have no mask."""
    writer, width, heads = context.writer, stream.width, 2
    size = width // heads
    scale = 0.3
    tables = [writer.drawn(width, width, scale=scale) for _ in range(3)]
    values = [each.name for each in (stream, keys, keys)]
    query, key, value = (
        writer.op("MatMul", each, writer.const(table)) for each, table in zip(values, tables, strict=True)
    )
    if writer.rng.random() < 0.5:
        query = writer.op("Add", query, writer.const(np.zeros(width)))
    split = [writer.reshape(each, 0, 0, heads, size) for each in (query, key, value)]
    query, value = (writer.op("Transpose", each, perm=[0, 2, 1, 3]) for each in (split[0], split[2]))
    key = writer.op("Transpose", split[1], perm=[0, 2, 3, 1])
    if writer.rng.random() < 0.5:
        query = writer.op("Mul", query, writer.const(1 / math.sqrt(size)))
        scores = writer.op("MatMul", query, key)
    else:
        scores = writer.op("Div", writer.op("MatMul", query, key), writer.const(math.sqrt(size)))
    state = stream.state.joined(keys.state)
    if plan.log_length:
        length = writer.cast(writer.length(keys.name), TensorProto.FLOAT)
        scores = writer.op("Mul", scores, writer.op("Log", writer.op("Add", length, writer.const(2.0))))
        state = state.tainted(keys.symbol, LOG_LENGTH)
    norms = [each.state.norm for each in (stream, keys)]
    bound = None
    if None not in norms:
        spectral = [float(np.linalg.norm(table, 2)) for table in tables[:2]]
        bound = float(np.prod([*spectral, *norms])) / math.sqrt(size)
    scores, state = _hidden(context, scores, state, stream, keys, plan, bound)
    context.attends(state, stream, keys)
    weights = writer.op("Softmax", scores, axis=2 if plan.wrong_softmax else 3)
    blind = plan.by_query and plan.hiding.endswith("-inf")
    if blind and writer.rng.random() < 0.4:
        weights = writer.op("Where", writer.op("IsNaN", weights), writer.const(0.0), weights)
        blind = False
    product = writer.op("Transpose", writer.op("MatMul", weights, value), perm=[0, 2, 1, 3])
    joined = writer.reshape(product, 0, 0, width)
    name = writer.op("Add", stream.name, writer.matmul(joined, width, width))
    # Padded queries without a key are NaN, and only these.
    state = replace(state, behind="nan" if blind or stream.state.behind == "nan" else "finite")
    return replace(stream, name=name, state=state)


def _hidden(
    context: Context, scores: str, state: State, stream: Stream, keys: Stream, plan: Plan, bound: float | None
) -> tuple[str, State]:
    """The scores (B, H, T, S) with hidden ones hidden, and the state of attention over them."""
    symbol = keys.symbol
    mask = context.masks.get(symbol)
    if plan.forward:
        scores = _forward(context, scores, plan.forward)
    if plan.hiding:
        assert mask is not None
        scores = _padding(context, scores, mask, plan)
    if keys.state.behind == "nan":
        state = state.tainted(symbol, NAN_BEHIND)
    if plan.wrong_softmax:
        return scores, state.tainted(symbol, WRONG_SOFTMAX)
    if plan.forward:
        return scores, _after_frontier(state, mask, plan)
    if mask is None or not plan.hiding:
        return scores, state.tainted(symbol, NO_MASK)
    return scores, _after_mask(state, stream, keys, mask, plan, bound)


def _after_frontier(state: State, mask: MaskInput | None, plan: Plan) -> State:
    """Behind a frontier no query attends to a padded key.

    Unless the frontier's own -inf is replaced: a query with all keys masked then attends to padded ones too.
    """
    if mask is not None and plan.hiding == "where lowest":
        return state.needing(mask.need("all"))
    return state


def _after_mask(state: State, stream: Stream, keys: Stream, mask: MaskInput, plan: Plan, bound: float | None) -> State:
    """The influence of padded keys that remains under a mask of keys without a frontier."""
    if plan.hiding.endswith("-inf"):
        return state
    state = state.needing(mask.need("all" if plan.by_query else "some", by_ones=plan.hiding.startswith("one minus")))
    if plan.filler:
        return state.tainted(keys.symbol, TOO_SMALL)
    if plan.hiding.endswith("lowest") or (bound is not None and bound < BOUNDED_BELOW):
        return state
    # Tables bound scores too. The grammar leaves open how far a proof should use that.
    return state.tainted(keys.symbol, UNBOUNDED if stream.state.raw and keys.state.raw else UNSAID)


def _padding(context: Context, scores: str, mask: MaskInput, plan: Plan) -> str:
    writer = context.writer
    way, _, filler = plan.hiding.rpartition(" ")
    number = plan.filler or {"-inf": -np.inf, "lowest": LOWEST, "-1e9": -1e9, "-1e4": -1e4}[filler]
    if way == "one minus times":
        hidden = writer.op("Sub", writer.const(1.0), _by_keys(context, mask.ones, plan, product="Mul"))
        return writer.op("Add", scores, writer.op("Mul", hidden, writer.const(number)))
    keep = _by_keys(context, mask.keep, plan, product="And")
    if way == "add":
        return writer.op("Add", scores, writer.op("Where", keep, writer.const(0.0), writer.const(number)))
    if writer.rng.random() < 0.5:
        return writer.op("Where", writer.op("Not", keep), writer.const(number), scores)
    return writer.op("Where", keep, scores, writer.const(number))


def _by_keys(context: Context, mask: str, plan: Plan, product: str) -> str:
    """(B, 1, 1, S), or with the queries' own mask (B, 1, T, S)."""
    writer = context.writer
    keys = writer.unsqueeze(mask, 1, 2)
    if not plan.by_query:
        return keys
    return writer.op(product, writer.unsqueeze(mask, 1, 3), keys)


def _forward(context: Context, scores: str, form: str) -> str:
    """Scores (B, H, T, T) whose later keys are hidden."""
    writer = context.writer
    kind, _, filler = form.partition(" ")
    number = writer.const({"-inf": -np.inf, "lowest": LOWEST}[filler])
    length = writer.extent(scores, 2)
    if kind == "trilu" and writer.opset >= 14:
        square = writer.op("Expand", number, writer.op("Concat", length, length, axis=0))
        return writer.op("Add", scores, writer.op("Trilu", square, writer.const(1, np.int64), upper=1))
    if kind == "buffer":
        buffer = writer.const(np.tril(np.ones((1, 1, LONGEST, LONGEST), bool)), np.bool_)
        rows = writer.slice(buffer, 2, 0, length)
        return writer.op("Where", writer.slice(rows, 3, 0, length), scores, number)
    place = writer.range(writer.squeeze(length, 0))
    later = writer.op("Less", writer.unsqueeze(place, 1), writer.unsqueeze(place, 0))
    if writer.rng.random() < 0.5:
        return writer.op("Where", later, number, scores)
    return writer.op("Add", scores, writer.op("Where", later, number, writer.const(0.0)))


# Fused operators.


def fused(context: Context, stream: Stream, poison: bool = False) -> Stream:
    """An operator of attention that hides padded keys. With `poison`, one that does not."""
    writer, symbol = context.writer, stream.symbol
    if stream.state.behind == "nan":
        # Whether 0 x NaN is computed depends on the kernel. Decomposed attention computes it.
        return attend(context, stream, stream, Plan()) if poison else attention(context, stream)
    mask = None if poison else context.masks.get(symbol)
    state = stream.state.finite()
    kinds = ["MultiHeadAttention", "packed"] + (["Attention", "Attention"] if writer.opset >= 23 else [])
    kinds += ["GroupQueryAttention"] * 2 if stream.width == 16 and not poison else []
    kind = writer.pick(*kinds)
    if kind == "GroupQueryAttention":
        name, state = _grouped(context, stream, state, mask, poison=poison)
    elif kind == "Attention":
        name, state = _standard(context, stream, state, mask, poison=poison)
    else:
        name, state = _microsoft(context, stream, state, mask, kind, poison=poison)
    context.attends(state, stream)
    mixed = writer.matmul(name, stream.width, stream.width)
    return replace(stream, name=writer.op("Add", stream.name, mixed), state=state)


def _standard(
    context: Context, stream: Stream, state: State, mask: MaskInput | None, *, poison: bool
) -> tuple[str, State]:
    """`Attention` of ai.onnx 23, over packed heads or over heads apart."""
    writer, width, heads = context.writer, stream.width, 2
    operands = [writer.matmul(stream.name, width, width) for _ in range(3)]
    attributes: dict[str, Any] = {"q_num_heads": heads, "kv_num_heads": heads}
    packed = writer.rng.random() < 0.5
    if not packed:
        attributes = {}
        apart = [writer.reshape(each, 0, 0, heads, width // heads) for each in operands]
        operands = [writer.op("Transpose", each, perm=[0, 2, 1, 3]) for each in apart]
    if mask is None and not poison:
        attributes["is_causal"] = 1
    if mask is not None:
        keep = writer.unsqueeze(mask.keep, 1, 2)
        length = writer.extent(stream.name, 1)
        square = writer.op("Concat", writer.extent(stream.name, 0), writer.ints(1), length, length, axis=0)
        keep = writer.op("Expand", keep, square)
        if writer.rng.random() < 0.4:
            number = writer.pick(-np.inf, LOWEST)
            keep = writer.op("Where", keep, writer.const(0.0), writer.const(number))
            state = state if np.isinf(number) else state.needing(mask.need("some"))
        operands.append(keep)
    name = writer.op("Attention", *operands, **attributes)
    if not packed:
        name = writer.reshape(writer.op("Transpose", name, perm=[0, 2, 1, 3]), 0, 0, width)
    return name, state.tainted(stream.symbol, NO_MASK) if poison else state


def _microsoft(
    context: Context, stream: Stream, state: State, mask: MaskInput | None, kind: str, *, poison: bool
) -> tuple[str, State]:
    """`MultiHeadAttention` and `Attention` of com.microsoft with a mask of keys, or causal."""
    writer, width = context.writer, stream.width
    attributes: dict[str, Any] = {"num_heads": 2, "domain": "com.microsoft"}
    causal = mask is None and not poison
    if causal:
        attributes["unidirectional"] = 1
    key_mask = ""
    if mask is not None:
        key_mask = writer.cast(mask.keep, TensorProto.INT32)
        attributes["mask_filter_value"] = LOWEST
        state = state.needing(mask.need("some"))
    if kind == "packed":
        weights, bias = writer.const(writer.drawn(width, 3 * width)), writer.const(writer.drawn(3 * width))
        name = writer.op("Attention", stream.name, weights, bias, key_mask, **attributes)
    else:
        operands = [writer.matmul(stream.name, width, width) for _ in range(3)]
        name = writer.op("MultiHeadAttention", *operands, "", key_mask, **attributes)
    return name, state.tainted(stream.symbol, NO_MASK) if poison else state


def query_masked(context: Context, stream: Stream) -> Stream:
    """Attention under a mask of queries and keys: queries that are not allowed have no visible key."""
    plan = Plan(hiding=context.writer.pick(*HIDING[:6]), by_query=True)
    return attend(context, stream, stream, plan)


def _grouped(
    context: Context, stream: Stream, state: State, mask: MaskInput | None, *, poison: bool
) -> tuple[str, State]:
    """`GroupQueryAttention` of com.microsoft without a past: causal, two queries' heads to one of keys."""
    writer, width = context.writer, stream.width
    assert not poison, "its frontier hides padded keys from every query"
    query = writer.matmul(stream.name, width, width)
    key, value = (writer.matmul(stream.name, width, width // 2) for _ in range(2))
    length = writer.extent(stream.name, 1)
    if mask is None:
        ends = writer.op("Expand", length, writer.extent(stream.name, 0))
    else:
        ends = writer.reduce("Sum", writer.cast(mask.keep, TensorProto.INT64), 1, keep=False)
        state = state.needing(mask.need("all"))
    ends = writer.cast(writer.op("Sub", ends, writer.const(1, np.int64)), TensorProto.INT32)
    total = writer.cast(writer.squeeze(length, 0), TensorProto.INT32)
    attributes: dict[str, Any] = {"num_heads": 2, "kv_num_heads": 1, "domain": "com.microsoft"}
    return writer.op("GroupQueryAttention", query, key, value, "", "", ends, total, **attributes), state
