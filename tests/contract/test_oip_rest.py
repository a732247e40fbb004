"""The Open Inference Protocol over HTTP: the answers of its gRPC form, as JSON and as bytes after it.

Needs the fixtures of tests/contract/conftest.py. A model `wild`, made here, has outputs that JSON has no numbers for.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import pytest
from attnserve.oip import open_inference_pb2 as oip
from attnserve_server.app import Application
from attnserve_server.config import Settings
from attnserve_server.domain.errors import Overloaded
from attnserve_server.model.manifest import InputSpec, OutputSpec
from attnserve_server.model.repository import write_bundle
from attnserve_server.observability.spec import HTTP_REQUESTS
from attnserve_server.transport.oip.layout import TIMINGS
from attnserve_server.transport.oip.servicer import SERVICE
from attnserve_server.transport.rest.oip_bodies import JSON_BYTES
from gated import Gate, until
from google.protobuf import json_format
from http_calls import Answer, call, head
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from tiny_bundle import HEADS, WIDTH, tiny_graph, tiny_manifest

IDS = np.array([[2, 4, 5, 3], [2, 6, 3, 0]], np.int64)
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], np.int64)
INFER = "/v2/models/tiny/infer"
NUMPY = {"FP32": "<f4", "INT64": "<i8", "FP16": "<f2", "BOOL": "?"}


def tensor(name: str, array: np.ndarray, **fields: Any) -> dict[str, Any]:
    return {"name": name, "shape": list(array.shape), "datatype": "INT64", **fields}


def as_json(*, nested: bool = False, ids: np.ndarray = IDS, mask: np.ndarray = MASK, **fields: Any) -> dict[str, Any]:
    """A request whose tensors are JSON."""
    pairs = (("input_ids", ids), ("attention_mask", mask))
    data = [(name, one, one.tolist() if nested else one.ravel().tolist()) for name, one in pairs]
    return {"inputs": [tensor(name, one, data=values) for name, one, values in data], **fields}


def as_bytes(*, ids: np.ndarray = IDS, mask: np.ndarray = MASK, **fields: Any) -> tuple[bytes, dict[str, str]]:
    """A request whose tensors follow the JSON, and its header."""
    pairs = (("input_ids", ids), ("attention_mask", mask))
    inputs = [tensor(name, one, parameters={"binary_data_size": one.nbytes}) for name, one in pairs]
    return with_bytes({"inputs": inputs, **fields}, ids.tobytes() + mask.tobytes())


def with_bytes(sent: object, after: bytes) -> tuple[bytes, dict[str, str]]:
    top = json.dumps(sent).encode()
    return top + after, {JSON_BYTES: str(len(top)), "content-type": "application/octet-stream"}


def outputs_of(answer: Answer) -> dict[str, np.ndarray]:
    """The outputs of an answer, JSON or bytes."""
    assert answer.status == 200, answer.body
    size = int(answer.headers.get(JSON_BYTES, len(answer.body)))
    found, at = {}, size
    for one in json.loads(answer.body[:size])["outputs"]:
        count = one.get("parameters", {}).get("binary_data_size")
        if count is None:
            array = np.array(one["data"], NUMPY[one["datatype"]])
        else:
            array = np.frombuffer(answer.body[at : at + count], NUMPY[one["datatype"]])
            at += count
        found[one["name"]] = array.reshape(one["shape"])
    assert at == len(answer.body)
    return found


def top_of(answer: Answer) -> dict[str, Any]:
    return json.loads(answer.body[: int(answer.headers.get(JSON_BYTES, len(answer.body)))])


async def over_grpc(server: Application, method: str, request: Any, reply: Any) -> Any:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        return reply.FromString(await channel.unary_unary(f"/{SERVICE}/{method}")(request.SerializeToString()))


async def post(server: Application, sent: object, path: str = INFER, **headers: str) -> Answer:
    return await call(
        server.rest_port, "POST", path, sent, {key.replace("_", "-"): one for key, one in headers.items()}
    )


async def get(server: Application, path: str) -> Answer:
    return await call(server.rest_port, "GET", path)


async def test_all_forms_of_one_request_equal_grpc_bit_for_bit(server: Application) -> None:
    message = oip.ModelInferRequest(model_name="tiny")
    for name, array in (("input_ids", IDS), ("attention_mask", MASK)):
        message.inputs.add(name=name, datatype="INT64", shape=array.shape)
        message.raw_input_contents.append(array.tobytes())
    wanted = await over_grpc(server, "ModelInfer", message, oip.ModelInferResponse)
    names = [one.name for one in wanted.outputs]
    body, headers = as_bytes(parameters={"binary_data_output": True})
    answers = [
        await post(server, as_json()),
        await post(server, as_json(nested=True)),
        await post(server, as_json(), "/v2/models/tiny/versions/2/infer"),
        await call(server.rest_port, "POST", INFER, body, headers),
    ]
    for answer in answers:
        found = outputs_of(answer)
        assert list(found) == names == ["hidden", "embedding", "lengths"]
        assert [one.tobytes() for one in found.values()] == list(wanted.raw_output_contents)
        assert (top_of(answer)["model_name"], top_of(answer)["model_version"]) == ("tiny", "2")
    assert JSON_BYTES not in answers[0].headers
    assert answers[3].headers["content-type"] == "application/octet-stream"


async def test_each_output_chooses_its_form(server: Application) -> None:
    chosen = [{"name": "embedding", "parameters": {"binary_data": False}}, {"name": "hidden"}, {"name": "lengths"}]
    sent = as_json(outputs=chosen, parameters={"binary_data_output": True})
    answer = await post(server, sent)
    embedding, hidden, _ = top_of(answer)["outputs"]
    assert len(embedding["data"]) == 2 * WIDTH
    assert "data" not in hidden
    plain = outputs_of(await post(server, as_json()))
    assert all(one.tobytes() == plain[name].tobytes() for name, one in outputs_of(answer).items())


async def test_texts_are_strings_or_bytes(server: Application) -> None:
    texts = ["the cat", "the cat sat on a mat"]
    flat = {"name": "text", "shape": [2], "datatype": "BYTES", "data": texts}
    column = {**flat, "shape": [2, 1], "data": [[one] for one in texts]}
    data = b"".join(len(one).to_bytes(4, "little") + one.encode() for one in texts)
    sized = {"name": "text", "shape": [2, 1], "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}
    body, headers = with_bytes({"inputs": [sized]}, data)
    answers = [await post(server, {"inputs": [one]}) for one in (flat, column)]
    answers.append(await call(server.rest_port, "POST", INFER, body, headers))
    first = outputs_of(answers[0])
    assert first["lengths"].tolist() == [4, 8]
    assert all(outputs_of(one)["hidden"].tobytes() == first["hidden"].tobytes() for one in answers)


async def test_attention_is_returned_by_name_only(server: Application) -> None:
    found = outputs_of(await post(server, as_json(outputs=[{"name": "attention:1"}])))["attention:1"]
    assert found.shape == (2, HEADS, 4, 4)
    np.testing.assert_allclose(found[0].sum(axis=-1), 1, atol=1e-5)  # weights of one query, float32
    links = [{"name": f"attention:0:{part}"} for part in ("query", "key", "weight")]
    found = outputs_of(await post(server, as_json(outputs=links, parameters={"top_k": 3})))
    assert {name: one.shape for name, one in found.items()} == {one["name"]: (2, 3) for one in links}


async def test_an_answer_states_where_its_time_went(server: Application) -> None:
    message = oip.ModelInferRequest(model_name="tiny", outputs=[{"name": "attention:0"}])
    contents = oip.InferTensorContents(bytes_contents=[b"the cat"])
    message.inputs.add(name="text", datatype="BYTES", shape=[1], contents=contents)
    answer = await over_grpc(server, "ModelInfer", message, oip.ModelInferResponse)
    over_http = top_of(await post(server, as_json(outputs=[{"name": "attention:0"}])))["parameters"]
    for found in ({name: one.int64_param for name, one in answer.parameters.items()}, over_http):
        assert tuple(found) == TIMINGS or set(found) == set(TIMINGS)
        assert found["compute_ns"] > 0
        assert found["attention_ns"] > 0
        assert all(0 <= one < 60e9 for one in found.values())


async def test_an_id_is_repeated_and_names_the_request(server: Application) -> None:
    answer = await post(server, as_json(id="mine"))
    assert (top_of(answer)["id"], answer.headers["x-request-id"]) == ("mine", "mine")
    other = await post(server, as_json(id="mine"), x_request_id="header")
    assert (top_of(other)["id"], other.headers["x-request-id"]) == ("mine", "header")
    assert "id" not in top_of(await post(server, as_json()))
    failed = await post(server, as_json(id="mine", outputs=[{"name": "x"}]))
    assert (failed.json["request_id"], failed.headers["x-request-id"]) == ("mine", "mine")


def text(**fields: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"], **fields}]}


def first(**fields: Any) -> dict[str, Any]:
    sent = as_json()
    sent["inputs"][0] |= fields
    return sent


def sized(size: Any, after: bytes = b"", **fields: Any) -> tuple[bytes, dict[str, str]]:
    given = tensor("input_ids", IDS, parameters={"binary_data_size": size}, **fields)
    return with_bytes({"inputs": [given]}, after)


BROKEN: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{", "body: no JSON"),
    "no inputs": ({"inputs": []}, "inputs: empty"),
    "inputs left out": ({}, "missing required field `inputs`"),
    "an unknown field": (as_json(colour=1), "unknown field `colour`"),
    "an unknown field of an input": (first(colour=1), "unknown field `colour`"),
    "another model": (as_json(model_name="plain"), "model_name: 'plain', but the path has 'tiny'"),
    "no data": ({"inputs": [tensor("input_ids", IDS)]}, "inputs[0].data: missing"),
    "few elements": (first(data=[1, 2]), "inputs[0].data: 2 elements, but shape is [2, 4]"),
    "another nesting": (first(data=IDS.T.tolist()), "inputs[0].data: lists of shape [4, 2], but shape is [2, 4]"),
    "ragged lists": (first(data=[[1, 2], [3]]), "inputs[0].data: lists of different lengths"),
    "a fraction": (first(data=[0.5] * 8), "inputs[0].data[0]: Expected `int`, got `float`"),
    "a string": (first(data=["1"] * 8), "inputs[0].data[0]: Expected `int`, got `str`"),
    "a truth value": (first(data=[True] * 8), "inputs[0].data[0]: Expected `int`, got `bool`"),
    "a number beyond the datatype": (first(data=[2**63] + [0] * 7), "inputs[0].data: a number is out of the range"),
    "deep lists": (b'{"inputs": [{"name": "input_ids", "shape": [1], "datatype": "INT64", "data": '
                   + b"[" * 400 + b"1" + b"]" * 400 + b"}]}", "inputs[0].data"),
    "a long string among numbers": (first(data=["x" * 20_000] + [1] * 20_000), "inputs[0].data[0]: Expected `int`"),
    "no shape": (first(shape=[]), "inputs[0]"),
    "other rows": (first(shape=[4, 2]), "inputs[1].shape[0]: 2 rows, but input 'input_ids' has 4"),
    "a negative length": (first(shape=[2, -4]), "inputs[0]"),
    "a length beyond int64": (first(shape=[2, 2**63]), "inputs[0].shape[1]"),
    "another datatype": (first(datatype="INT32"), "inputs[0].datatype: INT32, but input 'input_ids' is INT64"),
    "an unknown datatype": (first(datatype="float"), "inputs[0].datatype: 'float', but input"),
    "half precision in JSON": (first(datatype="FP16"), "inputs[0].data: FP16 is not read from JSON"),
    "bfloat16 in JSON": (first(datatype="BF16"), "inputs[0].data: BF16 is not read from JSON"),
    "an unknown input": (first(name="words"), "inputs[0].name: row 0: no input 'words'"),
    "an unknown output": (as_json(outputs=[{"name": "logits"}]), "outputs[0]: no output 'logits'"),
    "an output twice": (as_json(outputs=[{"name": "hidden"}] * 2), "outputs: an output is requested twice"),
    "a sequence": (as_json(parameters={"sequence_id": 4}), "parameters['sequence_id']: not supported"),
    "shared memory": (
        first(parameters={"shared_memory_region": "x"}),
        "inputs[0].parameters['shared_memory_region']: not supported",
    ),
    "classes": (
        as_json(outputs=[{"name": "hidden", "parameters": {"classification": 2}}]),
        "outputs[0].parameters['classification']: not supported",
    ),
    "an unknown parameter": (as_json(parameters={"colour": "red"}), "parameters['colour']: unknown"),
    "a parameter of another type": (as_json(parameters={"priority": [1]}), "parameters"),
    "a priority": (as_json(parameters={"priority": "high"}), "parameters['priority']: 'high' is no integer"),
    "binary outputs": (as_json(parameters={"binary_data_output": 1}), "['binary_data_output']: '1' is neither"),
    "a binary output": (
        as_json(outputs=[{"name": "hidden", "parameters": {"binary_data": "yes"}}]),
        "outputs[0].parameters['binary_data']: 'yes' is neither",
    ),
    "an id": (as_json(id="ü"), "request_id: not printable ASCII"),
    "half of a pair": (b'{"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["\\ud800"]}]}', ""),
    "texts of numbers": (text(data=[1]), "inputs[0].data[0]: Expected `str`, got `int`"),
    "texts of another shape": (text(shape=[1, 2]), "inputs[0].data: 1 elements, but shape is [1, 2]"),
    "too many rows": (
        as_json(ids=np.full((9, 2), 5), mask=np.ones((9, 2), np.int64)),
        "inputs[0].shape[0]: 9 rows are not from 1 to 8",
    ),
    "bytes without the header": ({"inputs": [tensor("input_ids", IDS, parameters={"binary_data_size": 64})]},
                                 "inputs[0].parameters['binary_data_size']: 64, but 0 bytes are left"),
    "few bytes": (sized(64, b"1234"), "inputs[0].parameters['binary_data_size']: 64, but 4 bytes are left"),
    "many bytes": (sized(64, bytes(70)), "body: 6 bytes after those of the inputs"),
    "a negative size": (sized(-1), "inputs[0].parameters['binary_data_size']: '-1' is no number of bytes"),
    "a size that is true": (sized(True), "'True' is no number of bytes"),
    "a size and data": (sized(64, bytes(64), data=[1]), "set beside data"),
    "bytes of another shape": (sized(8, bytes(8)), "inputs[0]: 8 bytes; shape [2, 4] of INT64 needs 64"),
    "a header beyond the body": ((b"{}", {JSON_BYTES: "3"}), f"{JSON_BYTES}: 3 exceeds the 2 bytes of the body"),
    "a header of zero": ((b"{}", {JSON_BYTES: "0"}), f"{JSON_BYTES}: '0' is no positive number"),
    "a header of words": ((b"{}", {JSON_BYTES: "ten"}), f"{JSON_BYTES}: 'ten' is no positive number"),
    "a string that is cut off": (
        with_bytes({"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES",
                                "parameters": {"binary_data_size": 5}}]}, b"\x09\x00\x00\x00a"),
        "inputs[0]: string 0 is cut off",
    ),
}  # fmt: skip


async def test_what_is_wrong_is_named_in_the_terms_of_the_protocol(server: Application) -> None:
    for case, (sent, expected) in BROKEN.items():
        body, headers = sent if isinstance(sent, tuple) else (sent, {})
        answer = await call(server.rest_port, "POST", INFER, body, headers)
        assert (answer.status, answer.json["reason"]) == (400, "INVALID_REQUEST"), (case, answer.body)
        assert expected in answer.json["error"], case
        assert answer.json.keys() == {"error", "reason", "request_id"}


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("none/infer", "MODEL_NOT_FOUND"),
        ("tiny/versions/9/infer", "MODEL_NOT_FOUND"),
        ("tiny/infer/", "PATH_NOT_FOUND"),
    ],
)
async def test_what_is_not_there_is_not_found(server: Application, path: str, reason: str) -> None:
    answer = await post(server, as_json(), f"/v2/models/{path}")
    assert (answer.status, answer.json["reason"]) == (404, reason)


async def test_a_compressed_body_is_refused(server: Application) -> None:
    answer = await post(server, as_json(), content_encoding="gzip")
    assert (answer.status, answer.json["reason"]) == (415, "UNSUPPORTED_MEDIA_TYPE")


@pytest.mark.parametrize("path", [INFER, "/v2/repository/index", "/v2/repository/models/tiny/unload"])
async def test_pages_of_browsers_need_a_type_that_they_may_not_send_unasked(server: Application, path: str) -> None:
    for page in ({"origin": "https://a.example"}, {"sec_fetch_site": "cross-site"}):
        for kind in ("", "text/plain", "application/octet-stream"):
            answer = await post(server, {}, path, content_type=kind, **page)
            assert (answer.status, answer.json["reason"]) == (415, "UNSUPPORTED_MEDIA_TYPE")
        assert (await post(server, {}, path, **page)).status != 415
    for kind in ("", "application/octet-stream"):  # as clients of the protocol send JSON
        assert (await post(server, {}, path, content_type=kind)).status != 415


async def test_the_timeout_is_the_deadline(server: Application, gate: Gate) -> None:
    answer = await post(server, as_json(parameters={"timeout": 200_000}))
    assert (answer.status, answer.json["reason"]) == (504, "DEADLINE_EXPIRED")
    assert gate.waiting[0].ended
    longest = asyncio.create_task(post(server, as_json(parameters={"timeout": 2**63 - 1})))
    await until(lambda: len(gate.waiting) == 2)
    gate.release(1)
    assert (await longest).status == 200


async def test_a_client_that_leaves_cancels_its_request(server: Application, gate: Gate) -> None:
    body = json.dumps(as_json()).encode()
    _, writer = await asyncio.open_connection("127.0.0.1", server.rest_port)
    writer.write(head("POST", INFER, {"host": "a", "content-length": str(len(body))}) + body)
    await until(lambda: bool(gate.waiting))
    writer.transport.abort()
    await until(lambda: gate.waiting[0].ended)
    counter = server.metrics.counter(HTTP_REQUESTS)
    await until(lambda: bool(counter.labels("/v2/models/{name}/infer", "499").value))


async def test_overload_is_refused_before_work(server: Application, gate: Gate) -> None:
    gate.full = Overloaded("queue_full", 1, 2, 1.5)
    answer = await post(server, as_json())
    assert (answer.status, answer.json["reason"], answer.headers["retry-after"]) == (429, "OVERLOADED", "2")
    assert (gate.refused, gate.waiting) == (1, [])


async def test_bodies_and_answers_are_bounded_in_memory(server: Application) -> None:
    held, unread = server.rest._rest.bodies, server.grpc.unread
    held.take(held._budget)
    assert (await post(server, as_json())).status == 429
    held.give(held._budget)
    body, headers = as_bytes()
    assert (await call(server.rest_port, "POST", INFER, body, headers)).status == 200
    assert (held._taken, unread.bytes) == (0, 0)


async def test_statistics_count_both_protocols(server: Application) -> None:
    await post(server, as_json())
    await post(server, as_json(outputs=[{"name": "none"}]))
    message = oip.ModelInferRequest(model_name="tiny")
    message.inputs.add(name="input_ids", datatype="INT64", shape=IDS.shape)
    message.raw_input_contents.append(IDS.tobytes())
    await over_grpc(server, "ModelInfer", message, oip.ModelInferResponse)
    (found,) = (await get(server, "/v2/models/tiny/versions/2/stats")).json["model_stats"]
    assert found["inference_count"] == 4
    assert (found["inference_stats"]["success"]["count"], found["inference_stats"]["fail"]["count"]) == (2, 1)
    assert found["inference_stats"]["fail"]["ns"] == 0
    assert len((await get(server, "/v2/models/stats")).json["model_stats"]) == 3


DESCRIBED: dict[str, tuple[str, Any, Any]] = {
    "/v2": ("ServerMetadata", oip.ServerMetadataRequest(), oip.ServerMetadataResponse),
    "/v2/models/tiny": ("ModelMetadata", oip.ModelMetadataRequest(name="tiny"), oip.ModelMetadataResponse),
    "/v2/models/tiny/versions/1": (
        "ModelMetadata", oip.ModelMetadataRequest(name="tiny", version="1"), oip.ModelMetadataResponse,
    ),
    "/v2/models/tiny/config": ("ModelConfig", oip.ModelConfigRequest(name="tiny"), oip.ModelConfigResponse),
    "/v2/models/tiny/stats": ("ModelStatistics", oip.ModelStatisticsRequest(name="tiny"), oip.ModelStatisticsResponse),
}  # fmt: skip


@pytest.mark.parametrize("path", DESCRIBED)
async def test_descriptions_are_those_of_grpc(server: Application, path: str) -> None:
    method, request, reply = DESCRIBED[path]
    found = (await get(server, path)).json
    wanted = await over_grpc(server, method, request, reply)
    wanted = wanted.config if path.endswith("config") else wanted
    assert json_format.ParseDict(found, type(wanted)()) == wanted
    if path.endswith("config"):
        assert found["input"][0] == {"name": "input_ids", "data_type": "TYPE_INT64", "dims": [-1], "optional": False}


async def test_live_ready_and_the_index(server: Application) -> None:
    assert (await get(server, "/v2/health/live")).json == {"live": True}
    assert (await get(server, "/v2/health/ready")).json == {"ready": True}
    assert (await get(server, "/v2/models/tiny/ready")).json == {"name": "tiny", "ready": True}
    assert "binary_tensor_data" in (await get(server, "/v2")).json["extensions"]
    for sent in (None, b"", {}, {"ready": True}):
        found = (await call(server.rest_port, "POST", "/v2/repository/index", sent)).json
        assert [(one["name"], one["version"], one["state"]) for one in found] == [
            ("plain", "1", "READY"), ("tiny", "1", "READY"), ("tiny", "2", "READY")
        ]  # fmt: skip
    server.health.drain()
    answer = await get(server, "/v2/health/ready")
    assert (answer.status, answer.json["reason"], answer.headers["retry-after"]) == (503, "NOT_SERVING", "1")
    assert (await get(server, "/v2/health/live")).status == 200


async def test_models_are_not_changed_without_admin(server: Application) -> None:
    for change in ("load", "unload"):
        answer = await post(server, {}, f"/v2/repository/models/tiny/{change}")
        assert (answer.status, answer.json["reason"]) == (501, "UNSUPPORTED")
        assert "--admin" in answer.json["error"]


async def test_models_are_loaded_and_unloaded_with_admin(settings: Settings) -> None:
    server = Application(settings.model_copy(update={"admin": True}))
    await server.start()
    try:
        sent = {"parameters": {"unload_dependents": False}}
        assert (await post(server, sent, "/v2/repository/models/tiny/unload")).status == 200
        assert (await post(server, as_json())).status == 404
        assert (await get(server, "/v2/models/tiny/ready")).status == 404
        assert (await call(server.rest_port, "POST", "/v2/repository/models/tiny/load")).json == {}
        assert (await post(server, as_json())).status == 200
        refused = await post(server, {"parameters": {"config": "{}"}}, "/v2/repository/models/tiny/load")
        assert (refused.status, refused.json["error"]) == (400, "parameters['config']: not supported: leave it out")
        assert (await post(server, {}, "/v2/repository/models/none/load")).status == 404
    finally:
        await server.aclose()


@pytest.fixture
async def wild(settings: Settings, tmp_path: Path, tiny_files: dict[str, Path]) -> AsyncIterator[Application]:
    """A server of one model whose outputs are `half`, float16, and `wild`: infinities."""
    graph = tiny_graph()
    values = np.array([[np.inf, -np.inf, 0.1]], np.float32)
    graph.graph.initializer.append(numpy_helper.from_array(values, "values"))
    graph.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "nothing"))
    graph.graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "first"))
    graph.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "second"))
    graph.graph.node.extend(
        [
            helper.make_node("Cast", ["embedding"], ["half"], to=TensorProto.FLOAT16),
            helper.make_node("Slice", ["embedding", "first", "second", "second"], ["column"]),
            helper.make_node("Mul", ["column", "nothing"], ["zeros"]),
            helper.make_node("Add", ["zeros", "values"], ["wild"]),
        ]
    )
    graph.graph.output.append(helper.make_tensor_value_info("half", TensorProto.FLOAT16, ["batch", WIDTH]))
    graph.graph.output.append(helper.make_tensor_value_info("wild", TensorProto.FLOAT, ["batch", 3]))
    onnx.save(graph, tmp_path / "wild.onnx")
    tiny = tiny_manifest("wild")
    outputs = (
        *tiny.outputs,
        OutputSpec(name="half", dtype="float16", shape=(WIDTH,)),
        OutputSpec(name="wild", dtype="float32", shape=(3,)),
    )
    manifest = tiny.model_copy(update={"outputs": outputs})
    write_bundle(tmp_path / "models", manifest, {**tiny_files, "model.onnx": tmp_path / "wild.onnx"})
    server = Application(settings.model_copy(update={"repository": tmp_path / "models"}))
    await server.start()
    yield server
    await server.aclose()


async def test_half_precision_is_answered_as_bytes_alone(wild: Application) -> None:
    path = "/v2/models/wild/infer"
    refused = await post(wild, as_json(), path)
    assert refused.status == 400
    assert "outputs: 'half' is FP16, which is not sent as JSON: set binary_data_output to true" in refused.json["error"]
    chosen = [{"name": "embedding"}, {"name": "half"}]
    refused = await post(wild, as_json(outputs=chosen), path)
    assert "outputs[1]: 'half' is FP16, which is not sent as JSON: set binary_data to true" in refused.json["error"]
    chosen[1]["parameters"] = {"binary_data": True}
    found = outputs_of(await post(wild, as_json(outputs=chosen), path))
    assert found["half"].tobytes() == found["embedding"].astype(np.float16).tobytes()


@pytest.fixture
async def echo(settings: Settings, tmp_path: Path) -> AsyncIterator[Application]:
    """A server of a model that returns its input, float32 of shape (batch, 3)."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "echo", ends[:1], ends[1:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "echo.onnx"
    )
    manifest = tiny_manifest("echo").model_copy(
        update={
            "text": None,
            "sites": (),
            "axes": (),
            "inputs": (InputSpec(name="x", dtype="float32", shape=(3,)),),
            "outputs": (OutputSpec(name="y", dtype="float32", shape=(3,)),),
        }
    )
    write_bundle(tmp_path / "models", manifest, {"model.onnx": tmp_path / "echo.onnx"})
    server = Application(settings.model_copy(update={"repository": tmp_path / "models"}))
    await server.start()
    yield server
    await server.aclose()


