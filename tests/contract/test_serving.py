"""All but inference: start, health, readiness, metrics, drain, internal errors, and signals to a real process.

Needs the fixtures of tests/contract/conftest.py: the files and repository of the tiny model, `settings`, a started
`server`, its `channel`, and `gate`, which holds each request until the test releases it.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from attnserve.v1 import attention_pb2, model_pb2
from attnserve.v1 import inference_service_pb2 as pb
from attnserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from attnserve_server.app import Application
from attnserve_server.config import Settings
from attnserve_server.engine.session import ProviderUnavailable
from attnserve_server.lifetime import EXIT_DRAINED, EXIT_FAULTED, EXIT_FORCED, run
from attnserve_server.model.repository import write_bundle
from attnserve_server.scheduling.catalog import ModelState
from attnserve_server.transport.receiving import ReceiveBounds
from attnserve_server.transport.server import PortUnavailable
from attnserve_server.wanted import StartFailed
from gated import Gate, until
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from prometheus_client.parser import text_string_to_metric_families
from serving import command, serve
from tiny_bundle import tiny_manifest

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


def asking(text: str = "the cat", model: str = "tiny", **fields: object) -> pb.InferRequest:
    return pb.InferRequest(model=model, sequences=[pb.Sequence(text=pb.TextInput(text=text))], **fields)


async def get(port: int, path: str, accept: str = "*/*") -> tuple[int, dict[str, str], str]:
    """Send one HTTP request on the test's own loop; return status, headers and body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\nConnection: close\r\n\r\n".encode())
    head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    first, *lines = head.split("\r\n")
    return int(first.split()[1]), dict(line.lower().split(": ", 1) for line in lines), body


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(found: dict[tuple[str, tuple[tuple[str, str], ...]], float], name: str, **labels: str) -> float:
    return sum(
        value for (named, given), value in found.items() if named == name and labels.items() <= dict(given).items()
    )


def settled(server: Application) -> bool:
    """Return whether all started RPCs are counted as ended, which happens just after their callers have the answers."""
    found = [sample for family in server.metrics.registry.collect() for sample in family.samples]
    started, handled = (
        sum(sample.value for sample in found if sample.name == f"grpc_server_{what}_total")
        for what in ("started", "handled")
    )
    return started == handled


async def scrape(server: Application) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    await until(lambda: settled(server))
    return samples((await get(server.http_port, "/metrics"))[2])


async def health_of(channel: grpc.aio.Channel, service: str) -> int:
    answer = await HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
    return int(answer.status)


@pytest.fixture
async def unstarted(settings: Settings) -> AsyncIterator[Application]:
    application = Application(settings)
    yield application
    await application.aclose()


# Health and readiness


@pytest.mark.parametrize("service", ["", "attnserve.v1.InferenceService", "tiny", "plain"])
async def test_warm_services_are_serving(channel: grpc.aio.Channel, service: str) -> None:
    assert await health_of(channel, service) == SERVING


async def test_an_unknown_service_is_not_found(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health_of(channel, "nope")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_bytes_that_are_no_health_request_are_invalid(channel: grpc.aio.Channel) -> None:
    for data in (b"\xff", b"\x0a\x01\xff"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/grpc.health.v1.Health/Check")(data)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_every_watcher_gets_a_drain_after_another_has_left(
    channel: grpc.aio.Channel, server: Application
) -> None:
    first, second, unknown = (
        HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=service)) for service in ("", "", "nope")
    )
    for watch in (first, second):
        assert (await watch.read()).status == SERVING
    assert (await unknown.read()).status == SERVICE_UNKNOWN
    first.cancel()
    server.health.set("tiny", serving=True)  # nothing changes for the watchers of the whole
    draining = asyncio.create_task(server.drain())
    assert (await second.read()).status == NOT_SERVING
    assert await second.read() is grpc.aio.EOF
    await draining


