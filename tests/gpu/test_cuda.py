"""Answers of MiniLM on a GPU equal eager attention. Skipped with the reason where there is no GPU.

Needs the package of MiniLM, torch and transformers: `minilm_repository` is exported, and `minilm_references` are the
answers of Hugging Face's eager model.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from attnserve_client import AttentionSelection, Client
from eager import Reference
from gpus import WHY_NOT
from serving import serve

# TF32 is off by default in onnxruntime's matrix products only for some kernels: two decimal digits less than on a CPU.
OUTPUT_TOLERANCE = 5e-3
WEIGHT_TOLERANCE = 2e-3


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]


def test_cuda_answers_equal_eager_attention(
    minilm_repository: Path, minilm_references: list[Reference], tmp_path: Path
) -> None:
    with (
        serve(minilm_repository, tmp_path, "--require-provider", "CUDAExecutionProvider") as server,
        Client(server.target) as client,
    ):
        answers = client.infer("minilm", [reference.text for reference in minilm_references], attention=True)
        provider = server.metric("attnserve_execution_provider_info", provider="CUDAExecutionProvider")
    assert provider == 1
    for answer, reference in zip(answers, minilm_references, strict=True):
        assert answer.receipt.execution_provider == "CUDAExecutionProvider"
        np.testing.assert_allclose(answer.outputs["embedding"], reference.embedding, rtol=0, atol=OUTPUT_TOLERANCE)
        weights = np.stack([site.weights for site in answer.attention])
        np.testing.assert_allclose(weights, reference.weights, rtol=0, atol=WEIGHT_TOLERANCE)


def test_cuda_mean_over_heads_equals_that_of_eager_attention(
    minilm_repository: Path, minilm_references: list[Reference], tmp_path: Path
) -> None:
    asked = AttentionSelection(heads="mean")
    with serve(minilm_repository, tmp_path) as server, Client(server.target) as client:
        answers = client.infer("minilm", [reference.text for reference in minilm_references], attention=asked)
    for answer, reference in zip(answers, minilm_references, strict=True):
        means = np.stack([site.weights[0] for site in answer.attention])
        np.testing.assert_allclose(means, reference.weights.mean(axis=1), rtol=0, atol=WEIGHT_TOLERANCE)


def test_cuda_answer_does_not_depend_on_batch_neighbours(
    minilm_repository: Path, minilm_references: list[Reference], tmp_path: Path
) -> None:
    with serve(minilm_repository, tmp_path) as server, Client(server.target) as client:
        alone = client.infer("minilm", minilm_references[1].text, attention=True)
        together = client.infer("minilm", [reference.text for reference in minilm_references], attention=True)[1]
    np.testing.assert_allclose(together.outputs["embedding"], alone.outputs["embedding"], rtol=0, atol=OUTPUT_TOLERANCE)
