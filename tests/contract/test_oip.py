"""The Open Inference Protocol over gRPC: the same answers and errors as the native API, in the protocol's form.

The server of tests/contract/conftest.py serves the tiny model; messages are of this project's own proto.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator

import grpc
import numpy as np
import pytest
from attnserve.oip import open_inference_pb2 as oip
from attnserve.v1 import attention_pb2
from attnserve.v1 import inference_service_pb2 as pb
from attnserve_server.app import Application
from attnserve_server.config import Settings
from attnserve_server.transport.oip.servicer import METHODS, SERVICE
from google.protobuf import descriptor_pool
from google.rpc import error_details_pb2, status_pb2
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny_bundle import HEADS, WIDTH

IDS = np.array([[2, 4, 5, 3], [2, 6, 3, 0]], np.int64)
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], np.int64)
Output = oip.ModelInferRequest.InferRequestedOutputTensor
NUMPY = {"FP32": "<f4", "INT64": "<i8"}


class Rpc:
    """Calls of a server, by method."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel

    async def __call__(self, method: str, request, reply):
        call = self.channel.unary_unary(f"/{SERVICE}/{method}", lambda one: one.SerializeToString(), reply.FromString)
        return await call(request, timeout=10)

    async def infer(self, request: oip.ModelInferRequest) -> oip.ModelInferResponse:
        return await self("ModelInfer", request, oip.ModelInferResponse)

    async def native(self, request: pb.InferRequest) -> pb.InferResponse:
        call = self.channel.unary_unary(
            "/attnserve.v1.InferenceService/Infer", lambda one: one.SerializeToString(), pb.InferResponse.FromString
        )
        return await call(request, timeout=10)

    def stream(self):
        return self.channel.stream_stream(
            f"/{SERVICE}/ModelStreamInfer", lambda one: one.SerializeToString(), oip.ModelStreamInferResponse.FromString
        )


@pytest.fixture
async def rpc(server: Application) -> AsyncIterator[Rpc]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        yield Rpc(channel)


def tensor_request(*outputs: str, model: str = "tiny", ids=IDS, mask=MASK, **fields) -> oip.ModelInferRequest:
    message = oip.ModelInferRequest(model_name=model, **fields)
    for name, array in (("input_ids", ids), ("attention_mask", mask)):
        if array is not None:
            message.inputs.add(name=name, datatype="INT64", shape=array.shape)
            message.raw_input_contents.append(array.tobytes())
    for name in outputs:
        message.outputs.add(name=name)
    return message


def text_request(*texts: str, pair: str = "", outputs=(), **fields) -> oip.ModelInferRequest:
    message = oip.ModelInferRequest(model_name="tiny", **fields)
    named = {"text": texts, **({"text_pair": [pair] * len(texts)} if pair else {})}
    for name, values in named.items():
        contents = oip.InferTensorContents(bytes_contents=[one.encode() for one in values])
        message.inputs.add(name=name, datatype="BYTES", shape=[len(values), 1], contents=contents)
    for name in outputs:
        message.outputs.add(name=name)
    return message


def arrays(answer: oip.ModelInferResponse) -> dict[str, np.ndarray]:
    return {
        one.name: np.frombuffer(raw, NUMPY[one.datatype]).reshape(one.shape)
        for one, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
    }


def native_of(ids: np.ndarray, **fields) -> pb.InferRequest:
    message = pb.InferRequest(model="tiny", **fields)
    tensor = message.sequences.add().tensors.tensors.add(name="input_ids", dtype=5, shape=ids.shape, data=ids.tobytes())
    del tensor
    return message


