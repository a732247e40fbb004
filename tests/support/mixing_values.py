"""What generated graphs are made of: a writer of ONNX nodes, and values whose dependence on neighbours is known."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import onnx
from attnserve_server.model.manifest import BATCH
from onnx import helper, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]

UNSAID = "unsaid"
"""The poison of a value of which the grammar does not know whether it is mixed; nothing is claimed of it."""
NAN_BEHIND = "NaN behind the sequence"
LONGEST = 512
"""Rows of position tables, and so the greatest length of every axis."""
LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True, slots=True)
class Need:
    """What must hold of a mask input for an answer to be independent of padding.

    `need` "some": one position or more is allowed; "all": every one is. `ones`: allowed positions hold 1.
    """

    input: str
    need: Literal["some", "all"]
    ones: bool = False


@dataclass(frozen=True, slots=True)
class State:
    """What is known of a value by construction.

    `taint`: by axis (`batch` or a symbol) the poison through which others reach a sequence's own part of the value.
    `behind`: what stands at padded positions: zeros, finite numbers, or NaN. `norm`: a bound on the Euclidean norm of
    the last axis, at every position; None: there is none.
    """

    taint: Mapping[str, str] = field(default_factory=dict)
    behind: Literal["zero", "finite", "nan"] = "finite"
    norm: float | None = None
    needs: frozenset[Need] = frozenset()
    raw: bool = False
    """Whether it is a float input as sent, of any size."""

    def tainted(self, axis: str, poison: str) -> State:
        """The state once a poison lets `axis` in; the first poison keeps its name, and beats an unsaid one."""
        known = self.taint.get(axis, UNSAID)
        return replace(self, taint={**self.taint, axis: poison if known == UNSAID else known}, norm=None, raw=False)

    def joined(self, *others: State) -> State:
        """The state of a value that is computed from several, position by position. Its norm is not known."""
        state = self
        for other in others:
            for axis, poison in other.taint.items():
                state = state.tainted(axis, poison)
        behind = {each.behind for each in (self, *others)}
        return replace(
            state,
            behind="nan" if "nan" in behind else "finite",
            norm=None,
            raw=False,
            needs=state.needs.union(*(other.needs for other in others)),
        )

    def needing(self, *needs: Need) -> State:
        """The state with further needs."""
        return replace(self, needs=self.needs | set(needs))

    def finite(self, norm: float | None = None) -> State:
        """The state behind an operation by position that turns zeros into something else; NaN stays NaN."""
        return replace(self, behind="nan" if self.behind == "nan" else "finite", norm=norm, raw=False)


@dataclass(frozen=True, slots=True)
class Stream:
    """A value float32 (B, symbol, width), the form in which pieces hand values on."""

    name: str
    symbol: str
    width: int
    state: State


@dataclass(frozen=True, slots=True)
class MaskInput:
    """The mask of one symbol. `keep`: a boolean value (B, symbol), true where a position is allowed.

    `ones`: float32 (B, symbol), 1 where allowed, 0 elsewhere if the input holds what it should. `arithmetic`: whether
    `ones` is computed from the input's own number, so that a number other than 1 changes it. `picky`: whether `keep` is
    false for some numbers that the input's padding does not have.
    """

    input: str
    keep: str
    ones: str
    arithmetic: bool = False
    picky: bool = False

    def need(self, how: Literal["some", "all"], *, by_ones: bool = False) -> Need:
        """A need of this input; `by_ones`: `ones` is used, not `keep`."""
        return Need(self.input, how, ones=self.arithmetic if by_ones else self.picky)


class Writer:
    """Writes nodes and constants under unique names. `prefix` begins the names of nodes: the piece that they are of."""

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
        """A name that no value has yet."""
        self._count += 1
        return f"{self.prefix}.{stem}_{self._count}"

    def op(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """One node of one output."""
        return self.ops(kind, *inputs, domain=domain, **attributes)[0]

    def ops(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> list[str]:
        """One node of several outputs."""
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
        """Axes of extent 1."""
        if self.opset >= 13:
            return self.op("Unsqueeze", value, self.ints(*axes))
        return self.op("Unsqueeze", value, axes=list(axes))

    def squeeze(self, value: str, *axes: int) -> str:
        """Without axes of extent 1."""
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
        """The extent of one axis, int64 of rank 1."""
        if self.opset >= 15 and self.rng.random() < 0.5:
            return self.op("Shape", value, start=axis, end=axis + 1)
        shape = self.op("Shape", value)
        if self.rng.random() < 0.5:
            return self.op("Slice", shape, self.ints(axis), self.ints(axis + 1))
        return self.unsqueeze(self.op("Gather", shape, self.const(axis, np.int64), axis=0), 0)

    def length(self, value: str, axis: int = 1) -> str:
        """The extent of one axis, an int64 scalar."""
        return self.op("Gather", self.op("Shape", value), self.const(axis, np.int64), axis=0)

    def slice(self, value: str, axis: int, start: int | str, end: int | str, step: int = 1) -> str:
        """A slice along one axis; bounds are numbers, or names of int64 values of rank 1."""
        bounds = [self.ints(bound) if isinstance(bound, int) else bound for bound in (start, end)]
        return self.op("Slice", value, *bounds, self.ints(axis), self.ints(step))

    def range(self, length: str) -> str:
        """0 .. length - 1, int64."""
        return self.op("Range", self.const(0, np.int64), length, self.const(1, np.int64))

    def matmul(self, value: str, rows: int, columns: int, *, scale: float = 0.5, bias: bool = False) -> str:
        """A product with a drawn matrix."""
        product = self.op("MatMul", value, self.const(self.drawn(rows, columns, scale=scale)))
        return self.op("Add", product, self.const(self.drawn(columns, scale=scale))) if bias else product

    def reshape(self, value: str, *extents: int | str) -> str:
        """To extents that are numbers (0: as it was; -1: the rest) or names of int64 values of rank 1."""
        if all(isinstance(extent, int) for extent in extents):
            return self.op("Reshape", value, self.ints(*(int(extent) for extent in extents)))
        parts = [self.ints(extent) if isinstance(extent, int) else extent for extent in extents]
        return self.op("Reshape", value, self.op("Concat", *parts, axis=0))


@dataclass
class Context:
    """One graph on its way: its writer, the values of its inputs, and the names of the pieces so far."""

    writer: Writer
    masks: dict[str, MaskInput] = field(default_factory=dict)
    wrong_masks: dict[str, MaskInput] = field(default_factory=dict)
    pieces: list[str] = field(default_factory=list)
    safe: bool = True
    """Whether pieces must leave nothing mixed; else one of them may be a poison."""

    def begin(self, piece: str) -> None:
        """Name the piece whose nodes follow."""
        self.pieces.append(piece)
        self.writer.prefix = f"p{len(self.pieces)}.{piece.replace(' ', '_')}"


def over(
    state: State, symbol: str, poison: str, *, hidden: Literal["where", "product", "zero", "causal", ""] = ""
) -> State:
    """The state of a value that reads all positions of `symbol`.

    Args:
        state: of what is read.
        symbol: along which it is read.
        poison: the name of the fault where padded positions are read.
        hidden: how padded positions are hidden: replaced ("where"), multiplied by 0 ("product"), 0 already ("zero"),
            or never read ("causal"); empty: not at all.
    """
    if not hidden:
        return replace(state.tainted(symbol, poison), behind="finite")
    if hidden in {"product", "zero"} and state.behind == "nan":
        return replace(state.tainted(symbol, NAN_BEHIND), behind="finite")
    return state.finite()


def tainted(stream: Stream, name: str, *faults: tuple[str, str]) -> Stream:
    """The stream under another value, with (axis, poison) faults."""
    state = stream.state.finite()
    for axis, poison in faults:
        state = state.tainted(axis, poison)
    return replace(stream, name=name, state=state)


NO_FAULT: Mapping[str, str] = MappingProxyType({})
__all__ = [
    "BATCH",
    "LONGEST",
    "LOWEST",
    "NAN_BEHIND",
    "NO_FAULT",
    "UNSAID",
    "Array",
    "Context",
    "MaskInput",
    "Need",
    "State",
    "Stream",
    "Writer",
    "over",
    "tainted",
]
