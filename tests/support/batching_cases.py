"""Graphs whose answers once depended on their batch, each with the request, its neighbours and the right values.

They reproduce users' bug reports, C1 to C16 and C53. Needs the repository's root on the path, for `bench`.

`CASES` holds them by number. `windows_as_heads` makes the graph of C17, which is no case: its test is of sites.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto

from bench import batching_graphs as graphs
from bench.batching_graphs import MASKS, WIDTH, Array, Feeds, Maker

Right = Callable[[Mapping[str, Array]], None]


@dataclass(frozen=True, slots=True)
class Case:
    """A graph, a request and its batch neighbours.

    `axis`: along which sharing must be refused, `batch` or `t`; empty: it may be allowed, since the request's own masks
    decide. `right`: asserts the known values of the request's answer. `shows`: whether the bare graph, padded and
    joined, gives the request another answer, so that the case can fail.
    """

    graph: Callable[[], onnx.ModelProto]
    request: Feeds
    neighbours: tuple[Feeds, ...]
    axis: str = ""
    right: Right | None = None
    shows: bool = True
    max_length: int = 128


def outputs_are(name: str, value: float, tolerance: float = 1e-5) -> Right:
    """Every number of an output is this one, up to float32's rounding."""

    def check(answer: Mapping[str, Array]) -> None:
        np.testing.assert_allclose(answer[name], value, atol=tolerance)

    return check


def weights_are(value: float) -> Right:
    """Every weight of every site is this one, up to float32's rounding; there is a site."""

    def check(answer: Mapping[str, Array]) -> None:
        weights = [each for name, each in answer.items() if name.startswith("attention.")]
        assert weights, "no site gives weights"
        for each in weights:
            np.testing.assert_allclose(each, value, atol=1e-6)

    return check


def text(*ids: int, mask: tuple[int, ...] = ()) -> Feeds:
    """Ids with a mask, of ones unless given."""
    return {"input_ids": np.array(ids, np.int64), "attention_mask": np.array(mask or [1] * len(ids), np.int64)}


def long_text(length: int, seed: int = 1, *, masked: bool = True) -> Feeds:
    """Drawn ids, and a mask of ones if `masked`."""
    ids = np.random.default_rng(seed).integers(1, 30, length)
    return {"input_ids": ids} | ({"attention_mask": np.ones(length, np.int64)} if masked else {})


def features(length: int, width: int = WIDTH, size: float = 1.0, seed: int = 0, *, masked: bool = False) -> Feeds:
    """Drawn features, and a mask of ones if `masked`."""
    values = np.random.default_rng(seed).normal(size=(length, width)) * size
    return {"x": values.astype(np.float32)} | ({"attention_mask": np.ones(length, np.int64)} if masked else {})


# C1, C2: one quantizer for the whole batch (findings/dynamic_quantization_one_scale.sh).


def dynamic_quantization(*, masked: bool, fused: bool = False) -> onnx.ModelProto:
    """x -> DynamicQuantizeLinear -> MatMulInteger with the identity -> attention; fused: DynamicQuantizeMatMul."""
    make = Maker()
    values = make.input("x", TensorProto.FLOAT, "t", 4)
    identity = np.eye(4, dtype=np.int8)
    if fused:
        one = make.const(1.0)
        hidden = make.op("DynamicQuantizeMatMul", values, make.const(identity, np.int8), one, domain="com.microsoft")
    else:
        hidden = graphs.quantized(make, values, 4, 4, identity)
    scores = make.op("MatMul", hidden, make.op("Transpose", hidden, perm=[0, 2, 1]))
    if masked:
        kept = make.op("Cast", make.mask(), to=TensorProto.BOOL)
        bias = make.op("Where", kept, make.const(0.0), make.const(-np.inf))
        scores = make.op("Add", scores, make.unsqueeze(bias, 1))
    make.output(make.op("MatMul", make.op("Softmax", scores, axis=-1), hidden), "y", "t", 4)
    return make.model()


def quantized_case(*, masked: bool, fused: bool = False) -> Case:
    """A's 1.0 became 0.0 beside a value of 1000."""
    mask = {"attention_mask": np.ones(2, np.int64)} if masked else {}
    beside = np.ones((2, 4), np.float32)
    beside[0, 0] = 1000
    return Case(
        lambda: dynamic_quantization(masked=masked, fused=fused),
        {"x": np.ones((2, 4), np.float32)} | mask,
        ({"x": beside} | mask,),
        axis="batch",
        # One step of the quantizer.
        right=outputs_are("y", 1.0, 1 / 127),
    )


# C3 to C6: no mask at all.


