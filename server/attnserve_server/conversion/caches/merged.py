"""Take a merged decoder apart: one If chooses by an input between a branch with a cache and one without.

`branches_of` returns a graph for each branch, and None for a graph that is not merged. Both refer to the same
initializers of the source. A cache is the inputs that hold the keys and values of a decoder's earlier positions.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from attnserve_server.conversion.graphs.nodes import remove_unused_initializers
from attnserve_server.conversion.graphs.walk import before, input_of

_PREFIX = "attnserve/branch/"
_BRANCHES = ("then_branch", "else_branch")


def branches_of(proto: onnx.ModelProto) -> tuple[ir.Model, ir.Model] | None:
    """Return the branch without cache and the branch with one, each as a graph; None for a graph that is not merged.

    Inputs that only the other branch uses are left out, and so is the input that chooses.

    Args:
        proto: is not changed.
    """
    if _choice(ir.from_proto(proto).graph) is None:
        return None
    models = [_inlined(ir.from_proto(proto), branch) for branch in _BRANCHES]
    with_cache, without = sorted(models, key=lambda model: -len(_rank_3(model.graph)))
    return (without, with_cache) if len(_rank_3(with_cache.graph)) > len(_rank_3(without.graph)) else None


def _choice(graph: ir.Graph) -> ir.Node | None:
    """Return the If that makes every output of a graph, if an input of the graph chooses its branch."""
    makers = {value.producer() for value in graph.outputs}
    [node] = makers if len(makers) == 1 else [None]
    if node is None or node.op_type != "If":
        return None
    condition = input_of(node, 0)
    if condition is None or not before(condition, ("Cast", "Identity", "Reshape", "Squeeze")).is_graph_input():
        return None
    return node


def _inlined(model: ir.Model, branch: str) -> ir.Model:
    """Put the nodes of one branch in the place of the If."""
    graph = model.graph
    choice = _choice(graph)
    assert choice is not None
    body = choice.attributes[branch].as_graph()
    results = list(body.outputs)
    body.outputs.clear()
    for name in list(body.initializers):
        graph.register_initializer(body.initializers.pop(name))
    nodes = list(body)
    body.remove(nodes)
    graph.insert_before(choice, nodes)
    declared = [(str(value.name), value.shape, value.type) for value in choice.outputs]
    made: list[ir.Value] = []
    for at, result in enumerate(results):
        if result.producer() is None or result in made:
            # A value of the outer graph, or one of two outputs of the branch, needs a separate node as an output.
            node = ir.node("Identity", [result], name=f"{_PREFIX}{at}")
            graph.insert_before(choice, node)
            result = node.outputs[0]  # noqa: PLW2901 - the node's output takes the place of the branch's
        made.append(result)
    for old, result in zip(choice.outputs, made, strict=True):
        old.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(choice, safe=True)
    for (name, shape, kind), result in zip(declared, made, strict=True):
        result.name, result.shape, result.type = name, shape, kind
    for other in (choice.attributes[name].as_graph() for name in _BRANCHES if name != branch):
        other.outputs.clear()
        other.remove(list(other), safe=True)  # its nodes would count as uses of the inputs
    RemoveUnusedNodesPass()(model)
    remove_unused_initializers(graph)
    for value in [value for value in graph.inputs if not value.uses()]:
        graph.inputs.remove(value)
    return model


def _rank_3(graph: ir.Graph) -> set[str]:
    """Return the names of the inputs that may hold keys and values: those of three axes or more."""
    return {str(value.name) for value in graph.inputs if value.shape is not None and len(value.shape) > 2}
