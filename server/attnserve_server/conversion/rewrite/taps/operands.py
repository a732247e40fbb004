"""Compute an operand of a site as its operator does: projected, cut, biased and rotated, in the shape (n, H, T, D).

A site is a place in the graph that computes attention. A tap is the nodes that return its weights for the rows of the
batch that its input `items` selects. A site that its finder did not refuse raises nothing here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from attnserve_server.conversion.base.quantizers import Quantized
from attnserve_server.conversion.base.sites import (
    Columns,
    FoundSite,
    Operand,
    Probabilities,
    Rotary,
    Scores,
)
from attnserve_server.conversion.rewrite.taps.tap import Tap, WholeBatch


def with_plain_values(graph: ir.Graph, sites: Mapping[str, FoundSite]) -> dict[str, FoundSite]:
    """Return the sites with values, (B, H, S, D), that are in the graph; new nodes compute those inside operators.

    Integers that represent weights, values and results are dequantized by new nodes. Checks compare weights @ value
    with an operator's output; a bundle's graph does not have these nodes.
    """
    shared: dict[tuple[object, ...], ir.Value] = {}
    plain = dict(sites)
    for name, site in sites.items():
        scores = site.attention
        if isinstance(scores, Probabilities):
            plain[name] = replace(site, attention=_in_floats(graph, name, scores))
        if not isinstance(scores, Scores) or scores.value.plain:
            continue
        nodes = WholeBatch(graph, f"{name}.value", shared)
        value = Operands(nodes).heads_first(scores.value, _head_dim(scores.value))
        value.type = ir.TensorType(ir.DataType.FLOAT)
        nodes.place_after(site.node)
        operand = Operand(value, scores.value.heads, packed=False)
        plain[name] = replace(site, attention=replace(scores, value=operand))
    return plain


def _in_floats(graph: ir.Graph, name: str, site: Probabilities) -> Probabilities:
    """Return a site whose weights, value and output are floats; new nodes dequantize those that are integers."""
    found = {"weights": site.weights, "value": site.value, "output": site.output}
    quantizers = {"weights": site.of_weights, "value": site.of_value, "output": site.of_output}
    for part, quantizer in quantizers.items():
        source = found[part]
        node = source.producer()
        if quantizer is None or node is None:
            continue
        nodes = WholeBatch(graph, f"{name}.{part}", {})
        copy = nodes.dequantized(source, quantizer)
        copy.type, copy.shape = ir.TensorType(ir.DataType.FLOAT), source.shape
        nodes.place_after(node)
        found[part] = copy
    return replace(
        site,
        weights=found["weights"],
        value=found["value"],
        output=found["output"],
        of_weights=None,
        of_value=None,
        of_output=None,
    )


def _head_dim(operand: Operand) -> int:
    """Return the head size by the columns of the value or the bias; a part of packed operands needs none."""
    bias = operand.bias
    start, stop = operand.columns or ((bias.start, bias.stop) if bias is not None else (0, 0))
    return (stop - start) // operand.heads


class Operands:
    """The operands of one tap. Operands that share a value share its gathered rows."""

    def __init__(self, tap: Tap) -> None:
        self._tap = tap
        self._rows: dict[ir.Value, ir.Value] = {}

    def heads_first(self, operand: Operand, head_dim: int) -> ir.Value:
        """Return the selected rows, float32 (n, H, T, D)."""
        tap = self._tap
        rows = self._cut_out(operand)
        if operand.part is not None:
            rows = tap.op("Gather", [rows, tap.scalar(operand.part)], axis=3)
        if operand.value.dtype is not ir.DataType.FLOAT:
            rows = tap.float32(rows)
        if operand.part is None and operand.packed:
            rows = tap.reshape(rows, [tap.shape(rows, 0, 2), tap.ints(operand.heads, head_dim)])
        if operand.bias is not None:
            bias = tap.reshape(tap.float32(self._columns(operand.bias, 0)), [tap.ints(operand.heads, head_dim)])
            rows = tap.op("Add", [rows, bias])
        if operand.part is not None or operand.packed:
            rows = tap.op("Transpose", [rows], perm=[0, 2, 1, 3])
        return rows if operand.rotary is None else self._rotated(rows, operand.rotary, head_dim)

    def _cut_out(self, operand: Operand) -> ir.Value:
        """Return the rows, projected where the operator does that, in the type that the graph computes in.

        Weights are cut before the MatMul: the file has them once, and the runtime, which folds the cut, holds a second
        copy of two thirds of them. If they were cut after it, the value's columns would be computed in vain, and the
        runtime would pack a second copy of all (measured: 96 MiB of weights take 142 MiB untapped, 226 MiB cut before,
        238 MiB after).
        """
        tap, weights = self._tap, operand.weights
        if operand.columns is None:
            return self._rows_of(operand.value)
        if weights is None:
            return self._columns(Columns(self._rows_of(operand.value), *operand.columns), 2)
        rows, cut = self._rows_of(operand.value), self._columns(Columns(weights, *operand.columns), 1)
        if operand.quantized is not None:
            return self._integer_matmul(rows, cut, operand.quantized, operand.columns)
        return tap.op("MatMul", [rows, cut])

    def _rows_of(self, value: ir.Value) -> ir.Value:
        """Return the selected rows, gathered once for all operands that use the value."""
        if value not in self._rows:
            self._rows[value] = self._tap.rows_of(value)
        return self._rows[value]

    def _integer_matmul(
        self, rows: ir.Value, weights: ir.Value, quantized: Quantized, columns: tuple[int, int]
    ) -> ir.Value:
        """Return a MatMul of integers, which is exact as the operator's own, scaled to float32.

        `weights` are those of the columns alone.
        """
        # Zero points, like weights, are cut for each operand: without VNNI the runtime rewrites both to unsigned
        # numbers, under names that it can use only once: findings/x64quantprecision_shared_weights.sh.
        zero = None if quantized.weight_zero is None else self._per_column(quantized.weight_zero, columns)
        product = self._tap.op("MatMulInteger", [rows, weights, quantized.input_zero, zero])
        scale = self._tap.op("Mul", [quantized.input_scale, self._per_column(quantized.weight_scale, columns)])
        return self._tap.op("Mul", [self._tap.float32(product), scale])

    def _per_column(self, value: ir.Value, columns: tuple[int, int]) -> ir.Value:
        """Return the scales or zero points of some columns; one number may serve all columns."""
        if value.shape is None or all(size == 1 for size in value.shape):
            value = self._tap.op("Expand", [value, self._tap.ints(columns[1])])
        return self._columns(Columns(value, *columns), 0)

    def _columns(self, columns: Columns, axis: int) -> ir.Value:
        tap = self._tap
        return tap.op("Slice", [columns.value, tap.ints(columns.start), tap.ints(columns.stop), tap.ints(axis)])

    def _rotated(self, rows: ir.Value, rotary: Rotary, head_dim: int) -> ir.Value:
        """Return float32 (n, H, T, D): each pair (a, b) becomes (a cos - b sin, b cos + a sin)."""
        tap = self._tap
        half = _width(rotary.cos)
        cos, sin = (self._angles(rows, table, rotary) for table in (rotary.cos, rotary.sin))
        step, second = (2, 1) if rotary.interleaved else (1, half)
        first_end = 2 * half if rotary.interleaved else half

        def cut(start: int, stop: int, every: int) -> ir.Value:
            return tap.op("Slice", [rows, *(tap.ints(number) for number in (start, stop, 3, every))])

        one, other = cut(0, first_end, step), cut(second, 2 * half, step)
        rotated_one = tap.op("Sub", [tap.op("Mul", [one, cos]), tap.op("Mul", [other, sin])])
        rotated_other = tap.op("Add", [tap.op("Mul", [other, cos]), tap.op("Mul", [one, sin])])
        # All first numbers precede all second ones; the MatMul of query and key does not depend on the order.
        parts = [rotated_one, rotated_other]
        if 2 * half < head_dim:
            parts.append(cut(2 * half, head_dim, 1))
        return tap.op("Concat", parts, axis=3)

    def _angles(self, rows: ir.Value, table: ir.Value, rotary: Rotary) -> ir.Value:
        """Return the rows of a table from the first position on, float32 (T, R); with `ends`, (n, 1, T, R)."""
        tap = self._tap
        if rotary.ends is not None:
            return self._angles_up_to(rows, table, rotary.ends)
        first, length = tap.ints(0), tap.shape(rows, 2, 3)
        if rotary.first is not None:
            flat = tap.reshape(rotary.first, [tap.ints(-1)])
            first = tap.op("Slice", [flat, tap.ints(0), tap.ints(1), tap.ints(0)])
        end = tap.op("Add", [first, length])
        return tap.float32(tap.op("Slice", [table, first, end, tap.ints(0)]))

    def _angles_up_to(self, rows: ir.Value, table: ir.Value, ends: ir.Value) -> ir.Value:
        """Return the rows of a table for T positions that end at each row's own end, float32 (n, 1, T, R)."""
        tap, one = self._tap, self._tap.ints(1)
        length = tap.shape(rows, 2, 3)
        flat = tap.op("Reshape", [ends, tap.ints(-1)], shared=True)
        last = tap.op("Cast", [tap.rows_of(flat)], to=int(ir.DataType.INT64))
        first = tap.op("Sub", [tap.op("Add", [tap.unsqueeze(last, 1), one]), length])
        places = tap.op("Range", [tap.scalar(0), tap.op("Squeeze", [length]), tap.scalar(1)])
        picked = tap.op("Gather", [table, tap.op("Add", [first, places])], axis=0)
        return tap.unsqueeze(tap.float32(picked), 1)


def _width(table: ir.Value) -> int:
    assert table.shape is not None
    width = table.shape[-1]
    assert isinstance(width, int)
    return width
