"""Ranges of inputs that look rows up, against the runtime itself: a number is legal where the graph runs on it.

`GRAPHS` and `COLUMNS` make a graph with one input of row numbers; its table `rows` has six rows. An input that cannot
be followed to its tables is reported and has no range.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from attnserve_server.conversion.inputs.index_ranges import index_ranges_of
from attnserve_server.conversion.inputs.signature import signature_of
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.model.manifest import IndexRange, InputRole
from onnx import TensorProto, helper, numpy_helper

Node = onnx.NodeProto
ROWS = 6
node = helper.make_node


def graph_of(
    *nodes: Node,
    shape: tuple[str | int, ...] = ("batch", "seq"),
    dtype: int = TensorProto.INT64,
    name: str = "class_ids",
    **constants: Any,
) -> onnx.ModelProto:
    """Nodes from an integer input, by default `class_ids` (B, T), to `y`; `rows` is a table of 6."""
    table = np.arange(ROWS * 8, dtype=np.float32).reshape(ROWS, 8)
    tables = {"rows": table, "wide": np.ascontiguousarray(table.T), **constants}
    used = {each for made in nodes for each in made.input}
    for made in nodes:
        for attribute in made.attribute:
            for branch in (attribute.g,) if attribute.type == onnx.AttributeProto.GRAPH else ():
                used |= {each for inner in branch.node for each in inner.input}
    graph = helper.make_graph(
        list(nodes),
        "lookups",
        [helper.make_tensor_value_info(name, dtype, list(shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), key) for key, array in tables.items() if key in used],
    )
    versions = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def embedded(segment: str = "zeros", place: str = "class_ids") -> tuple[Node, ...]:
    """onnxruntime's fused embeddings."""
    inputs = ["zeros", segment, "rows", "rows", "rows", "gamma", "beta", "", place]
    return (
        node("Sub", ["class_ids", "class_ids"], ["zeros"]),
        node("EmbedLayerNormalization", inputs, ["y", "mask"], domain="com.microsoft"),
    )


def branch(name: str) -> onnx.GraphProto:
    """Return a branch of an If that looks `class_ids` up in `rows`."""
    found = node("Gather", ["rows", "class_ids"], [name])
    return helper.make_graph([found], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)])


