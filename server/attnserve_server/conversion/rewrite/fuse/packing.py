"""Finds `ai.onnx` Attention nodes that work on (B, H, T, D) though the graph has packed values. Changes nothing.

onnxruntime's CPU kernel reads and writes packed heads in place; transposing them first is time that buys nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from attnserve_server.conversion.rewrite.fuse.carried import Carried, carry, rank


@dataclass(frozen=True, slots=True)
class PackableSite:
    """An Attention node whose query, key and value all were split from packed values."""

    node: ir.Node
    query: Carried
    key: Carried
    value: Carried


def packable_sites(graph: ir.Graph) -> Iterator[PackableSite]:
    """All such nodes of the graph itself that keep no cache and whose one output is all that is used."""
    for node in graph:
        if node.op_type != "Attention" or node.domain not in {"", "ai.onnx"} or len(node.inputs) < 3:
            continue
        operands = node.inputs[:3]
        kept = any(value is not None for value in node.inputs[4:]) or any(map(_used, node.outputs[1:]))
        if kept or any(value is None or rank(value) != 4 for value in operands):
            continue
        query, key, value = (carry(each) for each in operands if each is not None)
        if query.packed and key.packed and value.packed and key.heads == value.heads and query.heads % key.heads == 0:
            yield PackableSite(node, query, key, value)


def _used(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()
