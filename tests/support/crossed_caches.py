"""Decoders that attend to an encoder's states and keep a cache of keys and values, as optimum writes them.

In one file with a branch for each kind of call (`merged`) or one file for each (`apart`); `answer` is in float64, and
raises IndexError for an id of `VOCABULARY` or more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]

HEADS, HEAD_DIM, WIDTH, VOCABULARY = 2, 4, 8, 30
NEW, PAST, TOTAL, SOURCE = "decoder_sequence_length", "past_decoder_sequence_length", "total", "encoder_sequence_length"
STATES = helper.make_tensor_value_info("encoder_hidden_states", TensorProto.FLOAT, ["batch_size", SOURCE, WIDTH])
KEPT = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")


@dataclass(frozen=True, slots=True)
class CrossedDecoder:
    """Ids, an encoder's states and their mask to logits: attention to earlier ids, then to the states."""

    tables: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(12)
        shapes = {"words": (VOCABULARY, WIDTH), "head": (WIDTH, VOCABULARY)}
        shapes |= {f"{side}_{part}": (WIDTH, WIDTH) for side in ("own", "cross") for part in "qkv"}
        for name, shape in shapes.items():
            self.tables[name] = (rng.normal(size=shape) * 0.5).astype(np.float32)

    def merged(self, *, cached_first: bool = True) -> onnx.ModelProto:
        """Return one file with both branches. `use_cache_branch` is the input that chooses.

        `cached_first`: whether its true takes the branch with a cache; else its false does.
        """
        branches = {}
        for cached in (True, False):
            prefix = "cached_" if cached else "whole_"
            nodes, outputs = self._nodes(prefix, cached=cached), []
            for name, shape in self._outputs(cached=cached).items():
                if cached and "encoder" in name:
                    # optimum's branch with a cache returns a constant in the place of the encoder's keys and values.
                    nodes.append(helper.make_node("Identity", ["nothing"], [prefix + name]))
                outputs.append(helper.make_tensor_value_info(prefix + name, TensorProto.FLOAT, shape))
            branches[cached] = helper.make_graph(nodes, prefix, [], outputs)
        then, otherwise = branches[cached_first], branches[not cached_first]
        outputs = self._outputs(cached=True)
        choice = helper.make_node("If", ["use_cache_branch"], list(outputs), then_branch=then, else_branch=otherwise)
        inputs = [
            *self._inputs(cached=True),
            STATES,
            helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1]),
        ]
        return self._model([choice], inputs, outputs)

    def apart(self, *, cached: bool) -> onnx.ModelProto:
        """Return one branch as a file. `cached`: the one that takes a cache; else the one that takes the states."""
        outputs = self._outputs(cached=cached)
        outputs = {name: shape for name, shape in outputs.items() if not cached or "encoder" not in name}
        nodes = self._nodes("", cached=cached)
        return self._model(nodes, [*self._inputs(cached=cached), *([] if cached else [STATES])], outputs)

    def _model(self, nodes: list[Any], inputs: list[Any], outputs: dict[str, list[str | int]]) -> onnx.ModelProto:
        constants = {
            **self.tables,
            **{f"i{number}": np.array(number) for number in range(3)},
            "a0": np.array([0]),
            "a1": np.array([1]),
            "a12": np.array([1, 2]),
            "split": np.array([0, 0, HEADS, HEAD_DIM]),
            "merge": np.array([0, 0, WIDTH]),
            "zero": np.array(0, np.float32),
            "lowest": np.array(np.finfo(np.float32).min),
            "scale": np.array(HEAD_DIM**-0.5, np.float32),
            "nothing": np.zeros((0, HEADS, 1, HEAD_DIM), np.float32),
        }
        graph = helper.make_graph(
            nodes,
            "decoder",
            inputs,
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
            [numpy_helper.from_array(array, name) for name, array in constants.items()],
        )
        opset = helper.make_opsetid("", 18)
        return helper.make_model(graph, opset_imports=[opset], ir_version=10, producer_name="hand")

    def _inputs(self, *, cached: bool) -> list[onnx.ValueInfoProto]:
        inputs = [
            helper.make_tensor_value_info("encoder_attention_mask", TensorProto.INT64, ["batch_size", SOURCE]),
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch_size", NEW]),
        ]
        for name in KEPT if cached else ():
            shape = ["batch_size", HEADS, PAST if "decoder" in name else SOURCE, HEAD_DIM]
            inputs.append(helper.make_tensor_value_info(f"past_key_values.0.{name}", TensorProto.FLOAT, shape))
        return inputs

    def _outputs(self, *, cached: bool) -> dict[str, list[str | int]]:
        outputs: dict[str, list[str | int]] = {"logits": ["batch_size", NEW, VOCABULARY]}
        total = TOTAL if cached else NEW
        for name in KEPT:
            outputs[f"present.0.{name}"] = ["batch_size", HEADS, total if "decoder" in name else SOURCE, HEAD_DIM]
        return outputs

    def _nodes(self, prefix: str, *, cached: bool) -> list[onnx.NodeProto]:
        nodes: list[onnx.NodeProto] = []

        def node(operator: str, *inputs: str, to: str, **attributes: Any) -> str:
            """Add a node, and return its output."""
            nodes.append(helper.make_node(operator, list(inputs), [prefix + to], **attributes))
            return prefix + to

        def heads(value: str, side: str, part: str, to: str) -> str:
            flat = node("MatMul", value, f"{side}_{part}", to=f"{side}_{part}_flat")
            return node(
                "Transpose", node("Reshape", flat, "split", to=f"{side}_{part}_apart"), to=to, perm=[0, 2, 1, 3]
            )

        def attended(side: str, query: str, key: str, value: str, bias: str, hidden: str) -> str:
            turned = node("Transpose", key, to=f"{side}_turned", perm=[0, 1, 3, 2])
            scaled = node("Mul", node("MatMul", query, turned, to=f"{side}_products"), "scale", to=f"{side}_scaled")
            weights = node("Softmax", node("Add", scaled, bias, to=f"{side}_scores"), to=f"{side}_weights", axis=-1)
            context = node("MatMul", weights, value, to=f"{side}_context")
            rows = node("Transpose", context, to=f"{side}_rows", perm=[0, 2, 1, 3])
            return node("Add", hidden, node("Reshape", rows, "merge", to=f"{side}_joined"), to=f"{side}_hidden")

        hidden = node("Gather", "words", "input_ids", to="word")
        new = node("Gather", node("Shape", "input_ids", to="sizes"), "i1", to="new")
        past = "i0"
        if cached:
            past = node("Gather", node("Shape", "past_key_values.0.decoder.key", to="past_sizes"), "i2", to="past")
        total = node("Add", past, new, to="total")
        queries = node("Unsqueeze", node("Range", past, total, "i1", to="queries"), "a1", to="query_column")
        before = node("LessOrEqual", node("Range", "i0", total, "i1", to="keys"), queries, to="before")
        causal = node("Where", before, "zero", "lowest", to="causal")
        key, value = "", ""
        for part, kind in (("k", "key"), ("v", "value")):
            made = heads(hidden, "own", part, f"own_{part}_heads" if cached else f"present.0.decoder.{kind}")
            if cached:
                made = node(
                    "Concat", f"past_key_values.0.decoder.{kind}", made, to=f"present.0.decoder.{kind}", axis=-2
                )
            key, value = (made, value) if part == "k" else (key, made)
        hidden = attended("own", heads(hidden, "own", "q", "own_q_heads"), key, value, causal, hidden)
        kept = node("Not", node("Equal", "encoder_attention_mask", "i0", to="hidden_keys"), to="kept")
        kept = node("Unsqueeze", kept, "a12", to="kept_keys")
        masked = node("Where", kept, "zero", "lowest", to="masked")
        if cached:
            key, value = (f"past_key_values.0.encoder.{kind}" for kind in ("key", "value"))
        else:
            key = heads("encoder_hidden_states", "cross", "k", "present.0.encoder.key")
            value = heads("encoder_hidden_states", "cross", "v", "present.0.encoder.value")
        hidden = attended("cross", heads(hidden, "cross", "q", "cross_q_heads"), key, value, masked, hidden)
        node("MatMul", hidden, "head", to="logits")
        return nodes

    def answer(self, ids: Array, states: Array, mask: Array) -> tuple[Array, list[Array], dict[str, Array]]:
        """Return logits (T, V), own and cross weights (H, T, keys), and keys and values by their output, in float64.

        Args:
            ids: (T,).
            states: of the encoder, (S, WIDTH).
            mask: (S,), 1 for states that count.
        """
        tables = {name: table.astype(np.float64) for name, table in self.tables.items()}
        hidden = tables["words"][ids]
        every: list[Array] = []
        presents: dict[str, Array] = {}
        for side, stack, visible in (
            ("own", "decoder", np.tri(len(ids), dtype=bool)),
            ("cross", "encoder", mask.astype(bool)[None]),
        ):
            source = hidden if side == "own" else states.astype(np.float64)
            flat = (hidden @ tables[f"{side}_q"], source @ tables[f"{side}_k"], source @ tables[f"{side}_v"])
            query, key, value = (each.reshape(-1, HEADS, HEAD_DIM).transpose(1, 0, 2) for each in flat)
            scores = np.where(visible, query @ key.transpose(0, 2, 1) * HEAD_DIM**-0.5, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            every.append(weights)
            presents |= {f"present.0.{stack}.key": key, f"present.0.{stack}.value": value}
            hidden = hidden + (weights @ value).transpose(1, 0, 2).reshape(len(ids), WIDTH)
        return hidden @ tables["head"], every, presents