async def test_bfloat16_is_read_from_bytes_as_the_upper_half_of_a_float32(echo: Application) -> None:
    upper = np.array([[0x3F80, 0xC049, 0x0001], [0x7F7F, 0x8000, 0x3DCD]], np.uint16)  # 1.0, -3.14, the least, ...
    wanted = (upper.astype(np.uint32) << 16).view(np.float32)
    given = {"name": "x", "shape": [2, 3], "datatype": "BF16", "parameters": {"binary_data_size": upper.nbytes}}
    body, headers = with_bytes({"inputs": [given], "parameters": {"binary_data_output": True}}, upper.tobytes())
    over_http = outputs_of(await call(echo.rest_port, "POST", "/v2/models/echo/infer", body, headers))
    message = oip.ModelInferRequest(model_name="echo", raw_input_contents=[upper.tobytes()])
    message.inputs.add(name="x", datatype="BF16", shape=[2, 3])
    answer = await over_grpc(echo, "ModelInfer", message, oip.ModelInferResponse)
    assert over_http["y"].tobytes() == answer.raw_output_contents[0] == wanted.tobytes()


async def test_numbers_that_json_does_not_have_are_strings(wild: Application) -> None:
    answer = await post(wild, as_json(outputs=[{"name": "wild"}]), "/v2/models/wild/infer")
    assert answer.status == 200, answer.body
    [output] = top_of(answer)["outputs"]
    tenth = float(np.float32(0.1))
    assert output["data"] == ["Infinity", "-Infinity", tenth] * 2
    assert outputs_of(answer)["wild"][1].tolist() == [math.inf, -math.inf, tenth]


