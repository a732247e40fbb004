"""The audit log of a real server: one line for each request, from every front, and what each line holds.

Servers are run as commands over the tiny model, of one process and of several. HMACs are recomputed with the standard
library, as the how-to page describes it.
"""

from __future__ import annotations

import hmac
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from attnserve.oip import open_inference_pb2 as oip
from attnserve.v1 import attention_pb2
from attnserve.v1 import inference_service_pb2 as pb
from attnserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from attnserve_server.app import Application
from attnserve_server.config import Settings, SettingsInvalid
from attnserve_server.observability.audit import AuditLog
from attnserve_server.observability.audit_file import AuditUnusable
from attnserve_server.observability.metrics import Metrics
from attnserve_server.observability.spec import AUDIT_LINES
from attnserve_server.transport.audited import AuditedPlane
from attnserve_server.transport.traced import AuditedTracedPlane, plane_of
from credentials import Tokens, bearer
from http_calls import call
from processes import CODE
from serving import RunningServer, serve

KEY = bytes(range(32))
TEXT, PAIR = "the cat sat on a mat", "a dog looked"
IDS = np.array([2, 4, 5, 3], np.int64)


def digest(content: bytes) -> str:
    """The HMAC of a content, as an auditor computes it."""
    return hmac.new(KEY, content, "sha256").hexdigest()


def texts(*given: str, **fields: Any) -> pb.InferRequest:
    return pb.InferRequest(
        model="tiny", sequences=[pb.Sequence(text=pb.TextInput(text=one)) for one in given], **fields
    )


@dataclass
class Audited:
    """A server with an audit log, and a token."""

    server: RunningServer
    log: Path
    secret: str = ""
    _read: int = field(default=0, init=False)

    def lines(self, count: int) -> list[dict[str, Any]]:
        """The next lines of the log, once there are so many."""
        until_s = time.monotonic() + 60
        while len(found := self.log.read_text().splitlines()) < self._read + count:
            assert time.monotonic() < until_s, found
            time.sleep(0.02)
        new, self._read = found[self._read :], len(found)
        assert len(new) == count, "each request has one line"
        return [json.loads(line) for line in new]

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(self.server.target)


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "audit.key"
    path.write_bytes(KEY)
    return path


@pytest.fixture(scope="module", params=["none", "process"])
def audited(
    request: pytest.FixtureRequest, tiny_repository: Path, key_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Audited]:
    folder = tmp_path_factory.mktemp("audited")
    tokens = Tokens(folder / "tokens.txt")
    secret = tokens.add("reviewer", "infer,attention,metrics")
    log = folder / "audit.jsonl"
    flags = ("--isolation", request.param, "--fronts", "1", "--models", "tiny/2", "--tokens-file", str(tokens.path))
    flags += ("--audit-log", str(log), "--audit-key-file", str(key_file))
    with serve(tiny_repository, folder, *flags) as running:
        yield Audited(running, log, secret)


def test_a_line_has_who_what_and_which_bundle(audited: Audited) -> None:
    with audited.channel() as channel:
        request = texts(TEXT, "the mat", request_id="first")
        answer = InferenceServiceStub(channel).Infer(request, metadata=bearer(audited.secret), timeout=30)
    [line] = audited.lines(1)
    assert line["request_id"] == "first"
    assert line["caller"] == "reviewer"
    assert (line["model"], line["version"]) == ("tiny", "2")
    assert line["bundle_digest"] == answer.receipt.digest
    assert line["provider"] == answer.receipt.execution_provider
    assert line["precision"] == answer.receipt.precision
    assert (line["status"], line["reason"], line["selection"]) == ("OK", None, None)
    assert [one["hmac"] for one in line["sequences"]] == [
        {"text": digest(TEXT.encode())},
        {"text": digest(b"the mat")},
    ]
    assert [one["tokens"] for one in line["sequences"]] == [8, 4]
    assert line["key_id"] == digest(b"attnserve audit key")[:16]
    assert line["time"].endswith("+00:00")
    assert TEXT not in json.dumps(line), "no text unless --audit-text is set"