async def test_services_are_not_serving_before_warm_up(unstarted: Application) -> None:
    port = await unstarted.grpc.start(ReceiveBounds.of(unstarted.settings, []))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert await health_of(channel, "") == NOT_SERVING


async def test_a_loading_model_is_unavailable_and_reports_its_state(
    server: Application, channel: grpc.aio.Channel
) -> None:
    server.catalog.find("tiny", "2").move(ModelState.LOADING)
    stub = InferenceServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Infer(asking(version="2"))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert caught.value.details() == "model 'tiny' is loading"
    assert (await stub.Infer(asking())).receipt.version == "1", "the highest version that is ready answers"
    described = (await stub.GetModel(pb.GetModelRequest(model="tiny", version="2"))).model
    assert described.state == model_pb2.MODEL_STATE_LOADING


async def test_http_reports_liveness_and_readiness(server: Application) -> None:
    status, headers, body = await get(server.http_port, "/readyz")
    assert (status, headers["content-type"]) == (200, "application/json")
    assert json.loads(body)["models"][0] == {"name": "plain", "version": "1", "state": "ready", "reason": ""}
    assert (await get(server.http_port, "/livez"))[0] == 200
    assert (await get(server.http_port, "/nope"))[0] == 404
    server.health.drain()
    assert (await get(server.http_port, "/readyz"))[0] == 503
    assert (await get(server.http_port, "/livez"))[0] == 200


async def test_metrics_have_the_requested_format(server: Application) -> None:
    _, headers, _ = await get(server.http_port, "/metrics")
    assert headers["content-type"].startswith("text/plain")
    _, headers, body = await get(server.http_port, "/metrics", accept="application/openmetrics-text")
    assert headers["content-type"].startswith("application/openmetrics-text")
    assert body.endswith("# EOF\n")


# Metrics


async def test_counters_equal_the_requests_sent(server: Application, channel: grpc.aio.Channel) -> None:
    stub = InferenceServiceStub(channel)
    good = [stub.Infer(asking(attention=attention_pb2.AttentionSelection(layers=[0]))) for _ in range(5)]
    answers = await asyncio.gather(*good, *(stub.Infer(asking("")) for _ in range(3)), return_exceptions=True)
    stream = stub.StreamInfer()
    await stream.write(pb.StreamInferRequest(request=asking(request_id="a")))
    await stream.done_writing()
    assert len([answer async for answer in stream]) == 1
    await until(lambda: not server.grpc._streams._open)
    found = await scrape(server)
    assert total(found, "grpc_server_started_total", grpc_method="Infer") == 8
    assert total(found, "grpc_server_handled_total", grpc_method="Infer", grpc_code="OK") == 5
    assert total(found, "grpc_server_handled_total", grpc_method="Infer", grpc_code="INVALID_ARGUMENT") == 3
    assert total(found, "grpc_server_handling_seconds_count", grpc_method="Infer") == 8
    assert total(found, "grpc_server_handled_total", grpc_method="StreamInfer", grpc_code="OK") == 1
    assert total(found, "attnserve_requests_total", model="tiny", version="2", code="OK") == 6
    assert total(found, "attnserve_requests_total", code="INVALID_ARGUMENT") == 3
    assert total(found, "attnserve_refused_total", reason="INVALID_REQUEST") == 3
    assert total(found, "attnserve_sequences_total") == 6
    sent = sum(
        len(answer.results[0].attention.maps[0].weights.data)
        for answer in answers
        if isinstance(answer, pb.InferResponse)
    )
    assert total(found, "attnserve_attention_bytes_total", form="dense") == sent
    assert total(found, "attnserve_model_state", model="tiny", version="1", state="ready") == 1
    assert total(found, "attnserve_execution_provider_info", provider="CPUExecutionProvider", precision="fp32") == 3
    assert total(found, "attnserve_session_memory_bytes") >= 0