def sharp_attention() -> onnx.ModelProto:
    """Unmasked attention behind a LayerNorm, with sharp queries and keys and a scale of 1/8."""
    make = Maker()
    hidden = make.normalised(make.input("x", TensorProto.FLOAT, "t", 64), 64)
    query, key = (make.op("MatMul", hidden, make.drawn(64, 64, scale=1.0)) for _ in range(2))
    scores = make.op("MatMul", query, make.op("Transpose", key, perm=[0, 2, 1]))
    weights = make.op("Softmax", make.op("Mul", scores, make.const(1 / 8)), axis=-1)
    make.output(make.op("MatMul", weights, hidden), "y", "t", 64)
    return make.model()


def ids_alone() -> onnx.ModelProto:
    """Unmasked attention over a table of 30 vectors of 64, small enough that every key has a share."""
    make = Maker()
    words = make.op("Gather", make.drawn(30, 64, scale=0.3), make.input("input_ids", TensorProto.INT64, "t"), axis=0)
    weights = make.op("Softmax", make.op("MatMul", words, make.op("Transpose", words, perm=[0, 2, 1])), axis=-1)
    make.output(make.op("MatMul", weights, words), "y", "t", 64)
    return make.model()


def old_softmax() -> onnx.ModelProto:
    """Softmax of opset 11 with its default axis: one distribution over heads, queries and keys."""
    make = Maker(opset=11)
    values = make.input("x", TensorProto.FLOAT, "t", WIDTH)
    scores = make.op("MatMul", make.heads(values), make.heads(values, key=True))
    moved = make.heads(make.op("Add", values, make.const(1.0)))
    product = make.op("Transpose", make.op("MatMul", make.op("Softmax", scores), moved), perm=[0, 2, 1, 3])
    make.output(make.op("Reshape", product, make.ints(0, 0, WIDTH)), "y", "t", WIDTH)
    return make.model()


# C7 to C10: the length as a number.


def by_length(number: Callable[[Maker, str], str]) -> Callable[[], onnx.ModelProto]:
    """Masked attention whose scores are scaled by a number made from the length."""

    def model() -> onnx.ModelProto:
        make = Maker()
        words, mask = make.ids(), make.mask()
        scale = number(make, make.length(mask))
        make.output(make.attended(words, words, words, make.bias(mask, -np.inf), scale), "y", "t", WIDTH)
        return make.model()

    return model


def log_scale(make: Maker, length: str) -> str:
    """0.1 x max(1, log T / log 32)."""
    ratio = make.op("Div", make.op("Log", make.number(length)), make.const(np.log(32)))
    return make.op("Mul", make.op("Max", ratio, make.const(1.0)), make.const(0.1))


def switch(make: Maker, length: str) -> str:
    """0.1 up to 40 positions, then 1.5."""
    return make.op("Where", make.op("Greater", length, make.const(40, np.int64)), make.const(1.5), make.const(0.1))


def last_ten() -> onnx.ModelProto:
    """The masked mean of the last ten positions, the padded end's."""
    make = Maker()
    words, mask = make.ids(), make.mask()
    start = make.op("Max", make.op("Sub", make.length(mask), make.const(10, np.int64)), make.const(0, np.int64))
    start = make.op("Reshape", start, make.ints(1))

    def tail(value: str) -> str:
        return make.op("Slice", value, start, make.ints(2**31), make.ints(1))

    ones = make.unsqueeze(make.number(tail(mask)), 2)
    count = make.op("Max", make.total(ones, 1), make.const(1.0))
    make.output(make.op("Div", make.total(make.op("Mul", tail(words), ones), 1), count), "y", WIDTH)
    return make.model()


def small_pool() -> onnx.ModelProto:
    """An unmasked mean, times 1e-5."""
    make = Maker()
    values = make.input("x", TensorProto.FLOAT, "t", WIDTH)
    mean = make.op("ReduceMean", values, axes=[1], keepdims=0)
    make.output(make.op("Mul", mean, make.const(1e-5)), "y", WIDTH)
    return make.model()


# C14 to C16, C53: masks.


def finite_mask(filler: float, dtype: type = np.float32) -> onnx.ModelProto:
    """scores + (1 - mask) x filler over embeddings."""
    make = Maker(dtype=dtype)
    words, mask = make.ids(), make.mask()
    hidden = make.op("Sub", make.const(1.0), make.number(mask))
    bias = make.unsqueeze(make.op("Mul", hidden, make.const(filler)), 1, 2)
    make.output(make.attended(words, words, words, bias, 0.1), "y", "t", WIDTH)
    return make.model()


def squared_mask(*, fused: bool) -> onnx.ModelProto:
    """A mask of queries and keys, m (x) m: written out with a finite value, or com.microsoft's raw mask."""
    make = Maker()
    words, mask = make.ids(), make.mask()
    rows = make.op("Cast", mask, to=TensorProto.INT32)
    square = make.op("Mul", make.unsqueeze(rows, 2), make.unsqueeze(rows, 1))
    if fused:
        weights, bias = make.drawn(WIDTH, 3 * WIDTH, scale=0.3), make.const(np.zeros(3 * WIDTH))
        attended = make.op("Attention", words, weights, bias, square, domain="com.microsoft", num_heads=2)
    else:
        hidden = make.op("Sub", make.const(1.0), make.number(square))
        bias = make.unsqueeze(make.op("Mul", hidden, make.const(-1e9)), 1)
        attended = make.attended(make.projected(words), make.projected(words), words, bias)
    make.output(attended, "y", "t", WIDTH)
    return make.model()