TABLE = {"rows": np.arange(ROWS * 8, dtype=np.float32).reshape(ROWS, 8)}
FUSED = {"gamma": np.ones(8, np.float32), "beta": np.zeros(8, np.float32)}
ANGLES = {"x": np.ones((1, 1, 16), np.float32)}
GRAPHS: dict[str, Callable[[], onnx.ModelProto]] = {
    "at once": lambda: graph_of(node("Gather", ["rows", "class_ids"], ["y"])),
    "columns": lambda: graph_of(node("Gather", ["wide", "class_ids"], ["y"], axis=1)),
    "columns from the end": lambda: graph_of(node("Gather", ["wide", "class_ids"], ["y"], axis=-1)),
    "cast": lambda: graph_of(
        node("Cast", ["class_ids"], ["wider"], to=TensorProto.INT64),
        node("Gather", ["rows", "wider"], ["y"]),
        dtype=TensorProto.INT32,
    ),
    "small type": lambda: graph_of(
        node("Cast", ["class_ids"], ["wider"], to=TensorProto.INT32),
        node("Gather", ["rows", "wider"], ["y"]),
        dtype=TensorProto.UINT8,
    ),
    "offset": lambda: graph_of(
        node("Add", ["class_ids", "two"], ["shifted"]), node("Gather", ["rows", "shifted"], ["y"]), two=np.array(2)
    ),
    "offset of another sign": lambda: graph_of(
        node("Sub", ["three", "class_ids"], ["turned"]),
        node("Gather", ["rows", "turned"], ["y"]),
        three=np.array([[3]]),
    ),
    "offset of zeros like it": lambda: graph_of(
        node("Shape", ["class_ids"], ["extents"]),
        node("ConstantOfShape", ["extents"], ["twos"], value=helper.make_tensor("two", TensorProto.INT64, [1], [2])),
        node("Add", ["twos", "class_ids"], ["shifted"]),
        node("Gather", ["rows", "shifted"], ["y"]),
    ),
    "moved": lambda: graph_of(
        node("Reshape", ["class_ids", "flat"], ["long"]),
        node("Unsqueeze", ["long", "first"], ["row"]),
        node("Transpose", ["row"], ["column"], perm=[1, 0]),
        node("Gather", ["rows", "column"], ["y"]),
        flat=np.array([-1]),
        first=np.array([0]),
    ),
    "negative ones wrapped": lambda: graph_of(
        node("Less", ["class_ids", "zero"], ["behind"]),
        node("Add", ["class_ids", "six"], ["wrapped"]),
        node("Where", ["behind", "wrapped", "class_ids"], ["chosen"]),
        node("Gather", ["rows", "chosen"], ["y"]),
        zero=np.array(0),
        six=np.array(ROWS),
    ),
    "wrapped by the table's own shape": lambda: graph_of(
        node("Shape", ["rows"], ["extents"]),
        node("Gather", ["extents", "zero"], ["six"]),
        node("Less", ["class_ids", "zero"], ["behind"]),
        node("Add", ["class_ids", "six"], ["wrapped"]),
        node("Where", ["behind", "wrapped", "class_ids"], ["chosen"]),
        node("Gather", ["rows", "chosen"], ["y"]),
        zero=np.array(0),
    ),
    "one number ignored": lambda: graph_of(
        node("Equal", ["class_ids", "ignored"], ["without"]),
        node("Where", ["without", "zero", "class_ids"], ["chosen"]),
        node("Gather", ["rows", "chosen"], ["y"]),
        zero=np.array(0),
        ignored=np.array(-20),
    ),
    "clipped": lambda: graph_of(
        node("Clip", ["class_ids", "zero", "five"], ["kept"]),
        node("Gather", ["rows", "kept"], ["y"]),
        zero=np.array(0),
        five=np.array(5),
    ),
    "clipped on one side": lambda: graph_of(
        node("Max", ["class_ids", "zero"], ["kept"]), node("Gather", ["rows", "kept"], ["y"]), zero=np.array(0)
    ),
    "clipped past its end": lambda: graph_of(
        node("Clip", ["class_ids", "", "nine"], ["kept"]), node("Gather", ["rows", "kept"], ["y"]), nine=np.array(9)
    ),
    "rest of a division": lambda: graph_of(
        node("Mod", ["class_ids", "six"], ["kept"]), node("Gather", ["rows", "kept"], ["y"]), six=np.array(ROWS)
    ),
    "doubled": lambda: graph_of(
        node("Mul", ["class_ids", "two"], ["even"]), node("Gather", ["rows", "even"], ["y"]), two=np.array(2)
    ),
    "two tables": lambda: graph_of(
        node("Gather", ["rows", "class_ids"], ["one"]),
        node("Gather", ["few", "class_ids"], ["other"]),
        node("Add", ["one", "other"], ["y"]),
        few=np.ones((4, 8), np.float32),
    ),
    "elements": lambda: graph_of(node("GatherElements", ["rows", "class_ids"], ["y"], axis=0)),
    "tuples of one": lambda: graph_of(
        node("Unsqueeze", ["class_ids", "last"], ["tuples"]),
        node("GatherND", ["rows", "tuples"], ["y"]),
        last=np.array([2]),
    ),
    "scattered": lambda: graph_of(
        node("Shape", ["class_ids"], ["extents"]),
        node("Expand", ["one", "extents"], ["ones"]),
        node("ScatterElements", ["rows", "class_ids", "ones"], ["y"], axis=0),
        one=np.array([[1]], np.float32),
    ),
    "fused embeddings, position": lambda: graph_of(*embedded(), dtype=TensorProto.INT32, **FUSED),
    "fused embeddings, segment": lambda: graph_of(
        *embedded(segment="class_ids", place=""), dtype=TensorProto.INT32, **FUSED
    ),
    "rotary": lambda: graph_of(
        node("RotaryEmbedding", ["x", "rows", "rows", "class_ids"], ["y"], num_heads=1), shape=(1, 1), **ANGLES
    ),
    "rotary of onnxruntime": lambda: graph_of(
        node("RotaryEmbedding", ["x", "class_ids", "rows", "rows"], ["y"], domain="com.microsoft", num_heads=1),
        shape=(1, 1),
        **ANGLES,
    ),
    "in a branch": lambda: graph_of(
        node("ReduceMax", ["class_ids"], ["greatest"], keepdims=0),
        node("Less", ["greatest", "far"], ["small"]),
        node("If", ["small"], ["y"], then_branch=branch("one"), else_branch=branch("other")),
        far=np.array(99),
    ),
    "floats": lambda: graph_of(
        node("Cast", ["class_ids"], ["whole"], to=TensorProto.INT64),
        node("Gather", ["rows", "whole"], ["y"]),
        dtype=TensorProto.FLOAT,
    ),
    "floats clipped": lambda: graph_of(
        node("Clip", ["class_ids", "low"], ["kept"]),
        node("Cast", ["kept"], ["whole"], to=TensorProto.INT32),
        node("Gather", ["rows", "whole"], ["y"]),
        dtype=TensorProto.FLOAT,
        low=np.array(-2, np.float32),
    ),
}


