"""The tap of a site whose operator does not return its weights: computes them again for the selected rows.

items (n,) -+-> query's rows -+-> MatMul -> softcap -> + masks -> Softmax -> weights (n, H, L, S)
            +-> key's rows ---+                              |
            +-> masks' rows -----------------------------^   +-> scores (n, H, L, S)

Scores are a second output of the same nodes. Where the masks keep or leave out keys, they are what softmax reads, so
they add no node. Where masks are only added, one more node leaves out the hidden keys.

A site is a place in the graph that computes attention. A tap is the nodes that return its weights for the rows of the
batch that its input `items` selects. A site that its finder did not refuse raises nothing here.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from attnserve_server.conversion.base.sites import KeyPadding, Mask, Scores
from attnserve_server.conversion.rewrite.taps.masks import LOWEST, MaskRows
from attnserve_server.conversion.rewrite.taps.operands import Operands
from attnserve_server.conversion.rewrite.taps.tap import Tap

_LOWEST_OF = {ir.DataType.FLOAT16: float(np.finfo(np.float16).min)}
"""Exporters write "masked" as minus infinity or as the lowest number of the mask's type. bfloat16 has the range of
float32, and float64 is cast to that."""


def weights_of_scores(tap: Tap, scores: Scores) -> tuple[ir.Value, ir.Value]:
    """Return the softmax of the site's scores for the selected rows, float32 (n, H, L, S), and the scores.

    The scores are after scale, softcap and bias, and before the masks. A hidden key has `LOWEST`.
    """
    return _ScoresTap(tap).weights(scores)


class _ScoresTap:
    def __init__(self, tap: Tap) -> None:
        self._tap = tap
        self._operands = Operands(tap)

    def weights(self, scores: Scores) -> tuple[ir.Value, ir.Value]:
        """Return the weights and the scores, float32 (n, H, L, S)."""
        query = self._operands.heads_first(scores.query, scores.head_dim)
        if scores.scale != 1:
            query = self._tap.op("Mul", [query, self._tap.number(scores.scale)])
        key = self._operands.heads_first(scores.key, scores.head_dim)
        logits = self._product(query, key, scores)
        if scores.softcap:
            cap = self._tap.number(scores.softcap)
            logits = self._tap.op("Mul", [self._tap.op("Tanh", [self._tap.op("Div", [logits, cap])]), cap])
        last = scores.key_ends if scores.behind_past else None
        at_end = scores.behind_past and last is None
        masks = MaskRows(self._tap, scores.query.value, query, key, scores.key_counts, last, at_end=at_end)
        return self._zeroed(scores, masks, logits) if scores.zeroed else self._added(scores, masks, logits)

    def _zeroed(self, scores: Scores, masks: MaskRows, logits: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return softmax over the keys that are not masked; 0 in rows without such a key."""
        kept: list[ir.Value] = []
        for mask in scores.masks:
            assert isinstance(mask, Mask), "key padding is added to scores, and leaves no row without a key"
            rows = masks.of(mask)
            if mask.boolean:
                kept.append(rows)
                continue
            bias = self._tap.float32(rows)
            logits = self._tap.op("Add", [logits, bias])
            kept.append(self._tap.op("Greater", [bias, self._tap.number(_masked_up_to(mask))]))
        kept += self._kept_by_position(scores, masks)
        if not kept:
            return self._softmax(logits, scores), logits
        allowed = self._all_of(kept)
        # Two Wheres: the first keeps masked keys out of the sum; the second sets a row in which every key is masked,
        # and softmax therefore uniform, to zeros. A Mul would keep a NaN.
        shown = self._tap.op("Where", [allowed, logits, self._tap.number(LOWEST)])
        return self._tap.op("Where", [allowed, self._softmax(shown, scores), self._tap.number(0.0)]), shown

    def _all_of(self, kept: list[ir.Value]) -> ir.Value:
        allowed = kept[0]
        for other in kept[1:]:
            allowed = self._tap.op("And", [allowed, other])
        return allowed

    def _kept_by_position(self, scores: Scores, masks: MaskRows) -> list[ir.Value]:
        """Return what causal masks, windows and counts of keys keep, each bool and broadcast to (n, H, L, S)."""
        kept: list[ir.Value] = []
        if scores.causal:
            kept.append(masks.causal())
        if scores.window:
            kept.append(masks.window(scores.window))
        if scores.ahead is not None:
            kept.append(masks.ahead(scores.ahead))
        if scores.key_counts is not None:
            kept.append(masks.keys_before(scores.key_counts))
        if scores.key_ends is not None:
            kept.append(masks.keys_up_to(scores.key_ends))
            if scores.window:
                kept.append(masks.queries_up_to(scores.key_ends))
        return kept

    def _softmax(self, logits: ir.Value, scores: Scores) -> ir.Value:
        """Return softmax over the keys and the sink; the sink's share is left out."""
        tap = self._tap
        if scores.sink is None:
            return tap.op("Softmax", [logits], axis=-1)
        if isinstance(scores.sink, ir.Value):
            sink = tap.reshape(tap.float32(scores.sink), [tap.ints(1, scores.query.heads, 1, 1)])
        else:
            sink = tap.number(scores.sink)
        column = tap.op("Expand", [sink, tap.op("Concat", [tap.shape(logits, 0, 3), tap.ints(1)], axis=0)])
        softmax = tap.op("Softmax", [tap.op("Concat", [logits, column], axis=3)], axis=-1)
        return tap.op("Slice", [softmax, tap.ints(0), tap.ints(-1), tap.ints(3)])

    def _added(self, scores: Scores, masks: MaskRows, logits: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return softmax of the scores plus all masks; the masks are summed first, as onnxruntime does.

        The order matters where a whole row is shifted by -10,000, which leaves the scores three decimal places.
        """
        tap, zero = self._tap, self._tap.number(0.0)
        total: ir.Value | None = None
        kept: list[ir.Value] = []
        for mask in scores.masks:
            if isinstance(mask, KeyPadding):
                kept.append(masks.counted(mask))
                total = self._sum(total, tap.op("Where", [kept[-1], zero, tap.number(mask.filter_value)]))
        if scores.causal:
            kept.append(masks.causal_or_last())
            total = self._sum(total, tap.op("Where", [kept[-1], zero, tap.number(LOWEST)]))
        shown, biased = logits, False
        for mask in scores.masks:
            if isinstance(mask, Mask):
                bias = tap.float32(masks.of(mask))
                kept.append(tap.op("Greater", [bias, tap.number(_masked_up_to(mask))]))
                total, shown, biased = self._sum(total, bias), self._sum(shown, bias), True
        softmax = tap.op("Softmax", [logits if total is None else self._sum(logits, total)], axis=-1)
        if kept:
            shown = tap.op("Where", [self._all_of(kept), shown, tap.number(LOWEST)])
        if not biased:
            return softmax, shown
        # A row of minus infinities, for which the operator itself returns NaN.
        return tap.op("Where", [tap.op("IsNaN", [softmax]), zero, softmax]), shown

    def _sum(self, one: ir.Value | None, other: ir.Value) -> ir.Value:
        return other if one is None else self._tap.op("Add", [one, other])

    def _product(self, query: ir.Value, key: ir.Value, scores: Scores) -> ir.Value:
        """Return query @ key^T, (n, H, L, S); query heads h * G to h * G + G - 1 share the key head h."""
        transposed = self._tap.op("Transpose", [key], perm=[0, 1, 3, 2])
        heads, kv_heads = scores.query.heads, scores.key.heads
        if heads == kv_heads:
            return self._tap.op("MatMul", [query, transposed])
        count, rest = self._tap.shape(query, 0, 1), self._tap.shape(query, 2, 4)
        query_groups = self._tap.reshape(query, [count, self._tap.ints(kv_heads, heads // kv_heads), rest])
        product = self._tap.op("MatMul", [query_groups, self._tap.unsqueeze(transposed, 2)])
        lengths = [self._tap.shape(query, 2, 3), self._tap.shape(key, 2, 3)]
        return self._tap.reshape(product, [count, self._tap.ints(heads), *lengths])


def _masked_up_to(mask: Mask) -> float:
    if mask.masked_up_to is not None:
        return mask.masked_up_to
    return _LOWEST_OF.get(mask.value.dtype or ir.DataType.FLOAT, LOWEST) / 2