async def refused(call) -> tuple[str, str, list[str]]:
    """The code, the message and the invalid fields with which a call ends."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    details = dict(caught.value.trailing_metadata() or ())
    status = status_pb2.Status.FromString(details["grpc-status-details-bin"])
    fields: list[str] = []
    for detail in status.details:
        if detail.type_url.endswith("BadRequest"):
            found = error_details_pb2.BadRequest.FromString(detail.value)
            fields = [f"{one.field}: {one.description}" for one in found.field_violations]
    return caught.value.code().name, caught.value.details(), fields


def test_messages_are_in_a_private_pool() -> None:
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindMessageTypeByName("inference.ModelInferRequest")
    assert oip.DESCRIPTOR.pool.FindMessageTypeByName("inference.ModelInferRequest")


WORDS = st.sampled_from(
    ["", "input_ids", "attention_mask", "text", "tiny", "none", "INT64", "BYTES", "FP32", "BF16", "hidden"]
)
TEXTS = WORDS | st.text(max_size=8)
VALUES = st.one_of(
    st.builds(lambda value: oip.InferParameter(bool_param=value), st.booleans()),
    st.builds(lambda value: oip.InferParameter(int64_param=value), st.integers(-(2**63), 2**63 - 1)),
    st.builds(lambda value: oip.InferParameter(string_param=value), TEXTS),
    st.builds(lambda value: oip.InferParameter(double_param=value), st.floats()),
)
NAMES = st.sampled_from(["priority", "timeout", "top_k", "prompt_name", "sequence_id", "binary_data"]) | st.text(
    max_size=5
)
LENGTHS = st.integers(-2, 9) | st.sampled_from([2**31, 2**63 - 1, -(2**63)])


def contents(ids: list[int], small: list[int], floats: list[float], strings: list[bytes]) -> oip.InferTensorContents:
    return oip.InferTensorContents(
        int64_contents=ids, int_contents=small, fp32_contents=floats, bytes_contents=strings, bool_contents=[True]
    )  # fmt: skip


CONTENTS = st.builds(
    contents,
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=9),
    st.lists(st.integers(-(2**31), 2**31 - 1), max_size=2),
    st.lists(st.floats(width=32), max_size=2),
    st.lists(st.binary(max_size=6), max_size=3),
)


def tensor_of(name: str, datatype: str, shape: list[int], values, parameter) -> oip.ModelInferRequest.InferInputTensor:
    tensor = oip.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape, contents=values)
    if parameter is not None:
        tensor.parameters["x"].CopyFrom(parameter)
    return tensor


@st.composite
def messages(draw) -> bytes:
    """Bytes of a request that may be anything: well formed, nearly so, or noise."""
    message = oip.ModelInferRequest(
        model_name=draw(st.just("tiny") | TEXTS),
        model_version=draw(st.sampled_from(["", "", "1", "9", "x"])),
        id=draw(st.just("") | TEXTS),
        inputs=draw(
            st.lists(
                st.builds(
                    tensor_of, TEXTS, TEXTS, st.lists(LENGTHS, max_size=4), CONTENTS | st.none(), VALUES | st.none()
                ),
                max_size=3,
            )
        ),
        raw_input_contents=draw(st.lists(st.binary(max_size=32), max_size=3)),
        outputs=[
            Output(name=name)
            for name in draw(st.lists(TEXTS | st.sampled_from(["attention:0", "attention:rollout:key"]), max_size=3))
        ],
    )
    for name, value in draw(st.dictionaries(NAMES, VALUES, max_size=3)).items():
        message.parameters[name].CopyFrom(value)
    data = bytearray(message.SerializeToString())
    for at in draw(st.lists(st.integers(0, max(len(data) - 1, 0)), max_size=2)):
        if data:
            data[at] = draw(st.integers(0, 255))
    return bytes(data)


LEAKS = re.compile(r"Traceback|File \"|/[a-z_]+/[a-z_]+|\.py\b|0x[0-9a-f]{9,}")
BENIGN = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}


async def test_no_message_is_answered_with_an_internal_error(server: Application) -> None:
    """Many messages on one server; hypothesis draws them, and the calls run in the loop of the test."""
    drawn: list[bytes] = []

    @given(messages())
    @hypothesis_settings(
        max_examples=300, database=None, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
    )
    def draw(data: bytes) -> None:
        drawn.append(data)

    draw()
    assert len(drawn) > 100
    codes: Counter[str] = Counter()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        for data in drawn:
            call = channel.unary_unary(f"/{SERVICE}/ModelInfer")(data, timeout=20)
            code, text = (await call.code()).name, await call.details() or ""
            assert code in BENIGN, (code, text, data)
            assert not LEAKS.search(text), text
            codes[code] += 1
        call = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer", None, oip.ModelStreamInferResponse.FromString)()
        for data in drawn[:100]:
            await call.write(data)
            answer = await call.read()
            code = answer.error_message.split(": ")[0] or "OK"
            assert code in BENIGN, answer.error_message
            assert not LEAKS.search(answer.error_message)
        await call.done_writing()
        assert await call.code() is grpc.StatusCode.OK
    assert {"INVALID_ARGUMENT", "NOT_FOUND"} <= codes.keys()


async def test_rows_of_a_padded_batch_are_answered_as_if_each_came_alone(rpc: Rpc) -> None:
    answer = await rpc.infer(tensor_request(id="seven"))
    found = arrays(answer)
    assert (answer.model_name, answer.model_version, answer.id) == ("tiny", "2", "seven")
    assert list(found) == ["hidden", "embedding", "lengths"]
    assert found["hidden"].shape == (2, 4, WIDTH)
    assert found["lengths"].tolist() == [4, 3]
    assert not found["hidden"][1, 3].any()
    for row, length in enumerate((4, 3)):
        alone = await rpc.native(native_of(IDS[row, :length]))
        hidden, embedding = (np.frombuffer(one.data, "<f4") for one in alone.results[0].outputs)
        # 1e-4 of values of about 1: batches of other shapes may round otherwise.
        np.testing.assert_allclose(found["hidden"][row, :length].ravel(), hidden, atol=1e-4)
        np.testing.assert_allclose(found["embedding"][row], embedding, atol=1e-4)


async def test_a_row_alone_is_bit_for_bit_the_native_answer(rpc: Rpc) -> None:
    found = arrays(await rpc.infer(tensor_request(ids=IDS[:1], mask=None)))
    native = await rpc.native(native_of(IDS[0]))
    assert found["hidden"].tobytes() == native.results[0].outputs[0].data
    assert found["embedding"].tobytes() == native.results[0].outputs[1].data


async def test_a_row_is_padded_to_the_length_of_the_request(rpc: Rpc) -> None:
    found = arrays(await rpc.infer(tensor_request(ids=IDS[1:], mask=MASK[1:])))
    assert found["hidden"].shape == (1, 4, WIDTH)
    assert found["lengths"].tolist() == [3]


async def test_typed_contents_equal_raw_ones(rpc: Rpc) -> None:
    raw = tensor_request("embedding")
    typed = oip.ModelInferRequest(model_name="tiny", outputs=raw.outputs)
    for name, array in (("input_ids", IDS), ("attention_mask", MASK)):
        contents = oip.InferTensorContents(int64_contents=array.ravel().tolist())
        typed.inputs.add(name=name, datatype="INT64", shape=array.shape, contents=contents)
    first, second = await rpc.infer(raw), await rpc.infer(typed)
    assert first.raw_output_contents == second.raw_output_contents


async def test_large_tensors_are_read_from_views(rpc: Rpc) -> None:
    rows, length = 8, 32
    ids = np.full((rows, length), 5, np.int64)
    message = tensor_request("embedding", ids=ids, mask=np.ones_like(ids))
    expected = arrays(await rpc.infer(message))["embedding"]
    # Strings are not structure: they make the message large enough for views, and the server refuses nothing.
    message.inputs.add(name="ghost", datatype="FP32", shape=[rows, 2**15])
    message.raw_input_contents.append(bytes(rows * 2**17))
    code, _, fields = await refused(rpc.infer(message))
    assert code == "INVALID_ARGUMENT"
    assert any(field.startswith("inputs[2].name: row 0: no input 'ghost'") for field in fields)
    assert expected.shape == (rows, WIDTH)


async def test_texts_are_rows_and_padded_to_the_longest(rpc: Rpc) -> None:
    found = arrays(await rpc.infer(text_request("the cat", "the cat sat on a mat")))
    assert found["hidden"].shape == (2, 8, WIDTH)
    assert found["lengths"].tolist() == [4, 8]
    raw = oip.ModelInferRequest(model_name="tiny")
    raw.inputs.add(name="text", datatype="BYTES", shape=[1])
    raw.raw_input_contents.append(len(b"the cat").to_bytes(4, "little") + b"the cat")
    assert arrays(await rpc.infer(raw))["hidden"].shape == (1, 4, WIDTH)


async def test_attention_is_returned_by_name_only(rpc: Rpc) -> None:
    found = arrays(await rpc.infer(tensor_request("attention:1", "lengths")))
    assert list(found) == ["attention:1", "lengths"]
    assert found["attention:1"].shape == (2, HEADS, 4, 4)
    assert not found["attention:1"][1, :, 3].any()
    selection = attention_pb2.AttentionSelection(layers=[1], head_reduction=attention_pb2.HEAD_REDUCTION_EACH)
    native = await rpc.native(native_of(IDS[1, :3], attention=selection))
    weights = np.frombuffer(native.results[0].attention.maps[0].weights.data, "<f4").reshape(HEADS, 3, 3)
    np.testing.assert_allclose(found["attention:1"][1, :, :3, :3], weights, atol=1e-5)


async def test_rollout_has_one_map(rpc: Rpc) -> None:
    found = arrays(await rpc.infer(tensor_request("attention:rollout")))["attention:rollout"]
    assert found.shape == (2, 4, 4)
    np.testing.assert_allclose(found[0].sum(axis=-1), 1, atol=1e-5)


@pytest.mark.parametrize("whole", [False, True])
async def test_links_are_the_greatest_weights_of_the_mean_over_heads(rpc: Rpc, whole: bool) -> None:
    names = ["attention:0:query", "attention:0:key", "attention:0:weight", *(["attention:0"] if whole else [])]
    message = tensor_request(*names)
    message.parameters["top_k"].int64_param = 5
    found = arrays(await rpc.infer(message))
    dense = arrays(await rpc.infer(tensor_request("attention:0")))["attention:0"].mean(axis=1)
    for row, length in enumerate((4, 3)):
        best = np.sort(dense[row, :length, :length].ravel())[::-1][:5]
        np.testing.assert_allclose(found["attention:0:weight"][row], best, atol=1e-5)
        queries, keys = found["attention:0:query"][row], found["attention:0:key"][row]
        np.testing.assert_allclose(dense[row, queries, keys], best, atol=1e-5)


async def test_links_beyond_those_of_a_map_are_marked(rpc: Rpc) -> None:
    message = tensor_request("attention:0:key", "attention:0:weight", ids=IDS[:1, :2], mask=None)
    message.parameters["top_k"].int64_param = 6
    found = arrays(await rpc.infer(message))
    assert found["attention:0:key"][0, 4:].tolist() == [-1, -1]
    assert found["attention:0:weight"][0, 4:].tolist() == [0, 0]


def with_parameter(name: str, **value) -> oip.ModelInferRequest:
    message = tensor_request()
    message.parameters[name].CopyFrom(oip.InferParameter(**value))
    return message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("priority", {"uint64_param": 0}),
        ("priority", {"int64_param": 1}),
        ("priority", {"uint64_param": 7}),
        ("timeout", {"int64_param": 5_000_000}),
        ("timeout", {"string_param": "5000000"}),
        ("triton_enable_empty_final_response", {"bool_param": True}),
    ],
)
async def test_parameters_are_taken(rpc: Rpc, name: str, value: dict) -> None:
    assert (await rpc.infer(with_parameter(name, **value))).outputs


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("sequence_id", {"int64_param": 4}, "not supported: no model here keeps state"),
        ("shared_memory_region", {"string_param": "x"}, "not supported: send the bytes"),
        ("classification", {"int64_param": 3}, "not supported: no output is reduced"),
        ("priority", {"string_param": "high"}, "'high' is no integer"),
        ("priority", {"int64_param": -1}, "-1 is not from 0"),
        ("timeout", {"bool_param": True}, "'True' is no integer"),
        ("top_k", {"int64_param": 3}, "no output has links"),
        ("colour", {"string_param": "red"}, "unknown"),
        ("priority", {}, "'None' is no integer"),
    ],
)
async def test_parameters_that_are_not_supported_are_refused_by_name(
    rpc: Rpc, name: str, value: dict, why: str
) -> None:
    code, _, fields = await refused(rpc.infer(with_parameter(name, **value)))
    assert code == "INVALID_ARGUMENT"
    assert fields[0].startswith(f"parameters['{name}']: {why}")


async def test_parameters_of_tensors_are_refused_by_name(rpc: Rpc) -> None:
    message = tensor_request("hidden")
    message.inputs[0].parameters["shared_memory_region"].string_param = "x"
    message.outputs[0].parameters["classification"].int64_param = 2
    _, _, fields = await refused(rpc.infer(message))
    assert [field.split(": ")[0] for field in fields] == [
        "outputs[0].parameters['classification']", "inputs[0].parameters['shared_memory_region']"
    ]  # fmt: skip


async def test_the_timeout_is_the_deadline(rpc: Rpc) -> None:
    code, _, _ = await refused(rpc.infer(with_parameter("timeout", int64_param=1)))
    assert code in {"DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}


def broken(change) -> oip.ModelInferRequest:
    message = tensor_request()
    change(message)
    return message


BROKEN = {
    "no inputs": (lambda m: (m.ClearField("inputs"), m.ClearField("raw_input_contents")), "inputs: empty"),
    "a short tensor": (lambda m: m.raw_input_contents.__setitem__(0, b"123"), "inputs[0]: 3 bytes; shape [2, 4]"),
    "raw and typed": (lambda m: m.inputs[0].contents.int64_contents.append(1), "inputs[0].contents: set beside"),
    "one raw": (lambda m: m.raw_input_contents.pop(), "raw_input_contents: 1 for 2 inputs"),
    "no shape": (lambda m: m.inputs[0].ClearField("shape"), "inputs[0].shape: empty"),
    "other rows": (
        lambda m: m.inputs[1].shape.__setitem__(0, 3),
        "inputs[1].shape[0]: 3 rows, but input 'input_ids' has 2",
    ),
    "a negative length": (lambda m: m.inputs[0].shape.__setitem__(1, -4), "inputs[0].shape: [2, -4]"),
    "many rows": (lambda m: m.inputs[0].shape.__setitem__(0, 2**40), "inputs[0].shape[0]: 1099511627776 rows are not"),
    "a datatype": (
        lambda m: setattr(m.inputs[0], "datatype", "INT32"),
        "inputs[0].datatype: INT32, but input 'input_ids' is INT64",
    ),
    "no datatype": (lambda m: setattr(m.inputs[0], "datatype", "float"), "inputs[0].datatype: 'float', but input"),
    "an unknown input": (lambda m: setattr(m.inputs[0], "name", "words"), "inputs[0].name: row 0: no input 'words'"),
    "an unknown output": (
        lambda m: m.outputs.add(name="logits"),
        "outputs[0]: no output 'logits'; the model has hidden",
    ),
    "an output twice": (
        lambda m: m.outputs.extend([Output(name="hidden")] * 2),
        "outputs: an output is requested twice",
    ),
    "links without a number": (lambda m: m.outputs.add(name="attention:0:key"), "parameters['top_k']: missing"),
    "rollout and a layer": (
        lambda m: m.outputs.extend([Output(name="attention:0"), Output(name="attention:rollout")]),
        "outputs: attention:rollout and attention of a layer need two requests",
    ),
    "a high id": (
        lambda m: m.raw_input_contents.__setitem__(0, (IDS + 99).tobytes()),
        "inputs[0]: row 0: element 0 is 101",
    ),
    "an id": (lambda m: setattr(m, "id", "ü"), "request_id: not printable ASCII"),
}


@pytest.mark.parametrize("case", BROKEN)
async def test_what_is_wrong_is_named_in_the_terms_of_the_protocol(rpc: Rpc, case: str) -> None:
    change, expected = BROKEN[case]
    code, _, fields = await refused(rpc.infer(broken(change)))
    assert code == "INVALID_ARGUMENT"
    assert any(field.startswith(expected) for field in fields), fields


async def test_all_rows_with_one_fault_are_reported_once(rpc: Rpc) -> None:
    message = tensor_request(ids=np.full((2, 33), 5, np.int64), mask=None)
    _, _, fields = await refused(rpc.infer(message))
    assert fields == ["inputs[0].shape[1]: row 0: length 33 exceeds 32 of axis 'seq'"]


async def test_an_unknown_model_is_not_found(rpc: Rpc) -> None:
    assert (await refused(rpc.infer(tensor_request(model="none"))))[0] == "NOT_FOUND"
    assert (await refused(rpc("ModelMetadata", oip.ModelMetadataRequest(name="none"), oip.ModelMetadataResponse)))[
        0
    ] == ("NOT_FOUND")


async def test_a_model_without_a_tokenizer_has_no_text_input(rpc: Rpc) -> None:
    message = text_request("the cat")
    message.model_name = "plain"
    code, _, fields = await refused(rpc.infer(message))
    assert code == "INVALID_ARGUMENT"
    assert "inputs[0].datatype" in fields[0]


async def test_metadata_lists_texts_lengths_and_attention(rpc: Rpc) -> None:
    found = await rpc("ModelMetadata", oip.ModelMetadataRequest(name="tiny"), oip.ModelMetadataResponse)
    assert list(found.versions) == ["1", "2"]
    assert {one.name: (one.datatype, list(one.shape)) for one in found.inputs} == {
        "input_ids": ("INT64", [-1, -1]),
        "attention_mask": ("INT64", [-1, -1]),
        "text": ("BYTES", [-1, 1]),
        "text_pair": ("BYTES", [-1, 1]),
    }
    outputs = {one.name: (one.datatype, list(one.shape)) for one in found.outputs}
    assert outputs["lengths"] == ("INT64", [-1])
    assert outputs["attention:1"] == ("FP32", [-1, HEADS, -1, -1])
    assert outputs["attention:rollout"] == ("FP32", [-1, -1, -1])
    assert outputs["attention:0:key"] == ("INT64", [-1, -1])


@pytest.mark.parametrize("method", ["ModelMetadata", "ModelConfig"])
async def test_a_description_without_virtual_outputs_is_what_tools_can_request_together(rpc: Rpc, method: str) -> None:
    reply = {"ModelMetadata": oip.ModelMetadataResponse, "ModelConfig": oip.ModelConfigResponse}[method]
    call = rpc.channel.unary_unary(f"/{SERVICE}/{method}", response_deserializer=reply.FromString)
    sent = oip.ModelMetadataRequest(name="tiny").SerializeToString()
    found = await call(sent, metadata=(("attnserve-outputs", "model"),))
    names = [one.name for one in (found.outputs if method == "ModelMetadata" else found.config.output)]
    assert names == ["hidden", "embedding", "lengths"]
    assert list(arrays(await rpc.infer(tensor_request(*names)))) == names


async def test_every_output_of_the_metadata_can_be_requested(rpc: Rpc) -> None:
    found = await rpc("ModelMetadata", oip.ModelMetadataRequest(name="tiny"), oip.ModelMetadataResponse)
    for output in found.outputs:
        message = tensor_request(output.name)
        if output.name.count(":") == 2:
            message.parameters["top_k"].int64_param = 3
        answer = arrays(await rpc.infer(message))[output.name]
        declared = [-1 if length < 0 else length for length in output.shape]
        assert len(declared) == answer.ndim
        assert all(length in {-1, real} for length, real in zip(declared, answer.shape, strict=True))


async def test_config_statistics_and_index(rpc: Rpc) -> None:
    config = (await rpc("ModelConfig", oip.ModelConfigRequest(name="tiny"), oip.ModelConfigResponse)).config
    assert config.max_batch_size == 8
    assert [(one.name, one.optional) for one in config.input] == [
        ("input_ids", False), ("attention_mask", True), ("text", True), ("text_pair", True)
    ]  # fmt: skip
    await rpc.infer(tensor_request())
    await refused(rpc.infer(tensor_request("none")))
    ask = oip.ModelStatisticsRequest(name="tiny", version="2")
    (found,) = (await rpc("ModelStatistics", ask, oip.ModelStatisticsResponse)).model_stats
    assert (found.inference_count, found.inference_stats.success.count, found.inference_stats.fail.count) == (2, 1, 1)
    assert 1 <= found.execution_count <= 2
    assert found.last_inference > 1e12
    assert found.inference_stats.success.ns > found.inference_stats.compute_infer.ns / 2 > 0
    index = await rpc("RepositoryIndex", oip.RepositoryIndexRequest(ready=True), oip.RepositoryIndexResponse)
    assert [(one.name, one.version, one.state) for one in index.models] == [
        ("plain", "1", "READY"), ("tiny", "1", "READY"), ("tiny", "2", "READY")
    ]  # fmt: skip


async def test_live_and_ready(rpc: Rpc) -> None:
    assert (await rpc("ServerLive", oip.ServerLiveRequest(), oip.ServerLiveResponse)).live
    assert (await rpc("ServerReady", oip.ServerReadyRequest(), oip.ServerReadyResponse)).ready
    assert (await rpc("ModelReady", oip.ModelReadyRequest(name="tiny"), oip.ModelReadyResponse)).ready
    assert (await rpc("ServerMetadata", oip.ServerMetadataRequest(), oip.ServerMetadataResponse)).name == "attnserve"


async def test_models_are_not_changed_without_admin(rpc: Rpc) -> None:
    ask = oip.RepositoryModelUnloadRequest(model_name="tiny")
    code, text, _ = await refused(rpc("RepositoryModelUnload", ask, oip.RepositoryModelUnloadResponse))
    assert code == "UNIMPLEMENTED"
    assert "--admin" in text


async def test_models_are_loaded_and_unloaded_with_admin(settings: Settings) -> None:
    server = Application(settings.model_copy(update={"admin": True}))
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        rpc = Rpc(channel)
        ask = oip.RepositoryModelUnloadRequest(model_name="tiny")
        ask.parameters["unload_dependents"].bool_param = True
        await rpc("RepositoryModelUnload", ask, oip.RepositoryModelUnloadResponse)
        assert (await refused(rpc.infer(tensor_request())))[0] == "NOT_FOUND"
        load = oip.RepositoryModelLoadRequest(model_name="tiny")
        await rpc("RepositoryModelLoad", load, oip.RepositoryModelLoadResponse)
        assert (await rpc.infer(tensor_request())).model_version == "2"
        load.parameters["config"].string_param = "{}"
        code, _, fields = await refused(rpc("RepositoryModelLoad", load, oip.RepositoryModelLoadResponse))
        assert (code, fields) == ("INVALID_ARGUMENT", ["parameters['config']: not supported: leave it out"])
    await server.aclose()


async def test_a_stream_answers_in_order_and_stays_open_after_failures(rpc: Rpc) -> None:
    call = rpc.stream()()
    final = with_parameter("triton_enable_empty_final_response", bool_param=True)
    final.id = "last"
    for message in (
        text_request("the cat", id="a"),
        tensor_request(model="none", id="b"),
        text_request("a mat"),
        final,
    ):
        await call.write(message)
    await call.done_writing()
    answers = [one async for one in call]
    assert [one.infer_response.id for one in answers] == ["a", "b", "", "last"]
    assert [bool(one.error_message) for one in answers] == [False, True, False, False]
    assert answers[1].error_message == "NOT_FOUND: no model 'none'"
    assert answers[1].infer_response.parameters["reason"].string_param == "MODEL_NOT_FOUND"
    assert answers[3].infer_response.parameters["triton_final_response"].bool_param
    assert await call.code() is grpc.StatusCode.OK


async def test_a_malformed_message_does_not_end_a_stream(server: Application) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        call = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer", None, oip.ModelStreamInferResponse.FromString)()
        await call.write(b"\xff\xff\xff")
        await call.write(text_request("the cat").SerializeToString())
        await call.done_writing()
        first, second = [one async for one in call]
    assert first.error_message.startswith("INVALID_ARGUMENT: ")
    assert second.infer_response.outputs


async def test_a_drain_answers_what_a_stream_has_sent_and_ends_it(settings: Settings) -> None:
    server = Application(settings)
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        call = Rpc(channel).stream()()
        await call.write(text_request("the cat"))
        assert not (await call.read()).error_message
        draining = asyncio.create_task(server.drain())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await draining
    await server.aclose()


async def test_every_method_of_the_proto_is_served(rpc: Rpc) -> None:
    for method in METHODS:
        if method == "ModelStreamInfer":
            continue
        call = rpc.channel.unary_unary(f"/{SERVICE}/{method}")(b"", timeout=10)
        code, text = await call.code(), await call.details()
        assert code in {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED}, method
        assert "Method not found" not in text
