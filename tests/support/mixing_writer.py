"""Write the nodes and constants of the graphs that `mixing_graphs` makes from a seed, in the form of each opset.

A graph is a chain of pieces. Nothing is checked: a wrong node fails, if at all, where its graph is loaded.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]


class Writer:
    """Writes nodes and constants under unique names.

    `prefix` begins the names of nodes: the piece that they belong to.
    """

    def __init__(self, rng: random.Random, opset: int) -> None:
        self.rng = rng
        self.arrays = np.random.default_rng(rng.getrandbits(32))
        self.opset = opset
        self.prefix = "inputs"
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.domains: set[str] = set()
        self._count = 0

    def fresh(self, stem: str) -> str:
        """Return a name that no value has yet."""
        self._count += 1
        return f"{self.prefix}.{stem}_{self._count}"

    def op(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node of one output, and return it."""
        return self.ops(kind, *inputs, domain=domain, **attributes)[0]

    def ops(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> list[str]:
        """Add a node of several outputs, and return them."""
        names = [self.fresh(kind) for _ in range(outputs)]
        self.domains.add(domain)
        node = helper.make_node(kind, list(inputs), names, name=f"{names[0]}_node", domain=domain, **attributes)
        self.nodes.append(node)
        return names

    def const(self, value: Any, dtype: Any = np.float32) -> str:
        """An initializer."""
        name = self.fresh("constant")
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def ints(self, *numbers: int) -> str:
        """An int64 initializer of rank 1."""
        return self.const(numbers, np.int64)

    def drawn(self, *shape: int, scale: float = 0.5) -> Array:
        """Normal numbers, float32."""
        return (self.arrays.normal(size=shape) * scale).astype(np.float32)

    def pick(self, *choices: Any) -> Any:
        """One of the choices."""
        return self.rng.choice(choices)

    # Operators whose form depends on the opset.

    def unsqueeze(self, value: str, *axes: int) -> str:
        """Add axes of size 1."""
        if self.opset >= 13:
            return self.op("Unsqueeze", value, self.ints(*axes))
        return self.op("Unsqueeze", value, axes=list(axes))

    def squeeze(self, value: str, *axes: int) -> str:
        """Remove axes of size 1."""
        if self.opset >= 13:
            return self.op("Squeeze", value, self.ints(*axes))
        return self.op("Squeeze", value, axes=list(axes))

    def reduce(self, kind: str, value: str, *axes: int, keep: bool = True) -> str:
        """A reduction, `kind` without its `Reduce`."""
        since = 13 if kind == "Sum" else 18
        if self.opset >= since:
            return self.op(f"Reduce{kind}", value, self.ints(*axes), keepdims=int(keep))
        return self.op(f"Reduce{kind}", value, axes=list(axes), keepdims=int(keep))

    def cast(self, value: str, kind: int) -> str:
        """A cast to an ONNX element type."""
        return self.op("Cast", value, to=kind)

    def split(self, value: str, axis: int, *sizes: int) -> list[str]:
        """Parts along an axis."""
        if self.opset >= 13:
            return self.ops("Split", value, self.ints(*sizes), outputs=len(sizes), axis=axis)
        return self.ops("Split", value, outputs=len(sizes), axis=axis, split=list(sizes))

    def extent(self, value: str, axis: int) -> str:
        """Return the size of one axis, int64 of rank 1."""
        if self.opset >= 15 and self.rng.random() < 0.5:
            return self.op("Shape", value, start=axis, end=axis + 1)
        shape = self.op("Shape", value)
        if self.rng.random() < 0.5:
            return self.op("Slice", shape, self.ints(axis), self.ints(axis + 1))
        return self.unsqueeze(self.op("Gather", shape, self.const(axis, np.int64), axis=0), 0)

    def length(self, value: str, axis: int = 1) -> str:
        """Return the size of one axis, an int64 scalar."""
        return self.op("Gather", self.op("Shape", value), self.const(axis, np.int64), axis=0)

    def slice(self, value: str, axis: int, start: int | str, end: int | str, step: int = 1) -> str:
        """A slice along one axis; bounds are numbers, or names of int64 values of rank 1."""
        bounds = [self.ints(bound) if isinstance(bound, int) else bound for bound in (start, end)]
        return self.op("Slice", value, *bounds, self.ints(axis), self.ints(step))

    def range(self, length: str) -> str:
        """0 .. length - 1, int64."""
        return self.op("Range", self.const(0, np.int64), length, self.const(1, np.int64))

    def matmul(self, value: str, rows: int, columns: int, *, scale: float = 0.5, bias: bool = False) -> str:
        """Return a MatMul with a drawn matrix."""
        product = self.op("MatMul", value, self.const(self.drawn(rows, columns, scale=scale)))
        return self.op("Add", product, self.const(self.drawn(columns, scale=scale))) if bias else product

    def reshape(self, value: str, *extents: int | str) -> str:
        """Reshape to sizes that are numbers (0: unchanged; -1: the rest) or names of int64 values of rank 1."""
        if all(isinstance(extent, int) for extent in extents):
            return self.op("Reshape", value, self.ints(*(int(extent) for extent in extents)))
        parts = [self.ints(extent) if isinstance(extent, int) else extent for extent in extents]
        return self.op("Reshape", value, self.op("Concat", *parts, axis=0))
