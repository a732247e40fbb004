"""Spans of `--tracing` at a real collector: parents, links, errors, no content, several processes, a dead collector.

Needs the fixtures of tests/contract/conftest.py.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import structlog
from attnserve.oip import open_inference_pb2 as oip
from attnserve.v1 import attention_pb2
from attnserve.v1 import inference_service_pb2 as pb
from attnserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from attnserve_server.app import Application
from attnserve_server.config import Settings
from attnserve_server.domain import errors
from attnserve_server.observability.spec import SPANS
from attnserve_server.transport.traced import TracedRpcs
from collecting import Collector, Span, collecting, variables
from http_calls import call
from processes import ids, started

pytest.importorskip("opentelemetry.sdk")

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
SENT = (("traceparent", f"00-{TRACE}-{PARENT}-01"), ("tracestate", "a=1"))
INFER = "attnserve.v1.InferenceService/Infer"
WORDS = "the dog looked"


def text(words: str = WORDS, **fields: object) -> pb.InferRequest:
    return pb.InferRequest(model="tiny", version="2", sequences=[pb.Sequence(text=pb.TextInput(text=words))], **fields)


def sent_by(trace: str, flags: str = "01") -> tuple[tuple[str, str], ...]:
    return (("traceparent", f"00-{trace}-{PARENT}-{flags}"),)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with collecting() as made:
        for name, value in variables(made.endpoint).items():
            monkeypatch.setenv(name, value)
        yield made


@pytest.fixture
async def traced(collector: Collector, settings: Settings) -> AsyncIterator[Application]:
    """A server of one instance that exports to `collector`."""
    application = Application(settings.model_copy(update={"tracing": True, "instances": 1}))
    await application.start()
    yield application
    await application.aclose()


@pytest.fixture
async def stub(traced: Application) -> AsyncIterator[InferenceServiceStub]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{traced.grpc_port}") as channel:
        yield InferenceServiceStub(channel)


async def spans_of(collector: Collector, trace: str, *names: str) -> dict[str, Span]:
    """The spans of a trace by name, once it has all of these names; each once."""
    need = set(names)
    found = await asyncio.to_thread(
        collector.wait, lambda spans: need <= {one.name for one in spans if one.trace_id == trace}
    )
    own = [one for one in found if one.trace_id == trace]
    assert len({one.name for one in own}) == len(own), [one.name for one in own]
    return {one.name: one for one in own}


async def test_a_call_has_a_span_for_each_of_its_steps(collector: Collector, stub: InferenceServiceStub) -> None:
    selection = attention_pb2.AttentionSelection(layers=[-1])
    await stub.Infer(text(attention=selection, request_id="r1"), metadata=SENT)
    found = await spans_of(collector, TRACE, INFER, "decode", "queue", "run", "attention", "encode")
    server = found.pop(INFER)
    assert (server.parent_id, server.kind, server.failed) == (PARENT, 2, False)
    assert server.attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": INFER,
        "rpc.response.status_code": "OK",
        "attnserve.model.name": "tiny",
        "attnserve.model.version": "2",
        "attnserve.request.id": "r1",
    }
    assert {one.parent_id for one in found.values()} == {server.span_id}
    assert set(found) == {"decode", "queue", "run", "attention", "encode"}
    order = [found[name] for name in ("decode", "queue", "run", "attention", "encode")]
    times = [time for one in order for time in (one.begin, one.end)]
    slack_ns = 10_000  # of the conversion from seconds, in floating point
    assert all(early <= late + slack_ns for early, late in itertools.pairwise(times)), times
    assert server.begin <= times[0] + slack_ns
    assert times[-1] <= server.end + slack_ns
    assert abs(server.end / 1e9 - time.time()) < 60  # noqa: TID251 - spans have wall time
    assert found["decode"].attributes["attnserve.sequences"] == 1
    assert server.resource["service.name"] == "attnserve"


async def test_no_span_holds_text_or_numbers_of_a_request(collector: Collector, stub: InferenceServiceStub) -> None:
    await stub.Infer(text(attention=attention_pb2.AttentionSelection()), metadata=SENT)
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.Infer(text(prompt_name="secret"), metadata=sent_by("1" * 32))
    await spans_of(collector, "1" * 32, INFER, "decode")
    await spans_of(collector, TRACE, INFER, "encode")
    for span in collector.spans:
        said = json.dumps([span.name, span.attributes, span.message, span.resource])
        assert not any(word in said for word in ("secret", "dog", "looked")), said
        assert all(isinstance(value, str | int | bool) for value in span.attributes.values()), span.attributes


async def test_a_batch_is_linked_to_its_members_and_they_to_it(
    collector: Collector, stub: InferenceServiceStub
) -> None:
    traces = [f"{number:032x}" for number in range(1, 25)]
    answers = await asyncio.gather(*(stub.Infer(text(), metadata=sent_by(trace)) for trace in traces))
    sizes = {trace: answer.results[0].run.batch_size for trace, answer in zip(traces, answers, strict=True)}
    assert max(sizes.values()) > 1, "no batch had several callers"
    found = {trace: await spans_of(collector, trace, INFER, "queue", "run", "encode") for trace in traces}
    batches = {one.span_id: one for one in collector.named("batch")}
    members = [link for one in batches.values() for link in one.links]
    assert sorted(members) == sorted((trace, found[trace][INFER].span_id) for trace in traces)
    for trace in traces:
        ((of, batch),) = found[trace]["run"].links
        assert batches[batch].trace_id == of != trace
        assert not batches[batch].parent_id
        assert (trace, found[trace][INFER].span_id) in batches[batch].links
        assert batches[batch].attributes["attnserve.batch.size"] == len(batches[batch].links) == sizes[trace]


async def test_a_request_of_several_sequences_has_one_span_of_each_kind(
    collector: Collector, stub: InferenceServiceStub
) -> None:
    one = pb.Sequence(text=pb.TextInput(text="the cat"))
    await stub.Infer(pb.InferRequest(model="tiny", sequences=[one] * 3), metadata=SENT)
    found = await spans_of(collector, TRACE, INFER, "decode", "queue", "run", "encode")
    assert found["decode"].attributes["attnserve.sequences"] == 3


async def test_an_error_of_the_caller_is_none_of_the_server(
    collector: Collector, traced: Application, stub: InferenceServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.Infer(text(prompt_name="none"), metadata=sent_by("1" * 32))
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.Infer(pb.InferRequest(model="none"), metadata=sent_by("2" * 32))
    scheduler = traced.catalog.get("tiny", "2").scheduler

    async def failing(sequences, *_: object, **__: object) -> list[object]:
        return [errors.InternalFault() for _ in sequences]

    monkeypatch.setattr(scheduler._executor, "run", failing)
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.Infer(text(), metadata=sent_by("3" * 32))

    async def late(sequences, *_: object, **__: object) -> list[object]:
        await asyncio.sleep(0.3)
        return [errors.RequestCancelled() for _ in sequences]

    monkeypatch.setattr(scheduler._executor, "run", late)
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.Infer(text(), metadata=sent_by("4" * 32), timeout=0.1)
    invalid = await spans_of(collector, "1" * 32, INFER, "decode")
    assert (invalid[INFER].failed, invalid["decode"].failed) == (False, True)
    assert invalid[INFER].attributes["error.type"] == "INVALID_ARGUMENT"
    assert invalid[INFER].attributes["attnserve.error.reason"] == "INVALID_REQUEST"
    assert (await spans_of(collector, "2" * 32, INFER))[INFER].attributes["rpc.response.status_code"] == "NOT_FOUND"
    fault = await spans_of(collector, "3" * 32, INFER, "decode", "queue", "run")
    assert (fault[INFER].failed, fault["run"].failed, fault["queue"].failed) == (True, True, False)
    assert fault[INFER].attributes["rpc.response.status_code"] == "INTERNAL"
    assert any(one.failed and (("3" * 32, fault[INFER].span_id) in one.links) for one in collector.named("batch"))
    expired = await spans_of(collector, "4" * 32, INFER)
    assert (expired[INFER].failed, expired[INFER].attributes["error.type"]) == (True, "DEADLINE_EXCEEDED")


class Ended:
    """The context of a call that has ended on the caller's side."""

    def time_remaining(self) -> float:
        return 0.0

    async def abort(self, *_: object) -> None:
        raise grpc.aio.InternalError("ended")


