"""`--verify-batches` on a real server counts the answers that a batch changed, and none where it changed none.

With it, the server runs a sample of sequences again alone, and compares. The control is a model that mixes the rows of
its batch, under a manifest that denies it. Needs `tiny_files` of tests/contract/conftest.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
import onnx
import pytest
import structlog
from attnserve.v1 import attention_pb2, tensor_pb2
from attnserve.v1 import inference_service_pb2 as pb
from attnserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from attnserve_server.app import Application
from attnserve_server.config import Settings
from attnserve_server.model.certificate import Certificate, Clause, Verdict
from attnserve_server.model.manifest import AxisSpec, InputSpec, Manifest, OutputSpec, SiteSpec
from attnserve_server.model.repository import UNSEALED, write_bundle
from attnserve_server.observability.metrics import CHECK_OUTCOMES
from gated import until
from made_by_hand import CHECK, PROVENANCE
from onnx import TensorProto, helper, numpy_helper
from tiny_bundle import tiny_manifest

WIDTH = 4
QUIET = np.array([[1.0, -0.5, 0.25, 0.75], [-1.0, 0.5, 1.0, -0.25]], np.float32)
"""What each caller sends, (T, D). Beside a neighbour of 1000 its quantized values are all 0."""
LOUD = QUIET * 1000


def graph(*, quantized: bool) -> onnx.ModelProto:
    """Attention of x over itself, `softmax(x x^T)`; `quantized`: by one scale of the whole batch, which mixes rows."""
    node = helper.make_node
    nodes = [node("Identity", ["x"], ["hidden"])]
    if quantized:
        nodes = [
            node("DynamicQuantizeLinear", ["x"], ["x8", "scale", "zero"]),
            node("DequantizeLinear", ["x8", "scale", "zero"], ["hidden"]),
        ]
    nodes += [
        node("Identity", ["hidden"], ["out"]),
        node("Gather", ["hidden", "attention_items.site"], ["asked"]),
        node("Transpose", ["asked"], ["turned"], perm=[0, 2, 1]),
        node("MatMul", ["asked", "turned"], ["scores"]),
        node("Softmax", ["scores"], ["weights"], axis=-1),
        node("Unsqueeze", ["weights", "head"], ["attention.site"]),
    ]
    made = helper.make_graph(
        nodes,
        "mixing" if quantized else "plain",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "t", WIDTH]),
            helper.make_tensor_value_info("attention_items.site", TensorProto.INT64, ["items"]),
        ],
        [
            helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", "t", WIDTH]),
            helper.make_tensor_value_info("attention.site", TensorProto.FLOAT, ["items", 1, "t", "t"]),
        ],
        [numpy_helper.from_array(np.array([1], np.int64), "head")],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def forced(name: str) -> Manifest:
    """A manifest with which the server joins rows, although the graph may mix them."""
    return Manifest(
        name=name,
        version="1",
        digest=UNSEALED,
        files={},
        precision="fp32",
        max_batch_size=8,
        axes=(AxisSpec(symbol="t", max_length=16, paddable=False),),
        inputs=(InputSpec(name="x", dtype="float32", shape=("t", WIDTH)),),
        outputs=(OutputSpec(name="out", dtype="float32", shape=("t", WIDTH)),),
        sites=(
            SiteSpec(
                name="site",
                layer=0,
                kind="self",
                form="dense",
                operator="Softmax",
                heads=1,
                kv_heads=1,
                head_dim=WIDTH,
                query_axis="t",
                key_axis="t",
                items_input="attention_items.site",
                weights_output="attention.site",
            ),
        ),
        provenance=PROVENANCE,
        check=CHECK,
        certificate=Certificate(
            clauses=(Clause(axis="batch", verdict=Verdict.PROVED), Clause(axis="t", verdict=Verdict.UNKNOWN))
        ),
    )


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, tiny_files: dict[str, Path]) -> Path:
    root = tmp_path_factory.mktemp("forced")
    for name, quantized in (("mixing", True), ("plain", False)):
        folder = tmp_path_factory.mktemp(name)
        onnx.save(graph(quantized=quantized), folder / "model.onnx")
        write_bundle(root, forced(name), {"model.onnx": folder / "model.onnx"})
    proved = Certificate(clauses=tuple(Clause(axis=axis, verdict=Verdict.PROVED) for axis in ("batch", "seq")))
    write_bundle(root, tiny_manifest().model_copy(update={"certificate": proved}), tiny_files)
    return root


@asynccontextmanager
async def serving(repository: Path, **settings: object) -> AsyncIterator[tuple[Application, InferenceServiceStub]]:
    """A server that puts all sequences of one request into one batch."""
    given = {"grpc_port": 0, "http_port": 0, "instances": 1, "run_overhead_tokens": 1e6, **settings}
    application = Application(Settings(repository=repository, **given))  # type: ignore[arg-type]
    try:
        await application.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{application.grpc_port}") as channel:
            yield application, InferenceServiceStub(channel)
    finally:
        await application.aclose()


def asking(model: str, *rows: np.ndarray) -> pb.InferRequest:
    tensors = [
        tensor_pb2.Tensor(
            name="x", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=row.shape, data=row.astype("<f4").tobytes()
        )
        for row in rows
    ]
    sequences = [pb.Sequence(tensors=pb.TensorInput(tensors=[tensor])) for tensor in tensors]
    selection = attention_pb2.AttentionSelection()
    return pb.InferRequest(model=model, sequences=sequences, attention=selection, request_id="mine")


def metric(server: Application, name: str, model: str, **labels: str) -> float:
    value = server.metrics.registry.get_sample_value(name, {"model": model, "version": "1", **labels})
    assert value is not None, name
    return value


def checks(server: Application, model: str) -> dict[str, int]:
    """Drawn sequences by outcome."""
    return {
        outcome: int(metric(server, "attnserve_batch_checks_total", model, outcome=outcome))
        for outcome in CHECK_OUTCOMES
    }


def first_output(answer: pb.InferResponse, at: int) -> np.ndarray:
    return np.frombuffer(answer.results[at].outputs[0].data, "<f4").reshape(QUIET.shape)


async def test_answers_changed_by_their_batch_are_counted(repository: Path, caplog: pytest.LogCaptureFixture) -> None:
    with structlog.testing.capture_logs():  # the server's own lines
        async with serving(repository, models=("mixing",), verify_batches=1.0) as (server, stub):
            answer = await stub.Infer(asking("mixing", QUIET, LOUD, QUIET))
            assert np.abs(first_output(answer, 0)).max() == 0, "the scale of a loud neighbour leaves nothing"
            await until(lambda: sum(checks(server, "mixing").values()) == 3)
            assert checks(server, "mixing") == {"equal": 1, "different": 2, "dropped": 0, "failed": 0}
            assert metric(server, "attnserve_batch_mismatch_total", "mixing") == 2
            assert metric(server, "attnserve_batching_isolated", "mixing") == 0
            assert (await stub.GetModel(pb.GetModelRequest(model="mixing"))).model.state_reason == ""
            [line] = [record for record in caplog.records if record.name == "attnserve_server.scheduling.verifier"]
            assert (line.__dict__["request_id"], line.__dict__["batch_size"]) == ("mine", 3)
            again = await stub.Infer(asking("mixing", QUIET, LOUD, QUIET))
            assert np.abs(first_output(again, 0)).max() == 0, "counting changes nothing"


async def test_answers_unchanged_by_their_batch_are_equal(repository: Path) -> None:
    with structlog.testing.capture_logs():
        async with serving(repository, models=("plain",), verify_batches=1.0) as (server, stub):
            await stub.Infer(asking("plain", QUIET, LOUD, QUIET))
            await until(lambda: sum(checks(server, "plain").values()) == 3)
            assert checks(server, "plain") == {"equal": 3, "different": 0, "dropped": 0, "failed": 0}
            assert metric(server, "attnserve_batch_mismatch_total", "plain") == 0


async def test_padded_texts_with_attention_are_equal(repository: Path) -> None:
    texts = ("a dog", "the cat sat on a mat", "the dog looked at the cat and the mat")
    asked = pb.InferRequest(
        model="tiny",
        sequences=[pb.Sequence(text=pb.TextInput(text=text)) for text in texts],
        attention=attention_pb2.AttentionSelection(),
    )
    with structlog.testing.capture_logs():
        async with serving(repository, models=("tiny",), verify_batches=1.0) as (server, stub):
            answer = await stub.Infer(asked)
            assert {result.run.batch_size for result in answer.results} == {3}
            await until(lambda: sum(checks(server, "tiny").values()) == 3)
            assert checks(server, "tiny") == {"equal": 3, "different": 0, "dropped": 0, "failed": 0}


async def test_isolate_makes_the_next_answers_right_and_is_reported(repository: Path) -> None:
    with structlog.testing.capture_logs():
        async with serving(repository, models=("mixing",), verify_batches=1.0, verify_action="isolate") as (
            server,
            stub,
        ):
            await stub.Infer(asking("mixing", QUIET, LOUD))
            await until(lambda: sum(checks(server, "mixing").values()) == 2)
            answer = await stub.Infer(asking("mixing", QUIET, LOUD))
            assert [result.run.batch_size for result in answer.results] == [1, 1]
            # One step of 8 bits over the sequence's own range, which is 2.
            np.testing.assert_allclose(first_output(answer, 0), QUIET, atol=2 / 255)
            assert metric(server, "attnserve_batching_isolated", "mixing") == 1
            described = (await stub.GetModel(pb.GetModelRequest(model="mixing"))).model
            assert "runs alone" in described.state_reason


async def test_by_default_no_sample_is_kept(repository: Path) -> None:
    with structlog.testing.capture_logs():
        async with serving(repository, models=("mixing",)) as (server, stub):
            (loaded,) = server.models.started()
            assert loaded.scheduler._verifier is None
            await stub.Infer(asking("mixing", QUIET, LOUD, QUIET))
            await stub.Infer(asking("mixing", QUIET))
            assert set(checks(server, "mixing").values()) == {0}
