"""MiniLM through the whole service, against the eager attention of Hugging Face.

Needs `minilm_references`, the answers of the eager model to sixteen sentences, and servers over the exported bundle.
Without the package of MiniLM, the tests are skipped, or fail at its export.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from attnserve_client import AsyncClient, AttentionSelection, Client
from eager import OUTPUT_TOLERANCE, WEIGHT_TOLERANCE, Reference
from serving import RunningServer, serve

# float32 rounding: matrix kernels block another batch shape in another way, so they sum in another order.
BATCH_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def gathering_server(minilm_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningServer]:
    """One instance that takes batches of up to 16 at any padding, so that requests share runs."""
    folder = tmp_path_factory.mktemp("gathering-server")
    settings = ("--instances", "1", "--run-overhead-tokens", "100000")
    with serve(minilm_repository, folder, *settings) as server:
        yield server


def assert_equal_to_eager(weights: np.ndarray, reference: Reference) -> None:
    assert weights.shape == reference.weights.shape
    np.testing.assert_allclose(weights, reference.weights, rtol=0, atol=WEIGHT_TOLERANCE)
    np.testing.assert_allclose(weights.sum(axis=-1), 1.0, rtol=0, atol=WEIGHT_TOLERANCE)


async def test_mixed_batch_equals_eager_attention_in_every_layer_and_head(
    gathering_server: RunningServer, minilm_references: list[Reference]
) -> None:
    async with AsyncClient(gathering_server.target) as client:
        blocker = asyncio.create_task(client.infer("minilm", "hold the instance while the others gather " * 60))
        answers = await asyncio.gather(
            *(
                client.infer("minilm", reference.text, attention=True if index % 2 == 0 else None, timeout=60)
                for index, reference in enumerate(minilm_references)
            )
        )
        await blocker
    for index, (answer, reference) in enumerate(zip(answers, minilm_references, strict=True)):
        outputs = answer.outputs
        np.testing.assert_allclose(
            outputs["last_hidden_state"], reference.last_hidden_state, rtol=0, atol=OUTPUT_TOLERANCE
        )
        np.testing.assert_allclose(outputs["embedding"], reference.embedding, rtol=0, atol=OUTPUT_TOLERANCE)
        if index % 2 == 0:
            assert_equal_to_eager(np.stack([site.weights for site in answer.attention]), reference)
        else:
            assert not answer.attention
    # Requests of one run report the same instance and the same compute time to the nanosecond.
    runs: dict[tuple[int, float], set[bool]] = {}
    for index, answer in enumerate(answers):
        runs.setdefault((answer.run.instance, answer.run.compute_s), set()).add(index % 2 == 0)
    shared = [answer.run.batch_size for answer in answers]
    assert max(shared) >= 8, f"requests with and without attention must share a batch; batch sizes were {shared}"
    assert {True, False} in runs.values()


def test_one_request_of_sixteen_sequences_equals_eager_attention(
    minilm_server: RunningServer, minilm_references: list[Reference]
) -> None:
    with Client(minilm_server.target) as client:
        answers = client.infer("minilm", [reference.text for reference in minilm_references], attention=True)
    for answer, reference in zip(answers, minilm_references, strict=True):
        assert_equal_to_eager(np.stack([site.weights for site in answer.attention]), reference)


def test_token_ids_have_the_answer_of_their_text(
    minilm_server: RunningServer, minilm_references: list[Reference]
) -> None:
    reference = minilm_references[2]
    with Client(minilm_server.target) as client:
        by_text = client.infer("minilm", reference.text, attention=AttentionSelection(unit="word"))
        by_ids = client.infer("minilm", reference.ids, attention=AttentionSelection(unit="word"))
    np.testing.assert_array_equal(by_ids.outputs["embedding"], by_text.outputs["embedding"])
    np.testing.assert_array_equal(by_ids.attention[-1].weights, by_text.attention[-1].weights)


async def test_answer_does_not_depend_on_batch_neighbours(
    gathering_server: RunningServer, minilm_references: list[Reference]
) -> None:
    probe = minilm_references[1].text
    async with AsyncClient(gathering_server.target) as client:
        alone = await client.infer("minilm", probe, attention=True)
        assert alone.run.batch_size == 1
        blocker = asyncio.create_task(client.infer("minilm", "hold the instance while the others gather " * 60))
        others = [client.infer("minilm", reference.text, timeout=60) for reference in minilm_references]
        together, *_ = await asyncio.gather(client.infer("minilm", probe, attention=True, timeout=60), *others)
        await blocker
    assert together.run.batch_size > 1
    for name, expected in alone.outputs.items():
        np.testing.assert_allclose(together.outputs[name], expected, rtol=0, atol=BATCH_TOLERANCE)
    for site, expected_site in zip(together.attention, alone.attention, strict=True):
        np.testing.assert_allclose(site.weights, expected_site.weights, rtol=0, atol=BATCH_TOLERANCE)
