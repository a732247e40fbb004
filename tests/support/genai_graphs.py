"""Decoders as onnxruntime-genai's builder writes them, and their answers in float64.

Each layer is a `GroupQueryAttention` over a cache of keys and values. No field is checked; a wrong one fails, if at
all, where the graph is made or run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from cache_graphs import Answer
from microsoft_graphs import DOMAIN
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]

HEADS, KV_HEADS, HEAD_DIM, WIDTH, VOCABULARY, POSITIONS = 4, 2, 16, 32, 30, 64
BLOCK = 32
PARTS = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
PAST, TOTAL, NEW, SIZE = "past_sequence_length", "total_sequence_length", "sequence_length", "kv_cache_dim"


@dataclass(frozen=True, slots=True)
class GroupedDecoder:
    """Ids and a mask over past and new tokens to logits. Rotation is inside the operator, so there are no positions.

    `int4`: projections are MatMulNBits. `packed`: query, key and value are one input. `normed`: an RMS norm of each
    head between projection and operator, as in Qwen3, which needs them apart. `window`: how many keys a query attends
    to, with a cache of these alone, as in Gemma 2; 0: all.
    """

    layers: int = 2
    int4: bool = False
    packed: bool = False
    normed: bool = False
    window: int = 0
    tables: dict[str, Array] = field(default_factory=dict)
    quantized: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(13)
        self.tables["words"] = rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
        self.tables["norm"] = rng.uniform(0.5, 1.5, HEAD_DIM).astype(np.float32)
        angles = np.outer(np.arange(POSITIONS), 100.0 ** (-np.arange(HEAD_DIM // 2) * 2 / HEAD_DIM))
        self.tables.update(cos=np.cos(angles).astype(np.float32), sin=np.sin(angles).astype(np.float32))
        shapes = {f"{part}{layer}": (WIDTH, width) for layer in range(self.layers) for part, width in PARTS.items()}
        shapes |= {f"o{layer}": (HEADS * HEAD_DIM, WIDTH) for layer in range(self.layers)}
        for name, (rows, columns) in {**shapes, "head": (WIDTH, VOCABULARY)}.items():
            # Whole multiples of a scale, which four bits hold exactly.
            whole = rng.integers(-8, 8, (columns, rows))
            scales = rng.uniform(0.02, 0.08, (columns, rows // BLOCK)).astype(np.float32)
            self.tables[name] = (whole * np.repeat(scales, BLOCK, axis=1)).T.astype(np.float32)
            nibbles = (whole + 8).astype(np.uint8).reshape(columns, rows // BLOCK, BLOCK)
            self.quantized.update(
                {f"{name}_bits": nibbles[..., ::2] | nibbles[..., 1::2] << 4, f"{name}_scales": scales}
            )

    def model(self) -> onnx.ModelProto:
        """The graph."""
        node = helper.make_node
        nodes = [
            node("ReduceSum", ["attention_mask", "a1"], ["counts"], keepdims=0),
            node("Sub", ["counts", "i1"], ["ends64"]),
            node("Cast", ["ends64"], ["seqlens_k"], to=TensorProto.INT32),
            node("Shape", ["attention_mask"], ["sizes"]),
            node("Gather", ["sizes", "i1"], ["total64"]),
            node("Cast", ["total64"], ["total_seq_len"], to=TensorProto.INT32),
            node("Gather", ["words", "input_ids"], ["hidden0"]),
        ]
        inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch_size", NEW]),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch_size", TOTAL]),
        ]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch_size", NEW, VOCABULARY])]
        for layer in range(self.layers):
            nodes += self._layer(layer)
            for kind in ("key", "value"):
                for name, length, into in (
                    (f"past_key_values.{layer}.{kind}", PAST, inputs),
                    (f"present.{layer}.{kind}", TOTAL, outputs),
                ):
                    shape = ["batch_size", KV_HEADS, length, SIZE]
                    into.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        nodes.append(self._product(f"hidden{self.layers}", "head", "logits"))
        sizes = {f"{part}_apart": np.array([0, 0, -1, HEAD_DIM]) for part in "qk"}
        sizes |= {f"{part}_flat": np.array([0, 0, PARTS[part]]) for part in "qk"}
        constants = {**self.tables, **self.quantized, **sizes, "a1": np.array([1]), "i1": np.array(1)}
        if self.packed:
            for layer in range(self.layers):
                constants[f"qkv{layer}"] = np.concatenate([self.tables[f"{part}{layer}"] for part in PARTS], axis=1)
                for kept in ("bits", "scales"):
                    parts = [self.quantized[f"{part}{layer}_{kept}"] for part in PARTS]
                    constants[f"qkv{layer}_{kept}"] = np.concatenate(parts, axis=0)
        used = {name for each in nodes for name in each.input}
        initializers = [numpy_helper.from_array(array, name) for name, array in constants.items() if name in used]
        graph = helper.make_graph(nodes, "main_graph", inputs, outputs, initializers)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="onnxruntime-genai")

    def _product(self, value: str, table: str, to: str) -> onnx.NodeProto:
        if not self.int4:
            return helper.make_node("MatMul", [value, table], [to])
        width = sum(PARTS.values()) if table.startswith("qkv") else self.tables[table].shape[1]
        rows = WIDTH if table.startswith("qkv") else self.tables[table].shape[0]
        attributes = {"K": rows, "N": width, "bits": 4, "block_size": BLOCK}
        return helper.make_node(
            "MatMulNBits", [value, f"{table}_bits", f"{table}_scales"], [to], domain=DOMAIN, **attributes
        )

    def _layer(self, layer: int) -> list[onnx.NodeProto]:
        node, hidden = helper.make_node, f"hidden{layer}"
        nodes: list[onnx.NodeProto] = []
        if self.packed:
            nodes.append(self._product(hidden, f"qkv{layer}", f"packed{layer}"))
            operands = [f"packed{layer}", "", ""]
        else:
            nodes += [self._product(hidden, f"{part}{layer}", f"{part}_{layer}") for part in PARTS]
            operands = [f"{part}_{layer}" for part in PARTS]
            for at, part in enumerate("qk" if self.normed else ""):
                nodes += [
                    node("Reshape", [operands[at], f"{part}_apart"], [f"{part}_apart{layer}"]),
                    node(
                        "SimplifiedLayerNormalization",
                        [f"{part}_apart{layer}", "norm"],
                        [f"{part}_normed{layer}"],
                        axis=-1,
                        epsilon=1e-6,
                    ),
                    node("Reshape", [f"{part}_normed{layer}", f"{part}_flat"], [f"{part}_joined{layer}"]),
                ]
                operands[at] = f"{part}_joined{layer}"
        past = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
        attended = [f"attended{layer}", *(f"present.{layer}.{kind}" for kind in ("key", "value"))]
        attributes = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "do_rotary": 1, "scale": HEAD_DIM**-0.5}
        if self.window:
            attributes |= {"local_window_size": self.window, "sliding_window_cache": 1}
        return [
            *nodes,
            node(
                "GroupQueryAttention",
                [*operands, *past, "seqlens_k", "total_seq_len", "cos", "sin"],
                attended,
                name=f"/model/layers.{layer}/attn/GroupQueryAttention",
                domain=DOMAIN,
                **attributes,
            ),
            self._product(f"attended{layer}", f"o{layer}", f"projected{layer}"),
            node("Add", [hidden, f"projected{layer}"], [f"hidden{layer + 1}"]),
        ]

    def answer(self, ids: Array) -> Answer:
        """Return the answer for one sequence, in float64.

        Args:
            ids: (T,).
        """
        tables = {name: table.astype(np.float64) for name, table in self.tables.items()}
        hidden, length = tables["words"][ids], len(ids)
        every: list[Array] = []
        presents: dict[str, Array] = {}
        for layer in range(self.layers):
            flat = [hidden @ tables[f"{part}{layer}"] for part in PARTS]
            query, key, value = (each.reshape(length, -1, HEAD_DIM).transpose(1, 0, 2) for each in flat)
            if self.normed:
                query, key = (
                    each / np.sqrt((each**2).mean(-1, keepdims=True) + 1e-6) * tables["norm"] for each in (query, key)
                )
            query, key = self._rotated(query), self._rotated(key)
            presents |= {f"present.{layer}.key": key, f"present.{layer}.value": value}
            groups = HEADS // KV_HEADS
            scores = query @ np.repeat(key, groups, axis=0).transpose(0, 2, 1) * HEAD_DIM**-0.5
            far = np.subtract.outer(np.arange(length), np.arange(length))
            scores = np.where((far >= 0) & (far < (self.window or length)), scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            every.append(weights)
            context = weights @ np.repeat(value, groups, axis=0)
            hidden = hidden + context.transpose(1, 0, 2).reshape(length, -1) @ tables[f"o{layer}"]
        return Answer(hidden @ tables["head"], every, presents)

    def _rotated(self, heads: Array) -> Array:
        """Rotate pairs of a head's two halves by the angle of their position. Source: Su et al. 2021, eq. 34."""
        cos, sin = (self.tables[name].astype(np.float64)[: heads.shape[1]] for name in ("cos", "sin"))
        first, second = np.split(heads, 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
