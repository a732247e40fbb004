"""Sites are listed in the order of their layers, for any order of nodes in the file.

A site is a place in a graph where attention is computed. Each builder returns a graph and its sites' names in the right
order.
"""

from __future__ import annotations

import random

import onnx
import onnx_ir as ir
import pytest
from attnserve_server.conversion.finders import find_sites
from onnx.parser import parse_model

SIZE = "[B, 2, T, 4]"


def parsed(inputs: str, outputs: str, nodes: str) -> onnx.ModelProto:
    model = parse_model(f"""<ir_version: 10, opset_import: ["": 23]> layers ({inputs}) => ({outputs}) {{ {nodes} }}""")
    for node in model.graph.node:
        node.name = f"/{node.output[0]}/Attention" if node.op_type == "Attention" else node.output[0]
    return onnx.shape_inference.infer_shapes(model)


def shuffled(model: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """The same graph with its nodes in another order in which they can run."""
    rng, waiting = random.Random(seed), list(model.graph.node)
    known = {value.name for value in model.graph.input}
    del model.graph.node[:]
    while waiting:
        ready = [node for node in waiting if set(node.input) <= known]
        chosen = rng.choice(ready)
        waiting.remove(chosen)
        known |= set(chosen.output)
        model.graph.node.append(chosen)
    return model


def names_of(model: onnx.ModelProto) -> list[str]:
    return list(find_sites(ir.from_proto(model).graph))


def encoder_decoder() -> tuple[onnx.ModelProto, list[str]]:
    """Three encoder layers, then two decoder layers that attend to themselves and to the last encoder layer."""
    model = parsed(
        f"float{SIZE} source, float{SIZE} target",
        f"float{SIZE} hidden",
        """
        enc0 = Attention(source, source, source)
        e0 = Add(source, enc0)
        enc1 = Attention(e0, e0, e0)
        e1 = Add(e0, enc1)
        enc2 = Attention(e1, e1, e1)
        e2 = Add(e1, enc2)
        self0 = Attention(target, target, target)
        s0 = Add(target, self0)
        cross0 = Attention(s0, e2, e2)
        c0 = Add(s0, cross0)
        self1 = Attention(c0, c0, c0)
        s1 = Add(c0, self1)
        cross1 = Attention(s1, e2, e2)
        hidden = Add(s1, cross1)
        """,
    )
    return model, ["enc0", "enc1", "enc2", "self0", "cross0", "self1", "cross1"]


def towers() -> tuple[onnx.ModelProto, list[str]]:
    """Two towers that share nothing but their sizes; the first output is that of the second input."""
    model = parsed(
        f"float{SIZE} words, float{SIZE} patches",
        f"float{SIZE} y, float{SIZE} x",
        """
        p0 = Attention(patches, patches, patches)
        p1 = Attention(p0, p0, p0)
        y = Identity(p1)
        sizes = Shape(p1)
        filled = Expand(words, sizes)
        w0 = Attention(filled, filled, filled)
        x = Attention(w0, w0, w0)
        """,
    )
    return model, ["w0", "x", "p0", "p1"]


def parallel() -> tuple[onnx.ModelProto, list[str]]:
    """Two layers, each of two attentions side by side that are added."""
    model = parsed(
        f"float{SIZE} x",
        f"float{SIZE} y",
        """
        b0 = Attention(x, x, x)
        a0 = Attention(x, x, x)
        h = Add(a0, b0)
        b1 = Attention(h, h, h)
        a1 = Attention(h, h, h)
        y = Add(a1, b1)
        """,
    )
    return model, ["a0", "b0", "a1", "b1"]


def branches() -> tuple[onnx.ModelProto, list[str]]:
    """A layer in the branches of an If, between two others."""
    model = parsed(
        f"float{SIZE} x, bool which",
        f"float{SIZE} y",
        """
        first = Attention(x, x, x)
        h = If(which) <
            then_branch = yes () => (a) { a = Attention(first, first, first) },
            else_branch = no () => (b) { b = Identity(first) }>
        last = Attention(h, h, h)
        y = Identity(last)
        """,
    )
    return model, ["first", "attention_1", "last"]


@pytest.mark.parametrize("make", [encoder_decoder, towers, parallel])
@pytest.mark.parametrize("seed", range(6))
def test_order_of_sites_does_not_depend_on_the_order_of_nodes(make, seed: int) -> None:
    model, expected = make()
    assert names_of(model) == expected
    assert names_of(shuffled(model, seed)) == expected


def test_layers_in_branches_are_between_the_layers_around_them() -> None:
    model, expected = branches()
    assert names_of(model) == expected
