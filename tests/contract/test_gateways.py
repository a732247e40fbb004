"""What gateways call: the load of models, and tokenizer files in pieces, of one process and of several.

Needs the fixtures of tests/contract/conftest.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from attnserve.v1 import inference_service_pb2 as pb
from attnserve.v1 import model_pb2
from attnserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from attnserve_client import AsyncClient
from attnserve_client.cli._app import app
from attnserve_client.errors import ModelNotFound, TextUnavailable
from attnserve_server.app import Application
from attnserve_server.transport import gateways
from callers import Caller
from gated import Gate, until
from processes import started
from tokenizers import Tokenizer
from typer.testing import CliRunner


@pytest.fixture
async def stub(channel: grpc.aio.Channel) -> InferenceServiceStub:
    return InferenceServiceStub(channel)


def command(*line: str) -> str:
    """Run the command `attnserve`, and return what it prints."""
    done = CliRunner().invoke(app, list(line))
    assert done.exit_code == 0, done.output
    return done.stdout


def asking() -> pb.InferRequest:
    return pb.InferRequest(model="tiny", sequences=[pb.Sequence(text=pb.TextInput(text="the cat"))])


async def test_the_load_has_what_waits_and_the_predicted_wait(stub: InferenceServiceStub, gate: Gate) -> None:
    gate.seconds_per_token = 0.5
    call = stub.Infer(asking())
    await until(lambda: bool(gate.waiting))
    found = await stub.GetLoad(pb.GetLoadRequest(model="tiny"))
    call.cancel()
    assert [(one.model, one.version, one.state) for one in found.models] == [
        ("tiny", "1", model_pb2.MODEL_STATE_READY), ("tiny", "2", model_pb2.MODEL_STATE_READY)
    ]  # fmt: skip
    held = found.models[1]
    assert (held.waiting_sequences, held.waiting_tokens, held.waiting_bytes, held.instances) == (1, 1, 1, 1)
    assert held.predicted_wait_seconds == 0.5
    assert held.max_waiting_sequences == 4096


async def test_the_wait_is_not_set_while_no_speed_is_known(stub: InferenceServiceStub, gate: Gate) -> None:
    assert gate.seconds_per_token is None
    found = await stub.GetLoad(pb.GetLoadRequest())
    assert [one.HasField("predicted_wait_seconds") for one in found.models] == [True, True, False]
    assert [one.model for one in found.models] == ["plain", "tiny", "tiny"]


async def test_a_model_that_does_not_serve_has_no_load(stub: InferenceServiceStub, server: Application) -> None:
    server.catalog.drain()
    found = await stub.GetLoad(pb.GetLoadRequest(model="plain"))
    assert list(found.models) == [pb.ModelLoad(model="plain", version="1", state=model_pb2.MODEL_STATE_DRAINING)]


async def test_pieces_of_a_tokenizer_join_to_the_file_of_the_bundle(
    stub: InferenceServiceStub, tiny_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateways, "CHUNK_BYTES", 100)
    content = tiny_files["tokenizer.json"].read_bytes()
    joined, count = b"", 0
    while True:
        piece = await stub.GetTokenizer(pb.GetTokenizerRequest(model="tiny", offset=len(joined)))
        assert (piece.version, piece.total_bytes, piece.offset) == ("2", len(content), len(joined))
        assert piece.digest == f"sha256:{hashlib.sha256(content).hexdigest()}"
        joined, count = joined + piece.data, count + 1
        if not piece.data:
            break
    assert joined == content
    assert count == -(-len(content) // 100) + 1


async def test_the_tokenizer_of_the_client_makes_the_tokens_of_the_server(
    server: Application, caller: Callable[..., Caller], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateways, "CHUNK_BYTES", 100)
    client = caller(f"127.0.0.1:{server.grpc_port}")
    try:
        found = await client.call("tokenizer", "tiny")
        loads = await client.call("loads", "tiny")
        result = await client.infer("the cat sat")
        with pytest.raises(TextUnavailable):
            await client.call("tokenizer", "plain")
        with pytest.raises(ModelNotFound):
            await client.call("tokenizer", "none")
    finally:
        await client.close()
    encoded = Tokenizer.from_buffer(found.content).encode("the cat sat")
    assert len(encoded.ids) == result.run.useful_tokens <= found.max_tokens
    assert not found.pads_and_truncates
    assert [(one.version, one.state, one.waiting_sequences) for one in loads] == [("1", "ready", 0), ("2", "ready", 0)]
    assert all(one.predicted_wait_s is not None for one in loads)


async def test_a_server_of_several_processes_answers_the_same(
    tiny_repository: Path, tiny_files: dict[str, Path], tmp_path: Path
) -> None:
    running = started(tiny_repository, tmp_path)
    try:
        target = f"127.0.0.1:{running.grpc_port}"
        async with AsyncClient(target) as client:
            await client.infer("tiny", "the cat")
            loads = await client.loads()
            found = await client.tokenizer("tiny")
        shown = json.loads(command("queues", "tiny", "--server", target, "--json"))
        assert " 0.0 ms\n" in command("queues", "--server", target)
        assert found.digest in command("tokenizer", "tiny", "--server", target, "--out", str(tmp_path / "t.json"))
    finally:
        running.process.terminate()
        assert running.process.wait(30) == 0
    assert [(one.model, one.state) for one in loads] == [("plain", "ready"), ("tiny", "ready"), ("tiny", "ready")]
    assert loads[2].predicted_wait_s == 0 == loads[2].waiting_sequences
    assert found.content == tiny_files["tokenizer.json"].read_bytes() == (tmp_path / "t.json").read_bytes()
    assert [one["version"] for one in shown] == ["1", "2"]
