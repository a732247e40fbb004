"""A tiny real model with taps: its graph, tokenizer and manifest, and a repository that holds it.

A tap is an output with a layer's attention weights, for the rows listed in a separate input. A bundle is a folder with
a model's files and their manifest; a repository is a folder of bundles. Writing a version again raises BundleInvalid.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from attnserve_server.conversion.rewrite.taps import add_means
from attnserve_server.model.manifest import (
    AxisSpec,
    CheckReport,
    InputRole,
    InputSpec,
    Manifest,
    OutputSpec,
    Provenance,
    SiteSpec,
    TextSpec,
)
from attnserve_server.model.repository import UNSEALED, write_bundle
from made_by_hand import proved
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "dog")
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS)
WIDTH, HEADS, LAYERS, MAX_LENGTH = 8, 2, 2, 32


def tiny_graph() -> onnx.ModelProto:
    """Two layers of masked self-attention with taps; outputs `hidden` (B, S, D) and `embedding` (B, D)."""
    random = np.random.default_rng(7)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def constant(name: str, value: object, dtype: type = np.int64) -> str:
        weights.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def matrix(name: str, *shape: int) -> str:
        weights.append(numpy_helper.from_array(random.normal(0, 0.5, shape).astype(np.float32), name))
        return name

    def node(operator: str, *inputs: str, to: str, **attributes: object) -> str:
        nodes.append(helper.make_node(operator, list(inputs), [to], **attributes))
        return to

    nodes.append(helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT))
    one = constant("one", 1.0, np.float32)
    node("Sub", "mask", one, to="absent")
    node("Mul", "absent", constant("huge", 1e9, np.float32), to="bias2")
    node("Unsqueeze", "bias2", constant("axes12", [1, 2]), to="bias")
    hidden = node("Gather", matrix("table", len(VOCABULARY), WIDTH), "input_ids", to="hidden0")
    split = constant("split", [0, 0, HEADS, WIDTH // HEADS])
    merge = constant("merge", [0, 0, WIDTH])
    scale = constant("scale", (WIDTH // HEADS) ** -0.5, np.float32)
    for layer in range(LAYERS):
        parts = {}
        for part in "qkv":
            flat = node("MatMul", hidden, matrix(f"w{part}{layer}", WIDTH, WIDTH), to=f"{part}flat{layer}")
            cut = node("Reshape", flat, split, to=f"{part}cut{layer}")
            parts[part] = node("Transpose", cut, to=f"{part}{layer}", perm=[0, 2, 1, 3])

        def attend(query: str, key: str, bias: str, prefix: str, to: str) -> str:
            turned = node("Transpose", key, to=f"{prefix}kt", perm=[0, 1, 3, 2])
            raw = node("MatMul", query, turned, to=f"{prefix}raw")
            scaled = node("Mul", raw, scale, to=f"{prefix}scaled")
            masked = node("Add", scaled, bias, to=f"{prefix}masked")
            return node("Softmax", masked, to=to, axis=-1)

        probabilities = attend(parts["q"], parts["k"], "bias", f"l{layer}", f"p{layer}")
        context = node("MatMul", probabilities, parts["v"], to=f"context{layer}")
        turned = node("Transpose", context, to=f"turned{layer}", perm=[0, 2, 1, 3])
        joined = node("Reshape", turned, merge, to=f"joined{layer}")
        hidden = node("Add", hidden, joined, to=f"hidden{layer + 1}")
        items = f"attention_items.layer{layer}"
        chosen = [node("Gather", parts[p], items, to=f"tap{layer}{p}", axis=0) for p in "qk"]
        bias = node("Gather", "bias", items, to=f"tap{layer}bias", axis=0)
        attend(*chosen, bias, f"t{layer}", f"attention.layer{layer}")
    node("Identity", hidden, to="hidden")
    node("Unsqueeze", "mask", constant("axis2", [2]), to="mask3")
    node("Mul", "hidden", "mask3", to="kept")
    node("ReduceSum", "kept", constant("axis1", [1]), to="total", keepdims=0)
    node("ReduceSum", "mask", constant("axis1b", [1]), to="count", keepdims=1)
    node("Div", "total", "count", to="embedding")
    ids = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "seq"])
        for name in ("input_ids", "attention_mask")
    ]
    taps = [
        helper.make_tensor_value_info(f"attention_items.layer{layer}", TensorProto.INT64, [f"items{layer}"])
        for layer in range(LAYERS)
    ]
    outputs = [
        helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["batch", "seq", WIDTH]),
        helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", WIDTH]),
        *(
            helper.make_tensor_value_info(
                f"attention.layer{layer}", TensorProto.FLOAT, [f"items{layer}", HEADS, "seq", "seq"]
            )
            for layer in range(LAYERS)
        ),
    ]
    graph = helper.make_graph(nodes, "tiny", ids + taps, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return _with_means(model)


def _with_means(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph with the mean over heads beside the weights of each tap."""
    graph = ir.from_proto(model)
    add_means(graph.graph, tiny_manifest().sites)
    changed = ir.to_proto(graph)
    onnx.checker.check_model(changed)
    return changed


