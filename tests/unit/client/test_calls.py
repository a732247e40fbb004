"""Both clients against a gRPC server: what they send, return and raise.

The fixtures `driver` and `driver_class` run a test with each client. `server` is a fake server, and `raw_server` is one
with methods of the test, for malformed answers.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import numpy as np
import pytest
from attnserve.v1 import inference_service_pb2 as wire
from attnserve.v1 import model_pb2, tensor_pb2
from attnserve_client import (
    AsyncClient,
    AttentionSelection,
    AttentionUnavailable,
    AttnserveError,
    Client,
    DeadlineExpired,
    InvalidRequest,
    ModelNotFound,
    RetryPolicy,
    ServerUnreachable,
)
from attnserve_client.errors import (
    BadAnswer,
    InternalFault,
    PermissionDenied,
    RequestCancelled,
    TextUnavailable,
    Unauthenticated,
)
from attnserve_client.testing import FakeServer
from grpc_health.v1 import health_pb2


async def test_arrays_are_views_of_the_responses_bytes(driver: Any) -> None:
    result = await driver.infer("fake", "a text", attention=True)
    embedding = result.outputs["embedding"]
    assert embedding.shape == (16,)
    for array in (*result.outputs.values(), result.attention[0].raw, result.attention[0].weights):
        owner = array
        while isinstance(owner, np.ndarray) and owner.base is not None:
            owner = owner.base
        assert isinstance(owner, bytes), "the array must be a view of the message's bytes, not a copy"
        assert not array.flags.writeable
    assert np.shares_memory(result.attention[0].weights, result.attention[0].raw)


async def test_list_returns_a_list_and_one_input_one_result(driver: Any) -> None:
    several = await driver.infer("fake", ["one", "two"])
    single = await driver.infer("fake", ["one"])
    assert len(several) == 2
    assert len(single) == 1
    one = await driver.infer("fake", "one")
    np.testing.assert_array_equal(one.outputs["embedding"], several[0].outputs["embedding"])
    assert several[0].run.batch_size == 2


@pytest.mark.parametrize(
    "ids", [[5, 6, 7], np.array([5, 6, 7], dtype=np.int32), {"input_ids": np.array([5, 6, 7], dtype=np.int64)}]
)
async def test_token_ids_and_arrays_are_sent_as_equal_tensors(driver: Any, server: FakeServer, ids: Any) -> None:
    await driver.infer("fake", ids)
    (tensor,) = server.requests[-1].sequences[0].tensors.tensors
    assert (tensor.name, tensor.dtype, list(tensor.shape)) == ("input_ids", tensor_pb2.DATA_TYPE_INT64, [3])
    assert np.frombuffer(tensor.data, dtype="<i8").tolist() == [5, 6, 7]


async def test_pair_and_all_options_are_sent(driver: Any, server: FakeServer) -> None:
    await driver.infer(
        "fake",
        ("a query", "a passage"),
        version="1",
        outputs=["embedding"],
        attention=AttentionSelection(layers=[-1], heads="mean"),
        priority="high",
        request_id="mine",
    )
    request = server.requests[-1]
    assert (request.sequences[0].text.text, request.sequences[0].text.text_pair) == ("a query", "a passage")
    assert list(request.outputs.names) == ["embedding"]
    assert request.priority == wire.PRIORITY_HIGH
    assert (request.version, request.request_id) == ("1", "mine")


async def test_empty_outputs_return_none_and_no_outputs_argument_returns_all(driver: Any, server: FakeServer) -> None:
    assert (await driver.infer("fake", "text", outputs=[])).outputs == {}
    assert server.requests[-1].HasField("outputs")
    assert set((await driver.infer("fake", "text")).outputs) == {"embedding", "last_hidden_state"}
    assert not server.requests[-1].HasField("outputs")


async def test_validate_only_predicts_the_exact_response_size(driver: Any) -> None:
    predicted = await driver.infer("fake", "some text", attention=True, validate_only=True)
    received = await driver.infer("fake", "some text", attention=True)
    assert predicted.outputs == {}
    assert predicted.attention == []
    assert predicted.run.batch_size == 0
    total = sum(array.nbytes for array in received.outputs.values()) + sum(
        each.raw.nbytes for each in received.attention
    )
    assert predicted.predicted_bytes == received.predicted_bytes == total
    assert predicted.effective_attention.unit == "token"


async def test_models_are_described(driver: Any) -> None:
    (listed,) = await driver.models()
    described = await driver.model("fake")
    assert listed == described
    assert described.ready
    assert [site.name for site in described.sites] == ["layer.0", "layer.1"]
    assert described.outputs[1].shape == ("seq", 16)
    assert described.token_input == "input_ids"
    with pytest.raises(ModelNotFound) as caught:
        await driver.model("other", "7")
    assert (caught.value.model, caught.value.version) == ("other", "7")


async def test_ready_follows_the_models_state(driver: Any, server: FakeServer) -> None:
    assert await driver.ready()
    assert await driver.ready("fake")
    assert not await driver.ready("other")
    server.state = "loading"
    assert not await driver.ready()
    assert not await driver.ready("fake")


async def test_ready_is_false_without_a_server(driver: Any, server: FakeServer) -> None:
    server.stop()
    assert not await driver.ready()
    assert not await driver.ready("fake")


async def test_missing_server_raises_server_unreachable(driver_class: Any, server: FakeServer) -> None:
    server.stop()
    driver = driver_class(server.target, retry=RetryPolicy(max_attempts=1))
    with pytest.raises(ServerUnreachable) as caught:
        await driver.infer("fake", "text", request_id="mine")
    assert caught.value.code == "UNAVAILABLE"
    assert caught.value.request_id == "mine"
    assert isinstance(caught.value.__cause__, grpc.RpcError)
    await driver.close()


async def test_slow_server_raises_deadline_expired(driver: Any, server: FakeServer) -> None:
    await driver.models()  # connected, so that the deadline is the server's to miss
    server.latency_s = 30.0
    with pytest.raises(DeadlineExpired, match=r"^the timeout passed before the response arrived$"):
        await driver.infer("fake", "text", timeout=0.2)


async def test_invalid_request_lists_its_violations(driver: Any, server: FakeServer) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await driver.infer("fake", "text", attention=AttentionSelection(layers=[9]), request_id="mine")
    error = caught.value
    assert error.code == "INVALID_ARGUMENT"
    assert error.reason == "INVALID_REQUEST"
    assert error.request_id == "mine"
    assert [(each.field, each.description) for each in error.violations] == [
        ("attention.layers[0]", "layer 9 is out of range; the model has 2 sites: -2 to 1")
    ]
    assert error.retry_delay_s is None


async def test_attention_of_a_model_without_sites_raises_attention_unavailable(driver_class: Any) -> None:
    with FakeServer(layers=0) as server:
        driver = driver_class(server.target)
        with pytest.raises(AttentionUnavailable) as caught:
            await driver.infer("fake", "text", attention=True)
        assert caught.value.model == "fake"
        await driver.close()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TextUnavailable("send tensors", code="FAILED_PRECONDITION", reason="TEXT_UNAVAILABLE"), TextUnavailable),
        (
            InternalFault("internal error", code="INTERNAL", reason="INTERNAL", metadata={"request_id": "r"}),
            InternalFault,
        ),
        (AttnserveError("data was lost", code="DATA_LOSS"), AttnserveError),
        (AttnserveError("no credentials", code="UNAUTHENTICATED"), Unauthenticated),
        (AttnserveError("not this", code="PERMISSION_DENIED"), PermissionDenied),
    ],
)
async def test_server_errors_are_raised_as_their_class(
    driver: Any, server: FakeServer, error: AttnserveError, kind: type[AttnserveError]
) -> None:
    server.fail_next(error)
    with pytest.raises(AttnserveError) as caught:
        await driver.infer("fake", "text")
    assert type(caught.value) is kind
    assert caught.value.code == error.code
    assert caught.value.message == error.message


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), float("inf")])
async def test_invalid_timeout_is_refused_without_a_request(driver: Any, server: FakeServer, wrong: float) -> None:
    with pytest.raises(InvalidRequest):
        await driver.infer("fake", "text", timeout=wrong)
    assert not server.requests


async def test_token_and_metadata_are_sent_with_every_call(driver_class: Any, server: FakeServer) -> None:
    driver = driver_class(server.target, token="secret", metadata=[("x-team", "search")])
    await driver.models()
    await driver.infer("fake", "text")
    assert len(server.metadata) == 2
    for metadata in server.metadata:
        assert metadata["authorization"] == "Bearer secret"
        assert metadata["x-team"] == "search"
    await driver.close()


async def test_credentials_open_a_tls_channel(driver_class: Any, server: FakeServer) -> None:
    driver = driver_class(server.target, credentials=grpc.ssl_channel_credentials(), retry=RetryPolicy(max_attempts=1))
    with pytest.raises(ServerUnreachable):  # the fake server has no TLS
        await driver.models(timeout=5.0)
    await driver.close()


async def test_calls_are_distributed_and_survive_the_loss_of_one_server(driver_class: Any) -> None:
    with FakeServer() as one, FakeServer() as other:
        driver = driver_class([one.target, other.target])
        await asyncio.gather(*(driver.ready() for _ in range(4)))
        for _ in range(20):
            await driver.infer("fake", "text")
            if one.requests and other.requests:
                break
        assert one.requests
        assert other.requests
        one.stop()
        for _ in range(5):
            await driver.infer("fake", "text")
        await driver.close()


async def test_unhealthy_server_receives_no_calls(driver_class: Any, raw_server: Any) -> None:
    with raw_server(ListModels=lambda request, context: wire.ListModelsResponse()) as server:
        server.health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        driver = driver_class(server.target, retry=RetryPolicy(max_attempts=1))
        with pytest.raises(ServerUnreachable):
            await driver.models(timeout=5.0)
        await driver.close()


async def test_calls_on_a_closed_client_raise_request_cancelled(driver: Any) -> None:
    await driver.close()
    await driver.close()
    for call in (driver.infer("fake", "text"), driver.models(), driver.stream("fake", ["text"])):
        with pytest.raises(RequestCancelled, match="closed"):
            await call


async def test_close_cancels_running_calls(driver: Any, server: FakeServer) -> None:
    await driver.models()
    server.latency_s = 30.0
    call = asyncio.create_task(driver.infer("fake", "text"))
    await asyncio.to_thread(server.wait_for_requests, 1)
    await driver.close()
    with pytest.raises(RequestCancelled):
        await call


async def test_cancelled_task_raises_cancelled_error(server: FakeServer) -> None:
    server.latency_s = 30.0
    async with AsyncClient(server.target) as client:
        call = asyncio.create_task(client.infer("fake", "text"))
        await asyncio.to_thread(server.wait_for_requests, 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call


def described(**fields: Any) -> model_pb2.Model:
    seq = model_pb2.Dimension(symbol="seq")
    return model_pb2.Model(
        name="m", inputs=[model_pb2.TensorSpec(name="tokens", dtype=tensor_pb2.DATA_TYPE_INT32, shape=[seq])], **fields
    )


async def test_token_ids_use_the_models_input_which_is_fetched_once(driver_class: Any, raw_server: Any) -> None:
    seen: list[wire.InferRequest] = []
    fetched: list[wire.GetModelRequest] = []

    def get_model(request: wire.GetModelRequest, context: Any) -> wire.GetModelResponse:
        fetched.append(request)
        return wire.GetModelResponse(model=described())

    def infer(request: wire.InferRequest, context: Any) -> wire.InferResponse:
        seen.append(request)
        return wire.InferResponse(results=[wire.SequenceResult()])

    with raw_server(GetModel=get_model, Infer=infer) as server:
        driver = driver_class(server.target)
        await driver.infer("m", [1, 2])
        await driver.infer("m", [1, 2])
        await driver.close()
    assert len(fetched) == 1
    assert [seen[0].sequences[0].tensors.tensors[0].name, seen[0].sequences[0].tensors.tensors[0].dtype] == [
        "tokens",
        tensor_pb2.DATA_TYPE_INT32,
    ]


@pytest.mark.parametrize(
    "response",
    [
        wire.InferResponse(),
        wire.InferResponse(results=[wire.SequenceResult(outputs=[tensor_pb2.Tensor(name="x", dtype=99)])]),
        wire.InferResponse(
            results=[wire.SequenceResult(outputs=[tensor_pb2.Tensor(name="x", dtype=7, shape=[3], data=b"1234")])]
        ),
    ],
    ids=["no result", "unknown type", "too few bytes"],
)
async def test_malformed_response_raises_bad_answer(
    driver_class: Any, response: wire.InferResponse, raw_server: Any
) -> None:
    with raw_server(Infer=lambda request, context: response) as server:
        driver = driver_class(server.target)
        with pytest.raises(BadAnswer):
            await driver.infer("m", "text")
        await driver.close()


def test_leaving_the_context_closes_the_client(server: FakeServer) -> None:
    with Client(server.target) as client:
        assert client.ready()
    with pytest.raises(RequestCancelled):
        client.models()