async def test_unknown_model_names_add_no_metric_series(server: Application, channel: grpc.aio.Channel) -> None:
    stub = InferenceServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.Infer(asking(model="nope"))
    before = set(await scrape(server))
    for number in range(50):
        for call in (
            stub.Infer(asking(model=f"nope{number}")),
            stub.Infer(asking(version=str(number + 10))),
            channel.unary_unary(f"/attnserve.v1.InferenceService/Nope{number}")(b""),
            channel.unary_unary(f"/nope{number}/Infer")(b""),
        ):
            with pytest.raises(grpc.aio.AioRpcError):
                await call
    assert set(await scrape(server)) == before


async def test_expired_and_cancelled_calls_are_counted_apart(
    server: Application, channel: grpc.aio.Channel, gate: Gate
) -> None:
    stub = InferenceServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.Infer(asking(), timeout=0.1)
    call = stub.Infer(asking())
    await until(lambda: len(gate.waiting) == 2)
    call.cancel()
    await until(lambda: gate.withdrawn == 2)
    found = await scrape(server)
    for code in ("DEADLINE_EXCEEDED", "CANCELLED"):
        assert total(found, "grpc_server_handled_total", grpc_method="Infer", grpc_code=code) == 1
        assert total(found, "attnserve_requests_total", model="tiny", code=code) == 1


# Start


@pytest.mark.parametrize("ready", ["any", "all"])
async def test_a_bundle_that_fails_to_load_leaves_the_others_serving(
    settings: Settings, tiny_files: dict[str, Path], tmp_path: Path, ready: str
) -> None:
    write_bundle(tmp_path, tiny_manifest(), tiny_files)
    broken = write_bundle(tmp_path, tiny_manifest("broken"), tiny_files)
    (broken.path / "model.onnx").write_bytes(b"no model")
    no_manifest = write_bundle(tmp_path, tiny_manifest("halved"), tiny_files)
    (no_manifest.path / "manifest.json").write_text("{")
    application = Application(settings.model_copy(update={"repository": tmp_path, "ready": ready}))
    try:
        await application.start()
        states = {model.name: model.state.value for model in application.catalog.all()}
        assert states == {"broken": "failed", "halved": "failed", "tiny": "ready"}
        async with grpc.aio.insecure_channel(f"127.0.0.1:{application.grpc_port}") as channel:
            stub = InferenceServiceStub(channel)
            assert (await stub.Infer(asking())).results
            described = {model.name: model for model in (await stub.ListModels(pb.ListModelsRequest())).models}
            assert described["broken"].state_reason
            assert str(tmp_path) not in described["broken"].state_reason + described["halved"].state_reason
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Infer(asking(model="broken"))
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            status = status_pb2.Status.FromString(dict(caught.value.trailing_metadata())["grpc-status-details-bin"])
            assert [detail.TypeName() for detail in status.details] == ["google.rpc.ErrorInfo"], "no RetryInfo"
            assert described["broken"].state_reason in caught.value.details()
            assert await health_of(channel, "broken") == NOT_SERVING
            assert await health_of(channel, "") == (SERVING if ready == "any" else NOT_SERVING)
        status, _, body = await get(application.http_port, "/readyz")
        assert status == (200 if ready == "any" else 503)
        reasons = {model["name"]: model["reason"] for model in json.loads(body)["models"] if model["state"] == "failed"}
        assert reasons == {name: described[name].state_reason for name in ("broken", "halved")}
    finally:
        await application.aclose()


