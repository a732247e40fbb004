"""Replace standard operators that the runtime has no kernel for by what it has, where the result is the same.

`ai.onnx.preview` FlexAttention is replaced by its own definition, with its `score_mod` and `prob_mod` written out, and
CausalConvWithState by onnxruntime's operator of the same name. Both hold for onnxruntime 1.32. Source: ONNX operators,
FlexAttention-1 and CausalConvWithState-27. `lowered` raises BuildRefused for a node whose definition needs types that
the graph does not state.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx.inliner
import onnx.shape_inference

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.graphs.operators import MICROSOFT, PREVIEW, STANDARD, subgraphs_of

_WRITTEN_OUT = (PREVIEW, "FlexAttention")
_RENAMED = "CausalConvWithState"
"""The runtime's operator has the same inputs, outputs and defaults, and further attributes."""


def lowered(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Return the model without operators that only their definition runs; the same model where it has none.

    Args:
        proto: checked, without local functions. It may be changed.
        name: of the file, for the refusal.

    Raises:
        BuildRefused: the graph does not state the types that a definition depends on.
    """
    nodes = list(_nodes(proto.graph))
    renamed = [node for node in nodes if node.op_type == _RENAMED and node.domain in STANDARD]
    for node in renamed:
        node.domain = MICROSOFT
    if renamed and all(entry.domain != MICROSOFT for entry in proto.opset_import):
        proto.opset_import.add(domain=MICROSOFT, version=1)
    flexible = [node for node in nodes if (node.domain, node.op_type) == _WRITTEN_OUT]
    if not flexible:
        return proto
    proto = onnx.shape_inference.infer_shapes(proto)
    try:
        found = onnx.inliner.inline_selected_functions(proto, [_WRITTEN_OUT], inline_schema_functions=True)
    except RuntimeError:
        where = flexible[0].name or flexible[0].output[0]
        raise BuildRefused(
            f"{name}: the types of the inputs of {where!r} (FlexAttention) are not in the graph, and the runtime has "
            "no kernel for it; infer the file's shapes, or export it with Attention"
        ) from None
    _name_softmaxes(found.graph, flexible)
    kept = [entry for entry in found.opset_import if entry.domain != PREVIEW]
    del found.opset_import[:]
    found.opset_import.extend(kept)
    return found


def _name_softmaxes(graph: onnx.GraphProto, flexible: list[onnx.NodeProto]) -> None:
    """Give the softmax of each definition the name and the metadata of its operator, by which sites are named."""
    producers = {output: node for node in _nodes(graph) for output in node.output}
    for operator in flexible:
        node = producers.get(operator.output[0])
        while node is not None and not (node.op_type == "Softmax" and node.output[0].startswith("Prob__")):
            node = producers.get(node.input[0]) if node.input else None
        if node is not None:
            node.name = operator.name
            del node.metadata_props[:]
            node.metadata_props.extend(operator.metadata_props)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph and of its subgraphs."""
    for node in graph.node:
        yield node
        for subgraph in subgraphs_of(node):
            yield from _nodes(subgraph)
