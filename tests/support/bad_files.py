"""Files that cannot be served, each with part of the error message, and unusual files that can.

`BAD_MODELS` and `OUTSIDE` hold patterns of the messages, `ODD_MODELS` the unusual files. Nothing here loads a file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx_files import encoder

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
Shape = list[str | int | None]


def small(
    nodes: list[onnx.NodeProto],
    shape: Shape | None = None,
    *,
    constants: dict[str, np.ndarray] | None = None,
    functions: list[onnx.FunctionProto] | None = None,
    outputs: tuple[str, ...] = ("y",),
    domains: tuple[str, ...] = (),
) -> onnx.ModelProto:
    """A model from `x`, float (n, t, 4), to `y`, through some nodes."""
    x = helper.make_tensor_value_info("x", FLOAT, shape or ["n", "t", 4])
    ys = [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs]
    tensors = [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    opsets = [helper.make_opsetid("", 18), *(helper.make_opsetid(domain, 1) for domain in domains)]
    graph = helper.make_graph(nodes, "small", [x], ys, tensors)
    return helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=functions or [])


def node(operator: str, inputs: str, output: str = "y", **attributes: object) -> onnx.NodeProto:
    """Return a node. `inputs`: names separated by spaces."""
    return helper.make_node(operator, inputs.split(), [output], **attributes)


def tanh() -> onnx.ModelProto:
    """Return the smallest model that can be served."""
    return small([node("Tanh", "x")])


def changed(model: onnx.ModelProto, change: Callable[[onnx.ModelProto], object]) -> onnx.ModelProto:
    """The model after a change."""
    change(model)
    return model


def _doubling(depth: int) -> list[onnx.FunctionProto]:
    """Functions that each call the one before twice: 2 ** depth nodes."""
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("mine", 1)]
    functions = [helper.make_function("mine", "f0", ["a"], ["b"], [node("Tanh", "a", "b")], opsets)]
    for level in range(1, depth):
        calls = [
            node(f"f{level - 1}", "a", "c", domain="mine"),
            node(f"f{level - 1}", "c", "b", domain="mine"),
        ]
        functions.append(helper.make_function("mine", f"f{level}", ["a"], ["b"], calls, opsets))
    return functions


def _calling_itself() -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("mine", 1)]
    function = helper.make_function("mine", "f", ["a"], ["b"], [node("f", "a", "b", domain="mine")], opsets)
    return small([node("f", "x", domain="mine")], functions=[function], domains=("mine",))


def _nested(depth: int) -> onnx.ModelProto:
    """An If inside an If inside an If."""
    inner = [node("Identity", "x", f"o{depth}")]
    for level in range(depth, 0, -1):
        branches = {
            "then_branch": (inner, f"o{level}"),
            "else_branch": ([node("Identity", "x", f"e{level}")], f"e{level}"),
        }
        graphs = {
            side: helper.make_graph(nodes, side, [], [helper.make_tensor_value_info(output, FLOAT, None)])
            for side, (nodes, output) in branches.items()
        }
        inner = [node("If", "yes", f"o{level - 1}", **graphs)]
    inner[0].output[0] = "y"
    return small(inner, constants={"yes": np.array(True)})


def _typed(kind: onnx.TypeProto) -> onnx.ModelProto:
    model = tanh()
    model.graph.input.append(helper.make_value_info("odd", kind))
    return model


def _shaped(*shapes: Shape | None) -> onnx.ModelProto:
    """The sum of inputs of these shapes."""
    names = [f"x{position}" for position in range(len(shapes))]
    inputs = [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in zip(names, shapes, strict=True)]
    graph = helper.make_graph([helper.make_node("Sum", names, ["y"])], "sum", inputs, [
        helper.make_tensor_value_info("y", FLOAT, None)
    ])  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def _set(model: onnx.ModelProto, **fields: int) -> onnx.ModelProto:
    for name, value in fields.items():
        setattr(model, name, value)
    return model


SEQUENCE_TYPE = helper.make_sequence_type_proto(helper.make_tensor_type_proto(FLOAT, ["n"]))
MAP_TYPE = helper.make_map_type_proto(INT64, helper.make_tensor_type_proto(FLOAT, ["n"]))
OPTIONAL_TYPE = helper.make_optional_type_proto(helper.make_tensor_type_proto(FLOAT, ["n"]))

BAD_MODELS: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "a cycle": (
        lambda: small([node("Add", "x b", "a"), node("Tanh", "a", "b"), node("Tanh", "b")]),
        "has a cycle",
    ),
    "a node that feeds itself": (lambda: small([node("Add", "x y")]), "has a cycle"),
    "an input from nowhere": (lambda: small([node("Add", "x nowhere")]), "not a valid ONNX model: .*'nowhere'"),
    "an output from nowhere": (lambda: small([node("Tanh", "x", "z")]), "cannot load the model: .*y"),
    "an unknown operator": (lambda: small([node("NoSuchOperator", "x")]), "not a valid .*NoSuchOperator"),
    "an operator of a later opset": (lambda: small([node("Swish", "x")]), "not a valid .*Swish"),
    "an operator of an unknown domain": (
        lambda: small([node("Fancy", "x", domain="my.domain")], domains=("my.domain",)),
        "'Fancy' of domain 'my.domain', which the runtime does not know",
    ),
    "an operator of the runtime's extensions": (
        lambda: small([node("BertTokenizer", "x", domain="ai.onnx.contrib")], domains=("ai.onnx.contrib",)),
        "needs onnxruntime-extensions",
    ),
    "an operator of an unknown domain inside a branch": (
        lambda: changed(
            _nested(1),
            lambda model: (
                model.opset_import.append(helper.make_opsetid("my.domain", 1)),
                setattr(model.graph.node[0].attribute[0].g.node[0], "domain", "my.domain"),
            ),
        ),
        "of domain 'my.domain'",
    ),
    "an operator that the runtime's own domain does not have": (
        lambda: small([node("Fancy", "x", domain="com.microsoft")], domains=("com.microsoft",)),
        "the runtime cannot load the model: .*Fancy",
    ),
    "a function that calls itself": (_calling_itself, "not a valid .*recursive"),
    "functions that would make a billion nodes": (
        lambda: small([node("f29", "x", domain="mine")], functions=_doubling(30), domains=("mine",)),
        r"has 536870912 nodes after its functions are inlined; the limit is 1000000",
    ),
    "an IR version to come": (lambda: _set(tanh(), ir_version=99), "has IR version 99; 3 to [0-9]+ are supported"),
    "an IR version of old": (lambda: _set(tanh(), ir_version=2), "has IR version 2; 3 to"),
    "no IR version": (lambda: _set(tanh(), ir_version=0), "has IR version 0; 3 to"),
    "an opset to come": (lambda: encoder(opset=99), "has opset 99; 11 to [0-9]+ are supported"),
    "an opset of old": (lambda: encoder(opset=10), "has opset 10; 11 to"),
    "no opset": (
        lambda: changed(tanh(), lambda model: model.ClearField("opset_import")),
        "declares no opset of the standard operators; 11 to",
    ),
    "two opsets": (
        lambda: changed(tanh(), lambda model: model.opset_import.append(helper.make_opsetid("ai.onnx", 17))),
        "declares two opsets, 17 and 18",
    ),
    "an input of sequences": (lambda: _typed(SEQUENCE_TYPE), "'odd' is of type sequence; only tensors can be served"),
    "an input of maps": (lambda: _typed(MAP_TYPE), "'odd' is of type map; only tensors"),
    "an optional input": (lambda: _typed(OPTIONAL_TYPE), "'odd' is of type optional; only tensors"),
    "an input of strings": (
        lambda: _typed(helper.make_tensor_type_proto(TensorProto.STRING, ["n"])),
        "'odd' is of type string",
    ),
    "an input of bfloat16": (
        lambda: _typed(helper.make_tensor_type_proto(TensorProto.BFLOAT16, ["n"])),
        "'odd' is of type bfloat16",
    ),
    "an input of 4-bit numbers": (
        lambda: _typed(helper.make_tensor_type_proto(TensorProto.INT4, ["n"])),
        "'odd' is of type int4",
    ),
    "an input of a type from the future": (
        lambda: _typed(helper.make_tensor_type_proto(99, ["n"])),
        "not a valid .*99",
    ),
    "an input without a shape": (lambda: _shaped(None), "'x0' has no known shape: name its axes"),
    "a scalar input": (lambda: _shaped([]), "'x0' is a scalar: its first axis must be the batch"),
    "an axis of negative length": (lambda: _shaped(["n", -1]), "axis 1 has the size -1: name its axes"),
    "an axis of no length": (lambda: _shaped(["n", 0]), "axis 1 has the size 0"),
    "a fixed batch": (lambda: _shaped([8, 4]), "fixed at 8: export the model with a dynamic first axis"),
    "no inputs": (lambda: changed(small([node("Tanh", "c")], constants={"c": np.ones((2, 2), np.float32)}),
                                  lambda model: model.graph.ClearField("input")), "has no inputs"),
    "more dynamic axes than are supported": (
        lambda: _shaped(["n", *(f"axis_{number}" for number in range(40))]),
        "the inputs have 40 dynamic axes; at most 9 are supported",
    ),
    "doubled names of values": (lambda: small([node("Tanh", "x"), node("Sin", "x")]), "not a valid .*'y'"),
    "doubled inputs": (
        lambda: changed(tanh(), lambda model: model.graph.input.append(model.graph.input[0])),
        "'x' has been used as graph input names multiple times",
    ),
    "doubled outputs": (
        lambda: changed(tanh(), lambda model: model.graph.output.append(model.graph.output[0])),
        "two outputs have the same name",
    ),
    "doubled initialisers": (
        lambda: changed(
            small([node("Add", "x c")], constants={"c": np.ones(1, np.float32)}),
            lambda model: model.graph.initializer.append(model.graph.initializer[0]),
        ),
        "c initializer name is not unique",
    ),
    "no output": (
        lambda: changed(tanh(), lambda model: model.graph.ClearField("output")),
        "no output can be served",
    ),
    "outputs that cannot be served alone": (
        lambda: small([node("ReduceSum", "x", keepdims=0)]),
        "no output can be served",
    ),
    "names of taps": (
        lambda: changed(tanh(), lambda model: setattr(model.graph.input[0], "name", "attention_items.x")),
        "not a valid|prepared already",
    ),
    "a run that needs more memory than there is": (
        lambda: small(
            [node("Expand", "x shape", "big"), node("ReduceMax", "big axes")],
            constants={"shape": np.array([2**20, 2**20, 1, 1, 4]), "axes": np.array([0, 1])},
        ),
        "the model does not run: ",
    ),
    "a run that fails": (
        lambda: small([node("Reshape", "x shape")], constants={"shape": np.array([-1, 999983])}),
        "the model does not run: ",
    ),
    "an initialiser that is shorter than its shape": (
        lambda: changed(
            small([node("Add", "x c")], constants={"c": np.ones(4, np.float32)}),
            lambda model: setattr(model.graph.initializer[0], "raw_data", b"\0" * 3),
        ),
        "not a valid",
    ),
    "an initialiser of negative length": (
        lambda: changed(
            small([node("Add", "x c")], constants={"c": np.ones(4, np.float32)}),
            lambda model: model.graph.initializer[0].dims.__setitem__(0, -4),
        ),
        "Negative dimension value",
    ),
    "an initialiser of immense length": (
        lambda: changed(
            small([node("Add", "x c")], constants={"c": np.ones(4, np.float32)}),
            lambda model: model.graph.initializer[0].dims.__setitem__(0, 2**62),
        ),
        "too large",
    ),
}  # fmt: skip


def _loop(trips: int) -> onnx.ModelProto:
    """`x` plus 1, so many times, in a loop."""
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [node("Identity", "go", "on"), node("Add", "v one", "w")],
        "body",
        [info("i", INT64, []), info("go", TensorProto.BOOL, []), info("v", FLOAT, None)],
        [info("on", TensorProto.BOOL, []), info("w", FLOAT, None)],
    )
    constants = {"trips": np.array(trips), "yes": np.array(True), "one": np.array(1, np.float32)}
    return small([node("Loop", "trips yes x", body=body)], constants=constants)


def endless() -> onnx.ModelProto:
    """Return a loop that does not end in reasonable time."""
    return _loop(2**62)


def _shuffled() -> onnx.ModelProto:
    model = encoder()
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))
    return model


def _with_initialisers_as_inputs() -> onnx.ModelProto:
    model = encoder()
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return model


def _calling() -> onnx.ModelProto:
    """A function that calls another."""
    return small([node("f2", "x", domain="mine")], functions=_doubling(3), domains=("mine",))


def _with_odd_outputs() -> onnx.ModelProto:
    model = small([node("Tanh", "x"), node("SequenceConstruct", "y y", "many"), node("Cast", "x", "text", to=8)])
    model.graph.output.append(helper.make_value_info("many", SEQUENCE_TYPE))
    model.graph.output.append(helper.make_tensor_value_info("text", TensorProto.STRING, ["n", "t", 4]))
    return model


def _of_the_input_alone() -> onnx.ModelProto:
    model = tanh()
    model.graph.output.append(model.graph.input[0])
    return model


ODD_MODELS: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "no attention": (tanh, "has no attention that can be recognised: it is served without weights"),
    "nodes in the wrong order": (_shuffled, ""),
    "initialisers that are inputs too": (_with_initialisers_as_inputs, ""),
    "an initialiser of no length": (
        lambda: small([node("Concat", "x none", axis=1)], constants={"none": np.zeros((5, 0, 4), np.float32)[:1]}),
        "",
    ),
    "an input that nothing uses": (
        lambda: changed(tanh(), lambda model: model.graph.input.append(
            helper.make_tensor_value_info("idle", FLOAT, ["n", "t"]))),
        "",
    ),
    "an output that is an input": (_of_the_input_alone, ""),
    "an output that is a constant": (
        lambda: small([node("Tanh", "x")], constants={"c": np.ones(3, np.float32)}, outputs=("y", "c")),
        "output 'c' is left out: its first axis is not the batch",
    ),
    "an output without a shape": (tanh, ""),
    "outputs that are no tensors, or strings": (
        _with_odd_outputs,
        "(?s)'many' is left out: its type is sequence, not tensor.*'text' is left out: .*string",
    ),
    "nodes of one name": (
        lambda: changed(encoder(), lambda model: [setattr(each, "name", "same") for each in model.graph.node]), ""
    ),
    "functions": (_calling, ""),
    "branches": (lambda: _nested(3), ""),
    "a loop": (lambda: _loop(3), ""),
    "an axis of one": (lambda: _shaped(["n", 1, "t"]), ""),
    "nameless axes that must be equal": (lambda: _shaped(["n", None, 4], ["n", None, 4]), ""),
    "named axes that must be equal": (lambda: _shaped(["n", "a"], ["n", "b"]), ""),
    "nameless axes of which some must be equal": (lambda: _shaped(["n", "t", None], ["n", None, None]), ""),
}  # fmt: skip


def nested_deeply(depth: int) -> bytes:
    """Return the bytes of graphs nested `depth` deep in attributes of nodes. Libraries refuse to write them."""

    def within(number: int, content: bytes) -> bytes:
        size, rest = bytearray(), len(content)
        while rest >= 128:
            size.append(rest % 128 | 128)
            rest //= 128
        return bytes([number << 3 | 2, *size, rest]) + content

    content = within(1, within(4, b"Identity"))
    for _ in range(depth):
        content = within(1, within(5, within(6, content)))
    return b"\x08\x09" + within(7, content) + within(8, b"\x10\x12")


def _disturb(data: Path, elsewhere: Path, way: str) -> None:
    """Move, replace or cut the data file. The model file stays as it is."""
    if way in {"../ranker.data", "absolute", "symbolic link", "link to a folder"}:
        data.rename(elsewhere)
    if way == "symbolic link":
        data.symlink_to(elsewhere)
    elif way == "link to a folder":
        (data.parent / "inner").symlink_to(elsewhere.parent)
    elif way == "hard link":
        os.link(data, elsewhere)
    elif way == "cut short":
        data.write_bytes(data.read_bytes()[:40])
    elif way in {"missing", "a folder", "a pipe"}:
        data.unlink()
        make: Callable[[Path], object] = {"a folder": os.mkdir, "a pipe": os.mkfifo}.get(way, lambda _: None)
        make(data)


def outside(folder: Path, way: str) -> Path:
    """Write a file whose external data is not a valid regular file in the same folder.

    `way`: a key of `OUTSIDE`, whose value is a pattern of the expected error message.
    """
    file = folder / "models-in" / "ranker.onnx"
    file.parent.mkdir()
    onnx.save(encoder(), file, save_as_external_data=True, location="ranker.data", size_threshold=0)
    _disturb(file.parent / "ranker.data", folder / "ranker.data", way)
    locations = {
        "absolute": str(folder / "ranker.data"),
        "link to a folder": "inner/ranker.data",
        "no name": "",
        "a zero": "a\0b",
    }
    model = onnx.load(file, load_external_data=False)
    numbers = {
        "an offset past the end": ("offset", 10**9),
        "an offset below zero": ("offset", -8),
        "an offset that is no number": ("offset", "many"),
        "a length of 3 GiB": ("length", 3 * 2**30),
    }
    for tensor in model.graph.initializer:
        entries = {entry.key: entry for entry in tensor.external_data}
        entries["location"].value = locations.get(way, way if "ranker.data" in way else "ranker.data")
        if way in numbers:
            key, value = numbers[way]
            entries[key].value = str(value)
    file.write_bytes(model.SerializeToString())
    return file


OUTSIDE = {
    "../ranker.data": "outside the model's folder", "./../../x/ranker.data": "outside the model's folder",
    "..\\ranker.data": "outside the model's folder", "C:\\ranker.data": "outside the model's folder",
    "inner/../../ranker.data": "outside the model's folder", "absolute": "outside the model's folder",
    "no name": "outside the model's folder", "a zero": "missing",
    "symbolic link": "is a link", "hard link": "is a link",
    "link to a folder": "is a link|outside the model's folder|missing", "a folder": "no regular file",
    "a pipe": "no regular file", "missing": "'ranker.data' is missing", "cut short": "cut short",
    "an offset past the end": "cut short", "an offset below zero": "cut short|outside",
    "an offset that is no number": "cut short|outside", "a length of 3 GiB": "the limit of an ONNX file is 2147483647",
}  # fmt: skip