async def test_a_failure_whose_caller_has_left_is_no_success(collector: Collector, traced: Application) -> None:
    async def fail(*_: object) -> bytes:
        raise errors.DeadlineExpired(1.0)

    rpcs = TracedRpcs(traced.metrics, traced.clock, traced.tracing)
    await rpcs.measured("unary", "own", "Fail", fail)(b"", Ended())
    found = await asyncio.to_thread(collector.wait, bool)
    assert [(one.name, one.failed, one.attributes["error.type"]) for one in found] == [
        ("own/Fail", True, "DEADLINE_EXCEEDED")
    ]


async def test_a_request_that_expires_in_the_queue_has_a_span_of_its_wait(
    collector: Collector, traced: Application, stub: InferenceServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = traced.catalog.get("tiny", "2").scheduler
    let = asyncio.Event()
    run = scheduler._executor.run

    async def held(*arguments: object, **options: object) -> list[object]:
        await let.wait()
        return await run(*arguments, **options)

    monkeypatch.setattr(scheduler._executor, "run", held)
    first = asyncio.ensure_future(stub.Infer(text(), metadata=sent_by("1" * 32)))
    async with asyncio.timeout(10):
        while not scheduler._busy:  # noqa: ASYNC110 - of a scheduler, which sets no event
            await asyncio.sleep(0.01)
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.Infer(text(), metadata=sent_by("2" * 32), timeout=0.2)
    let.set()
    await first
    found = await spans_of(collector, "2" * 32, INFER, "decode", "queue")
    assert found["queue"].failed
    assert found["queue"].attributes["error.type"] == "expired"


async def test_each_request_of_a_stream_has_a_span_below_that_of_the_stream(
    collector: Collector, stub: InferenceServiceStub
) -> None:
    stream = stub.StreamInfer(metadata=SENT)
    for name, model in (("a", "tiny"), ("b", "tiny"), ("c", "none")):
        message = text(request_id=name)
        message.model = model
        await stream.write(pb.StreamInferRequest(request=message))
    await stream.done_writing()
    assert len([one async for one in stream]) == 3
    name = "attnserve.v1.InferenceService/StreamInfer"
    found = await asyncio.to_thread(
        collector.wait, lambda spans: {name, "encode"} <= {one.name for one in spans} and
        len([one for one in spans if one.name == "request"]) == 3,
    )  # fmt: skip
    (whole,) = [one for one in found if one.name == name]
    assert (whole.trace_id, whole.parent_id) == (TRACE, PARENT)
    requests = {one.attributes["attnserve.request.id"]: one for one in found if one.name == "request"}
    assert {one.parent_id for one in requests.values()} == {whole.span_id}
    assert requests["c"].attributes["error.type"] == "NOT_FOUND"
    for at in ("a", "b"):
        below = {one.name for one in found if one.parent_id == requests[at].span_id}
        assert below == {"decode", "queue", "run", "encode"}


def oip_request() -> oip.ModelInferRequest:
    message = oip.ModelInferRequest(model_name="tiny", id="o1")
    for name, value in (("input_ids", 4), ("attention_mask", 1)):
        message.inputs.add(name=name, datatype="INT64", shape=[1, 5])
        message.raw_input_contents.append(np.full((1, 5), value).tobytes())
    return message


async def test_the_open_inference_protocol_is_traced_alike(collector: Collector, traced: Application) -> None:
    name = "inference.GRPCInferenceService/ModelInfer"
    async with grpc.aio.insecure_channel(f"127.0.0.1:{traced.grpc_port}") as channel:
        await channel.unary_unary(f"/{name}")(oip_request().SerializeToString(), metadata=SENT)
        stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(metadata=sent_by("1" * 32))
        await stream.write(oip_request().SerializeToString())
        await stream.done_writing()
        assert len([one async for one in stream]) == 1
    found = await spans_of(collector, TRACE, name, "decode", "queue", "run", "encode")
    assert found[name].parent_id == PARENT
    assert found[name].attributes["attnserve.request.id"] == "o1"
    other = await spans_of(collector, "1" * 32, "request", "decode", "encode", f"{name[:-10]}ModelStreamInfer")
    assert other["decode"].parent_id == other["request"].span_id


async def test_rest_is_traced_by_its_headers(collector: Collector, traced: Application) -> None:
    path = "/v1/models/tiny:infer"
    headers = dict(SENT)
    answer = await call(traced.rest_port, "POST", path, {"sequences": ["the cat"]}, headers)
    assert answer.status == 200, answer.body
    assert {key: answer.headers[key] for key in headers} == headers
    refused = await call(traced.rest_port, "POST", path, {"sequences": []}, dict(sent_by("1" * 32)))
    assert refused.status == 400
    name = "POST /v1/models/{name}:infer"
    found = await spans_of(collector, TRACE, name, "decode", "queue", "run", "encode")
    span = found[name]
    assert (span.parent_id, span.kind, span.failed) == (PARENT, 2, False)
    assert span.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/models/{name}:infer",
        "http.response.status_code": 200,
        "url.scheme": "http",
        "url.path": path,
        "attnserve.model.name": "tiny",
        "attnserve.model.version": "2",
        "attnserve.request.id": answer.headers["x-request-id"],
    }
    invalid = await spans_of(collector, "1" * 32, name)
    assert (invalid[name].attributes["http.response.status_code"], invalid[name].failed) == (400, False)


