"""The request id and the trace context of a caller: accepted by every method, returned, and in the log.

Needs the fixtures of tests/contract/conftest.py.
"""

from __future__ import annotations

import asyncio
import logging

import grpc
import pytest
import structlog
from attnserve.v1 import inference_service_pb2 as pb
from attnserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from attnserve_server.app import Application
from attnserve_server.transport.servicer import SERVICE
from google.rpc import error_details_pb2, status_pb2
from http_calls import call

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SENT = (("x-request-id", "mine"), ("traceparent", f"00-{TRACE}-00f067aa0ba902b7-01"), ("tracestate", "a=1"))
tiny = pb.InferRequest(model="tiny", sequences=[pb.Sequence(text=pb.TextInput(text="the cat"))])


def returned(metadata: object) -> set[tuple[str, str]]:
    return {pair for pair in SENT if pair in set(metadata)}


METHODS: dict[str, bytes] = {
    f"/{SERVICE}/Infer": tiny.SerializeToString(),
    f"/{SERVICE}/ListModels": b"",
    f"/{SERVICE}/GetModel": pb.GetModelRequest(model="tiny").SerializeToString(),
    f"/{SERVICE}/GetLoad": b"",
    f"/{SERVICE}/GetTokenizer": pb.GetTokenizerRequest(model="tiny").SerializeToString(),
    "/grpc.health.v1.Health/Check": b"",
}


@pytest.mark.parametrize("method", METHODS)
async def test_every_unary_method_returns_them(channel: grpc.aio.Channel, method: str) -> None:
    call = channel.unary_unary(method)(METHODS[method], metadata=SENT)
    assert returned(await call.initial_metadata()) == set(SENT)
    await call
    bare = channel.unary_unary(method)(METHODS[method])
    assert not returned(await bare.initial_metadata())
    await bare


async def test_a_stream_returns_them_at_its_start(channel: grpc.aio.Channel) -> None:
    call = InferenceServiceStub(channel).StreamInfer(metadata=SENT)
    async with asyncio.timeout(10):
        assert returned(await call.initial_metadata()) == set(SENT)
    await call.done_writing()
    assert await call.code() is grpc.StatusCode.OK


async def test_the_id_of_the_message_goes_before_that_of_the_metadata(channel: grpc.aio.Channel) -> None:
    infer = InferenceServiceStub(channel).Infer
    named = pb.InferRequest(model="tiny", sequences=tiny.sequences, request_id="named")
    assert (await infer(tiny, metadata=SENT)).receipt.request_id == "mine"
    assert (await infer(named, metadata=SENT)).receipt.request_id == "named"
    unusable = (("x-request-id", "a" * 129),)
    assert len((await infer(tiny, metadata=unusable)).receipt.request_id) == 32


@pytest.mark.parametrize(
    ("method", "request_"), [("Infer", pb.InferRequest(model="none")), ("GetModel", pb.GetModelRequest(model="none"))]
)
async def test_a_refusal_returns_and_logs_them(
    channel: grpc.aio.Channel, caplog: pytest.LogCaptureFixture, method: str, request_: object
) -> None:
    caplog.set_level(logging.INFO)
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        call = getattr(InferenceServiceStub(channel), method)(request_, metadata=SENT)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
    assert returned(await call.initial_metadata()) == set(SENT)
    details = dict(refused.value.trailing_metadata() or ())["grpc-status-details-bin"]
    info = error_details_pb2.ErrorInfo()
    assert status_pb2.Status.FromString(details).details[0].Unpack(info)
    assert info.metadata["request_id"] == "mine"
    (line,) = [one for one in lines if one["event"] == "request refused"]
    assert (line["request_id"], line["trace_id"]) == ("mine", TRACE)


async def test_calls_do_not_share_them(channel: grpc.aio.Channel) -> None:
    infer = InferenceServiceStub(channel).Infer
    answers = await asyncio.gather(
        *(infer(tiny, metadata=(("x-request-id", f"r{number}"),)) for number in range(20)), infer(tiny)
    )
    assert [one.receipt.request_id for one in answers[:20]] == [f"r{number}" for number in range(20)]
    assert len(answers[20].receipt.request_id) == 32


PATHS = ["/v1/models", "/openapi.json", "/v1/models/none", "/none", "/rerank"]


@pytest.mark.parametrize("path", PATHS)
async def test_every_path_of_rest_returns_them(server: Application, path: str) -> None:
    answer = await call(server.rest_port, "GET", path, None, dict(SENT))
    assert {key: answer.headers[key] for key, _ in SENT} == dict(SENT)
    bare = await call(server.rest_port, "GET", path)
    assert not bare.headers.keys() & {"traceparent", "tracestate"}


async def test_a_refusal_over_rest_logs_them(server: Application, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        answer = await call(server.rest_port, "POST", "/v1/models/none:infer", {"sequences": ["a"]}, dict(SENT))
        assert answer.status == 404
        await call(server.rest_port, "POST", "/v1/models/none:infer", {"sequences": ["a"]})
    first, other = [one for one in lines if one["event"] == "request refused"]
    assert (first["request_id"], first["trace_id"]) == ("mine", TRACE)
    assert other["request_id"] != "mine"
    assert "trace_id" not in other


async def test_headers_that_are_not_valid_are_ignored(server: Application) -> None:
    sent = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7", "tracestate": "a=1"}
    answer = await call(server.rest_port, "GET", "/v1/models", None, sent)
    assert answer.status == 200
    assert not answer.headers.keys() & sent.keys()
