"""The path by which padding or a batch neighbour reaches an output, through the node that decides the verdict.

The path is for reports only: an empty or shortened path never changes a verdict.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import onnx_ir as ir

from attnserve_server.conversion.proof.values import Cause, Value
from attnserve_server.model.certificate import PathStep

MOST_STEPS: Final = 12
"""The maximum number of steps. A longer path keeps the first, the last and those around the deciding node."""
_PASSES_ON: Final[Mapping[str, str]] = {
    "Gather": "looks up a table",
    "MatMul": "multiplies each position by weights",
    "Gemm": "multiplies each position by weights",
    "MatMulInteger": "multiplies each position by weights",
    "LayerNormalization": "normalises each position",
    "Add": "adds element by element",
    "Mul": "multiplies element by element",
    "Softmax": "computes weights from scores",
    "Reshape": "changes the shape",
    "Transpose": "reorders the axes",
    "Shape": "reads the shape",
    "Cast": "changes the type",
    "Attention": "computes attention",
}


def path_of(
    graph: ir.Graph, cause: Cause, target: ir.Value, values: Mapping[ir.Value, Value], *, others: str
) -> tuple[PathStep, ...]:
    """Return the shortest path from an input through the deciding node to a target.

    Args:
        graph: The graph that was interpreted.
        cause: The node that decides, and the reason.
        target: An output of the graph.
        values: What holds of each value.
        others: What may change the answer, in words.
    """
    top = _node_of(graph, cause)
    if top is None:
        return (PathStep(node=cause.node, operator=cause.operator, words=cause.reason),)
    start, before = _backwards(graph, top, values)
    behind = _forwards(graph, top, target)
    steps = []
    if start is not None:
        steps.append(PathStep(node=str(start.name), operator="input", words=f"{others} enter"))
    steps += [_step(node) for node in before]
    steps.append(PathStep(node=cause.node or _name(top), operator=cause.operator, words=cause.reason))
    steps += [_step(node) for node in behind]
    steps.append(PathStep(node=str(target.name), operator="output", words="the answer"))
    return tuple(_shortened(steps, at=1 + len(before) if start is not None else len(before)))


def _shortened(steps: list[PathStep], at: int) -> list[PathStep]:
    if len(steps) <= MOST_STEPS:
        return steps
    kept = sorted({0, 1, at - 1, at, at + 1, at + 2, len(steps) - 2, len(steps) - 1} & set(range(len(steps))))
    found: list[PathStep] = []
    for before, place in zip([-1, *kept], kept, strict=False):
        if place - before > 1:
            found.append(PathStep(node="", operator="", words=f"{place - before - 1} more nodes"))
        found.append(steps[place])
    return found


def _step(node: ir.Node) -> PathStep:
    words = _PASSES_ON.get(node.op_type, "passes it on")
    return PathStep(node=_name(node), operator=node.op_type, words=words)


def _name(node: ir.Node) -> str:
    return node.name or next((str(output.name) for output in node.outputs), "")


def _node_of(graph: ir.Graph, cause: Cause) -> ir.Node | None:
    """Return the node of the graph itself that is the cause, or that contains it."""
    for node in graph:
        if _name(node) == cause.node:
            return node
        for attribute in node.attributes.values():
            inner = attribute.value
            if isinstance(inner, ir.Graph) and _node_of(inner, cause) is not None:
                return node
    return None


def _backwards(
    graph: ir.Graph, node: ir.Node, values: Mapping[ir.Value, Value]
) -> tuple[ir.Value | None, list[ir.Node]]:
    """Return an input that the node depends on, and the nodes between, along varying values where possible."""

    def parents(one: ir.Node) -> Iterable[ir.Value]:
        return [value for value in one.inputs if value is not None and value.const_value is None]

    for only_varying in (True, False):
        seen: dict[ir.Node, ir.Node | None] = {node: None}
        waiting = deque([node])
        while waiting:
            one = waiting.popleft()
            for value in parents(one):
                if only_varying and value in values and not values[value].varies:
                    continue
                if value.is_graph_input():
                    return value, _chain(seen, one, node)
                producer = value.producer()
                if producer is not None and producer not in seen and producer.graph is graph:
                    seen[producer] = one
                    waiting.append(producer)
    return None, []


def _chain(seen: Mapping[ir.Node, ir.Node | None], first: ir.Node, last: ir.Node) -> list[ir.Node]:
    chain: list[ir.Node] = []
    at: ir.Node | None = first
    while at is not None and at is not last:
        chain.append(at)
        at = seen[at]
    return chain


def _forwards(graph: ir.Graph, node: ir.Node, target: ir.Value) -> list[ir.Node]:
    """Return the nodes between the deciding one and a target."""
    makes: Callable[[ir.Node], bool] = lambda one: target in one.outputs  # noqa: E731 - a name for a condition
    if makes(node):
        return []
    seen: dict[ir.Node, ir.Node | None] = {node: None}
    waiting = deque([node])
    while waiting:
        one = waiting.popleft()
        for output in one.outputs:
            for user, _ in output.uses():
                top = _top(user, graph)
                if top is None or top in seen:
                    continue
                seen[top] = one
                if makes(top):
                    return [*reversed(_chain(seen, one, node)), top]
                waiting.append(top)
    return []


def _top(node: ir.Node, graph: ir.Graph) -> ir.Node | None:
    """Return the node of the graph itself that is the given node, or that contains it."""
    if node.graph is graph:
        return node
    inner = node.graph
    for one in graph:
        for attribute in one.attributes.values():
            if attribute.value is inner:
                return one
    return None
