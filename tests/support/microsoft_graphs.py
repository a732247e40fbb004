"""Hand-made graphs of onnxruntime's attention operators, and their weights in float64, from what they define."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]

DOMAIN = "com.microsoft"
FILTER_VALUE = -10000.0
LOWEST = float(np.finfo(np.float32).min)


def model_of(
    op_type: str,
    inputs: dict[str, Array | None],
    constants: dict[str, Array],
    opset: int,
    dtype: type,
    attributes: dict[str, Any],
    batch: int,
) -> onnx.ModelProto:
    """One node; an input that is None is left out. Axes as long as the batch are `batch`, all others stay nameless."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    infos = []
    for name, array in inputs.items():
        if array is None or name in constants:
            continue
        shape: list[Any] = [None] * array.ndim
        if array.ndim > 2:
            # Facts that exporters state: widths and numbers of heads.
            shape[-1] = array.shape[-1]
        if array.ndim and array.shape[0] == batch > 1:
            shape[0] = "batch"
        infos.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), shape))
    names = [name if array is not None else "" for name, array in inputs.items()]
    node = helper.make_node(op_type, names, ["output"], name="attend", domain=DOMAIN, **attributes)
    outputs = [helper.make_tensor_value_info("output", kind, [None, None, None])]
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph([node], "microsoft", infos, outputs, initializers)
    versions = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=versions, ir_version=8)


