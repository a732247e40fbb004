"""Hand-made graphs of linear attention, spelled in many ways, and its weights in float64 from the definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]

WIDTH, HEADS = 16, 4
HEAD_DIM = WIDTH // HEADS
SPELLINGS = (
    "matmul",
    "matmul-transposed-sum",
    "matmul-guarded",
    "matmul-queries-divided",
    "matmul-inverse",
    "matmul-reduced",
    "matmul-one-head",
    "einsum",
    "einsum-ellipsis",
    "einsum-heads-last",
    "einsum-of-three",
)
LOOK_ALIKES = (
    "no-divisor",
    "divided-by-a-constant",
    "divided-by-its-norm",
    "other-keys-summed",
    "summed-over-features",
)


def linear_graph(spelling: str, opset: int = 17, dtype: type = np.float32) -> onnx.ModelProto:
    """Inputs `frames` (B, T, W) and `attention_mask` (B, T); output `attended`, the site's with its heads joined.

    `spelling`: one of `SPELLINGS`, or of `LOOK_ALIKES`, which are similar and no attention. It is not checked.
    """
    return _Spelled(spelling, opset, dtype).model()


class _Spelled:
    """A graph under construction. The layout of heads: (B, H, T, D), (B, T, H, D) or, of one head, (B, T, D)."""

    def __init__(self, spelling: str, opset: int, dtype: type) -> None:
        self.spelling, self.opset, self.dtype = spelling, opset, dtype
        self.kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self.one_head = spelling == "matmul-one-head"
        self.heads_last = spelling in {"einsum-heads-last", "einsum-of-three"}
        self.rank = 3 if self.one_head else 4
        self.nodes: list[onnx.NodeProto] = []
        rng = np.random.default_rng(3)
        self.constants = {f"w{part}": (rng.normal(size=(WIDTH, WIDTH)) * 0.4).astype(dtype) for part in "qkv"}
        for name, number in (("one", 1), ("two", 2), ("tiny", 1e-6)):
            self.constants[name] = np.array(number, dtype)

    def ints(self, name: str, *numbers: int) -> str:
        self.constants[name] = np.array(numbers, np.int64)
        return name

    def node(self, operator: str, *inputs: str, to: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(operator, list(inputs), [to], **attributes))
        return to

    def cast(self, value: str, to: str) -> str:
        self.nodes.append(helper.make_node("Cast", [value], [to], to=self.kind))
        return to

    def over(self, operator: str, value: str, axis: int, to: str, *, keep: int = 1) -> str:
        """A reduction or Unsqueeze over one axis: an attribute before opset 13, an input from there."""
        more = {"keepdims": keep} if operator == "ReduceSum" else {}
        if self.opset < 13:
            return self.node(operator, value, to=to, axes=[axis], **more)
        return self.node(operator, value, self.ints(f"{to}.axes", axis), to=to, **more)

    def model(self) -> onnx.ModelProto:
        query, key, value = self.features("q"), self.features("k"), self.split("v")
        kept = self.over("Unsqueeze", self.cast("attention_mask", "mask"), 2, "mask3")
        if not self.one_head:
            kept = self.over("Unsqueeze", kept, 3 if self.heads_last else 1, "mask4")
        key = self.node("Mul", key, kept, to="k.kept")
        attend = self.by_einsum if self.spelling.startswith("einsum") else self.by_matmul
        out = attend(query, key, value)
        if not self.one_head:
            joined = out if self.heads_last else self.node("Transpose", out, to="joined", perm=[0, 2, 1, 3])
            out = self.node("Reshape", joined, self.ints("join", 0, 0, WIDTH), to="flat")
        self.node("Identity", out, to="attended")
        info = helper.make_tensor_value_info
        inputs = [
            info("frames", self.kind, ["batch", "seq", WIDTH]),
            info("attention_mask", onnx.TensorProto.INT64, ["batch", "seq"]),
        ]
        outputs = [info("attended", self.kind, ["batch", "seq", WIDTH])]
        initializers = [numpy_helper.from_array(array, name) for name, array in self.constants.items()]
        graph = helper.make_graph(self.nodes, "linear", inputs, outputs, initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=7)
        return onnx.shape_inference.infer_shapes(model)

    def split(self, part: str) -> str:
        flat = self.node("MatMul", "frames", f"w{part}", to=f"{part}.flat")
        if self.one_head:
            return flat
        cut = self.node("Reshape", flat, self.ints("split", 0, 0, HEADS, HEAD_DIM), to=f"{part}.cut")
        return cut if self.heads_last else self.node("Transpose", cut, to=f"{part}.heads", perm=[0, 2, 1, 3])

    def features(self, part: str) -> str:
        return self.node("Add", self.node("Elu", self.split(part), to=f"{part}.elu"), "one", to=f"{part}.features")

    def by_einsum(self, query: str, key: str, value: str) -> str:
        if self.heads_last:
            summary = self.node("Einsum", key, value, to="summary", equation="bshd,bshm->bhmd")
            total = self.over("ReduceSum", key, 1, "total", keep=0)
            divisor = self.node("Einsum", query, total, to="divisor", equation="blhd,bhd->blh")
        else:
            shared = "..." if self.spelling == "einsum-ellipsis" else "bh"
            summary = self.node("Einsum", key, value, to="summary", equation=f"{shared}sd,{shared}sm->{shared}dm")
            total = self.node("Einsum", key, to="total", equation="bhsd->bhd")
            divisor = self.node("Einsum", query, total, to="divisor", equation="bhld,bhd->bhl")
        if self.spelling == "einsum-of-three":
            inverse = self.node("Div", "one", self.node("Add", divisor, "tiny", to="guarded"), to="inverse")
            return self.node("Einsum", query, summary, inverse, to="own", equation="blhd,bhmd,blh->blhm")
        letters = "blhd,bhmd->blhm" if self.heads_last else f"{shared}ld,{shared}dm->{shared}lm"
        product = self.node("Einsum", query, summary, to="product", equation=letters)
        return self.node("Div", product, self.over("Unsqueeze", divisor, 3, "column"), to="own")

    def by_matmul(self, query: str, key: str, value: str) -> str:
        summary = self.node("MatMul", self.swapped(key, "turned"), value, to="summary")
        divisor = self.divisor(query, key)
        if self.spelling == "matmul-queries-divided":
            return self.node("MatMul", self.node("Div", query, divisor, to="shares"), summary, to="own")
        product = self.node("MatMul", query, summary, to="product")
        if self.spelling == "no-divisor":
            return product
        if self.spelling == "divided-by-a-constant":
            return self.node("Div", product, "two", to="own")
        if self.spelling == "matmul-inverse":
            return self.node("Mul", self.node("Reciprocal", divisor, to="inverse"), product, to="own")
        return self.node("Div", product, divisor, to="own")

    def divisor(self, query: str, key: str) -> str:
        last = self.rank - 1
        if self.spelling in {"matmul-reduced", "summed-over-features", "divided-by-its-norm"}:
            row = {
                "matmul-reduced": lambda: self.over("ReduceSum", key, last - 1, "total"),
                "summed-over-features": lambda: self.over("ReduceSum", key, last, "total"),
                "divided-by-its-norm": lambda: query,
            }[self.spelling]()
            return self.over("ReduceSum", self.node("Mul", query, row, to="products"), last, "divisor")
        if self.spelling == "other-keys-summed":
            key = self.node("Mul", key, "two", to="other")
        if self.spelling == "matmul-transposed-sum":
            total = self.over("ReduceSum", self.swapped(key, "turned.again"), last, "total")
        else:
            total = self.swapped(self.over("ReduceSum", key, last - 1, "total.row"), "total")
        divisor = self.node("MatMul", query, total, to="divisor")
        return self.node("Max", divisor, "tiny", to="guarded") if self.spelling == "matmul-guarded" else divisor

    def swapped(self, value: str, to: str) -> str:
        return self.node("Transpose", value, to=to, perm=[*range(self.rank - 2), self.rank - 1, self.rank - 2])


def implied_weights(model: onnx.ModelProto, frames: Array, mask: Array, *, heads: int = HEADS) -> Array:
    """A[i, j] = phi(q_i) . phi(k_j) / sum over j' of phi(q_i) . phi(k_j'), float64 (B, H, T, T), pair by pair."""
    constants = {tensor.name: numpy_helper.to_array(tensor).astype(np.float64) for tensor in model.graph.initializer}

    def features(part: str) -> Array:
        flat = frames.astype(np.float64) @ constants[f"w{part}"]
        cut = flat.reshape(*flat.shape[:2], heads, -1).transpose(0, 2, 1, 3)
        return np.where(cut > 0, cut + 1, np.exp(cut))

    query, key = features("q"), features("k")
    batch, length = mask.shape
    weights = np.zeros((batch, heads, length, length))
    for row, head, at in np.ndindex(batch, heads, length):
        products = np.array([key[row, head, j] @ query[row, head, at] * mask[row, j] for j in range(length)])
        weights[row, head, at] = products / products.sum()
    return weights