def native(audited: Audited, sequence: pb.Sequence) -> None:
    with audited.channel() as channel:
        request = pb.InferRequest(model="tiny", sequences=[sequence])
        InferenceServiceStub(channel).Infer(request, metadata=bearer(audited.secret), timeout=30)


def streamed(audited: Audited, sequence: pb.Sequence) -> None:
    with audited.channel() as channel:
        request = pb.InferRequest(model="tiny", sequences=[sequence], request_id="s")
        stream = InferenceServiceStub(channel).StreamInfer(
            iter([pb.StreamInferRequest(request=request)]), metadata=bearer(audited.secret), timeout=30
        )
        assert [one.WhichOneof("message") for one in stream]


def of_protocol(audited: Audited, sequence: pb.Sequence) -> None:
    message = oip.ModelInferRequest(model_name="tiny")
    if sequence.WhichOneof("input") == "text":
        for name, text in (("text", sequence.text.text), ("text_pair", sequence.text.text_pair)):
            if text:
                contents = oip.InferTensorContents(bytes_contents=[text.encode()])
                message.inputs.add(name=name, datatype="BYTES", shape=[1, 1], contents=contents)
    else:
        message.inputs.add(name="input_ids", datatype="INT64", shape=[1, len(IDS)])
        message.raw_input_contents.append(IDS.tobytes())
    with audited.channel() as channel:
        infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            lambda one: one.SerializeToString(),
            oip.ModelInferResponse.FromString,
        )
        infer(message, metadata=bearer(audited.secret), timeout=30)


SENT: dict[str, Callable[[Audited, pb.Sequence], None]] = {
    "unary": native,
    "stream": streamed,
    "open inference protocol": of_protocol,
}


@pytest.mark.parametrize("send", SENT.values(), ids=SENT)
@pytest.mark.parametrize("kind", ["text", "pair", "ids"])
def test_hmacs_are_those_of_the_text_or_of_the_token_ids_on_every_front(
    audited: Audited, send: Callable[[Audited, pb.Sequence], None], kind: str
) -> None:
    if kind == "ids":
        sequence = pb.Sequence()
        sequence.tensors.tensors.add(name="input_ids", dtype=5, shape=IDS.shape, data=IDS.tobytes())
        expected = {"input_ids": digest(IDS.astype("<i8").tobytes())}
    else:
        sequence = pb.Sequence(text=pb.TextInput(text=TEXT, text_pair=PAIR if kind == "pair" else ""))
        expected = {"text": digest(TEXT.encode())} | ({"text_pair": digest(PAIR.encode())} if kind == "pair" else {})
    send(audited, sequence)
    [line] = audited.lines(1)
    assert (line["status"], line["caller"]) == ("OK", "reviewer")
    assert [one["hmac"] for one in line["sequences"]] == [expected]


async def test_rest_writes_the_same_lines(audited: Audited) -> None:
    port, headers = audited.server.rest_port, {"authorization": f"Bearer {audited.secret}", "x-request-id": "r"}
    body = {"sequences": [TEXT], "attention": {"layers": [-1], "head_reduction": "mean"}}
    assert (await call(port, "POST", "/v1/models/tiny:infer", body, headers)).status == 200
    tensors = {"inputs": [{"name": "input_ids", "datatype": "INT64", "shape": [1, 4], "data": IDS.tolist()}]}
    assert (await call(port, "POST", "/v2/models/tiny/infer", tensors, headers)).status == 200
    first, second = audited.lines(2)
    assert first["request_id"] == "r"
    assert first["selection"]["sites"] == ["layer1"]
    assert first["selection"]["head_reduction"] == "mean"
    assert first["sequences"][0]["hmac"] == {"text": digest(TEXT.encode())}
    assert second["sequences"][0]["hmac"] == {"input_ids": digest(IDS.tobytes())}
    assert {first["caller"], second["caller"]} == {"reviewer"}