def runs_on(session: onnxruntime.InferenceSession, array: np.ndarray) -> bool:
    """Return whether the runtime runs the graph on this array, instead of refusing a number in it."""
    try:
        session.run(None, {session.get_inputs()[0].name: array})
    except onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument:
        return False
    except onnxruntime.capi.onnxruntime_pybind11_state.Fail:
        return False
    except onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException:
        return False
    return True


def session_of(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", GRAPHS)
def test_numbers_are_legal_where_the_graph_runs_on_them(name: str) -> None:
    model = GRAPHS[name]()
    [spec] = signature_of(model.graph).inputs
    session = session_of(model)
    dtype = np.dtype(spec.dtype)
    shape = tuple(extent if isinstance(extent, int) else 1 for extent in (1, *spec.shape))
    lost = index_ranges_of(model.graph, {spec.name: dtype}).lost
    assert not lost, "nothing of these graphs is unclear"
    tried = range(20) if dtype.kind == "u" else range(-25, 20)
    for number in tried:
        legal = not spec.index_ranges or any(each.least <= number <= each.greatest for each in spec.index_ranges)
        assert legal == runs_on(session, np.full(shape, number, dtype)), number


def test_ranges_are_those_of_the_tables() -> None:
    ranges = {
        name: [(each.least, each.greatest) for each in signature_of(made().graph).inputs[0].index_ranges]
        for name, made in GRAPHS.items()
    }
    assert ranges["at once"] == [(-6, 5)]
    assert ranges["offset"] == [(-8, 3)]
    assert ranges["one number ignored"] == [(-20, -20), (-6, 5)]
    assert ranges["clipped"] == []
    assert ranges["clipped on one side"] == [(np.iinfo(np.int64).min, 5)]
    assert ranges["small type"] == [(0, 5)]
    assert ranges["two tables"] == [(-4, 3)]
    assert ranges["rotary"] == [(0, 5)]


FEW = np.ones((3, 8), np.float32)
COLUMNS: dict[str, Callable[[], onnx.ModelProto]] = {
    "split": lambda: graph_of(
        node("Split", ["class_ids"], ["first", "second"], axis=-1, num_outputs=2),
        node("Squeeze", ["first", "last"], ["one"]),
        node("Gather", ["rows", "one"], ["a"]),
        node("Gather", ["few", "second"], ["b"]),
        node("ReduceSum", ["b"], ["c"]),
        node("Add", ["a", "c"], ["y"]),
        shape=("batch", 2),
        few=FEW,
        last=np.array([1]),
    ),
    "gathered": lambda: graph_of(
        node("Gather", ["class_ids", "zero"], ["one"], axis=2),
        node("Gather", ["class_ids", "one_more"], ["other"], axis=-1),
        node("Gather", ["rows", "one"], ["a"]),
        node("Gather", ["few", "other"], ["b"]),
        node("Add", ["a", "b"], ["y"]),
        shape=("batch", "seq", 2),
        few=FEW,
        zero=np.array(0),
        one_more=np.array(1),
    ),
    "sliced": lambda: graph_of(
        node("Slice", ["class_ids", "zero", "one", "axis"], ["first"]),
        node("Slice", ["class_ids", "one", "far", "axis"], ["second"]),
        node("Gather", ["rows", "first"], ["a"]),
        node("Gather", ["few", "second"], ["b"]),
        node("Add", ["a", "b"], ["y"]),
        shape=("batch", "seq", 2),
        few=FEW,
        zero=np.array([0]),
        one=np.array([1]),
        far=np.array([2**62]),
        axis=np.array([2]),
    ),
    "reshaped before": lambda: graph_of(
        node("Reshape", ["class_ids", "flat"], ["long"]),
        node("Split", ["long"], ["first", "second"], axis=1, num_outputs=2),
        node("Gather", ["rows", "first"], ["a"]),
        node("Gather", ["few", "second"], ["b"]),
        node("Add", ["a", "b"], ["y"]),
        shape=("batch", "seq", 2),
        few=FEW,
        flat=np.array([-1, 2]),
    ),
    "offset into one table": lambda: graph_of(
        node("Add", ["class_ids", "offsets"], ["shifted"]),
        node("Gather", ["rows", "shifted"], ["y"]),
        shape=("batch", 2),
        offsets=np.array([0, 3]),
    ),
    "tuples": lambda: graph_of(
        node("GatherND", ["pairs", "class_ids"], ["y"]), shape=("batch", 2), pairs=np.ones((6, 3), np.float32)
    ),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_have_separate_ranges(name: str) -> None:
    model = COLUMNS[name]()
    [spec] = signature_of(model.graph).inputs
    session = session_of(model)
    shape = tuple(extent if isinstance(extent, int) else 1 for extent in (1, *spec.shape))
    assert {each.column for each in spec.index_ranges} == {0, 1}
    for column in (0, 1):
        for number in range(-12, 9):
            places = np.zeros(shape, np.int64)
            places[..., column] = number
            legal = any(each.least <= number <= each.greatest for each in spec.ranges_at(column))
            assert legal == runs_on(session, places), (column, number)


def test_columns_with_the_same_range_are_listed_once() -> None:
    model = graph_of(node("Gather", ["rows", "class_ids"], ["y"]), shape=("batch", 3))
    assert signature_of(model.graph).inputs[0].index_ranges == (IndexRange(least=-6, greatest=5),)


@pytest.mark.parametrize(
    "nodes",
    [
        [node("CumSum", ["class_ids", "one"], ["i"]), node("Gather", ["rows", "i"], ["y"])],
        [node("Div", ["class_ids", "two"], ["i"]), node("Gather", ["rows", "i"], ["y"])],
        [
            node("Transpose", ["class_ids"], ["turned"], perm=[1, 0]),
            node("Sub", ["class_ids", "turned"], ["i"]),
            node("Gather", ["rows", "i"], ["y"]),
        ],
        [node("NonZero", ["class_ids"], ["some"]), node("Gather", ["some", "class_ids"], ["z"], axis=1)],
    ],
    ids=["sums", "division", "differences of places", "rows of an unknown number"],
)
def test_input_that_is_not_followed_is_reported_and_not_bounded(nodes: list[Node]) -> None:
    model = graph_of(*nodes, one=np.array(1), two=np.array(2), last=np.array([2]))
    found = signature_of(model.graph)
    assert found.unbounded == {"class_ids"}
    assert found.inputs[0].index_ranges == ()


def test_token_ids_and_types_are_bounded_by_their_tables_and_never_negative() -> None:
    lookup = (node("Add", ["{0}", "two"], ["shifted"]), node("Gather", ["rows", "shifted"], ["y"]))
    for name, role in (("input_ids", InputRole.TOKEN_IDS), ("token_type_ids", InputRole.TOKEN_TYPE_IDS)):
        nodes = [
            node(each.op_type, [name if i == "{0}" else i for i in each.input], list(each.output)) for each in lookup
        ]
        [spec] = signature_of(graph_of(*nodes, name=name, two=np.array(2)).graph).inputs
        assert spec.role is role
        if role is InputRole.TOKEN_IDS:
            assert (spec.vocabulary_size, spec.index_ranges) == (4, ())
        else:
            assert spec.index_ranges == (IndexRange(least=0, greatest=3),)


def test_padding_and_drawn_numbers_are_legal() -> None:
    nodes = [
        node("Sub", ["class_ids", "ten"], ["i"]),
        node(
            "EmbedLayerNormalization",
            ["i", "", "rows", "rows", "", "gamma", "beta"],
            ["y", "m"],
            domain="com.microsoft",
        ),
    ]
    model = graph_of(*nodes, dtype=TensorProto.INT32, ten=np.array(10, np.int32), **FUSED)
    found = signature_of(model.graph)
    [spec] = found.inputs
    assert spec.index_ranges == (IndexRange(least=10, greatest=15),)
    assert spec.padding == 10
    drawn = Sampler(found).sequence({"seq": 200})["class_ids"]
    assert (drawn.min(), drawn.max()) == (10, 15)


def test_numbers_are_drawn_from_each_columns_own_range() -> None:
    found = signature_of(COLUMNS["gathered"]().graph)
    drawn = Sampler(found).sequence({"seq": 200})["class_ids"]
    assert drawn.min(axis=0).tolist() == [0, 0]
    assert drawn.max(axis=0).tolist() == [5, 2]


def scanned() -> onnx.ModelProto:
    """A scan over the positions, whose body looks rows up."""
    number = helper.make_tensor_value_info("number", TensorProto.INT64, None)
    row = helper.make_tensor_value_info("row", TensorProto.FLOAT, None)
    body = helper.make_graph([node("Gather", ["rows", "number"], ["row"])], "body", [number], [row])
    return graph_of(node("Scan", ["class_ids"], ["y"], body=body, num_scan_inputs=1, scan_input_axes=[1]))


def test_bodies_of_scans_are_followed() -> None:
    model = scanned()
    [spec] = signature_of(model.graph).inputs
    session = session_of(model)
    for number in range(-9, 9):
        legal = any(each.least <= number <= each.greatest for each in spec.index_ranges)
        assert legal == runs_on(session, np.full((1, 1), number)), number


def test_values_that_a_loop_passes_on_are_not_followed() -> None:
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            node("Identity", ["going"], ["still"]),
            node("Add", ["place", "two"], ["next"]),
            node("Gather", ["rows", "place"], ["row"]),
        ],
        "body",
        [
            info("step", TensorProto.INT64, []),
            info("going", TensorProto.BOOL, []),
            info("place", TensorProto.INT64, None),
        ],
        [
            info("still", TensorProto.BOOL, []),
            info("next", TensorProto.INT64, None),
            info("row", TensorProto.FLOAT, None),
        ],
    )
    loop = node("Loop", ["count", "", "class_ids"], ["last", "y"], body=body)
    found = signature_of(graph_of(loop, count=np.array(2), two=np.array(2)).graph)
    assert found.unbounded == {"class_ids"}
    assert found.inputs[0].index_ranges == ()