async def test_a_model_that_cannot_run_fails_at_warm_up(
    settings: Settings, tiny_files: dict[str, Path], tmp_path: Path
) -> None:
    manifest = tiny_manifest("wrong")
    outputs = (manifest.outputs[0].model_copy(update={"name": "nowhere"}), *manifest.outputs[1:])
    write_bundle(tmp_path, manifest.model_copy(update={"outputs": outputs}), tiny_files)
    write_bundle(tmp_path, tiny_manifest(), tiny_files)
    application = Application(settings.model_copy(update={"repository": tmp_path}))
    await application.start()
    assert application.catalog.find("wrong").state is ModelState.FAILED
    assert application.catalog.find("tiny").state is ModelState.READY
    await application.aclose()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"repository": Path("nowhere")}, StartFailed, "no model in nowhere: the folder does not exist"),
        ({"models": ("tiny/7",)}, StartFailed, "the repository has plain/1, tiny/1, tiny/2"),
        ({"require_provider": "CUDAExecutionProvider"}, ProviderUnavailable, "CUDAExecutionProvider is not available"),
    ],
    ids=["no repository", "no such model", "no such provider"],
)
async def test_a_failed_start_reports_its_reason(
    settings: Settings, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    application = Application(settings.model_copy(update=changes))
    with pytest.raises(error, match=message):
        await application.start()
    await application.aclose()


async def test_a_server_without_a_loaded_model_does_not_start(
    settings: Settings, tiny_files: dict[str, Path], tmp_path: Path
) -> None:
    broken = write_bundle(tmp_path, tiny_manifest(), tiny_files)
    (broken.path / "model.onnx").write_bytes(b"no model")
    application = Application(settings.model_copy(update={"repository": tmp_path}))
    with pytest.raises(StartFailed, match="no model could be loaded: tiny/1: "):
        await application.start()
    await application.aclose()


async def test_only_selected_models_are_loaded(settings: Settings) -> None:
    application = Application(settings.model_copy(update={"models": ("tiny/1", "plain")}))
    await application.start()
    assert [(model.name, model.version) for model in application.catalog.all()] == [("plain", "1"), ("tiny", "1")]
    await application.aclose()


@pytest.mark.parametrize("field", ["grpc_port", "http_port"])
async def test_a_taken_port_is_reported(settings: Settings, field: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        application = Application(settings.model_copy(update={field: port}))
        with pytest.raises(PortUnavailable, match=f"cannot listen on 127.0.0.1:{port}"):
            await application.start()
        await application.aclose()


# Drain, internal errors and signals, in this process


async def running(application: Application) -> asyncio.Task[int]:
    task = asyncio.create_task(run(application))
    await until(lambda: application.health.serving() or task.done())
    return task


@pytest.fixture
async def ran(settings: Settings) -> AsyncIterator[tuple[Application, asyncio.Task[int]]]:
    application = Application(settings)
    task = await running(application)
    yield application, task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_signal_drains_the_server_and_exits_with_0(
    ran: tuple[Application, asyncio.Task[int]],
) -> None:
    application, task = ran
    model = application.catalog.get("tiny", "2")
    assert model.manifest is not None
    gate = model.scheduler = Gate(model.manifest)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{application.grpc_port}") as channel:
        stub = InferenceServiceStub(channel)
        call = stub.Infer(asking())
        await until(lambda: bool(gate.waiting))
        signal.raise_signal(signal.SIGTERM)
        await until(lambda: not application.health.serving())
        assert model.state.value == "draining"
        gate.open()
        assert (await call).results
        assert await task == EXIT_DRAINED


async def test_new_requests_are_unavailable_while_draining(server: Application, channel: grpc.aio.Channel) -> None:
    server.catalog.drain()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await InferenceServiceStub(channel).Infer(asking())
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    server.grpc.drain()
    stream = InferenceServiceStub(channel).StreamInfer()
    assert await stream.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_second_signal_ends_the_server_at_once(ran: tuple[Application, asyncio.Task[int]]) -> None:
    application, task = ran
    model = application.catalog.get("tiny", "2")
    assert model.manifest is not None
    gate = model.scheduler = Gate(model.manifest)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{application.grpc_port}") as channel:
        call = InferenceServiceStub(channel).Infer(asking())
        await until(lambda: bool(gate.waiting))
        signal.raise_signal(signal.SIGTERM)
        await until(lambda: not application.health.serving())
        signal.raise_signal(signal.SIGTERM)
        assert await task == EXIT_FORCED
        with pytest.raises(grpc.aio.AioRpcError):
            await call


async def test_a_signal_while_loading_ends_the_start(settings: Settings) -> None:
    application = Application(settings)
    task = asyncio.create_task(run(application))
    await until(lambda: application.grpc_port != 0)
    signal.raise_signal(signal.SIGINT)
    assert await task == EXIT_DRAINED


async def test_a_scheduler_that_dies_ends_the_server_and_its_health(
    ran: tuple[Application, asyncio.Task[int]],
) -> None:
    application, task = ran
    loop_of_a_model = application.models.started()[0].scheduler._task
    assert loop_of_a_model is not None
    loop_of_a_model.cancel()
    assert await task == EXIT_FAULTED
    assert not application.health.serving()


async def test_a_scheduler_that_dies_leaves_answers_of_other_models(
    ran: tuple[Application, asyncio.Task[int]],
) -> None:
    application, task = ran
    model = application.catalog.get("tiny", "2")
    assert model.manifest is not None
    served, gate = model.scheduler, Gate(model.manifest)
    model.scheduler = gate
    loop_of_a_model = next(one for one in application.models.started() if one.scheduler is not served).scheduler._task
    assert loop_of_a_model is not None
    async with grpc.aio.insecure_channel(f"127.0.0.1:{application.grpc_port}") as channel:
        call = InferenceServiceStub(channel).Infer(asking())
        await until(lambda: bool(gate.waiting))
        loop_of_a_model.cancel()
        await until(lambda: application.health._closed)
        gate.open()
        assert (await call).results
    assert await task == EXIT_FAULTED


class Stuck:
    """A scheduler that never drains."""

    def __init__(self) -> None:
        self.aborted = False

    async def drain(self) -> None:
        await asyncio.Event().wait()

    def abort(self) -> None:
        self.aborted = True

    async def aclose(self) -> None:
        pass


async def test_a_drain_ends_with_its_grace(settings: Settings) -> None:
    application = Application(settings.model_copy(update={"drain_grace_s": 0.1}))
    await application.start()
    scheduler = application.models.started()[0].scheduler
    stuck = application.models.started()[0].scheduler = Stuck()  # type: ignore[assignment]
    async with asyncio.timeout(5):
        await application.drain()
    assert stuck.aborted
    await scheduler.aclose()
    await application.aclose()


# A real process


def test_a_real_process_serves_logs_json_and_ends_cleanly_on_sigterm(tiny_repository: Path, tmp_path: Path) -> None:
    with (
        serve(tiny_repository, tmp_path, "--instances", "1") as running_server,
        grpc.insecure_channel(running_server.target) as channel,
    ):
        stub = InferenceServiceStub(channel)
        assert stub.Infer(asking(), timeout=20).results
        with pytest.raises(grpc.RpcError):
            stub.Infer(asking("", request_id="mine"), timeout=20)
        with pytest.raises(grpc.RpcError):
            stub.Infer(asking(model="a\r\n\x1b[31mforged"), timeout=20)
    # `serve` has sent SIGTERM and checked exit code 0.
    lines = [json.loads(line) for line in running_server.log.read_text().splitlines()]
    events = [line["event"] for line in lines]
    assert events[0] == "listening"
    assert events.count("model ready") == 3
    assert events[-3:] == ["signal", "draining", "stopped"]
    refused = [line for line in lines if line["event"] == "request refused"]
    assert [line["level"] for line in refused] == ["info", "info"]
    assert refused[0]["request_id"] == "mine"
    assert "\x1b" not in running_server.log.read_text()


def test_all_wrong_settings_are_reported_at_once_with_exit_code_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [command("attnserve-server"), "serve", "--grpc-port", "70000", "--log-level", "loud"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={"PATH": "", "ATTNSERVE_INSTANCES": "many"},
        cwd=tmp_path,
    )
    assert done.returncode == 2
    for name in ("--grpc-port (ATTNSERVE_GRPC_PORT)", "--log-level", "--instances"):
        assert name in done.stderr
    assert "Traceback" not in done.stderr
