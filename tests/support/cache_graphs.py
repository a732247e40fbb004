"""Decoders with a cache (keys and values of earlier tokens), as optimum writes them, and their answers in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]

HEADS, HEAD_DIM, WIDTH, VOCABULARY, POSITIONS = 2, 4, 8, 30, 64
FOLDED = "batch_size x num_heads"
PAST, TOTAL, NEW = "past_sequence_length", "past_sequence_length + sequence_length", "sequence_length"


@dataclass(frozen=True, slots=True)
class Answer:
    """Logits (T, V), the weights of each layer (H, T, T), and keys and values (H, T, D) by the name of their output.

    Folded keys are (H, D, T).
    """

    logits: Array
    weights: list[Array]
    presents: dict[str, Array]


@dataclass(frozen=True, slots=True)
class CachedDecoder:
    """Ids, a mask over past and new tokens, positions and a cache to logits and the continued cache.

    `layers`: attention with a residual each; `total`: the symbol of the mask's axis. `form`: "apart" for Concat and
    MatMul, "operator" for `Attention` of ai.onnx with a past, "folded" for keys (B * H, D, S) and values (B * H, S, D),
    as BLOOM has them. `tables` is filled with random parameters, the same for each decoder of as many layers. No field
    is checked; a wrong one fails, if at all, where the graph is made or run.
    """

    layers: int = 2
    total: str = TOTAL
    form: Literal["apart", "operator", "folded"] = "apart"
    tables: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(11)
        shapes = {"words": (VOCABULARY, WIDTH), "places": (POSITIONS, WIDTH), "head": (WIDTH, VOCABULARY)}
        shapes |= {f"{part}{layer}": (WIDTH, WIDTH) for layer in range(self.layers) for part in "qkv"}
        for name, shape in shapes.items():
            self.tables[name] = (rng.normal(size=shape) * 0.5).astype(np.float32)

    def model(self) -> onnx.ModelProto:
        """The graph: causal, with masked keys at the lowest float, and Concat of past and new keys and values."""
        node = helper.make_node
        nodes = [
            node("Gather", ["words", "input_ids"], ["word"]),
            node("Gather", ["places", "position_ids"], ["place"]),
            node("Add", ["word", "place"], ["hidden0"]),
            node("Shape", ["input_ids"], ["sizes"]),
            node("Gather", ["sizes", "i0"], ["rows"]),
            node("Gather", ["sizes", "i1"], ["new"]),
            node("Shape", ["past_key_values.0.key"], ["past_sizes"]),
            # The first key of a layer has its positions on axis 2 in every form.
            node("Gather", ["past_sizes", "i2"], ["past"]),
            node("Add", ["past", "new"], ["total"]),
            # Query i attends to keys up to past + i, of those that the mask keeps.
            node("Range", ["past", "total", "i1"], ["queries"]),
            node("Range", ["i0", "total", "i1"], ["keys"]),
            node("Unsqueeze", ["queries", "a1"], ["query_column"]),
            node("LessOrEqual", ["keys", "query_column"], ["before"]),
            node("Cast", ["attention_mask"], ["kept"], to=TensorProto.BOOL),
            node("Unsqueeze", ["kept", "a12"], ["kept_keys"]),
            node("And", ["before", "kept_keys"], ["visible"]),
            node("Where", ["visible", "zero", "lowest"], ["bias"]),
            node("Unsqueeze", ["rows", "a0"], ["rows1"]),
            node("Unsqueeze", ["new", "a0"], ["new1"]),
            node("Concat", ["rows1", "new1", "heads1", "dim1"], ["split"], axis=0),
            node("Concat", ["rows1", "new1", "width1"], ["merged"], axis=0),
            node("Concat", ["rest1", "new1", "dim1"], ["fold"], axis=0),
            node("Concat", ["rest1", "dim1", "new1"], ["fold_key"], axis=0),
        ]
        inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch_size", NEW]),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch_size", self.total]),
            helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch_size", NEW]),
        ]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch_size", NEW, VOCABULARY])]
        for layer in range(self.layers):
            nodes += self._layer(layer)
            for kind in ("key", "value"):
                for name, length, into in (
                    (f"past_key_values.{layer}.{kind}", PAST, inputs),
                    (f"present.{layer}.{kind}", self.total, outputs),
                ):
                    shape = ["batch_size", HEADS, length, HEAD_DIM]
                    if self.form == "folded":
                        shape = [FOLDED, HEAD_DIM, length] if kind == "key" else [FOLDED, length, HEAD_DIM]
                    into.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        nodes.append(node("MatMul", [f"hidden{self.layers}", "head"], ["logits"]))
        constants = {
            **self.tables,
            **{f"i{number}": np.array(number) for number in range(3)},
            "a0": np.array([0]),
            "a1": np.array([1]),
            "a12": np.array([1, 2]),
            "heads1": np.array([HEADS]),
            "rest1": np.array([-1]),
            "heads": np.array([0, 0, HEADS, HEAD_DIM]),
            "dim1": np.array([HEAD_DIM]),
            "width1": np.array([WIDTH]),
            "zero": np.array(0, np.float32),
            "lowest": np.array(np.finfo(np.float32).min),
            "scale": np.array(HEAD_DIM**-0.5, np.float32),
        }
        initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
        graph = helper.make_graph(nodes, "decoder", inputs, outputs, initializers)
        opset = helper.make_opsetid("", 23 if self.form == "operator" else 18)
        return helper.make_model(graph, opset_imports=[opset], ir_version=10, producer_name="hand")

    def _layer(self, layer: int) -> list[onnx.NodeProto]:
        node, name = helper.make_node, f"/model/layers.{layer}/self_attn/"
        nodes: list[onnx.NodeProto] = []
        for part in "qkv":
            nodes += [
                node("MatMul", [f"hidden{layer}", f"{part}{layer}"], [f"flat_{part}{layer}"]),
                node(
                    "Reshape",
                    [f"flat_{part}{layer}", "heads" if self.form == "operator" else "split"],
                    [f"apart_{part}{layer}"],
                ),
                node("Transpose", [f"apart_{part}{layer}"], [f"{part}_{layer}"], perm=[0, 2, 1, 3]),
            ]
        if self.form == "operator":
            operands = [f"q_{layer}", f"k_{layer}", f"v_{layer}", "visible"]
            caches = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
            results = [f"context{layer}", f"present.{layer}.key", f"present.{layer}.value"]
            nodes.append(node("Attention", [*operands, *caches], results, name=f"{name}Attention"))
            return [*nodes, *self._added(layer)]
        if self.form == "folded":
            return [*nodes, *self._folded(layer), *self._added(layer)]
        for part, kind in (("k", "key"), ("v", "value")):
            joined = [f"past_key_values.{layer}.{kind}", f"{part}_{layer}"]
            nodes.append(node("Concat", joined, [f"present.{layer}.{kind}"], axis=-2))
        return [
            *nodes,
            node("Transpose", [f"present.{layer}.key"], [f"turned{layer}"], perm=[0, 1, 3, 2]),
            node("MatMul", [f"q_{layer}", f"turned{layer}"], [f"products{layer}"], name=f"{name}MatMul"),
            node("Mul", [f"products{layer}", "scale"], [f"scaled{layer}"]),
            node("Add", [f"scaled{layer}", "bias"], [f"scores{layer}"]),
            node("Softmax", [f"scores{layer}"], [f"weights{layer}"], axis=-1, name=f"{name}Softmax"),
            node("MatMul", [f"weights{layer}", f"present.{layer}.value"], [f"context{layer}"]),
            *self._added(layer),
        ]

    def _folded(self, layer: int) -> list[onnx.NodeProto]:
        """Attention over (B * H, ...)."""
        node = helper.make_node
        nodes = [
            node("Transpose", [f"k_{layer}"], [f"k_turned{layer}"], perm=[0, 1, 3, 2]),
            node("Reshape", [f"k_turned{layer}", "fold_key"], [f"k_folded{layer}"]),
            node("Reshape", [f"v_{layer}", "fold"], [f"v_folded{layer}"]),
            node("Reshape", [f"q_{layer}", "fold"], [f"q_folded{layer}"]),
        ]
        for part, kind, axis in (("k", "key", 2), ("v", "value", 1)):
            joined = [f"past_key_values.{layer}.{kind}", f"{part}_folded{layer}"]
            nodes.append(node("Concat", joined, [f"present.{layer}.{kind}"], axis=axis))
        return [
            *nodes,
            node("MatMul", [f"q_folded{layer}", f"present.{layer}.key"], [f"products{layer}"]),
            node("Unsqueeze", ["total", "a0"], [f"total1_{layer}"]),
            node("Concat", ["rows1", "heads1", "new1", f"total1_{layer}"], [f"square{layer}"], axis=0),
            node("Reshape", [f"products{layer}", f"square{layer}"], [f"open{layer}"]),
            node("Mul", [f"open{layer}", "scale"], [f"scaled{layer}"]),
            node("Add", [f"scaled{layer}", "bias"], [f"scores{layer}"]),
            node("Softmax", [f"scores{layer}"], [f"weights{layer}"], axis=-1),
            node("Shape", [f"products{layer}"], [f"flat{layer}"]),
            node("Reshape", [f"weights{layer}", f"flat{layer}"], [f"weights_folded{layer}"]),
            node("MatMul", [f"weights_folded{layer}", f"present.{layer}.value"], [f"context_folded{layer}"]),
            node("Concat", ["rows1", "heads1", "new1", "dim1"], [f"apart{layer}"], axis=0),
            node("Reshape", [f"context_folded{layer}", f"apart{layer}"], [f"context{layer}"]),
        ]

    def _added(self, layer: int) -> list[onnx.NodeProto]:
        """Join the heads of attention, and add it to the hidden states."""
        node = helper.make_node
        return [
            node("Transpose", [f"context{layer}"], [f"by_row{layer}"], perm=[0, 2, 1, 3]),
            node("Reshape", [f"by_row{layer}", "merged"], [f"attended{layer}"]),
            node("Add", [f"hidden{layer}", f"attended{layer}"], [f"hidden{layer + 1}"]),
        ]

    def answer(self, ids: Array, positions: Array | None = None, mask: Array | None = None) -> Answer:
        """Return the answer for one sequence, in float64.

        Args:
            ids: (T,).
            positions: (T,); None: from 0.
            mask: (T,), 1 for keys that count; None: all.
        """
        tables = {name: table.astype(np.float64) for name, table in self.tables.items()}
        length = len(ids)
        hidden = tables["words"][ids] + tables["places"][np.arange(length) if positions is None else positions]
        visible = np.tri(length, dtype=bool) & (np.ones(length) if mask is None else mask).astype(bool)
        every: list[Array] = []
        presents: dict[str, Array] = {}
        for layer in range(self.layers):
            flat = [hidden @ tables[f"{part}{layer}"] for part in "qkv"]
            query, key, value = (each.reshape(length, HEADS, HEAD_DIM).transpose(1, 0, 2) for each in flat)
            scores = np.where(visible, query @ key.transpose(0, 2, 1) * HEAD_DIM**-0.5, -1e30)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            kept = key.transpose(0, 2, 1) if self.form == "folded" else key
            presents |= {f"present.{layer}.key": kept, f"present.{layer}.value": value}
            every.append(weights)
            hidden = hidden + (weights @ value).transpose(1, 0, 2).reshape(length, WIDTH)
        return Answer(hidden @ tables["head"], every, presents)