@pytest.mark.parametrize("flags", ["00", "01"])
async def test_the_caller_decides_whether_its_call_is_sampled(
    collector: Collector, stub: InferenceServiceStub, flags: str
) -> None:
    await stub.Infer(text(), metadata=sent_by("5" * 32, flags))
    await stub.Infer(text(), metadata=SENT)
    await spans_of(collector, TRACE, INFER, "encode")
    assert any(one.trace_id == "5" * 32 for one in collector.spans) is (flags == "01")


async def test_the_sampler_is_that_of_the_standard_variables(
    collector: Collector, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    application = Application(settings.model_copy(update={"tracing": True}))
    await application.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{application.grpc_port}") as channel:
            await InferenceServiceStub(channel).Infer(text())
            await InferenceServiceStub(channel).Infer(text(), metadata=SENT)
    finally:
        await application.drain()
        await application.aclose()
    assert {one.trace_id for one in collector.named(INFER)} == {TRACE}


async def test_health_checks_have_no_spans(collector: Collector, traced: Application) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{traced.grpc_port}") as channel:
        await channel.unary_unary("/grpc.health.v1.Health/Check")(b"", metadata=sent_by("6" * 32))
        await InferenceServiceStub(channel).Infer(text(), metadata=SENT)
    await spans_of(collector, TRACE, INFER)
    assert not any(one.trace_id == "6" * 32 for one in collector.spans)


async def test_latency_histograms_name_traces_in_the_openmetrics_format_only(
    collector: Collector, traced: Application, stub: InferenceServiceStub
) -> None:
    await stub.Infer(text(attention=attention_pb2.AttentionSelection()), metadata=SENT)
    await call(traced.rest_port, "POST", "/v1/models/tiny:infer", {"sequences": ["the cat"]}, dict(SENT))
    page = await call(
        traced.http_port, "GET", "/metrics", None, {"accept": "application/openmetrics-text; version=1.0.0"}
    )
    named = {line.partition("{")[0] for line in page.body.decode().splitlines() if f'# {{trace_id="{TRACE}"}}' in line}
    assert named == {
        "grpc_server_handling_seconds_bucket",
        "attnserve_http_seconds_bucket",
        "attnserve_queue_seconds_bucket",
        "attnserve_compute_seconds_bucket",
        "attnserve_attention_seconds_bucket",
    }
    plain = await call(traced.http_port, "GET", "/metrics")
    assert "trace_id" not in plain.body.decode()


async def test_log_lines_of_a_call_have_the_id_of_its_trace(
    collector: Collector, stub: InferenceServiceStub, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    capturing = structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars])
    with capturing as lines, pytest.raises(grpc.aio.AioRpcError):
        await stub.Infer(pb.InferRequest(model="none"))
    found = await asyncio.to_thread(collector.wait, lambda spans: any(one.name == INFER for one in spans))
    (span,) = [one for one in found if one.name == INFER]
    assert [one["trace_id"] for one in lines if one["event"] == "request refused"] == [span.trace_id]