WORDS = st.sampled_from(
    ["", "input_ids", "attention_mask", "text", "INT64", "BYTES", "FP32", "FP16", "hidden", "attention:0"]
)
NAMES = WORDS | st.text(max_size=6)
LENGTHS = st.integers(-2, 9) | st.sampled_from([2**31, 2**63, -(2**63)])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | NAMES
DATA = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4), max_leaves=12)
PARAMETERS = st.dictionaries(
    st.sampled_from(["priority", "timeout", "top_k", "prompt_name", "sequence_id", "binary_data_size", "binary_data",
                     "binary_data_output", "classification"]) | st.text(max_size=4),
    SCALARS | DATA, max_size=3,
)  # fmt: skip
INPUTS = st.fixed_dictionaries(
    {"name": NAMES, "shape": st.lists(LENGTHS, max_size=4), "datatype": NAMES},
    optional={"data": DATA, "parameters": PARAMETERS},
)
BODIES = st.fixed_dictionaries(
    {"inputs": st.lists(INPUTS, max_size=3)},
    optional={
        "outputs": st.lists(st.fixed_dictionaries({"name": NAMES}, optional={"parameters": PARAMETERS}), max_size=3),
        "id": SCALARS,
        "parameters": PARAMETERS,
        "model_name": SCALARS,
    },
)


