"""Inputs that index tables, over a real server: indices without a row are refused, and GetModel returns the ranges.

`encoder` makes a graph that looks up tables by five inputs. It is converted once for the module, without a declared
range: conversion finds the ranges. An invalid index must be refused with InvalidRequest.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from attnserve_client import AsyncClient, InvalidRequest
from attnserve_client.bench.lengths import Lengths
from attnserve_client.bench.workload import RequestOptions, of_lengths
from attnserve_client.data_types import IndexRange
from attnserve_server.app import Application
from attnserve_server.config import Settings
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from index_graphs import encoder
from onnx import TensorProto, helper
from tokenizers import Tokenizer, models, pre_tokenizers, processors

LENGTH = 3
LEGAL = {
    "input_ids": np.array([1, 29, 0]),
    "position_ids": np.array([0, 17, -1], np.int32),
    "token_type_ids": np.zeros(LENGTH, np.int64),
    "categories": np.array([[6, 3], [0, 0], [-7, -4]]),
    "language_id": np.array(4),
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("indices")
    file = folder / "indices.onnx"
    file.write_bytes(encoder().SerializeToString())
    prepare_bundle(PrepareRequest(file=file, name="indices", repository=folder / "models", max_length=16))
    return folder / "models"


@pytest.fixture
async def client(repository: Path) -> AsyncIterator[AsyncClient]:
    application = Application(Settings(repository=repository, grpc_port=0, http_port=0))
    await application.start()
    async with AsyncClient(f"127.0.0.1:{application.grpc_port}") as opened:
        yield opened
    await application.aclose()


async def test_valid_indices_are_answered(client: AsyncClient) -> None:
    (result,) = await client.infer("indices", [LEGAL])
    assert result.outputs["hidden"].shape == (LENGTH, 8)


@pytest.mark.parametrize(
    ("name", "place", "number", "description"),
    [
        ("input_ids", 1, 30, "element 1 is 30; values of input 'input_ids' must be from 0 to 29"),
        ("position_ids", 2, 18, "element 2 is 18; values of input 'position_ids' must be from -22 to 17"),
        ("position_ids", 0, -23, "element 0 is -23; values of input 'position_ids' must be from -22 to 17"),
        ("token_type_ids", 1, 1, "element 1 is 1; values of input 'token_type_ids' must be from 0 to 0"),
        ("categories", (1, 0), 7, "element 2 is 7; values of column 0 of input 'categories' must be from -7 to 6"),
        ("categories", (2, 1), 4, "element 5 is 4; values of column 1 of input 'categories' must be from -4 to 3"),
        ("language_id", (), 5, "element 0 is 5; values of input 'language_id' must be from -5 to 4"),
        ("language_id", (), 2**62, f"element 0 is {2**62}; values of input 'language_id' must be from -5 to 4"),
    ],
)
async def test_invalid_indices_are_refused_with_element_value_and_range(
    client: AsyncClient, name: str, place: int | tuple[int, ...], number: int, description: str
) -> None:
    wrong = {**LEGAL, name: LEGAL[name].copy()}
    wrong[name][place] = number
    with pytest.raises(InvalidRequest) as refused:
        await client.infer("indices", [LEGAL, wrong])
    (violation,) = refused.value.violations
    assert violation.field.startswith("sequences[1].tensors.tensors[")
    assert violation.field.endswith(".data")
    assert violation.description == description


async def test_get_model_returns_the_index_ranges(client: AsyncClient) -> None:
    declared = {spec.name: spec.index_ranges for spec in (await client.model("indices")).inputs}
    assert declared == {
        "input_ids": (),
        "position_ids": (IndexRange(-22, 17),),
        "token_type_ids": (IndexRange(0, 0),),
        "categories": (IndexRange(-7, 6, 0), IndexRange(-4, 3, 1)),
        "language_id": (IndexRange(-5, 4),),
    }


async def test_random_requests_of_the_bench_are_valid(client: AsyncClient) -> None:
    model = await client.model("indices")
    workload = of_lengths(model, Lengths.parse("uniform:3,9"), RequestOptions(), seed=1, kinds=4)
    for request in workload.requests:
        await client._calls.call(lambda stub: stub.Infer, request, None)


async def test_negative_positions_count_from_the_sequences_own_end(tmp_path: Path) -> None:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("GatherND", ["doubled", "place"], ["y"], batch_dims=1)],
        "picking",
        [info("x", TensorProto.FLOAT, ["batch", "seq", 4]), info("place", TensorProto.INT64, ["batch", 1])],
        [info("y", TensorProto.FLOAT, ["batch", 4])],
    )
    graph.node.insert(0, helper.make_node("Add", ["x", "x"], ["doubled"]))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    (tmp_path / "pick.onnx").write_bytes(model.SerializeToString())
    prepare_bundle(
        PrepareRequest(file=tmp_path / "pick.onnx", name="pick", repository=tmp_path / "models", max_length=16)
    )
    settings = {"instances": 1, "run_overhead_tokens": 1_000_000}
    application = Application(Settings(repository=tmp_path / "models", grpc_port=0, http_port=0, **settings))
    await application.start()
    async with AsyncClient(f"127.0.0.1:{application.grpc_port}") as client:
        made = [
            {"x": np.random.default_rng(length).normal(size=(length, 4)).astype(np.float32), "place": np.array([place])}
            for length, place in ((9, 8), (3, -1), (3, 2), (5, -5))
        ]
        results = await client.infer("pick", made)
        [declared] = (await client.model("pick")).inputs[1].index_ranges
        with pytest.raises(InvalidRequest, match="element 0 is 3; values of input 'place' must be from -3 to 2"):
            await client.infer("pick", [made[0], {**made[1], "place": np.array([3])}])
    await application.aclose()
    assert declared == IndexRange(0, -1, None, "seq")
    # Positions in requests are not proved to be a sequence's own: only the two of one length share a run.
    assert {result.run.batch_size for result in results} == {1, 2}
    for given, result in zip(made, results, strict=True):
        np.testing.assert_array_equal(result.outputs["y"], 2 * given["x"][given["place"][0]])


async def test_a_second_text_is_refused_if_the_model_has_one_segment(tmp_path: Path, repository: Path) -> None:
    vocabulary = {f"w{number}": number for number in range(30)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = encoder()
    graph = model.graph
    for name in ("position_ids", "categories", "language_id"):
        del graph.input[[value.name for value in graph.input].index(name)]
    kept = {"words", "segments"}
    nodes = [node for node in graph.node if node.input[0] in kept or node.op_type == "Attention"]
    nodes.insert(2, type(nodes[0])(op_type="Add", input=["word", "segment"], output=["embedded"]))
    del graph.node[:]
    graph.node.extend(nodes)
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in kept]:
        graph.initializer.remove(tensor)
    file = tmp_path / "segments.onnx"
    file.write_bytes(model.SerializeToString())
    request = PrepareRequest(
        file=file, name="one", repository=tmp_path / "models", tokenizer=tmp_path / "tokenizer.json", max_length=16
    )
    prepare_bundle(request)
    application = Application(Settings(repository=tmp_path / "models", grpc_port=0, http_port=0))
    await application.start()
    async with AsyncClient(f"127.0.0.1:{application.grpc_port}") as client:
        (answered,) = await client.infer("one", ["w1 w2"])
        with pytest.raises(
            InvalidRequest, match="element 2 is 1; values of input 'token_type_ids' must be from 0 to 0"
        ):
            await client.infer("one", [("w1 w2", "w3")])
    await application.aclose()
    assert answered.outputs["hidden"].shape == (2, 8)
