"""Taps: nodes beside a site's own operator that compute its weights for the batch rows that ask. Finds no sites.

    items (n,) -+-> Gather(query) -+-> MatMul -> softcap -> + mask -> Softmax -> weights (n, H, L, S)
                +-> Gather(key) ---+
                +-> Gather(mask) ------------------------^

Everything after a Gather has n as its first extent, so with no rows asked for, every tensor is empty and the tap costs
next to nothing. The site's own operator is left as it was, and so is everything else in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from attnserve_server.build.sites import FoundSite, Mask, Operand, Scores

ITEMS_PREFIX = "attention_items."
WEIGHTS_PREFIX = "attention."
_LOWEST = float(np.finfo(np.float32).min)
_LOWEST_OF = {ir.DataType.FLOAT16: float(np.finfo(np.float16).min)}
"""Exporters write "masked" as minus infinity or as the lowest number of the mask's type; bfloat16 reaches as far as
float32, and float64 is cast to it."""

_Input = ir.Value | None


def add_taps(graph: ir.Graph, sites: Mapping[str, FoundSite]) -> None:
    """Add to a graph, for every site that has scores, the input and the output of its tap.

    Input `attention_items.<name>`: int64 (n,), rows of the batch, in any order, n may be 0. Output
    `attention.<name>`: float32 (n, H, L, S); rows sum to 1, fully masked rows are 0.
    Source: Vaswani et al. 2017, eq. 1, in the form of ONNX Attention-23.
    """
    shared: dict[tuple[str, ir.Value], ir.Value] = {}
    for name, site in sites.items():
        if site.scores is not None:
            _Tap(graph, name, site, shared).add()


class _Tap:
    """The nodes of one tap, gathered in order and put behind the site's node at the end."""

    def __init__(
        self, graph: ir.Graph, name: str, site: FoundSite, shared: dict[tuple[str, ir.Value], ir.Value]
    ) -> None:
        self._graph, self._name, self._site, self._shared = graph, name, site, shared
        self._nodes: list[ir.Node] = []
        self._items = ir.val(ITEMS_PREFIX + name, ir.DataType.INT64, ir.Shape([f"{ITEMS_PREFIX}{name}.count"]))

    def add(self) -> None:
        scores = self._site.scores
        assert scores is not None
        weights = self._weights(scores)
        weights.name = WEIGHTS_PREFIX + self._name
        weights.type = ir.TensorType(ir.DataType.FLOAT)
        weights.shape = ir.Shape([f"{ITEMS_PREFIX}{self._name}.count", scores.query.heads, None, None])
        self._graph.insert_after(self._site.node, self._nodes)
        self._graph.inputs.append(self._items)
        self._graph.outputs.append(weights)

    def _weights(self, scores: Scores) -> ir.Value:
        """Float32 (n, H, L, S)."""
        query = self._gathered(scores.query, scores.head_dim)
        if scores.scale != 1:
            query = self._op("Mul", [query, self._float(scores.scale)])
        key = self._gathered(scores.key, scores.head_dim)
        logits = self._product(query, key, scores)
        if scores.softcap:
            cap = self._float(scores.softcap)
            logits = self._op("Mul", [self._op("Tanh", [self._op("Div", [logits, cap])]), cap])
        kept: list[ir.Value] = []
        for mask in scores.masks:
            rows = self._rows_of(mask, scores.query.value)
            if mask.boolean:
                kept.append(rows)
                continue
            bias = self._float32(rows)
            logits = self._op("Add", [logits, bias])
            masked_below = _LOWEST_OF.get(mask.value.dtype or ir.DataType.FLOAT, _LOWEST) / 2
            kept.append(self._op("Greater", [bias, self._float(masked_below)]))
        if scores.causal:
            kept.append(self._causal(query, key))
        if not kept:
            return self._op("Softmax", [logits], axis=-1)
        allowed = kept[0]
        for other in kept[1:]:
            allowed = self._op("And", [allowed, other])
        # Where twice: the first keeps masked keys out of the sum, the second turns a row in which every key is masked
        # (and softmax therefore uniform) into zeros. A selection, since a product would carry a NaN on.
        softmax = self._op("Softmax", [self._op("Where", [allowed, logits, self._float(_LOWEST)])], axis=-1)
        return self._op("Where", [allowed, softmax, self._float(0.0)])

    def _gathered(self, operand: Operand, head_dim: int) -> ir.Value:
        """Float32 (n, H, T, D) of the rows that were asked for."""
        rows = self._op("Gather", [operand.value, self._items], axis=0)
        if operand.packed:
            shape = self._op("Concat", [self._shape(rows, 0, 2), self._ints(operand.heads, head_dim)], axis=0)
            rows = self._op("Reshape", [rows, shape], allowzero=1)
            rows = self._op("Transpose", [rows], perm=[0, 2, 1, 3])
        return rows if operand.value.dtype is ir.DataType.FLOAT else self._float32(rows)

    def _product(self, query: ir.Value, key: ir.Value, scores: Scores) -> ir.Value:
        """Query @ key^T, (n, H, L, S); query heads h * G to h * G + G - 1 share the key head h."""
        turned = self._op("Transpose", [key], perm=[0, 1, 3, 2])
        heads, kv_heads = scores.query.heads, scores.key.heads
        if heads == kv_heads:
            return self._op("MatMul", [query, turned])
        count, rest = self._shape(query, 0, 1), self._shape(query, 2, 4)
        grouped = self._op("Concat", [count, self._ints(kv_heads, heads // kv_heads), rest], axis=0)
        query_groups = self._op("Reshape", [query, grouped], allowzero=1)
        product = self._op("MatMul", [query_groups, self._op("Unsqueeze", [turned, self._ints(2)])])
        lengths = [self._shape(query, 2, 3), self._shape(key, 2, 3)]
        shape = self._op("Concat", [count, self._ints(heads), *lengths], axis=0)
        return self._op("Reshape", [product, shape], allowzero=1)

    def _rows_of(self, mask: Mask, query: ir.Value) -> ir.Value:
        """The mask's rows for the items, rank 4. A mask of one row serves them all, whatever the batch."""
        full = mask.value
        if mask.rank == 4 and _same_batch(full, query):
            return self._op("Gather", [full, self._items], axis=0)
        if mask.rank < 4:
            axes = self._ints(*range(4 - mask.rank))
            full = self._once("rank 4", full, lambda value: self._op("Unsqueeze", [value, axes]))
        one = self._ints(1)
        last_row = self._once("last row", full, lambda value: self._op("Sub", [self._shape(value, 0, 1), one]))
        return self._op("Gather", [full, self._op("Min", [self._items, last_row])], axis=0)

    def _once(self, what: str, value: ir.Value, make: Callable[[ir.Value], ir.Value]) -> ir.Value:
        """One for all taps that need it: the nodes of the first tap stand before those of the others."""
        if (what, value) not in self._shared:
            self._shared[what, value] = make(value)
        return self._shared[what, value]

    def _causal(self, query: ir.Value, key: ir.Value) -> ir.Value:
        """Bool (n, 1, L, S): key j is kept for query i where j <= i. Has n as its extent to be empty with it."""
        zero, one = self._scalar(0), self._scalar(1)
        length, keys = (self._op("Squeeze", [self._shape(value, 2, 3)]) for value in (query, key))
        rows = self._op("Unsqueeze", [self._op("Range", [zero, length, one]), self._ints(1)])
        shape = self._op(
            "Concat", [self._shape(query, 0, 1), self._ints(1), self._shape(query, 2, 3), self._ints(1)], axis=0
        )
        return self._op("GreaterOrEqual", [self._op("Expand", [rows, shape]), self._op("Range", [zero, keys, one])])

    def _float32(self, value: ir.Value) -> ir.Value:
        return self._op("Cast", [value], to=int(ir.DataType.FLOAT))

    def _shape(self, value: ir.Value, start: int, end: int) -> ir.Value:
        return self._op("Shape", [value], start=start, end=end)

    def _op(self, op_type: str, inputs: Sequence[_Input], **attributes: int | Sequence[int]) -> ir.Value:
        """One node; its output is named after the tap."""
        output = ir.val(f"{WEIGHTS_PREFIX}{self._name}/{op_type}_{len(self._nodes)}")
        name = f"{WEIGHTS_PREFIX}{self._name}/{len(self._nodes)}"
        self._nodes.append(ir.node(op_type, inputs, attributes=dict(attributes), outputs=[output], name=name))
        return output

    def _float(self, number: float) -> ir.Value:
        return self._constant(f"float32.{number!r}", np.array(number, np.float32))

    def _ints(self, *numbers: int) -> ir.Value:
        return self._constant("int64." + ".".join(map(str, numbers)) + ".list", np.array(numbers, np.int64))

    def _scalar(self, number: int) -> ir.Value:
        return self._constant(f"int64.{number}", np.array(number, np.int64))

    def _constant(self, label: str, array: np.ndarray) -> ir.Value:
        """An initializer, shared by all taps of the graph."""
        name = f"attnserve.{label}"
        if name not in self._graph.initializers:
            value = ir.val(
                name,
                ir.DataType.from_numpy(array.dtype),
                ir.Shape(array.shape),
                const_value=ir.tensor(array, name=name),
            )
            self._graph.register_initializer(value)
        return self._graph.initializers[name]


def _same_batch(mask: ir.Value, query: ir.Value) -> bool:
    """Whether the graph itself says that a mask has a row for every row of the batch."""
    if mask.shape is None or query.shape is None:
        return False
    one, other = mask.shape[0], query.shape[0]
    return isinstance(one, ir.SymbolicDim) and one.value is not None and one == other