def test_row_features_are_summed_up_by_map(audited: Audited) -> None:
    selection = attention_pb2.AttentionSelection(features=[1, 4])
    with audited.channel() as channel:
        answer = InferenceServiceStub(channel).Infer(
            texts(TEXT, attention=selection), metadata=bearer(audited.secret), timeout=30
        )
    [line] = audited.lines(1)
    assert line["selection"]["features"] == ["entropy", "mean_distance"]
    found = line["sequences"][0]["features"]
    maps = answer.results[0].attention.maps
    assert [one["sites"] for one in found] == [["layer0"], ["layer1"]]
    for one, own in zip(found, maps, strict=True):
        values = np.frombuffer(own.features.data, "<f4").reshape(-1, 2).astype(np.float64)
        assert one["rows"] == own.features.shape[1]
        for at, name in enumerate(("entropy", "mean_distance")):
            column = values[:, at]
            # The values are float32; their mean in float64 is exact to its rounding.
            assert one[name]["mean"] == pytest.approx(column.mean(), rel=1e-12)
            assert (one[name]["min"], one[name]["max"]) == (column.min(), column.max())


def test_a_request_that_fails_has_a_line_with_its_status(audited: Audited) -> None:
    with audited.channel() as channel:
        stub = InferenceServiceStub(channel)
        for request in (texts(""), texts(TEXT, attention=attention_pb2.AttentionSelection(layers=[9]))):
            with pytest.raises(grpc.RpcError):
                stub.Infer(request, metadata=bearer(audited.secret), timeout=30)
        stub.Infer(texts(TEXT, validate_only=True), metadata=bearer(audited.secret), timeout=30)
    first, second, checked = audited.lines(3)
    for line in (first, second):
        assert (line["status"], line["reason"]) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
        assert line["sequences"] == []
    assert (checked["status"], checked["validate_only"]) == ("OK", True)


def test_sighup_opens_the_file_again(audited: Audited) -> None:
    moved = audited.log.with_name("moved.jsonl")
    audited.log.rename(moved)
    audited.server.process.send_signal(signal.SIGHUP)
    until_s = time.monotonic() + 60
    while not audited.log.exists():
        assert time.monotonic() < until_s, "a new file is opened without a request"
        time.sleep(0.02)
    audited._read = 0
    native(audited, pb.Sequence(text=pb.TextInput(text="the dog")))
    [line] = audited.lines(1)
    assert line["sequences"][0]["hmac"] == {"text": digest(b"the dog")}


