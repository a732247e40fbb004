"""The tap of a site whose operator keeps its weights to itself: computes them again for the rows that ask.

items (n,) -+-> Gather(query) -+-> MatMul -> softcap -> + mask -> Softmax -> weights (n, H, L, S)
            +-> Gather(key) ---+
            +-> Gather(mask) ------------------------^
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from attnserve_server.build.sites import Mask, Operand, Scores
from attnserve_server.build.taps.nodes import TapNodes

_LOWEST = float(np.finfo(np.float32).min)
_LOWEST_OF = {ir.DataType.FLOAT16: float(np.finfo(np.float16).min)}
"""Exporters write "masked" as minus infinity or as the lowest number of the mask's type; bfloat16 reaches as far as
float32, and float64 is cast to it."""


def weights_of_scores(tap: TapNodes, scores: Scores) -> ir.Value:
    """Softmax of the site's scores for the rows that ask, float32 (n, H, L, S); a fully masked row is 0."""
    return _ScoresTap(tap).weights(scores)


class _ScoresTap:
    def __init__(self, tap: TapNodes) -> None:
        self._tap = tap

    def weights(self, scores: Scores) -> ir.Value:
        """Float32 (n, H, L, S)."""
        query = self._gathered(scores.query, scores.head_dim)
        if scores.scale != 1:
            query = self._tap.op("Mul", [query, self._tap.float(scores.scale)])
        key = self._gathered(scores.key, scores.head_dim)
        logits = self._product(query, key, scores)
        if scores.softcap:
            cap = self._tap.float(scores.softcap)
            logits = self._tap.op("Mul", [self._tap.op("Tanh", [self._tap.op("Div", [logits, cap])]), cap])
        kept: list[ir.Value] = []
        for mask in scores.masks:
            rows = self._rows_of(mask, scores.query.value)
            if mask.boolean:
                kept.append(rows)
                continue
            bias = self._tap.float32(rows)
            logits = self._tap.op("Add", [logits, bias])
            masked_below = _LOWEST_OF.get(mask.value.dtype or ir.DataType.FLOAT, _LOWEST) / 2
            kept.append(self._tap.op("Greater", [bias, self._tap.float(masked_below)]))
        if scores.causal:
            kept.append(self._causal(query, key))
        if not kept:
            return self._tap.op("Softmax", [logits], axis=-1)
        allowed = kept[0]
        for other in kept[1:]:
            allowed = self._tap.op("And", [allowed, other])
        # Where twice: the first keeps masked keys out of the sum, the second turns a row in which every key is masked
        # (and softmax therefore uniform) into zeros. A selection, since a product would carry a NaN on.
        softmax = self._tap.op("Softmax", [self._tap.op("Where", [allowed, logits, self._tap.float(_LOWEST)])], axis=-1)
        return self._tap.op("Where", [allowed, softmax, self._tap.float(0.0)])

    def _gathered(self, operand: Operand, head_dim: int) -> ir.Value:
        """Float32 (n, H, T, D) of the rows that were asked for."""
        rows = self._tap.rows_of(operand.value)
        if operand.packed:
            rows = self._tap.reshape(rows, [self._tap.shape(rows, 0, 2), self._tap.ints(operand.heads, head_dim)])
            rows = self._tap.op("Transpose", [rows], perm=[0, 2, 1, 3])
        return rows if operand.value.dtype is ir.DataType.FLOAT else self._tap.float32(rows)

    def _product(self, query: ir.Value, key: ir.Value, scores: Scores) -> ir.Value:
        """Query @ key^T, (n, H, L, S); query heads h * G to h * G + G - 1 share the key head h."""
        turned = self._tap.op("Transpose", [key], perm=[0, 1, 3, 2])
        heads, kv_heads = scores.query.heads, scores.key.heads
        if heads == kv_heads:
            return self._tap.op("MatMul", [query, turned])
        count, rest = self._tap.shape(query, 0, 1), self._tap.shape(query, 2, 4)
        query_groups = self._tap.reshape(query, [count, self._tap.ints(kv_heads, heads // kv_heads), rest])
        product = self._tap.op("MatMul", [query_groups, self._tap.unsqueeze(turned, 2)])
        lengths = [self._tap.shape(query, 2, 3), self._tap.shape(key, 2, 3)]
        return self._tap.reshape(product, [count, self._tap.ints(heads), *lengths])

    def _rows_of(self, mask: Mask, query: ir.Value) -> ir.Value:
        """The mask's rows for the items, rank 4. A mask of one row serves them all, whatever the batch."""
        full = mask.value
        if mask.rank == 4 and _same_batch(full, query):
            return self._tap.rows_of(full)
        if mask.rank < 4:
            added = range(4 - mask.rank)
            full = self._tap.once("rank 4", full, lambda value: self._tap.unsqueeze(value, *added))
        one = self._tap.ints(1)
        last_row = self._tap.once(
            "last row", full, lambda value: self._tap.op("Sub", [self._tap.shape(value, 0, 1), one])
        )
        return self._tap.op("Gather", [full, self._tap.op("Min", [self._tap.items, last_row])], axis=0)

    def _causal(self, query: ir.Value, key: ir.Value) -> ir.Value:
        """Bool (n, 1, L, S): key j is kept for query i where j <= i. Has n as its extent to be empty with it."""
        zero, one = self._tap.scalar(0), self._tap.scalar(1)
        length, keys = (self._tap.op("Squeeze", [self._tap.shape(value, 2, 3)]) for value in (query, key))
        rows = self._tap.unsqueeze(self._tap.op("Range", [zero, length, one]), 1)
        shape = self._tap.op(
            "Concat",
            [self._tap.shape(query, 0, 1), self._tap.ints(1), self._tap.shape(query, 2, 3), self._tap.ints(1)],
            axis=0,
        )
        return self._tap.op(
            "GreaterOrEqual", [self._tap.op("Expand", [rows, shape]), self._tap.op("Range", [zero, keys, one])]
        )


def _same_batch(mask: ir.Value, query: ir.Value) -> bool:
    """Whether the graph itself says that a mask has a row for every row of the batch."""
    if mask.shape is None or query.shape is None:
        return False
    one, other = mask.shape[0], query.shape[0]
    return isinstance(one, ir.SymbolicDim) and one.value is not None and one == other