def tiny_tokenizer() -> Tokenizer:
    """Words to ids, with [CLS] and [SEP] around them."""
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def tiny_manifest(name: str = "tiny", version: str = "1", *, text: bool = True) -> Manifest:
    """Return the manifest of the tiny model."""
    return Manifest(
        name=name,
        version=version,
        digest=UNSEALED,
        files={},
        precision="fp32",
        max_batch_size=8,
        axes=(AxisSpec(symbol="seq", max_length=MAX_LENGTH, paddable=True),),
        inputs=(
            InputSpec(name="input_ids", dtype="int64", shape=("seq",), role=InputRole.TOKEN_IDS),
            InputSpec(name="attention_mask", dtype="int64", shape=("seq",), role=InputRole.ATTENTION_MASK, fill=1),
        ),
        outputs=(
            OutputSpec(name="hidden", dtype="float32", shape=("seq", WIDTH)),
            OutputSpec(name="embedding", dtype="float32", shape=(WIDTH,)),
        ),
        sites=tuple(
            SiteSpec(
                name=f"layer{layer}",
                layer=layer,
                kind="self",
                form="dense",
                operator="Softmax",
                heads=HEADS,
                kv_heads=HEADS,
                head_dim=WIDTH // HEADS,
                query_axis="seq",
                key_axis="seq",
                items_input=f"attention_items.layer{layer}",
                weights_output=f"attention.layer{layer}",
                mean_output=f"attention_mean.layer{layer}",
            )
            for layer in range(LAYERS)
        ),
        vocabulary_size=len(VOCABULARY),
        text=TextSpec(axis="seq", max_tokens=MAX_LENGTH) if text else None,
        provenance=Provenance(source="tiny", exporter="onnx.helper", opset=18, created="2026-01-01T00:00:00Z"),
        check=CheckReport(
            against="itself",
            lengths=(4,),
            output_max_abs_error=0,
            output_tolerance=1e-4,
            weight_max_abs_error=0,
            weight_tolerance=1e-5,
            row_sum_max_abs_error=0,
        ),
        certificate=proved("seq"),
    )


def without_means(manifest: Manifest) -> Manifest:
    """Return the manifest as an earlier release wrote it: its taps return no means over heads."""
    sites = tuple(site.model_copy(update={"mean_output": None}) for site in manifest.sites)
    return manifest.model_copy(update={"sites": sites})


def graph_without_means(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph as an earlier release wrote it, without the nodes and outputs of means over heads."""
    old = onnx.ModelProto()
    old.CopyFrom(model)
    kept = [value for value in old.graph.output if not value.name.startswith("attention_mean.")]
    nodes = [node for node in old.graph.node if not node.name.startswith("attention_mean.")]
    for field, values in (("output", kept), ("node", nodes)):
        old.graph.ClearField(field)
        getattr(old.graph, field).extend(values)
    return old


def write_tiny_files(folder: Path) -> dict[str, Path]:
    """The tiny model's files, by their names in a bundle."""
    onnx.save(tiny_graph(), folder / "model.onnx")
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    return {"model.onnx": folder / "model.onnx", "tokenizer.json": folder / "tokenizer.json"}


def write_tiny_repository(root: Path, files: dict[str, Path]) -> Path:
    """Models `tiny`, versions 1 and 2, and `plain`, which takes tensors only."""
    write_bundle(root, tiny_manifest(), files)
    write_bundle(root, tiny_manifest(version="2"), files)
    write_bundle(root, tiny_manifest("plain", text=False), {"model.onnx": files["model.onnx"]})
    return root
