"""Attention written out step by step in ONNX, in the forms that exporters give it, and its weights in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]

WIDTH, HEADS = 16, 4
HEAD_DIM = WIDTH // HEADS
LATENTS = 3
_MOST = 64
"""Positions that tables of biases have."""

SCALES = ("none", "scores", "query", "key", "both")
MASKS = ("none", "added", "chosen", "minus infinity")
LAYOUTS = (
    "4-D",
    "3-D",
    "3-D head-major",
    "head-major",
    "5-D",
    "einsum",
    "einsum heads last",
    "einsum grouped",
    "turned",
    "repeated",
)
GUARDS = (
    *(
        "none",
        "identity",
        "dropout",
        "cast",
        "not a number",
        "zeroed",
        "multiplied",
        "renormalised",
        "sink",
        "quantised",
    ),
)
BIASES = ("none", "relative", "disentangled", "heads mixed", "heads mixed by convolution")
SPELLINGS = ("Softmax", "Exp", "Exp steady", "LogSoftmax")


@dataclass
class Decomposed:
    """Query features (B, L, W) attend to key features (B, S, W), or to themselves; constant queries are `latent`.

    `keep` (B, S): which keys count, where there is a mask. `layout`, `scale`, `mask`, `bias`, `guard` and `spelling`
    are names from the tuples above; no name is checked. A bias that a layout cannot have is left out of graph and
    reference. `divides`: the scale is a Div, not a Mul. `causal`: no key behind the query. `cross`: keys come from the
    input `memory`, not from `queries`; with `latent` or `direct` they always do. `direct`: inputs are heads
    (B, H, T, D), not features to project. `wide_softmax`: softmax in float32 between casts.
    """

    opset: int = 17
    layout: str = "4-D"
    scale: str = "scores"
    divides: bool = False
    mask: str = "none"
    causal: bool = False
    bias: str = "none"
    guard: str = "none"
    spelling: str = "Softmax"
    cross: bool = False
    latent: bool = False
    direct: bool = False
    dtype: type = np.float32
    wide_softmax: bool = False
    seed: int = 0
    nodes: list[onnx.NodeProto] = field(default_factory=list, repr=False)
    constants: dict[str, Array] = field(default_factory=dict, repr=False)

    @property
    def kv_heads(self) -> int:
        return 2 if self.layout in {"5-D", "einsum grouped", "repeated"} else HEADS

    @property
    def fully_masked(self) -> bool:
        """Whether all keys of a sequence may be masked: only where the graph defines the result."""
        return self.mask == "minus infinity" and self.guard in {"none", "not a number"}

    def tables(self) -> dict[str, Array]:
        rng = np.random.default_rng(self.seed)
        narrow = self.kv_heads * HEAD_DIM

        def drawn(*shape: int) -> Array:
            return (rng.normal(size=shape) * 0.4).astype(self.dtype)

        return {
            "wq": drawn(WIDTH, WIDTH),
            "wk": drawn(WIDTH, narrow),
            "wv": drawn(WIDTH, narrow),
            "latents": drawn(1, HEADS, LATENTS, HEAD_DIM) * 2,
            "bias": drawn(1, HEADS, _MOST, _MOST),
            "distances": drawn(HEADS, HEAD_DIM, 2 * _MOST),
            "mixture": drawn(HEADS, HEADS) * 2,
            "sink": drawn(1, HEADS, 1, 1),
        }

    # The graph.

    def op(self, op_type: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        output = f"{op_type.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], domain=domain, **attributes))
        return output

    def const(self, array: Any, kind: type | None = None) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants[name] = np.asarray(array, kind or self.dtype)
        return name

    def ints(self, *numbers: int) -> str:
        return self.const(numbers, np.int64)

    def unsqueeze(self, value: str, *axes: int) -> str:
        return (
            self.op("Unsqueeze", value, self.ints(*axes))
            if self.opset >= 13
            else self.op("Unsqueeze", value, axes=axes)
        )

    def total(self, value: str) -> str:
        """The sum over the last axis, which stays."""
        if self.opset >= 13:
            return self.op("ReduceSum", value, self.ints(-1), keepdims=1)
        return self.op("ReduceSum", value, axes=[-1], keepdims=1)

    def most(self, value: str) -> str:
        if self.opset >= 18:
            return self.op("ReduceMax", value, self.ints(-1), keepdims=1)
        return self.op("ReduceMax", value, axes=[-1], keepdims=1)

    def extent(self, value: str, axis: int) -> str:
        """Int64 of rank 1."""
        return self.op("Slice", self.op("Shape", value), self.ints(axis), self.ints(axis + 1))

    def model(self) -> onnx.ModelProto:
        self.nodes, self.constants = [], dict(self.tables())
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        info = helper.make_tensor_value_info
        inputs = [] if self.latent else [self._input("queries", kind, "target")]
        keys, length = self.keys, "source" if self.cross or self.latent else "target"
        if keys == "memory":
            inputs += [self._input("memory", kind, length)]
        if self.direct:
            inputs += [self._input("values", kind, length)]
        if self.mask != "none":
            inputs += [info("keep", onnx.TensorProto.BOOL, ["batch", length])]
        query = "latents" if self.latent else self._heads("queries", "wq", HEADS)
        key = self._heads(keys, "wk", self.kv_heads)
        value = self._heads("values" if self.direct else keys, "wv", self.kv_heads)
        query, key = self._scaled(query, key)
        if self.latent and self.layout in {"3-D", "3-D head-major", "einsum", "einsum heads last"}:
            rows = self.op("Concat", self.extent("memory", 0), self.ints(1, 1, 1), axis=0)
            query = self.op("Expand", query, rows)
        output = self._attended(query, key, value)
        output = self._batch_first(output, "memory" if self.latent else "queries")
        outputs = [info("attended", kind, ["batch", *[None] * (max(self.rank, 4) - 1)])]
        self.nodes.append(helper.make_node("Identity", [output], ["attended"]))
        used = {name for node in self.nodes for name in node.input}
        initializers = [numpy_helper.from_array(array, name) for name, array in self.constants.items() if name in used]
        graph = helper.make_graph(self.nodes, "decomposed", inputs, outputs, initializers)
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=6 if self.opset < 13 else 8)

    def _input(self, name: str, kind: int, length: str) -> onnx.ValueInfoProto:
        heads = HEADS if name == "queries" else self.kv_heads
        shape = ["batch", heads, length, HEAD_DIM] if self.direct else ["batch", length, WIDTH]
        return helper.make_tensor_value_info(name, kind, shape)

    def _heads(self, features: str, table: str, heads: int) -> str:
        """(B, H, T, D)."""
        if self.direct:
            return features
        apart = self.op("Reshape", self.op("MatMul", features, table), self.ints(0, 0, heads, HEAD_DIM))
        return self.op("Transpose", apart, perm=[0, 2, 1, 3])

    @property
    def factor(self) -> float:
        return 1.0 if self.scale == "none" else HEAD_DIM**-0.5

    def _times(self, value: str, factor: float) -> str:
        return (
            self.op("Div", value, self.const(1 / factor)) if self.divides else self.op("Mul", value, self.const(factor))
        )

    def _scaled(self, query: str, key: str) -> tuple[str, str]:
        if self.scale == "query":
            return self._times(query, self.factor), key
        if self.scale == "key":
            return query, self._times(key, self.factor)
        if self.scale == "both":
            return self._times(query, self.factor**0.5), self._times(key, self.factor**0.5)
        return query, key

    def _attended(self, query: str, key: str, value: str) -> str:  # noqa: PLR0911 - one layout after the other
        """Write attention in the case's layout. Masks and biases have the layout of the scores."""
        if self.layout in {"3-D", "3-D head-major"}:
            return self._folded(query, key, value)
        if self.layout == "head-major":
            query, key, value = (self.op("Transpose", each, perm=[1, 0, 2, 3]) for each in (query, key, value))
            scores = self.op("MatMul", query, self.op("Transpose", key, perm=[0, 1, 3, 2]))
            return self.op(
                "MatMul",
                self._weights(scores, query, lambda each: self.op("Transpose", each, perm=[1, 0, 2, 3])),
                value,
            )
        if self.layout == "5-D":
            query = self.op("Reshape", query, self.ints(0, self.kv_heads, 2, -1, HEAD_DIM))
            key, value = (self.unsqueeze(each, 2) for each in (key, value))
            scores = self.op("MatMul", query, self.op("Transpose", key, perm=[0, 1, 2, 4, 3]))
            return self.op("MatMul", self._weights(scores, query, self._grouped), value)
        if self.layout == "einsum":
            scores = self.op("Einsum", query, key, equation="bhid,bhjd->bhij")
            return self.op("Einsum", self._weights(scores, query, str), value, equation="bhij,bhjd->bhid")
        if self.layout == "einsum heads last":
            query, key, value = (self.op("Transpose", each, perm=[0, 2, 1, 3]) for each in (query, key, value))
            scores = self.op("Einsum", query, key, equation="blhd,bshd->bhls")
            return self.op(
                "Einsum", self._weights(scores, query, str), value, equation="... h l s, ... s h d -> ... l h d"
            )
        if self.layout == "einsum grouped":
            query = self.op("Reshape", query, self.ints(0, self.kv_heads, 2, -1, HEAD_DIM))
            scores = self.op("Einsum", query, key, equation="bkgld,bksd->bkgls")
            return self.op("Einsum", self._weights(scores, query, self._grouped), value, equation="bkgls,bksd->bklgd")
        if self.layout == "turned":
            # Softmax over the last axis but one, and weights on the right.
            scores = self.op("MatMul", query, self.op("Transpose", key, perm=[0, 1, 3, 2]))
            weights = self.op("Transpose", self._weights(scores, query, str), perm=[0, 1, 3, 2])
            return self.op("MatMul", self.op("Transpose", value, perm=[0, 1, 3, 2]), weights)
        if self.layout == "repeated":
            key, value = (self._repeated(each) for each in (key, value))
        scores = self.op("MatMul", query, self.op("Transpose", key, perm=[0, 1, 3, 2]))
        return self.op("MatMul", self._weights(scores, query, str), value)

    def _repeated(self, each: str) -> str:
        """(B, K, S, D), each head twice in a row."""
        length = self.extent(each, 2)
        twice = self.op("Expand", self.unsqueeze(each, 2), self.ints(1, 1, 2, 1, 1))
        return self.op("Reshape", twice, self.op("Concat", self.ints(0, HEADS), length, self.ints(-1), axis=0))

    def _batch_first(self, output: str, features: str) -> str:
        """With the batch as its first axis, as an output needs it."""
        if self.layout in {"3-D", "3-D head-major"}:
            extents = [self.extent(features, 0), self.ints(HEADS)]
            if self.layout == "3-D head-major":
                extents.reverse()
            lengths = self.op("Slice", self.op("Shape", output), self.ints(1), self.ints(3))
            output = self.op("Reshape", output, self.op("Concat", *extents, lengths, axis=0))
        return self.op("Transpose", output, perm=[1, 0, 2, 3]) if "head-major" in self.layout else output

    def _grouped(self, each: str) -> str:
        """(., H or 1, ., .) to (., K, G, ., .) or (., 1, 1, ., .)."""
        count = self.extent(each, 1)
        apart = self.op("Div", self.op("Add", count, self.ints(1)), self.ints(2))
        groups = self.op("Div", count, apart)
        shape = self.op(
            "Concat", self.extent(each, 0), apart, groups, self.extent(each, 2), self.extent(each, 3), axis=0
        )
        return self.op("Reshape", each, shape)

    def _folded(self, query: str, key: str, value: str) -> str:
        heads_first = self.layout == "3-D head-major"

        def fold(each: str) -> str:
            shape = self.op(
                "Concat", self.ints(-1), self.op("Slice", self.op("Shape", each), self.ints(2), self.ints(4)), axis=0
            )
            return self.op("Reshape", self.op("Transpose", each, perm=[1, 0, 2, 3]) if heads_first else each, shape)

        def spread(each: str) -> str:
            """A mask for every head of every sequence."""
            rows = self.op(
                "Concat", self.extent("memory" if self.latent else "queries", 0), self.ints(HEADS, 1, 1), axis=0
            )
            full = self.op("Expand", each, rows)
            return fold(full)

        turned = self.op("Transpose", fold(key), perm=[0, 2, 1])
        scores = self.op("MatMul", fold(query), turned)
        return self.op("MatMul", self._weights(scores, query, spread), fold(value))

    def _weights(self, scores: str, query: str, into: Any) -> str:
        """Write the nodes from scores to weights. `into` converts (B, H, L, S), or 1 of each, to the scores' layout."""
        lengths = self._length(self.keys), self._length("" if self.latent else "queries")
        scores = self._biased(scores, query, into, *lengths)
        kept: list[str] = []
        if self.mask != "none":
            kept.append(into_bool(self, self.unsqueeze("keep", 1, 2), into))
        if self.causal:
            kept.append(into_bool(self, self.unsqueeze(self._frontier(*lengths), 0, 1), into))
        for keep in kept:
            scores = self._masked(scores, keep)
        if self.guard == "sink":
            shape = self.op(
                "Concat", self.op("Slice", self.op("Shape", scores), self.ints(0), self.ints(-1)), self.ints(1), axis=0
            )
            scores = self.op("Concat", scores, self.op("Expand", into("sink"), shape), axis=-1)
        if self.wide_softmax:
            scores = self.op("Cast", scores, to=onnx.TensorProto.FLOAT)
        weights = self._softmax(scores)
        if self.wide_softmax:
            weights = self.op("Cast", weights, to=helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype)))
        weights = self._guarded(weights, kept)
        return self._mixed(weights)

    def _length(self, features: str) -> str:
        return self.extent(features, 2 if self.direct else 1) if features else self.ints(LATENTS)

    @property
    def disentangled(self) -> bool:
        return self.bias == "disentangled" and self.layout in {"4-D", "einsum", "turned"} and not self.latent

    @property
    def keys(self) -> str:
        """The input that keys come from."""
        return "memory" if self.cross or self.latent or self.direct else "queries"

    def _biased(self, scores: str, query: str, into: Any, keys: str, queries: str) -> str:
        if self.disentangled:
            rows, columns = (self._range(length) for length in (queries, keys))
            apart = self.op("Add", self.op("Sub", self.unsqueeze(rows, 1), columns), self.const(_MOST, np.int64))
            index = self.op("Expand", apart, self.op("Shape", scores))
            scores = self.op(
                "Add", scores, self.op("GatherElements", self.op("MatMul", query, "distances"), index, axis=-1)
            )
        if self.scale == "scores":
            scores = self._times(scores, self.factor)
        scores = self._mixed(scores)
        if self.bias == "relative":
            ends = self.op("Concat", queries, keys, axis=0)
            return self.op("Add", scores, into(self.op("Slice", "bias", self.ints(0, 0), ends, self.ints(2, 3))))
        return scores

    @property
    def mixed(self) -> bool:
        return self.bias.startswith("heads mixed") and self.layout in {"4-D", "repeated", "einsum"}

    def _mixed(self, each: str) -> str:
        """(B, H, L, S), each head a mixture of all."""
        if not self.mixed:
            return each
        if self.bias == "heads mixed":
            mixed = self.op("MatMul", self.op("Transpose", each, perm=[0, 2, 3, 1]), "mixture")
            return self.op("Transpose", mixed, perm=[0, 3, 1, 2])
        kernel = self.tables()["mixture"].T[..., None, None]
        return self.op("Conv", each, self.const(kernel), kernel_shape=[1, 1])

    def _frontier(self, keys: str, queries: str) -> str:
        """Bool (L, S): true where key j <= query i."""
        return self.op("Not", self.op("Less", self.unsqueeze(self._range(queries), 1), self._range(keys)))

    def _range(self, length: str) -> str:
        axes = {} if self.opset >= 13 else {"axes": [0]}
        end = self.op("Squeeze", length, *([] if axes else [self.ints(0)]), **axes)
        return self.op("Range", self.const(0, np.int64), end, self.const(1, np.int64))

    def _masked(self, scores: str, keep: str) -> str:
        lowest = -np.inf if self.mask == "minus infinity" else np.finfo(self.dtype).min / 4
        if self.mask == "added":
            kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
            left_out = self.op("Cast", self.op("Not", keep), to=kind)
            return self.op("Add", scores, self.op("Mul", left_out, self.const(lowest)))
        return self.op("Where", keep, scores, self.const(lowest))

    def _softmax(self, scores: str) -> str:
        last = -1 if self.opset >= 13 else self.rank - 1
        if self.spelling == "Softmax":
            if self.layout == "turned" and self.opset >= 13:
                turned = self.op("Softmax", self.op("Transpose", scores, perm=[0, 1, 3, 2]), axis=2)
                return self.op("Transpose", turned, perm=[0, 1, 3, 2])
            return self.op("Softmax", scores, axis=last)
        if self.spelling == "LogSoftmax":
            return self.op("Exp", self.op("LogSoftmax", scores, axis=last))
        if self.spelling == "Exp steady":
            scores = self.op("Sub", scores, self.most(scores))
        exponents = self.op("Exp", scores)
        return self.op("Div", exponents, self.total(exponents))

    @property
    def rank(self) -> int:
        return {"3-D": 3, "3-D head-major": 3, "5-D": 5, "einsum grouped": 5}.get(self.layout, 4)

    def _guarded(self, weights: str, kept: list[str]) -> str:  # noqa: C901, PLR0911 - one guard after the other
        guard = self.guard
        if guard == "identity":
            return self.op("Identity", weights)
        if guard == "dropout":
            return self.op("Dropout", weights)
        if guard == "cast":
            kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
            return self.op("Cast", self.op("Cast", weights, to=onnx.TensorProto.DOUBLE), to=kind)
        if guard == "not a number":
            return self.op("Where", self.op("IsNaN", weights), self.const(0.0), weights)
        if guard == "sink":
            return self.op("Slice", weights, self.ints(0), self.ints(-1), self.ints(-1))
        if guard == "quantised":
            scale, zero = self.const(1 / 255, np.float32), self.const(0, np.uint8)
            return self.op("DequantizeLinear", self.op("QuantizeLinear", weights, scale, zero), scale, zero)
        if guard == "zeroed":
            for keep in kept:
                weights = self.op("Where", keep, weights, self.const(0.0))
        if guard in {"multiplied", "renormalised"}:
            for keep in kept:
                kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
                weights = self.op("Mul", weights, self.op("Cast", keep, to=kind))
        if guard == "renormalised":
            weights = self.op("Div", weights, self.op("Add", self.total(weights), self.const(1e-9)))
        return weights

    # The expected weights.

    def feeds(self, batch: int, queries: int, keys: int, seed: int = 1) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        keys = keys if self.cross or self.latent else queries

        def drawn(length: int, heads: int) -> Array:
            shape = (batch, heads, length, HEAD_DIM) if self.direct else (batch, length, WIDTH)
            return rng.normal(size=shape).astype(self.dtype)

        feeds: dict[str, Array] = {}
        if not self.latent:
            feeds["queries"] = drawn(queries, HEADS)
        if self.keys == "memory":
            feeds["memory"] = drawn(keys, self.kv_heads)
        if self.direct:
            feeds["values"] = drawn(keys, self.kv_heads)
        if self.mask != "none":
            keep = rng.random((batch, keys)) > 0.3
            keep[:, 0] = True
            if self.fully_masked:
                keep[-1] = False
            feeds["keep"] = keep
        return feeds

    def reference(self, feeds: dict[str, Array]) -> Array:
        """The weights, float64 (B, H, L, S), from the definition."""
        wide = {name: array.astype(np.float64) for name, array in {**self.tables(), **feeds}.items()}

        def split(features: Array, table: str, heads: int) -> Array:
            if not self.direct:
                batch, length, _ = features.shape
                features = (features @ wide[table]).reshape(batch, length, heads, HEAD_DIM).transpose(0, 2, 1, 3)
            return np.repeat(features, HEADS // heads, axis=1)

        key = split(wide[self.keys], "wk", self.kv_heads)
        query = wide["latents"] if self.latent else split(wide["queries"], "wq", HEADS)
        scores = query @ key.swapaxes(-1, -2) * self.factor
        length, keys = scores.shape[-2:]
        if self.disentangled:
            apart = np.arange(length)[:, None] - np.arange(keys) + _MOST
            # Scaled as far as the queries are, or their product.
            part = {"none": 1.0, "key": 1.0, "both": self.factor**0.5}.get(self.scale, self.factor)
            scores = scores + part * np.take_along_axis(query @ wide["distances"], apart[None, None], axis=-1)
        if self.mixed:
            scores = np.einsum("bhls,hg->bgls", scores, wide["mixture"])
        if self.bias == "relative":
            scores = scores + wide["bias"][..., :length, :keys]
        allowed = np.ones(scores.shape, bool)
        if self.mask != "none":
            allowed &= feeds["keep"][:, None, None]
        if self.causal:
            allowed &= np.tri(length, keys, dtype=bool)
        peak = np.where(allowed, scores, -np.inf).max(axis=-1, keepdims=True)
        exponents = np.where(allowed, np.exp(scores - np.where(np.isfinite(peak), peak, 0.0)), 0.0)
        sums = exponents.sum(axis=-1, keepdims=True)
        if self.guard == "sink":
            sums = sums + np.exp(wide["sink"] - np.where(np.isfinite(peak), peak, 0.0))
        weights = np.divide(exponents, sums, out=np.zeros_like(exponents), where=sums > 0)
        return np.einsum("bhls,hg->bgls", weights, wide["mixture"]) if self.mixed else weights


def into_bool(case: Decomposed, keep: str, into: Any) -> str:
    """A mask in another layout, by way of numbers: not every kernel moves bools."""
    return case.op("Cast", into(case.op("Cast", keep, to=onnx.TensorProto.FLOAT)), to=onnx.TensorProto.BOOL)
