"""Put attention sites in the order of a model's layers, as data flows. The order of nodes in the file does not count.

A site comes after every site whose result reaches it. Tools that reorder nodes may put a later layer of one tower
before an earlier one of another, so that the order of nodes is no order of layers. The rules, the first that decides:

    towers that exchange no data      one after the other, in the order of the graph's inputs that they read
    sites with more sites behind them first: an encoder's come before those of the decoder that reads it
    sites with more sites before them first
    sites that read an earlier input  of the graph first
    the others                        in the order in which the graph's outputs reach them, first operands first

A site is a place in a graph that computes attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from attnserve_server.conversion.graphs.operators import STANDARD

_NO_DATA = frozenset(("Shape", "Size"))
"""Operators that read the size of a value only."""


def in_layer_order(graph: ir.Graph, nodes: Sequence[ir.Node]) -> list[ir.Node]:
    """Return the nodes of sites in the order of their layers.

    Args:
        graph: that holds them, in subgraphs too.
        nodes: one for each site; with two or more, one that the graph does not hold raises KeyError.
    """
    if len(nodes) < 2:
        return list(nodes)
    flow = _Flow({node: 1 << place for place, node in enumerate(nodes)})
    flow.inputs |= {value: 1 << place for place, value in enumerate(graph.inputs)}
    flow.follow(graph, 0, 0)
    before = [flow.sites_before[node] for node in nodes]
    behind = [sum(each >> place & 1 for each in before) for place in range(len(nodes))]
    ranks = _visits(graph)
    towers = _towers(before)
    # The lowest bit of a set of inputs is the first one.
    first_input = {
        tower: min(_lowest_bit(flow.inputs_of[nodes[place]]) for place in range(len(nodes)) if towers[place] == tower)
        for tower in set(towers)
    }
    first_visit = {
        tower: min(ranks.get(nodes[place], 0) for place in range(len(nodes)) if towers[place] == tower)
        for tower in set(towers)
    }

    def key(place: int) -> tuple[int, ...]:
        node, tower = nodes[place], towers[place]
        ties = (_lowest_bit(flow.inputs_of[node]), ranks.get(node, 0))
        return (first_input[tower], first_visit[tower], -behind[place], -before[place].bit_count(), *ties)

    return [nodes[place] for place in sorted(range(len(nodes)), key=key)]


@dataclass(slots=True)
class _Flow:
    """The sites, and the inputs of the graph, whose data reaches each value. Sets are bits of a number."""

    bits: dict[ir.Node, int]
    sites: dict[ir.Value, int] = field(default_factory=dict)
    inputs: dict[ir.Value, int] = field(default_factory=dict)
    sites_before: dict[ir.Node, int] = field(default_factory=dict)
    inputs_of: dict[ir.Node, int] = field(default_factory=dict)

    def follow(self, graph: ir.Graph, sites: int, inputs: int) -> tuple[int, int]:
        """Add the nodes of a graph, which these sets reach through the node that holds it. Return what it returns."""
        for node in graph:
            own, read = sites, inputs
            if node.op_type not in _NO_DATA or node.domain not in STANDARD:
                for value in node.inputs:
                    if value is not None:
                        own |= self.sites.get(value, 0)
                        read |= self.inputs.get(value, 0)
            for attribute in node.attributes.values():
                for inner in _graphs(attribute):
                    self.sites |= dict.fromkeys(inner.inputs, own)
                    self.inputs |= dict.fromkeys(inner.inputs, read)
                    given, taken = self.follow(inner, own, read)
                    own, read = own | given, read | taken
            if node in self.bits:
                self.sites_before[node], self.inputs_of[node] = own, read
                own |= self.bits[node]
            for value in node.outputs:
                self.sites[value], self.inputs[value] = own, read
        return (
            _union([self.sites.get(value, 0) for value in graph.outputs]),
            _union([self.inputs.get(value, 0) for value in graph.outputs]),
        )


def _graphs(attribute: ir.Attr) -> list[ir.Graph]:
    if attribute.type == ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    return list(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else []


def _union(sets: Sequence[int]) -> int:
    whole = 0
    for each in sets:
        whole |= each
    return whole


def _lowest_bit(bits: int) -> int:
    return bits & -bits


def _towers(before: Sequence[int]) -> list[int]:
    """Return for each site the number of its tower: sites whose data meets are in one."""
    towers: list[tuple[int, set[int]]] = []
    for place, each in enumerate(before):
        reached = each | 1 << place
        joined = [tower for tower in towers if tower[0] & reached]
        towers = [tower for tower in towers if not tower[0] & reached]
        places = {place}.union(*(tower[1] for tower in joined))
        towers.append((reached | _union([tower[0] for tower in joined]), places))
    return [next(min(places) for _, places in towers if place in places) for place in range(len(before))]


def _visits(graph: ir.Graph) -> dict[ir.Node, int]:
    """Return the order in which a depth-first search from the outputs leaves the nodes: operands before results."""
    ranks: dict[ir.Node, int] = {}
    waiting: list[tuple[ir.Node, bool]] = [(node, False) for node in reversed(_producers(graph.outputs))]
    entered: set[ir.Node] = set()
    while waiting:
        node, left = waiting.pop()
        if left:
            ranks[node] = len(ranks)
        elif node not in entered:
            entered.add(node)
            waiting.append((node, True))
            operands = _producers(node.inputs)
            for attribute in node.attributes.values():
                for inner in _graphs(attribute):
                    operands += _producers(inner.outputs)
            waiting += [(each, False) for each in reversed(operands) if each not in entered]
    return ranks


def _producers(values: Sequence[ir.Value | None]) -> list[ir.Node]:
    return [node for value in values if value is not None and (node := value.producer()) is not None]