def split(array: Array, heads: int) -> Array:
    """Float64 (B, H, T, D) of (B, T, H * D)."""
    batch, length, width = array.shape
    return array.astype(np.float64).reshape(batch, length, heads, width // heads).transpose(0, 2, 1, 3)


def padding_bias(mask: Array | None, batch: int, queries: int, keys: int, filter_value: float) -> Array:
    """What a mask of integers adds to the scores, float64 (B, 1, L, S)."""
    kept = np.ones((batch, 1, queries, keys), bool)
    if mask is not None and mask.ndim == 1:
        for row in range(batch):
            kept[row, ..., max(int(mask[row]), 0) :] = False
            if len(mask) == 2 * batch:
                kept[row, ..., : int(mask[batch + row])] = False
    elif mask is not None:
        broad = {2: (slice(None), None, None), 3: (slice(None), None), 4: (...,)}[mask.ndim]
        kept &= (mask[broad] > 0)[..., : queries if mask.ndim != 2 else None, :keys]
    return np.where(kept, 0.0, filter_value)


def softmax(scores: Array) -> Array:
    """Over the last axis; a row of nothing but minus infinity is 0."""
    highest = scores.max(axis=-1, keepdims=True)
    exponents = np.exp(scores - np.where(np.isfinite(highest), highest, 0))
    total = exponents.sum(axis=-1, keepdims=True)
    return exponents / np.where(total == 0, 1, total)


def added(scores: Array, padding: Array, *, causal: bool, bias: Array | None) -> Array:
    """Weights of `Attention` and `MultiHeadAttention`: softmax of the scores and everything that is added to them.

    In float32 from here on, as the operators' definition has it: the sum of a score and -10,000 is rounded to 0.001.
    """
    total = padding.astype(np.float32)
    queries, keys = scores.shape[2:]
    if causal:
        behind = np.arange(keys) > np.arange(queries)[:, None]
        behind[-1] = False
        total = total + np.where(behind, np.float32(LOWEST), np.float32(0))
    with np.errstate(over="ignore"):  # twice the lowest number is minus infinity, as it is in the kernel
        if bias is not None:
            total = total + bias.astype(np.float32)
        return softmax((scores.astype(np.float32) + total).astype(np.float64))


@dataclass
class Packed:
    """`Attention`: (B, L, W) with packed weights.

    `mask` and `bias` are the operator's mask and the bias added to its scores. `projection_bias`: False leaves out the
    bias of the projection.
    """

    batch: int = 2
    heads: int = 2
    length: int = 5
    width: int = 6
    head_dim: int = 4
    value_dim: int = 4
    mask: Array | None = None
    bias: Array | None = None
    projection_bias: bool = True
    dtype: type = np.float32
    attributes: dict[str, Any] = field(default_factory=dict)
    opset: int = 17
    seed: int = 0

    def _arrays(self) -> dict[str, Array | None]:
        rng = np.random.default_rng(self.seed)
        hidden, value_hidden = self.heads * self.head_dim, self.heads * self.value_dim
        columns = 2 * hidden + value_hidden
        return {
            "input": rng.normal(size=(self.batch, self.length, self.width)).astype(self.dtype),
            "weights": (rng.normal(size=(self.width, columns)) * 0.5).astype(self.dtype),
            "bias": rng.normal(size=columns).astype(self.dtype) if self.projection_bias else None,
            "mask": self.mask,
            "past": None,
            "attention_bias": self.bias,
        }

    def feeds(self) -> dict[str, Array]:
        arrays = self._arrays()
        return {name: array for name, array in arrays.items() if array is not None and name not in {"weights", "bias"}}

    def model(self) -> onnx.ModelProto:
        arrays = self._arrays()
        constants = {name: array for name in ("weights", "bias") if (array := arrays[name]) is not None}
        attributes = {"num_heads": self.heads, **self.attributes}
        if self.value_dim != self.head_dim:
            hidden = self.heads * self.head_dim
            attributes["qkv_hidden_sizes"] = [hidden, hidden, self.heads * self.value_dim]
        return model_of("Attention", arrays, constants, self.opset, self.dtype, attributes, self.batch)

    def _projected(self) -> tuple[Array, Array, Array]:
        arrays = self._arrays()
        assert arrays["input"] is not None
        assert arrays["weights"] is not None
        product = arrays["input"].astype(np.float64) @ arrays["weights"].astype(np.float64)
        if arrays["bias"] is not None:
            product = product + arrays["bias"]
        hidden = self.heads * self.head_dim
        query, key, value = np.split(product, [hidden, 2 * hidden], axis=-1)
        return split(query, self.heads), split(key, self.heads), split(value, self.heads)

    def reference(self) -> Array:
        """The weights, (B, H, L, S)."""
        query, key, _ = self._projected()
        scores = query @ key.transpose(0, 1, 3, 2) * self.attributes.get("scale", 1 / math.sqrt(self.head_dim))
        filter_value = self.attributes.get("mask_filter_value", FILTER_VALUE)
        padding = padding_bias(self.mask, self.batch, self.length, self.length, filter_value)
        return added(scores, padding, causal=bool(self.attributes.get("unidirectional")), bias=self.bias)

    def output_from(self, weights: Array) -> Array:
        """Return the expected output of the operator, (B, L, H * D)."""
        product = weights @ self._projected()[2]
        return product.transpose(0, 2, 1, 3).reshape(self.batch, self.length, -1)


@dataclass
class Quantized(Packed):
    """`QAttention`: the same in integers. `by_column`: a scale and a zero for each column of the weights.

    `zeros`: False leaves out the zero points.
    """

    by_column: bool = False
    zeros: bool = True

    def _arrays(self) -> dict[str, Array | None]:
        rng = np.random.default_rng(self.seed)
        columns = 3 * self.heads * self.head_dim
        shape = (columns,) if self.by_column else ()
        return {
            "input": rng.integers(0, 256, (self.batch, self.length, self.width)).astype(np.uint8),
            "weights": rng.integers(-127, 128, (self.width, columns)).astype(np.int8),
            "bias": rng.normal(size=columns).astype(np.float32),
            "input_scale": np.array(0.02, np.float32),
            "weight_scale": rng.uniform(0.005, 0.01, shape).astype(np.float32),
            "mask": self.mask,
            "input_zero": np.array(120, np.uint8) if self.zeros else None,
            "weight_zero": rng.integers(-5, 6, shape).astype(np.int8) if self.zeros else None,
        }

    def feeds(self) -> dict[str, Array]:
        kept = {"input", "mask"}
        return {name: array for name, array in self._arrays().items() if array is not None and name in kept}

    def model(self) -> onnx.ModelProto:
        arrays = self._arrays()
        constants = {
            name: array for name, array in arrays.items() if array is not None and name not in {"input", "mask"}
        }
        attributes = {"num_heads": self.heads, **self.attributes}
        return model_of("QAttention", arrays, constants, self.opset, self.dtype, attributes, self.batch)

    def _projected(self) -> tuple[Array, Array, Array]:
        wide = {name: array.astype(np.float64) for name, array in self._arrays().items() if array is not None}
        features = (wide["input"] - wide.get("input_zero", 0)) * wide["input_scale"]
        weights = (wide["weights"] - wide.get("weight_zero", 0)) * wide["weight_scale"]
        query, key, value = np.split(features @ weights + wide["bias"], 3, axis=-1)
        return split(query, self.heads), split(key, self.heads), split(value, self.heads)


@dataclass
class MultiHead:
    """`MultiHeadAttention`. `form`: "apart", "key and value packed", "all packed", or "heads first" (key and value).

    Another form raises KeyError. `mask`, `bias` and `projection_bias` are as in `Packed`.
    """

    batch: int = 2
    heads: int = 2
    queries: int = 5
    keys: int = 5
    head_dim: int = 4
    value_dim: int = 4
    form: str = "apart"
    mask: Array | None = None
    bias: Array | None = None
    projection_bias: bool = False
    dtype: type = np.float32
    attributes: dict[str, Any] = field(default_factory=dict)
    opset: int = 17
    seed: int = 0

    def _apart(self) -> tuple[Array, Array, Array]:
        rng = np.random.default_rng(self.seed)
        shapes = ((self.queries, self.head_dim), (self.keys, self.head_dim), (self.keys, self.value_dim))
        query, key, value = (
            rng.normal(size=(self.batch, length, self.heads * dim)).astype(self.dtype) for length, dim in shapes
        )
        return query, key, value

    def _projection_bias(self) -> Array | None:
        if not self.projection_bias:
            return None
        size = self.heads * (2 * self.head_dim + self.value_dim)
        return np.random.default_rng(self.seed + 1).normal(size=size).astype(self.dtype)

    def _arrays(self) -> dict[str, Array | None]:
        query, key, value = self._apart()

        def stacked(*arrays: Array) -> Array:
            return np.stack([array.reshape(*array.shape[:2], self.heads, -1) for array in arrays], axis=3)

        first, second, third = {
            "apart": (query, key, value),
            "key and value packed": (query, stacked(key, value) if "packed" in self.form else None, None),
            "all packed": (stacked(query, key, value) if self.form == "all packed" else None, None, None),
            "heads first": (
                query,
                split(key, self.heads).astype(self.dtype),
                split(value, self.heads).astype(self.dtype),
            ),
        }[self.form]
        return {
            "query": first,
            "key": second,
            "value": third,
            "bias": self._projection_bias(),
            "mask": self.mask,
            "attention_bias": self.bias,
        }

    def feeds(self) -> dict[str, Array]:
        return {name: array for name, array in self._arrays().items() if array is not None and name != "bias"}

    def model(self) -> onnx.ModelProto:
        arrays = self._arrays()
        constants = {"bias": arrays["bias"]} if arrays["bias"] is not None else {}
        attributes = {"num_heads": self.heads, **self.attributes}
        return model_of("MultiHeadAttention", arrays, constants, self.opset, self.dtype, attributes, self.batch)

    def _biased(self) -> tuple[Array, Array, Array]:
        query, key, value = (array.astype(np.float64) for array in self._apart())
        bias, hidden = self._projection_bias(), self.heads * self.head_dim
        if bias is not None:
            query = query + bias[:hidden]
            if self.form != "heads first":
                key, value = key + bias[hidden : 2 * hidden], value + bias[2 * hidden :]
        return split(query, self.heads), split(key, self.heads), split(value, self.heads)

    def reference(self) -> Array:
        """The weights, (B, H, L, S)."""
        query, key, _ = self._biased()
        scores = query @ key.transpose(0, 1, 3, 2) * self.attributes.get("scale", 1 / math.sqrt(self.head_dim))
        filter_value = self.attributes.get("mask_filter_value", FILTER_VALUE)
        padding = padding_bias(self.mask, self.batch, self.queries, self.keys, filter_value)
        return added(scores, padding, causal=bool(self.attributes.get("unidirectional")), bias=self.bias)

    def scores(self) -> Array:
        """The scores, (B, H, L, S), with the attention bias alone; minus infinity for a hidden key."""
        query, key, _ = self._biased()
        scores = query @ key.transpose(0, 1, 3, 2) * self.attributes.get("scale", 1 / math.sqrt(self.head_dim))
        hidden = padding_bias(self.mask, self.batch, self.queries, self.keys, -1.0) < 0
        if self.attributes.get("unidirectional"):
            behind = np.arange(self.keys) > np.arange(self.queries)[:, None]
            behind[-1] = False
            hidden = hidden | behind
        if self.bias is not None:
            scores, hidden = scores + self.bias, hidden | (self.bias <= np.finfo(self.dtype).min / 2)
        return np.where(hidden, -np.inf, scores)

    def output_from(self, weights: Array) -> Array:
        """Return the expected output of the operator, (B, L, H * D)."""
        product = weights @ self._biased()[2]
        return product.transpose(0, 2, 1, 3).reshape(self.batch, self.queries, -1)


@dataclass
class GroupQuery:
    """`GroupQueryAttention` without a past.

    `lengths`: keys that count in each row (None: all), in `ends_shape`; `rotary`: the number of rotated features of
    each head. `packed`: query, key and value are one input. `empty_past`: a past of no position is an input.
    `presents`: the operator returns its keys and values too. `sink`: softmax has one more score in each head.
    """

    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    length: int = 5
    head_dim: int = 16
    packed: bool = False
    lengths: tuple[int, ...] | None = None
    ends_shape: tuple[int, ...] = (-1,)
    rotary: int = 0
    positions: Array | None = None
    bias: Array | None = None
    empty_past: bool = False
    presents: bool = False
    sink: bool = False
    dtype: type = np.float32
    attributes: dict[str, Any] = field(default_factory=dict)
    opset: int = 17
    seed: int = 0

    def _apart(self) -> tuple[Array, Array, Array]:
        rng = np.random.default_rng(self.seed)
        query, key, value = (
            rng.normal(size=(self.batch, self.length, heads * self.head_dim)).astype(self.dtype)
            for heads in (self.heads, self.kv_heads, self.kv_heads)
        )
        return query, key, value

    def _tables(self) -> tuple[Array, Array] | tuple[None, None]:
        if not self.rotary:
            return None, None
        angles = np.random.default_rng(self.seed + 1).normal(size=(32, self.rotary // 2))
        return np.cos(angles).astype(self.dtype), np.sin(angles).astype(self.dtype)

    def _arrays(self) -> dict[str, Array | None]:
        query, key, value = self._apart()
        past = np.zeros((self.batch, self.kv_heads, 0, self.head_dim), self.dtype) if self.empty_past else None
        cos, sin = self._tables()
        ends = np.array(self.lengths or [self.length] * self.batch, np.int32) - 1
        return {
            "query": np.concatenate([query, key, value], axis=-1) if self.packed else query,
            "key": None if self.packed else key,
            "value": None if self.packed else value,
            "past_key": past,
            "past_value": past,
            "seqlens_k": ends.astype(np.int32).reshape(self.ends_shape),
            "total": np.array(self.length, np.int32),
            "cos": cos,
            "sin": sin,
            "positions": self.positions,
            "attention_bias": self.bias,
            "sink": self._sink() if self.sink else None,
        }

    def _sink(self) -> Array:
        return np.random.default_rng(self.seed + 2).normal(size=self.heads).astype(self.dtype)

    def feeds(self) -> dict[str, Array]:
        constants = {"cos", "sin", "sink"}
        return {name: array for name, array in self._arrays().items() if array is not None and name not in constants}

    def model(self) -> onnx.ModelProto:
        arrays = self._arrays()
        constants = {name: array for name in ("cos", "sin", "sink") if (array := arrays[name]) is not None}
        attributes = {"num_heads": self.heads, "kv_num_heads": self.kv_heads, **self.attributes}
        if self.rotary:
            attributes["do_rotary"] = 1
        model = model_of("GroupQueryAttention", arrays, constants, self.opset, self.dtype, attributes, self.batch)
        for info in model.graph.input:
            if info.name.startswith("past"):
                info.type.tensor_type.shape.dim[2].dim_value = 0
        if self.presents:
            model.graph.node[0].output.extend(["present_key", "present_value"])
        return model

    def _rotated(self, operand: Array) -> Array:
        """(B, H, T, D) with its first numbers rotated by the angles of its positions."""
        cos, sin = self._tables()
        if cos is None or sin is None:
            return operand
        first = 0 if self.positions is None else int(self.positions.flat[0])
        at = slice(first, first + self.length)
        turns = cos[at].astype(np.float64) + 1j * sin[at]
        wheels, rest = operand[..., : self.rotary], operand[..., self.rotary :]
        half = self.rotary // 2
        if self.attributes.get("rotary_interleaved"):
            turned = (wheels[..., ::2] + 1j * wheels[..., 1::2]) * turns
            wheels = np.stack([turned.real, turned.imag], axis=-1).reshape(wheels.shape)
        else:
            turned = (wheels[..., :half] + 1j * wheels[..., half:]) * turns
            wheels = np.concatenate([turned.real, turned.imag], axis=-1)
        return np.concatenate([wheels, rest], axis=-1)

    def reference(self) -> Array:
        """The weights, (B, H, L, S)."""
        scores = self.scores()
        if not self.sink and not self.attributes.get("smooth_softmax"):
            return softmax(scores)
        sinks = self._sink().astype(np.float64) if self.sink else np.zeros(self.heads)
        columns = np.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))
        return softmax(np.concatenate([scores, columns], axis=-1))[..., :-1]

    def scores(self) -> Array:
        """The scores, (B, H, L, S), after softcap and bias; minus infinity for a hidden key."""
        query, key, _ = self._apart()
        turned = self._rotated(split(query, self.heads))
        keys = np.repeat(self._rotated(split(key, self.kv_heads)), self.heads // self.kv_heads, axis=1)
        scores = turned @ keys.transpose(0, 1, 3, 2) * self.attributes.get("scale", 1 / math.sqrt(self.head_dim))
        if cap := self.attributes.get("softcap"):
            scores = cap * np.tanh(scores / cap)
        at = np.arange(self.length)
        kept = np.ones(scores.shape, bool)
        if self.attributes.get("causal", 1):
            kept &= at <= at[:, None]
        if (window := self.attributes.get("local_window_size", -1)) > 0:
            kept &= at > at[:, None] - window
        for row, length in enumerate(self.lengths or ()):
            kept[row] &= at < length
            if window > 0:
                kept[row] &= at[:, None] < length
        if self.bias is not None:
            kept &= self.bias > LOWEST
            scores = scores + np.where(self.bias > LOWEST, self.bias, 0.0)
        return np.where(kept, scores, -np.inf)

    def output_from(self, weights: Array) -> Array:
        """Return the expected output of the operator, (B, L, H * D)."""
        value = np.repeat(split(self._apart()[2], self.kv_heads), self.heads // self.kv_heads, axis=1)
        return (weights @ value).transpose(0, 2, 1, 3).reshape(self.batch, self.length, -1)
