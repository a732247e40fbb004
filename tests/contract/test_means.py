"""The mean over heads through a real server: from its own output, and from bundles of earlier releases without it.

A bundle is the folder of one converted model. The server runs in the test's own process, over the model of
`tiny_bundle`: `joined`, and `earlier`, the same graph without means over heads.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import onnx
import pytest
from attnserve.v1 import attention_pb2
from attnserve.v1 import inference_service_pb2 as pb
from attnserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from attnserve_server.app import Application
from attnserve_server.config import Settings
from attnserve_server.model.repository import write_bundle
from tiny_bundle import graph_without_means, tiny_manifest, without_means

MEAN, EACH = attention_pb2.HEAD_REDUCTION_MEAN, attention_pb2.HEAD_REDUCTION_EACH
TEXTS = ("the cat sat on a mat", "a dog", "the dog looked at the cat and the mat")
# float32 rounds a sum of two weights of at most 1 by 6e-8, and a product of layers a few times.
ROUNDING = 1e-6


@pytest.fixture
async def stub(tmp_path: Path, tiny_files: dict[str, Path]) -> AsyncIterator[InferenceServiceStub]:
    write_bundle(tmp_path / "models", tiny_manifest("joined"), tiny_files)
    onnx.save(graph_without_means(onnx.load(tiny_files["model.onnx"])), tmp_path / "model.onnx")
    old = {**tiny_files, "model.onnx": tmp_path / "model.onnx"}
    write_bundle(tmp_path / "models", without_means(tiny_manifest("earlier")), old)
    server = Application(Settings(repository=tmp_path / "models", host="127.0.0.1", grpc_port=0, http_port=0))
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            yield InferenceServiceStub(channel)
    finally:
        await server.aclose()


async def maps(stub: InferenceServiceStub, model: str, **selection: object) -> list[np.ndarray]:
    """The maps of all texts, sent as one request."""
    sequences = [pb.Sequence(text=pb.TextInput(text=text)) for text in TEXTS]
    asked = attention_pb2.AttentionSelection(**selection)  # type: ignore[arg-type]
    answer = await stub.Infer(pb.InferRequest(model=model, sequences=sequences, attention=asked))
    found = [made.weights for result in answer.results for made in result.attention.maps]
    return [np.frombuffer(tensor.data, "<f4").reshape(tensor.shape) for tensor in found]


@pytest.mark.parametrize("model", ["joined", "earlier"])
async def test_mean_of_the_last_layer_is_the_mean_of_its_heads(stub: InferenceServiceStub, model: str) -> None:
    means = await maps(stub, model, layers=[-1], head_reduction=MEAN)
    heads = await maps(stub, model, layers=[-1], head_reduction=EACH)
    assert len(means) == len(heads) == len(TEXTS)
    for mean, each in zip(means, heads, strict=True):
        assert mean.shape == (1, *each.shape[1:])
        np.testing.assert_allclose(mean[0], each.mean(axis=0, dtype=np.float64), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    "selection",
    [
        {"layer_reduction": attention_pb2.LAYER_REDUCTION_ROLLOUT},
        {"layer_reduction": attention_pb2.LAYER_REDUCTION_MEAN, "head_reduction": MEAN},
        {"unit": attention_pb2.ATTENTION_UNIT_WORD, "special_tokens": attention_pb2.SPECIAL_TOKENS_DROP},
        {"queries": [1, 0]},
        {"heads": [1]},
    ],
    ids=str,
)
async def test_bundles_with_and_without_means_answer_alike(stub: InferenceServiceStub, selection: dict) -> None:
    both = [await maps(stub, model, **{"head_reduction": MEAN} | selection) for model in ("joined", "earlier")]
    for one, other in zip(*both, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=ROUNDING)
