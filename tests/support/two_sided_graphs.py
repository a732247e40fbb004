"""Small graphs with two sides: an encoder-decoder of texts, words over image patches, and the patches alone.

`weights` and `attended` are the definition in float64. They raise KeyError, and `table` ValueError, for a name that a
graph does not have.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]

WIDTH, HEADS = 16, 4
IMAGE, PATCH = (8, 12), 4
"""Pixels of an image, and of each side of a patch: 2 rows and 3 columns of patches."""


class _Writer:
    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Array] = {}

    def node(self, operator: str, inputs: str, output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs.split(), [output], **attributes))
        return output

    def constant(self, name: str, array: Array) -> str:
        self.constants[name] = array
        return name

    def matrix(self, name: str, *shape: int, scale: float = 0.4) -> str:
        return self.constant(name, (self.rng.normal(size=shape) * scale).astype(np.float32))

    def attend(self, name: str, queries: str, keys: str, mask: str = "") -> str:
        """Return queries plus their attention to the keys, with separate projections."""
        for part, source in (("q", queries), ("k", keys), ("v", keys)):
            self.node("MatMul", f"{source} {self.matrix(f'{name}.w{part}', WIDTH, WIDTH)}", f"{name}.{part}")
        inputs = [f"{name}.q", f"{name}.k", f"{name}.v", *([mask] if mask else [])]
        heads = {"q_num_heads": HEADS, "kv_num_heads": HEADS}
        self.nodes.append(helper.make_node("Attention", inputs, [f"{name}.o"], name=f"/{name}/Attention", **heads))
        return self.node("Add", f"{queries} {name}.o", f"{name}.sum")

    def keeping(self, mask: str, like: str, axis_of: str) -> str:
        """Return an integer mask (B, S) in the form that Attention requires, (B, 1, L, S)."""
        self.node("Cast", mask, f"{mask}.bool", to=TensorProto.BOOL)
        self.node("Unsqueeze", f"{mask}.bool {self.constant('axes.12', np.array([1, 2]))}", f"{mask}.rows")
        self.node("Shape", like, f"{mask}.b", start=0, end=1)
        self.node("Shape", axis_of, f"{mask}.l", start=1, end=2)
        self.node("Shape", mask, f"{mask}.s", start=1, end=2)
        self.node("Concat", f"{mask}.b {self.constant('one', np.array([1]))} {mask}.l {mask}.s", f"{mask}.to", axis=0)
        return self.node("Expand", f"{mask}.rows {mask}.to", f"{mask}.mask")

    def model(self, inputs: list[onnx.ValueInfoProto], output: str, shape: list[str | int]) -> onnx.ModelProto:
        self.node("Identity", output, "hidden")
        outputs = [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, shape)]
        tensors = [numpy_helper.from_array(array, name) for name, array in self.constants.items()]
        graph = helper.make_graph(self.nodes, "two_sided", inputs, outputs, tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def _ids(name: str, *shape: str | int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.INT64, list(shape))


def encoder_decoder(vocabulary: int, target_vocabulary: int = 0, seed: int = 5) -> onnx.ModelProto:
    """Self-attention over a source text, and a target text that attends to it. Only the source is masked.

    `target_vocabulary`: ids of the target; 0 for as many as those of the source.
    """
    write = _Writer(seed)
    write.matrix("source.words", vocabulary, WIDTH, scale=1.0)
    write.matrix("target.words", target_vocabulary or vocabulary, WIDTH, scale=1.0)
    write.node("Gather", "source.words input_ids", "source.embedded")
    write.node("Gather", "target.words decoder_input_ids", "target.embedded")
    write.node("Identity", "attention_mask", "own")
    write.node("Identity", "attention_mask", "crossing")
    encoded = write.attend(
        "encoder", "source.embedded", "source.embedded", write.keeping("own", "input_ids", "input_ids")
    )
    mask = write.keeping("crossing", "input_ids", "decoder_input_ids")
    decoded = write.attend("decoder.cross", "target.embedded", encoded, mask)
    inputs = [
        _ids("input_ids", "batch", "source_seq"),
        _ids("attention_mask", "batch", "source_seq"),
        _ids("decoder_input_ids", "batch", "seq"),
    ]
    return write.model(inputs, decoded, ["batch", "seq", WIDTH])


def words_over_patches(
    vocabulary: int, length: str | int = "seq", *, leading: int = 0, layers: int = 1, seed: int = 6
) -> onnx.ModelProto:
    """Self-attention of the patches of an image, and a text that attends to them.

    `length`: the text's axis, a symbol or a fixed size. `leading`: positions of no patch before the patches.
    """
    write = _Writer(seed)
    write.matrix("words", vocabulary, WIDTH, scale=1.0)
    write.node("Gather", "words input_ids", "text")
    write.matrix("cut", WIDTH, 3, PATCH, PATCH)
    write.node("Conv", "pixel_values cut", "cells", strides=[PATCH, PATCH], kernel_shape=[PATCH, PATCH])
    count = (IMAGE[0] // PATCH) * (IMAGE[1] // PATCH)
    write.node("Reshape", f"cells {write.constant('flat', np.array([0, WIDTH, count]))}", "columns")
    image = write.node("Transpose", "columns", "patches", perm=[0, 2, 1])
    if leading:
        write.matrix("class", 1, leading, WIDTH)
        write.node("Shape", "pixel_values", "rows", start=0, end=1)
        write.node("Concat", f"rows {write.constant('class.shape', np.array([leading, WIDTH]))}", "class.to", axis=0)
        write.node("Expand", "class class.to", "class.rows")
        image = write.node("Concat", "class.rows patches", "patches.all", axis=1)
    image = write.attend("vision", image, image)
    text = "text"
    for layer in range(layers):
        text = write.attend(f"text.{layer}.self", text, text)
        text = write.attend(f"text.{layer}.cross", text, image)
    inputs = [
        _ids("input_ids", "batch", length),
        helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, *IMAGE]),
    ]
    return write.model(inputs, text, ["batch", length, WIDTH])


def patches_alone(seed: int = 8) -> onnx.ModelProto:
    """Self-attention of the patches of an image behind one leading position, and an embedding of the image."""
    write = _Writer(seed)
    write.matrix("cut", WIDTH, 3, PATCH, PATCH)
    write.node("Conv", "pixel_values cut", "cells", strides=[PATCH, PATCH], kernel_shape=[PATCH, PATCH])
    count = (IMAGE[0] // PATCH) * (IMAGE[1] // PATCH)
    write.node("Reshape", f"cells {write.constant('flat', np.array([0, WIDTH, count]))}", "columns")
    write.node("Transpose", "columns", "patches", perm=[0, 2, 1])
    write.matrix("class", 1, 1, WIDTH)
    write.node("Shape", "pixel_values", "rows", start=0, end=1)
    write.node("Concat", f"rows {write.constant('class.shape', np.array([1, WIDTH]))}", "class.to", axis=0)
    write.node("Expand", "class class.to", "class.rows")
    write.node("Concat", "class.rows patches", "all", axis=1)
    seen = write.attend("vision", "all", "all")
    write.node("ReduceMean", f"{seen} {write.constant('axis.1', np.array([1]))}", "embedding", keepdims=0)
    pixels = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, *IMAGE])
    model = write.model([pixels], seen, ["batch", count + 1, WIDTH])
    model.graph.output.append(helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", WIDTH]))
    return model


def weights(model: onnx.ModelProto, name: str, queries: Array, keys: Array) -> Array:
    """Weights (H, L, S) of the site of that name, from the definition, for features (L, W) and (S, W).

    Raises KeyError if the model has no such site.
    """
    constants = {tensor.name: numpy_helper.to_array(tensor).astype(np.float64) for tensor in model.graph.initializer}

    def split(features: Array, part: str) -> Array:
        projected = features.astype(np.float64) @ constants[f"{name}.w{part}"]
        return projected.reshape(len(features), HEADS, WIDTH // HEADS).transpose(1, 0, 2)

    scores = split(queries, "q") @ split(keys, "k").transpose(0, 2, 1) * (WIDTH // HEADS) ** -0.5
    exponents = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponents / exponents.sum(axis=-1, keepdims=True)


def attended(model: onnx.ModelProto, name: str, queries: Array, keys: Array) -> Array:
    """The queries after the site of that name, (L, W)."""
    constants = {tensor.name: numpy_helper.to_array(tensor).astype(np.float64) for tensor in model.graph.initializer}
    values = (keys @ constants[f"{name}.wv"]).reshape(len(keys), HEADS, -1).transpose(1, 0, 2)
    taken = weights(model, name, queries, keys) @ values
    return queries + taken.transpose(1, 0, 2).reshape(len(queries), WIDTH)


def table(model: onnx.ModelProto, name: str) -> Array:
    """A constant of the model, float64."""
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    return numpy_helper.to_array(tensor).astype(np.float64)