@st.composite
def bodies(draw: Callable[[st.SearchStrategy[Any]], Any]) -> tuple[str, bytes, dict[str, str]]:
    """Path, body and headers that may be anything: well formed, nearly so, or noise."""
    usual = st.sampled_from([as_json(), as_json(nested=True), text()])
    sent = draw(usual | BODIES)
    if draw(st.booleans()) and sent["inputs"]:
        sent = {**sent, "inputs": [{**sent["inputs"][0], **draw(INPUTS)}, *sent["inputs"][1:]]}
    data = bytearray(json.dumps(sent).encode())
    headers = {}
    if draw(st.booleans()):
        size = len(data) + draw(st.sampled_from([0, 0, 0, -1, 1]))
        headers[JSON_BYTES] = str(size) if draw(st.booleans()) else draw(st.text("0123456789-x ", max_size=21))
        data += draw(st.binary(max_size=70))
    for at in draw(st.lists(st.integers(0, len(data) - 1), max_size=2)):
        data[at] = draw(st.integers(0, 255))
    name = draw(st.sampled_from(["tiny", "tiny", "tiny/versions/1", "plain", "none", "tiny/versions/x", "%00", "%f0"]))
    return f"/v2/models/{name}/infer", bytes(data), headers


LEAKS = re.compile(r"Traceback|File \"|/[a-z_]+/[a-z_]+|\.py\b|0x[0-9a-f]{9,}|attnserve_server")
BENIGN = {200, 400, 404, 415, 429, 504}