def content_of(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


async def infer(server: Application, *requests: pb.InferRequest) -> None:
    """Send requests, one after the other."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        for request in requests:
            assert (await InferenceServiceStub(channel).Infer(request, timeout=30)).results


def test_a_full_disk_costs_lines_and_no_answer(tiny_repository: Path, key_file: Path, tmp_path: Path) -> None:
    flags = ("--isolation", "process", "--fronts", "1", "--models", "tiny/2")
    flags += ("--audit-log", "/dev/full", "--audit-key-file", str(key_file))
    with serve(tiny_repository, tmp_path, *flags) as running, grpc.insecure_channel(running.target) as channel:
        for _ in range(5):
            assert InferenceServiceStub(channel).Infer(texts(TEXT), timeout=30).results
        until_s = time.monotonic() + 60
        while running.metric("attnserve_audit_lines_total", result="dropped") < 5:
            assert time.monotonic() < until_s
            time.sleep(0.05)
        assert running.metric("attnserve_audit_lines_total", result="written") == 0
        log = running.log.read_text()
    assert log.count("the audit log cannot be written") == 1
    assert "No space left on device" in log
    assert "free space" in log


async def test_a_full_disk_costs_lines_and_no_answer_of_one_process(settings: Settings, key_file: Path) -> None:
    full = {"audit_log": Path("/dev/full"), "audit_key_file": key_file, "models": ("tiny/2",)}
    server = Application(settings.model_copy(update=full))
    await server.start()
    try:
        await infer(server, *[texts(TEXT)] * 5)
    finally:
        await server.aclose()
    lines = server.metrics.counter(AUDIT_LINES)
    assert [lines.labels(result).total for result in ("written", "dropped")] == [0, 5]


async def test_texts_are_in_the_log_if_that_is_switched_on_and_files_rotate(
    settings: Settings, key_file: Path, tmp_path: Path
) -> None:
    log = tmp_path / "audit.jsonl"
    how = {"audit_text": True, "audit_rotate_bytes": 2048, "audit_keep": 2, "models": ("tiny/2",)}
    server = Application(settings.model_copy(update={"audit_log": log, "audit_key_file": key_file, **how}))
    await server.start()
    try:
        await infer(server, *(texts(TEXT, request_id=str(number)) for number in range(12)))
    finally:
        await server.aclose()
    files = [log.with_name("audit.jsonl.2"), log.with_name("audit.jsonl.1"), log]
    assert content_of(tmp_path) == sorted(files)
    assert all(path.stat().st_size <= 2048 for path in files)
    lines = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    numbers = [int(line["request_id"]) for line in lines]
    assert numbers == list(range(12 - len(numbers), 12)), "in order, the oldest removed"
    assert {line["sequences"][0]["text"] for line in lines} == {TEXT}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"audit_log": "{folder}/log"}, ["--audit-key-file", "openssl rand"]),
        ({"audit_log": "{folder}/log", "audit_key_file": "{folder}/none"}, ["{folder}/none", "No such file"]),
        ({"audit_log": "{folder}/log", "audit_key_file": "{folder}/short"}, ["31 bytes; at least 32"]),
        ({"audit_log": "{folder}/no/log", "audit_key_file": "{key}"}, ["{folder}/no/log", "create its folder"]),
        ({"audit_log": "{folder}", "audit_key_file": "{key}"}, ["{folder}", "Is a directory"]),
        ({"audit_text": True}, ["need --audit-log"]),
    ],
    ids=["no key", "missing key", "short key", "no folder", "a folder", "no log"],
)
def test_an_unusable_file_is_refused_with_its_path_and_the_remedy(
    tiny_repository: Path, key_file: Path, tmp_path: Path, given: dict[str, Any], expected: list[str]
) -> None:
    (tmp_path / "short").write_bytes(KEY[:31])
    named = {"folder": tmp_path, "key": key_file}
    flags = {name: one.format(**named) if isinstance(one, str) else one for name, one in given.items()}
    with pytest.raises((SettingsInvalid, AuditUnusable)) as caught:
        AuditLog(Settings.load({"repository": str(tiny_repository), **flags}), Metrics())
    for one in expected:
        assert one.format(**named) in str(caught.value)


def test_an_unusable_file_ends_the_start_with_one_sentence(tiny_repository: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-P", "-c", CODE, "serve", "--repository", str(tiny_repository), "--isolation", "process"]
    line += ["--audit-log", str(tmp_path / "log"), "--audit-key-file", str(tmp_path / "none")]
    wide = {**os.environ, "COLUMNS": "400"}
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, env=wide)
    assert done.returncode == 2
    assert f"{tmp_path / 'none'}: cannot be read: No such file" in done.stderr
    assert "Traceback" not in done.stderr


async def test_without_an_audit_log_no_code_of_it_is_on_the_path(settings: Settings, key_file: Path) -> None:
    server = Application(settings)
    assert server.audit is None
    assert not isinstance(server.plane, AuditedPlane)
    await server.aclose()
    log = key_file.with_name("both.jsonl")
    with_log = Application(settings.model_copy(update={"audit_log": log, "audit_key_file": key_file}))
    assert type(with_log.plane) is AuditedPlane, "the control"
    tracing: Any = object()
    parts = (with_log.catalog, with_log.settings, with_log.clock, tracing, with_log.audit)
    assert type(plane_of(*parts)) is AuditedTracedPlane
    await with_log.aclose()
    assert log.read_bytes() == b""
