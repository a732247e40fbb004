"""Hand-written small graphs whose truth is easy to get wrong, with one operator, or one spelling, each.

All take `x` float32 (B, t, 8) and `attention_mask` int64 (B, t), and return `y`. `mixes` names the axes along which an
answer changes: with padding (`t`, `s`) or with other rows (`batch`). Nothing is claimed of other axes. `TRAPS` holds
the traps of the `mixing_traps_of_*` modules that are imported; `graph_of` raises KeyError for any other name.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import onnx
from attnserve_server.conversion.inputs.signature import Signature
from attnserve_server.model.manifest import BATCH, DerivedLength, InputRole, InputSpec, OutputSpec
from mixing_graphs import MixingGraph
from mixing_values import UNSAID
from mixing_writer import Writer
from onnx import TensorProto, helper

WIDTH = 8
Made = str | tuple[str, tuple[str | int, ...]]
"""The value of `y`: (B, t, 8), or of another shape without the batch."""


@dataclass(frozen=True, slots=True)
class Trap:
    """The body of a graph: from a writer, `x` and the mask to `y`."""

    body: Callable[[Writer, str, str], Made]
    mixes: tuple[str, ...]
    opset: int = 20
    derived: DerivedLength | None = None
    memory: bool = False
    """Whether there is a second input, `memory` float32 (B, s, 8)."""


TRAPS: dict[str, Trap] = {}


def trap(
    *mixes: str, opset: int = 20, derived: DerivedLength | None = None, memory: bool = False
) -> Callable[..., Callable[..., Made]]:
    """Register a body under its name."""

    def register(body: Callable[[Writer, str, str], Made]) -> Callable[[Writer, str, str], Made]:
        TRAPS[body.__name__] = Trap(body, mixes, opset, derived, memory)
        return body

    return register


def graph_of(name: str) -> MixingGraph:
    """A trap as a graph with truths."""
    made = TRAPS[name]
    writer = Writer(random.Random(name), made.opset)
    inputs = [
        InputSpec(name="x", dtype="float32", shape=("t", WIDTH)),
        InputSpec(name="attention_mask", dtype="int64", shape=("t",), role=InputRole.ATTENTION_MASK, fill=1.0),
    ]
    values = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "t", WIDTH]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["b", "t"]),
    ]
    if made.memory:
        inputs.append(InputSpec(name="memory", dtype="float32", shape=("s", WIDTH)))
        values.append(helper.make_tensor_value_info("memory", TensorProto.FLOAT, ["b", "s", WIDTH]))
    symbols = ("t", "s") if made.memory else ("t",)
    body = made.body(writer, "x", "attention_mask")
    value, shape = body if isinstance(body, tuple) else (body, ("t", WIDTH))
    writer.nodes.append(helper.make_node("Identity", [value], ["y"], name="y_node"))
    graph = helper.make_graph(
        writer.nodes,
        name,
        values,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", *shape])],
        writer.constants,
    )
    opsets = [helper.make_opsetid("", made.opset)]
    opsets += [helper.make_opsetid(domain, 1) for domain in sorted(writer.domains - {""})]
    truth = {axis: name if axis in made.mixes else UNSAID for axis in (BATCH, *symbols)}
    return MixingGraph(
        seed=0,
        proto=onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=opsets, ir_version=10)),
        signature=Signature(tuple(inputs), symbols),
        outputs=(OutputSpec(name="y", dtype="float32", shape=shape),),
        derived={str(shape[0]): made.derived} if made.derived else {},
        truths={"y": truth},
        needs=frozenset(),
        pieces=(name,),
        weights={},
    )


def kept(writer: Writer, mask: str) -> str:
    """The mask as booleans (B, t)."""
    return writer.cast(mask, TensorProto.BOOL)


def ones(writer: Writer, mask: str) -> str:
    """The mask as numbers (B, t)."""
    return writer.cast(mask, TensorProto.FLOAT)


def scored(writer: Writer, x: str, *, scale: float = 0.3) -> str:
    """x x^T, (B, t, t)."""
    return writer.op("Mul", writer.op("MatMul", x, writer.op("Transpose", x, perm=[0, 2, 1])), writer.const(scale))


def attended(writer: Writer, scores: str, x: str) -> str:
    """softmax(scores) x."""
    return writer.op("MatMul", writer.op("Softmax", scores, axis=2), x)


def number(writer: Writer, x: str, axis: int = 1) -> str:
    """The size of an axis as a float32 scalar."""
    return writer.cast(writer.length(x, axis), TensorProto.FLOAT)