def zero_attention() -> onnx.ModelProto:
    """add_zero_attn: one key and one value of zeros behind all keys, always allowed."""
    make = Maker()
    values, mask = make.input("x", TensorProto.FLOAT, "t", WIDTH), make.mask()
    query, key, value = (make.projected(values) for _ in range(3))
    first = make.op("Slice", values, make.ints(0), make.ints(1), make.ints(1))
    zero = make.op("Mul", first, make.const(0.0))
    key, value = (make.op("Concat", each, zero, axis=1) for each in (key, value))
    allowed = make.op("Slice", mask, make.ints(0), make.ints(1), make.ints(1))
    one = make.op("Add", make.op("Mul", allowed, make.ints(0)), make.ints(1))
    keep = make.op("Concat", mask, one, axis=1)
    make.output(make.attended(query, key, value, make.bias(keep, -np.inf)), "y", "t", WIDTH)
    return make.model()


def windows_as_heads() -> onnx.ModelProto:
    """x (B, 16, 8) -> Reshape (-1, 4, 8) -> attention of one head within each window -> back (C17)."""
    make = Maker()
    values = make.input("x", TensorProto.FLOAT, 16, 8)
    windows = make.op("Reshape", values, make.ints(-1, 4, 8))
    scores = make.op("MatMul", windows, make.op("Transpose", windows, perm=[0, 2, 1]))
    product = make.op("MatMul", make.op("Softmax", scores, axis=-1), windows)
    make.output(make.op("Reshape", product, make.ints(-1, 16, 8)), "y", 16, 8)
    return make.model()


def _zero(length: int) -> Feeds:
    return {"x": np.zeros((length, WIDTH), np.float32), "attention_mask": np.ones(length, np.int64)}


CASES: dict[str, Case] = {
    "C1": quantized_case(masked=False),
    "C1 masked": quantized_case(masked=True),
    "C1 fused": quantized_case(masked=False, fused=True),
    "C2": Case(graphs.int8_bert, text(4, 9, 2), (long_text(9),), axis="batch"),
    "C3": Case(graphs.unmasked, features(3, 64, 0.1), (features(6, 64, 1.0, 1),), axis="t"),
    "C4": Case(sharp_attention, features(3, 64, seed=3), (features(6, 64, 1.0, 1),), axis="t"),
    "C5": Case(ids_alone, {"input_ids": np.array([0, 5, 0])}, (long_text(7, masked=False),), axis="t"),
    "C6": Case(
        old_softmax,
        {"x": np.zeros((3, WIDTH), np.float32)},
        ({"x": np.zeros((6, WIDTH), np.float32)},),
        axis="t",
        # Of 2 heads x 3 x 3 scores each has a share of 1/18; each position has three of them.
        right=outputs_are("y", 3 / 18),
    ),
    "C7": Case(by_length(log_scale), long_text(20), (long_text(60, 2),), axis="t"),
    "C8": Case(by_length(switch), long_text(20), (long_text(60, 2),), axis="t"),
    "C9": Case(graphs.if_on_length, long_text(20), (long_text(70, 2),), axis="t"),
    "C10": Case(last_ten, long_text(20), (long_text(25, 2),), axis="t"),
    "C11": Case(graphs.greatest_length, long_text(3), (long_text(7, 2),), axis="batch"),
    "C12": Case(
        graphs.experts, long_text(16), tuple(long_text(16, seed) for seed in range(2, 9)), axis="batch", shows=False
    ),
    "C13": Case(small_pool, features(3), (features(9, seed=1),), axis="t"),
    "C14": Case(
        lambda: finite_mask(MASKS["-1e9"]),
        text(4, 9, 2, mask=(0, 0, 0)),
        (long_text(7),),
        right=weights_are(1 / 3),
    ),
    "C15": Case(lambda: squared_mask(fused=False), text(4, 9, 2, 8, mask=(1, 0, 1, 1)), (long_text(9),)),
    "C15 fused": Case(lambda: squared_mask(fused=True), text(4, 9, 2, 8, mask=(1, 0, 1, 1)), (long_text(9),)),
    # The output was right even so. The weights were cropped to the wrong columns.
    "C16": Case(zero_attention, _zero(4), (features(7, masked=True),), right=weights_are(0.2), shows=False),
    "C53": Case(lambda: finite_mask(-10.0), text(4, 9, 2), (long_text(400),), max_length=512),
    "C53 float16": Case(
        lambda: finite_mask(-100.0, np.float16), text(4, 9, 2), (long_text(400),), shows=False, max_length=512
    ),
}
