"""A decoder with a cache in plain ONNX nodes, both of its graphs tapped, with its manifest and a float64 reference.

The prompt graph runs a whole sequence. The continuing graph runs new positions after a past: the keys and values of
earlier ones. A tap is an output with a layer's attention weights, for the rows that its input lists. A position of
`MAX_LENGTH` or more raises IndexError in `reference`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from attnserve_server.engine.golden import GOLDEN_FILE, answers, write_golden
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.model.manifest import (
    AxisSpec,
    GoldenSpec,
    InputRole,
    InputSpec,
    Manifest,
    OutputSpec,
    SiteSpec,
    TextSpec,
)
from attnserve_server.model.past import PAST_FILE, CacheSpec, PastSpec
from attnserve_server.model.repository import UNSEALED
from made_by_hand import CHECK, PROVENANCE, proved
from onnx import TensorProto, helper, numpy_helper
from tiny_bundle import VOCABULARY, tiny_tokenizer

Array = np.ndarray[Any, np.dtype[Any]]

HEADS, KV_HEADS, HEAD_DIM, LAYERS, MAX_LENGTH = 4, 2, 4, 2, 24
WIDTH = HEADS * HEAD_DIM
PRESENTS = tuple(f"present.{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value"))
PASTS = tuple(name.replace("present", "past_key_values") for name in PRESENTS)
_HIDDEN = np.float32(-1e9)


def tables() -> dict[str, Array]:
    """Embeddings of words and places, and the projections of each layer, float32."""
    rng = np.random.default_rng(13)
    made = {"words": (len(VOCABULARY), WIDTH), "places": (MAX_LENGTH, WIDTH)}
    for layer in range(LAYERS):
        made |= {f"q{layer}": (WIDTH, WIDTH), f"o{layer}": (WIDTH, WIDTH)}
        made |= {f"{part}{layer}": (WIDTH, KV_HEADS * HEAD_DIM) for part in "kv"}
    return {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in made.items()}


def graph(*, past: bool, taps: bool = True) -> onnx.ModelProto:
    """The prompt graph, or with `past` the continuing graph; tapped unless `taps` is false.

    Ids and places (B, T), a mask (B, P + T) and, with `past`, a cache of each layer (B, KV, P, D) become logits
    (B, T, V) and the presents (B, KV, P + T, D).
    """
    node = helper.make_node
    total = "past+seq" if past else "seq"
    constants: dict[str, Array] = {
        **tables(),
        "zero": np.array(0, np.int64),
        "one": np.array(1, np.int64),
        "one_float": np.array(1, np.float32),
        "huge": np.array(-_HIDDEN, np.float32),
        "hidden": np.array(_HIDDEN, np.float32),
        "none": np.array(0, np.float32),
        "middle": np.array([1, 2], np.int64),
        "last": np.array([1], np.int64),
        "split_q": np.array([0, 0, HEADS, HEAD_DIM], np.int64),
        "split_kv": np.array([0, 0, KV_HEADS, HEAD_DIM], np.int64),
        "join": np.array([0, 0, WIDTH], np.int64),
        "groups": np.repeat(np.arange(KV_HEADS), HEADS // KV_HEADS).astype(np.int64),
        "scale": np.array(HEAD_DIM**-0.5, np.float32),
    }
    nodes = [
        node("Gather", ["words", "input_ids"], ["word"]),
        node("Gather", ["places", "position_ids"], ["place"]),
        node("Add", ["word", "place"], ["hidden0"]),
        node("Cast", ["attention_mask"], ["seen"], to=TensorProto.FLOAT),
        node("Sub", ["seen", "one_float"], ["unseen"]),
        node("Mul", ["unseen", "huge"], ["bias2"]),
        node("Unsqueeze", ["bias2", "middle"], ["bias4"]),
        node("Shape", ["attention_mask"], ["total1"], start=1, end=2),
        node("Shape", ["input_ids"], ["new1"], start=1, end=2),
        node("Squeeze", ["total1"], ["total"]),
        node("Squeeze", ["new1"], ["new"]),
        node("Sub", ["total", "new"], ["before"]),
        node("Range", ["before", "total", "one"], ["rows"]),
        node("Range", ["zero", "total", "one"], ["columns"]),
        node("Unsqueeze", ["rows", "last"], ["rows2"]),
        node("LessOrEqual", ["columns", "rows2"], ["allowed"]),
        node("Where", ["allowed", "none", "hidden"], ["triangle"]),
        node("Add", ["bias4", "triangle"], ["bias"]),
    ]

    def attend(query: str, key: str, bias: str, prefix: str, to: str) -> None:
        nodes.extend(
            [
                node("Gather", [key, "groups"], [f"{prefix}k"], axis=1),
                node("Transpose", [f"{prefix}k"], [f"{prefix}kt"], perm=[0, 1, 3, 2]),
                node("MatMul", [query, f"{prefix}kt"], [f"{prefix}raw"]),
                node("Mul", [f"{prefix}raw", "scale"], [f"{prefix}scaled"]),
                node("Add", [f"{prefix}scaled", bias], [f"{prefix}scores"]),
                node("Softmax", [f"{prefix}scores"], [to], axis=-1),
            ]
        )

    for layer in range(LAYERS):
        hidden = f"hidden{layer}"
        for part, split in (("q", "split_q"), ("k", "split_kv"), ("v", "split_kv")):
            nodes += [
                node("MatMul", [hidden, f"{part}{layer}"], [f"flat_{part}{layer}"]),
                node("Reshape", [f"flat_{part}{layer}", split], [f"cut_{part}{layer}"]),
                node("Transpose", [f"cut_{part}{layer}"], [f"new_{part}{layer}"], perm=[0, 2, 1, 3]),
            ]
        for part, name in (("k", "key"), ("v", "value")):
            present, new = f"present.{layer}.{name}", f"new_{part}{layer}"
            joined = [f"past_key_values.{layer}.{name}", new] if past else [new]
            nodes.append(node("Concat", joined, [present], axis=2))
        attend(f"new_q{layer}", f"present.{layer}.key", "bias", f"a{layer}", f"p{layer}")
        nodes += [
            node("Gather", [f"present.{layer}.value", "groups"], [f"v_all{layer}"], axis=1),
            node("MatMul", [f"p{layer}", f"v_all{layer}"], [f"context{layer}"]),
            node("Transpose", [f"context{layer}"], [f"turned{layer}"], perm=[0, 2, 1, 3]),
            node("Reshape", [f"turned{layer}", "join"], [f"joined{layer}"]),
            node("MatMul", [f"joined{layer}", f"o{layer}"], [f"out{layer}"]),
            node("Add", [hidden, f"out{layer}"], [f"hidden{layer + 1}"]),
        ]
        if not taps:
            continue
        items = f"attention_items.layer{layer}"
        nodes += [
            node("Gather", [f"new_q{layer}", items], [f"tq{layer}"]),
            node("Gather", [f"present.{layer}.key", items], [f"tk{layer}"]),
            node("Gather", ["bias", items], [f"tb{layer}"]),
        ]
        attend(f"tq{layer}", f"tk{layer}", f"tb{layer}", f"t{layer}", f"attention.layer{layer}")
    nodes += [
        node("Transpose", ["words"], ["turned_words"], perm=[1, 0]),
        node("MatMul", [f"hidden{LAYERS}", "turned_words"], ["logits"]),
    ]
    info = helper.make_tensor_value_info
    cached = [info(name, TensorProto.FLOAT, ["batch", KV_HEADS, "past", HEAD_DIM]) for name in PASTS if past]
    inputs = [
        info("input_ids", TensorProto.INT64, ["batch", "seq"]),
        info("attention_mask", TensorProto.INT64, ["batch", total]),
        info("position_ids", TensorProto.INT64, ["batch", "seq"]),
        *cached,
        *(info(f"attention_items.layer{layer}", TensorProto.INT64, [f"n{layer}"]) for layer in range(LAYERS) if taps),
    ]
    outputs = [
        info("logits", TensorProto.FLOAT, ["batch", "seq", len(VOCABULARY)]),
        *(info(name, TensorProto.FLOAT, ["batch", KV_HEADS, total, HEAD_DIM]) for name in PRESENTS),
        *(
            info(f"attention.layer{layer}", TensorProto.FLOAT, [f"n{layer}", HEADS, "seq", total])
            for layer in range(LAYERS)
            if taps
        ),
    ]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    made = helper.make_graph(nodes, "decoder", inputs, outputs, initializers)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def manifest(name: str = "decoder", *, batched: bool = True, padded: bool = False, text: bool = False) -> Manifest:
    """The manifest of both graphs. Its certificates are made by hand: each graph hides padding behind its mask.

    Args:
        name: the model's name.
        batched: whether sequences with a past share runs.
        padded: whether those of different new lengths do.
        text: whether it takes text.
    """
    presents = tuple(
        OutputSpec(name=one, dtype="float32", shape=(KV_HEADS, "seq", HEAD_DIM), on_request=True) for one in PRESENTS
    )
    logits = OutputSpec(name="logits", dtype="float32", shape=("seq", len(VOCABULARY)))
    ids = InputSpec(name="input_ids", dtype="int64", shape=("seq",), role=InputRole.TOKEN_IDS)
    mask = InputSpec(name="attention_mask", dtype="int64", shape=("seq",), role=InputRole.ATTENTION_MASK, fill=1)
    places = InputSpec(name="position_ids", dtype="int64", shape=("seq",), role=InputRole.POSITION_IDS)
    past = PastSpec(
        axis="past",
        follows="seq",
        key_axis="past+seq",
        caches=tuple(
            CacheSpec(input=InputSpec(name=one, dtype="float32", shape=(KV_HEADS, "past", HEAD_DIM)), present=continued)
            for one, continued in zip(PASTS, PRESENTS, strict=True)
        ),
        inputs=(ids, mask.model_copy(update={"shape": ("past+seq",)}), places),
        outputs=(
            logits,
            *(one.model_copy(update={"shape": (KV_HEADS, "past+seq", HEAD_DIM)}) for one in presents),
        ),
        certificate=proved("seq") if batched else None,
        batched=batched,
        paddable=padded,
    )
    return Manifest(
        name=name,
        version="1",
        digest=UNSEALED,
        files={},
        precision="fp32",
        max_batch_size=8,
        axes=(AxisSpec(symbol="seq", max_length=MAX_LENGTH, paddable=True),),
        inputs=(ids, mask, places),
        outputs=(logits, *presents),
        sites=tuple(
            SiteSpec(
                name=f"layer{layer}",
                layer=layer,
                kind="causal",
                form="dense",
                operator="Softmax",
                heads=HEADS,
                kv_heads=KV_HEADS,
                head_dim=HEAD_DIM,
                query_axis="seq",
                key_axis="seq",
                items_input=f"attention_items.layer{layer}",
                weights_output=f"attention.layer{layer}",
            )
            for layer in range(LAYERS)
        ),
        vocabulary_size=len(VOCABULARY),
        text=TextSpec(axis="seq", max_tokens=MAX_LENGTH) if text else None,
        provenance=PROVENANCE,
        check=CHECK,
        certificate=proved("seq"),
        past=past,
    )


def write_files(folder: Path) -> dict[str, Path]:
    """Both graphs and a tokenizer, by their names in a bundle."""
    onnx.save(graph(past=False), folder / "model.onnx")
    onnx.save(graph(past=True), folder / PAST_FILE)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    return {name: folder / name for name in ("model.onnx", PAST_FILE, "tokenizer.json")}


@dataclass(frozen=True, slots=True)
class Answer:
    """The reference's answer to one sequence: logits (T, V), weights (H, T, P + T) of each layer, and the presents."""

    logits: Array
    weights: tuple[Array, ...]
    presents: dict[str, Array]

    @property
    def pasts(self) -> dict[str, Array]:
        """The presents as the cache inputs of the next sequence, float32 as a caller sends them."""
        return {name: self.presents[present].astype(np.float32) for name, present in zip(PASTS, PRESENTS, strict=True)}

    def first(self, count: int) -> Answer:
        """The same with the presents of the first positions alone."""
        return replace(self, presents={name: value[:, :count] for name, value in self.presents.items()})