def picking(*nodes: Node, offset: int = 0) -> onnx.ModelProto:
    """Gather from `x` (B, T, 4) at the positions `place` (B, 1) plus an offset."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "seq", 4])]
    inputs.append(helper.make_tensor_value_info("place", TensorProto.INT64, ["batch", 1]))
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    constants = {"offset": np.array(offset), "last": np.array([2]), "wide": np.array([1, 1, 4])}
    made = [node("Add", ["place", "offset"], ["moved"]), *nodes]
    used = {each for one in made for each in one.input}
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items() if name in used]
    graph = helper.make_graph(made, "picking", inputs, [output], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


PICKING = {
    "tuples": (node("GatherND", ["x", "moved"], ["y"], batch_dims=1),),
    "elements": (
        node("Unsqueeze", ["moved", "last"], ["column"]),
        node("Expand", ["column", "wide"], ["elements"]),
        node("GatherElements", ["x", "elements"], ["y"], axis=1),
    ),
}


@pytest.mark.parametrize("offset", [0, 2, -1])
@pytest.mark.parametrize("name", PICKING)
def test_positions_in_a_sequence_are_bounded_by_its_length(name: str, offset: int) -> None:
    model = picking(*PICKING[name], offset=offset)
    found = signature_of(model.graph)
    spec = found.inputs[1]
    [bounds] = spec.index_ranges
    assert bounds.along == "seq"
    session = session_of(model)
    for length in (1, 5):
        least, greatest = bounds.at({"seq": length})
        for number in range(-9, 9):
            feeds = {"x": np.ones((1, length, 4), np.float32), "place": np.full((1, 1), number)}
            try:
                session.run(None, feeds)
                runs = True
            except Exception:  # noqa: BLE001 - the runtime's own, of several kinds
                runs = False
            assert (least <= number <= greatest) == runs, (length, number)
    drawn = {int(Sampler(found).sequence({"seq": 4}, number)["place"][0]) + offset for number in range(60)}
    assert drawn == {0, 1, 2, 3}