async def test_no_body_is_answered_with_an_internal_error(server: Application) -> None:
    """Many bodies on one server; hypothesis draws them, and the calls run in the loop of the test."""
    drawn: list[tuple[str, bytes, dict[str, str]]] = []

    @given(bodies())
    @hypothesis_settings(
        max_examples=400, database=None, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
    )
    def draw(one: tuple[str, bytes, dict[str, str]]) -> None:
        drawn.append(one)

    draw()
    codes: Counter[int] = Counter()
    for path, body, headers in drawn:
        answer = await call(server.rest_port, "POST", path, body, headers)
        assert answer.status in BENIGN, (answer.body, body)
        if answer.status != 200:
            assert isinstance(answer.json["error"], str)
            assert not LEAKS.search(answer.json["error"].replace("/openapi.json", "")), answer.body
        codes[answer.status] += 1
    assert {200, 400, 404} <= codes.keys(), codes


@pytest.mark.parametrize(("path", "field"), [("/v2/models/tiny", "outputs"), ("/v2/models/tiny/config", "output")])
async def test_a_description_without_virtual_outputs_is_what_tools_can_request_together(
    server: Application, path: str, field: str
) -> None:
    answer = await call(server.rest_port, "GET", path, None, {"attnserve-outputs": "model"})
    assert [one["name"] for one in answer.json[field]] == ["hidden", "embedding", "lengths"]
    whole = await get(server, path)
    assert "attention:rollout" in [one["name"] for one in whole.json[field]], "the header is what leaves them out"