async def answered(channel: grpc.aio.Channel) -> bytes:
    answer = await InferenceServiceStub(channel).Infer(text(attention=attention_pb2.AttentionSelection()))
    return b"".join(tensor.data for result in answer.results for tensor in result.outputs)


async def test_a_dead_collector_changes_no_answer_and_lost_spans_are_counted(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:  # bound, and nothing listens
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        for name, value in variables(endpoint, OTEL_BSP_MAX_QUEUE_SIZE="8", OTEL_BSP_MAX_EXPORT_BATCH_SIZE="4").items():
            monkeypatch.setenv(name, value)
        found = []
        for tracing in (False, True):
            application = Application(settings.model_copy(update={"tracing": tracing}))
            await application.start()
            try:
                async with grpc.aio.insecure_channel(f"127.0.0.1:{application.grpc_port}") as channel:
                    found.append({await answered(channel) for _ in range(20)})
                if tracing:
                    spans = application.metrics.counter(SPANS)
                    assert spans.labels("queue_full").total > 0
                    assert spans.labels("exported").total == 0
                began = time.monotonic()
                await application.drain()
                assert time.monotonic() - began < settings.drain_grace_s
            finally:
                await application.aclose()
    assert found[0] == found[1]
    assert len(found[0]) == 1


async def test_spans_are_flushed_at_the_end(collector: Collector, settings: Settings, monkeypatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    application = Application(settings.model_copy(update={"tracing": True}))
    await application.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{application.grpc_port}") as channel:
            await InferenceServiceStub(channel).Infer(text(), metadata=SENT)
        assert not collector.spans
        await application.drain()
    finally:
        await application.aclose()
    assert {one.name for one in collector.spans if one.trace_id == TRACE} == {INFER, "decode", "queue", "run", "encode"}
    assert application.metrics.counter(SPANS).labels("exported").total == 6


def test_the_context_crosses_to_the_engine(collector: Collector, tiny_repository: Path, tmp_path: Path) -> None:
    running = started(tiny_repository, tmp_path, "--tracing", variables={"OTEL_BSP_SCHEDULE_DELAY": "60000"})
    try:
        with grpc.insecure_channel(f"127.0.0.1:{running.grpc_port}") as channel:
            InferenceServiceStub(channel).Infer(ids(5))
            InferenceServiceStub(channel).Infer(ids(7), metadata=SENT)
        exemplars = {"accept": "application/openmetrics-text; version=1.0.0"}
        page = asyncio.run(call(running.http_port, "GET", "/metrics", None, exemplars)).body.decode()
        assert re.search(rf'attnserve_compute_seconds_bucket.*# {{trace_id="{TRACE}"}}', page)
        assert not collector.spans
    finally:
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(30) == 0
    found = {one.name: one for one in collector.spans if one.trace_id == TRACE}
    assert set(found) == {INFER, "decode", "queue", "run", "encode"}
    server = found[INFER]
    assert server.parent_id == PARENT
    assert {found[name].parent_id for name in ("decode", "queue", "run", "encode")} == {server.span_id}
    process = {name: one.resource["process.pid"] for name, one in found.items()}
    assert process["decode"] == process[INFER] == process["encode"] != process["run"] == process["queue"]
    (batch,) = [one for one in collector.named("batch") if (TRACE, server.span_id) in one.links]
    assert found["run"].links == ((batch.trace_id, batch.span_id),)
    assert len(collector.named(INFER)) == 2
