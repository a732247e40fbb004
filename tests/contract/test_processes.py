"""A server of several processes answers as one process does: results, maps, errors, health, metrics, drain.

`serve` is run as a command, with one front and an engine for each model of the tiny repository.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from attnserve.v1 import attention_pb2, tensor_pb2
from attnserve.v1 import inference_service_pb2 as pb
from attnserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from attnserve_server.app import Application
from attnserve_server.config import Settings
from grpc_health.v1 import health_pb2, health_pb2_grpc
from processes import CODE, Running, alive, children, ids, started

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench.echo import write_bundle  # noqa: E402


@pytest.fixture(scope="module")
def several(tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of several processes, for tests that leave it as it was."""
    running = started(tiny_repository, tmp_path_factory.mktemp("several"))
    yield running
    running.process.terminate()
    assert running.process.wait(30) == 0


@pytest.fixture
async def stub(several: Running) -> AsyncIterator[InferenceServiceStub]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{several.grpc_port}") as channel:
        yield InferenceServiceStub(channel)


def text(*texts: str, **fields: object) -> pb.InferRequest:
    return pb.InferRequest(
        model="tiny", sequences=[pb.Sequence(text=pb.TextInput(text=one)) for one in texts], **fields
    )


selection = attention_pb2.AttentionSelection
REQUESTS = {
    "tensors": ids(7),
    "text": text("the cat sat on a mat"),
    "several texts": text("the cat", "a", "on the mat the cat sat"),
    "all maps": text("the cat sat", attention=selection()),
    "the mean of words": text(
        "the cat sat", attention=selection(layers=[-1], head_reduction=attention_pb2.HEAD_REDUCTION_MEAN, unit=2)
    ),
    "links": text("the cat sat on a mat", attention=selection(top_k=2)),
    "features": text("the cat sat on a mat", attention=selection(features=[1, 3])),
    "one output": text("a mat", outputs=pb.OutputSelection(names=["embedding"])),
    "only checked": text("a mat", validate_only=True),
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
async def test_answers_are_those_of_one_process(
    stub: InferenceServiceStub, tiny_repository: Path, request_: pb.InferRequest
) -> None:
    application = Application(Settings(repository=tiny_repository, grpc_port=0, http_port=0))
    await application.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{application.grpc_port}") as channel:
            expected = await InferenceServiceStub(channel).Infer(request_)
    finally:
        await application.aclose()
    found = await stub.Infer(request_)
    assert found.receipt.HasField("timings") is not request_.validate_only
    timings = [answer.receipt.timings for answer in (found, expected)]
    assert {one.attention_seconds > 0 for one in timings} == {request_.HasField("attention")}
    for answer in (found, expected):
        answer.receipt.request_id = ""
        answer.receipt.ClearField("timings")
        for result in answer.results:
            result.run.Clear()
    assert found == expected


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (text(""), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.InferRequest(model="none"), grpc.StatusCode.NOT_FOUND),
        (text("a", attention=selection(layers=[9])), grpc.StatusCode.INVALID_ARGUMENT),
    ],
    ids=["no text", "no model", "no layer"],
)
async def test_errors_are_those_of_one_process(
    stub: InferenceServiceStub, request_: pb.InferRequest, code: grpc.StatusCode
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Infer(request_)
    assert caught.value.code() is code


async def test_many_callers_share_batches_and_are_counted_once(several: Running, stub: InferenceServiceStub) -> None:
    labels = {"model": "plain", "version": "1"}
    before = several.sample("attnserve_sequences_total", **labels)
    answers = await asyncio.gather(*(stub.Infer(ids(1 + number % 20)) for number in range(200)))
    assert all(len(answer.results) == 1 for answer in answers)
    assert several.sample("attnserve_sequences_total", **labels) - before == 200
    assert several.sample("attnserve_requests_total", code="OK", **labels) >= 200
    assert several.sample("attnserve_model_state", state="ready", **labels) == 1
    assert several.sample("attnserve_queue_depth", **labels) == 0


def test_each_process_reports_its_memory_and_processor_time(several: Running) -> None:
    names = ("supervisor", "front 0", "engine plain/1", "engine tiny/1", "engine tiny/2")
    for name in names:
        assert several.sample("process_resident_memory_bytes", process=name) > 10 * 2**20
        assert several.sample("process_cpu_seconds_total", process=name) > 0


async def test_a_cancelled_call_leaves_nothing_behind(several: Running, stub: InferenceServiceStub) -> None:
    calls = [stub.Infer(ids(20)) for _ in range(50)]
    await asyncio.sleep(0)
    for call in calls[::2]:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    answer = await stub.Infer(ids(3))
    assert len(answer.results) == 1
    assert several.sample("attnserve_running_batches", model="plain", version="1") == 0


async def test_a_call_ends_at_its_deadline(stub: InferenceServiceStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Infer(ids(20), timeout=1e-6)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_stream_is_answered(stub: InferenceServiceStub) -> None:
    call = stub.StreamInfer()
    for number in range(40):
        asked = ids(1 + number % 9)
        asked.request_id = str(number)
        await call.write(pb.StreamInferRequest(request=asked))
    await call.done_writing()
    answered = [answer.request_id async for answer in call]
    assert sorted(answered, key=int) == [str(number) for number in range(40)]


@pytest.mark.slow
async def test_large_tensors_come_back_bit_by_bit_also_beyond_the_shared_memory(tmp_path: Path) -> None:
    write_bundle(tmp_path)
    running = started(tmp_path, tmp_path)
    chance, options = np.random.default_rng(1), [("grpc.max_receive_message_length", 64 * 2**20)]
    rows = [1, 3, 43, 683, 4096] + [4096] * 24  # the last ones together take 144 MiB, twice the shared memory
    sent = [chance.standard_normal((count, 384), np.float32) for count in rows]
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{running.grpc_port}", options=options) as channel:
            infer = InferenceServiceStub(channel).Infer
            answers = await asyncio.gather(*(infer(echoed(one)) for one in sent))
    finally:
        running.process.terminate()
        assert running.process.wait(30) == 0
    for one, answer in zip(sent, answers, strict=True):
        assert answer.results[0].outputs[0].data == one.tobytes()


def echoed(x: np.ndarray) -> pb.InferRequest:
    tensor = tensor_pb2.Tensor(name="x", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=list(x.shape), data=x.tobytes())
    return pb.InferRequest(model="echo", sequences=[pb.Sequence(tensors=pb.TensorInput(tensors=[tensor]))])


async def test_health_and_readiness_are_those_of_the_whole(several: Running) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{several.grpc_port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "tiny", "plain"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert json.loads(several.page("/readyz"))["status"] == "ready"


def test_a_second_server_on_the_port_does_not_start(several: Running, tiny_repository: Path) -> None:
    line = [sys.executable, "-P", "-c", CODE, "serve", "--repository", str(tiny_repository), "--http-port", "0"]
    for isolation in ("process", "none"):
        second = subprocess.run(
            [*line, "--grpc-port", str(several.grpc_port), "--isolation", isolation],
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert second.returncode == 2
        assert b"the port is taken" in second.stderr


def test_a_signal_drains_and_ends_all_processes(tiny_repository: Path, tmp_path: Path) -> None:
    running = started(tiny_repository, tmp_path, "--fronts", "2", "--standby", "false")
    found = [one for one, _ in children(running.process.pid)]
    assert len(found) == 2 + 3, "two fronts, and an engine for each model"
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(30) == 0
    assert not any(alive(child) for child in found)


def test_the_server_ends_with_code_70_if_its_front_cannot_start(tiny_repository: Path) -> None:
    line = [sys.executable, "-P", "-c", CODE, "serve", "--repository", str(tiny_repository), "--isolation", "process"]
    line += ["--grpc-port", "0", "--http-port", "0", "--fronts", "1", "--standby", "false"]
    process = subprocess.Popen(line)
    found = False
    while not found:
        assert process.poll() is None
        for child, words in children(process.pid):
            if "attnserve_server.processes.front" in words:
                child.kill()
                found = True
        time.sleep(0.01)
    assert process.wait(60) == 70


def test_no_process_is_left_if_the_supervisor_is_killed(tiny_repository: Path, tmp_path: Path) -> None:
    running = started(tiny_repository, tmp_path)
    found = [one for one, _ in children(running.process.pid)]
    running.process.kill()
    running.process.wait(10)
    gone, left = psutil.wait_procs(found, timeout=20)
    assert (len(gone), left) == (len(found), [])