def reference(
    ids: list[int], past: dict[str, Array] | None = None, *, mask: list[int] | None = None, places: Array | None = None
) -> Answer:
    """Answer one sequence from the definition, in float64.

    Args:
        ids: T token ids.
        past: each cache input, (KV, P, D); None: empty.
        mask: 0 for hidden positions, P + T of them; None: none is hidden.
        places: index of each new position; None: P to P + T - 1.
    """
    wide = {name: value.astype(np.float64) for name, value in tables().items()}
    before = 0 if past is None else next(iter(past.values())).shape[1]
    new, total = len(ids), before + len(ids)
    seen = np.ones(total) if mask is None else np.array(mask, np.float64)
    places = np.arange(before, total) if places is None else places
    allowed = np.arange(total)[None, :] <= before + np.arange(new)[:, None]
    bias = np.where(allowed, 0.0, float(_HIDDEN)) + (1 - seen) * float(_HIDDEN)
    hidden = wide["words"][ids] + wide["places"][places]
    weights, presents = [], {}
    for layer in range(LAYERS):

        def split(part: str, heads: int, hidden: Array = hidden, layer: int = layer) -> Array:
            return (hidden @ wide[f"{part}{layer}"]).reshape(new, heads, HEAD_DIM).transpose(1, 0, 2)

        joined = {}
        for part, name in (("k", "key"), ("v", "value")):
            old = [] if past is None else [past[f"past_key_values.{layer}.{name}"].astype(np.float64)]
            joined[part] = presents[f"present.{layer}.{name}"] = np.concatenate([*old, split(part, KV_HEADS)], axis=1)
        keys, values = (np.repeat(joined[part], HEADS // KV_HEADS, axis=0) for part in "kv")
        scores = split("q", HEADS) @ keys.transpose(0, 2, 1) * HEAD_DIM**-0.5 + bias
        exponents = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights.append(exponents / exponents.sum(axis=-1, keepdims=True))
        context = (weights[-1] @ values).transpose(1, 0, 2).reshape(new, WIDTH)
        hidden = hidden + context @ wide[f"o{layer}"]
    return Answer(hidden @ wide["words"].T, tuple(weights), presents)


def with_golden(made: Manifest, files: dict[str, Path], folder: Path) -> tuple[Manifest, dict[str, Path]]:
    """Return the manifest with golden answers of both graphs, and the file that holds them."""
    golden = GoldenSpec(sequences=1, sample=4096, output_tolerance=1e-3, weight_tolerance=1e-3)
    assert made.past is not None
    made = made.model_copy(update={"golden": golden, "past": made.past.model_copy(update={"golden": golden})})
    ids = np.array([4, 9, 6], np.int64)
    prompt = {"input_ids": ids, "attention_mask": np.ones(3, np.int64), "position_ids": np.arange(3)}
    continued = {
        "input_ids": ids[:2],
        "attention_mask": np.ones(5, np.int64),
        "position_ids": np.array([3, 4]),
        **reference([4, 9, 6]).pasts,
    }
    answered = []
    for name, inputs, own in (("model.onnx", prompt, made), (PAST_FILE, continued, made.continuing)):
        assert own is not None
        session = RuntimeSession.load(files[name], provider="CPUExecutionProvider")
        answered.append(answers(session, own, [inputs]))
    path = folder / f"{made.name}.{GOLDEN_FILE}"
    write_golden(path, answered[0], made, answered[1])
    return made, {GOLDEN_FILE: path}
