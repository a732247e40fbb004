"""A past through a real server over loopback: values, labels, sizes, batches and refusals, by client.

A past is the keys and values of earlier positions, sent with a request, as an earlier answer returned them (presents).
Of the decoder's three bundles, `alone` may not share runs, and `broken` has the wrong graph and does not load.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnserve_client import AsyncClient, AttentionSelection, InvalidRequest
from attnserve_server.app import Application
from attnserve_server.config import Settings
from attnserve_server.model.repository import write_bundle
from attnserve_server.scheduling.catalog import ModelState
from past_graphs import LAYERS, PASTS, PRESENTS, manifest, reference, with_golden, write_files

# float32 sums in another order than the float64 reference; logits are below 60.
WEIGHTS, LOGITS = 1e-5, 1e-4


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoders")
    files = write_files(folder)
    for made in (manifest(text=True), manifest("alone", batched=False)):
        complete, golden = with_golden(made, files, folder)
        write_bundle(folder / "models", complete, {**files, **golden})
    broken, golden = with_golden(manifest("broken"), files, folder)
    # The prompt graph in the place of the continuing one: its golden answers are not repeated.
    write_bundle(folder / "models", broken, {**files, **golden, "past.onnx": files["model.onnx"]})
    return folder / "models"


@pytest.fixture
async def server(repository: Path) -> AsyncIterator[Application]:
    settings = Settings(
        repository=repository, grpc_port=0, http_port=0, instances=1, run_overhead_tokens=10**6, verify_batches=1.0
    )
    application = Application(settings)
    await application.start()
    yield application
    await application.aclose()


@pytest.fixture
async def client(server: Application) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(f"127.0.0.1:{server.grpc_port}") as opened:
        yield opened


def given(ids: list[int], past: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"input_ids": np.array(ids, np.int64), **(past or {})}


async def test_answers_after_a_past_equal_the_reference_alone_and_in_a_batch(client: AsyncClient) -> None:
    longer, shorter = reference([4, 5, 6]).pasts, reference([9]).pasts
    inputs = [given([7, 8], longer), given([7]), given([11], longer), given([5, 6], shorter), given([4, 4, 4])]
    results = await client.infer("decoder", inputs, attention=True)
    expected = [
        reference([7, 8], longer),
        reference([7]),
        reference([11], longer),
        reference([5, 6], shorter),
        reference([4, 4, 4]),
    ]
    for result, right in zip(results, expected, strict=True):
        assert set(result.outputs) == {"logits"}
        np.testing.assert_allclose(result.outputs["logits"], right.logits, atol=LOGITS)
        for found, weights in zip(result.attention, right.weights, strict=True):
            np.testing.assert_allclose(found.weights, weights, atol=WEIGHTS)
    # Padded along the new positions, as the certificate proves; never with another past, or with none.
    assert [result.run.batch_size for result in results] == [2, 2, 2, 1, 2]
    assert results[0].run.computed_tokens == 2 * (3 + 2)


async def test_a_model_whose_continuing_graph_is_not_certified_runs_each_sequence_alone(client: AsyncClient) -> None:
    past = reference([4, 5, 6]).pasts
    results = await client.infer("alone", [given([7, 8], past), given([9, 9], past), given([7]), given([8])])
    assert [result.run.batch_size for result in results] == [1, 1, 2, 2]
    np.testing.assert_allclose(results[1].outputs["logits"], reference([9, 9], past).logits, atol=LOGITS)


async def test_presents_come_on_request_and_continue_the_sequence(client: AsyncClient) -> None:
    ids = [4, 9, 6, 11, 5]
    first = await client.infer("decoder", given(ids[:3]), outputs=["logits", *PRESENTS])
    past = {name: first.outputs[present] for name, present in zip(PASTS, PRESENTS, strict=True)}
    second = await client.infer("decoder", given(ids[3:], past), outputs=["logits", *PRESENTS], attention=True)
    whole = reference(ids)
    np.testing.assert_allclose(second.outputs["logits"], whole.logits[3:], atol=LOGITS)
    for layer in range(LAYERS):
        np.testing.assert_allclose(second.attention[layer].weights, whole.weights[layer][:, 3:], atol=WEIGHTS)
    assert second.outputs["present.1.value"].shape == (2, 5, 4)
    predicted = await client.infer(
        "decoder", given(ids[3:], past), outputs=["logits", *PRESENTS], attention=True, validate_only=True
    )
    assert predicted.predicted_bytes == second.predicted_bytes
    sizes = [array.nbytes for array in second.outputs.values()] + [each.weights.nbytes for each in second.attention]
    assert predicted.predicted_bytes == sum(sizes)


async def test_past_keys_have_labels_and_a_separate_key_axis(client: AsyncClient) -> None:
    past = reference([4, 5]).pasts
    result = await client.infer("decoder", ("the cat", past), attention=AttentionSelection(layers=[0], heads="mean"))
    (found,) = result.attention
    assert (found.query_axis, found.key_axis) == ("seq", "past+seq")
    assert [token.text for token in found.query_tokens] == ["[CLS]", "the", "cat", "[SEP]"]
    assert [token.text for token in found.key_tokens][:3] == ["past[0]", "past[1]", "[CLS]"]
    assert found.weights.shape == (1, 4, 6)
    assert "past[1]" in {link.key for link in found.links(top=None, exclude_special=False)}


async def test_rollout_after_a_past_is_refused_with_a_sentence(client: AsyncClient) -> None:
    past = reference([4, 5]).pasts
    with pytest.raises(InvalidRequest, match=r"rollout needs equal queries and keys; sequences\[0\] has 2 past"):
        await client.infer("decoder", given([7], past), attention=AttentionSelection(layer_reduction="rollout"))


async def test_the_shadow_check_finds_no_difference_after_a_past(server: Application, client: AsyncClient) -> None:
    past = reference([4, 5, 6]).pasts
    await client.infer("decoder", [given([7, 8], past), given([11], past)], attention=True)
    labels = {"model": "decoder", "version": "1"}

    def checks(outcome: str) -> float:
        return (
            server.metrics.registry.get_sample_value("attnserve_batch_checks_total", {**labels, "outcome": outcome})
            or 0.0
        )

    async with asyncio.timeout(20):
        while not checks("equal"):
            await client.ready()
    assert (checks("different"), checks("failed")) == (0, 0)


async def test_a_swapped_continuing_graph_does_not_load(server: Application) -> None:
    broken = server.catalog.find("broken")
    assert broken.state is ModelState.FAILED
    assert "golden" in broken.state_reason


async def test_features_after_a_past_count_queries_from_its_first_position(client: AsyncClient) -> None:
    past = reference([4, 5, 6]).pasts
    selection = AttentionSelection(features=["first_token", "mean_distance"])
    result = await client.infer("decoder", given([7, 8], past), outputs=[], attention=selection)
    assert result.features is not None
    for found, weights in zip(result.features.sites, reference([7, 8], past).weights, strict=True):
        distances = np.abs(np.subtract.outer([3, 4], range(5)))
        np.testing.assert_allclose(found["mean_distance"], (weights * distances).sum(axis=2), atol=5 * WEIGHTS)
        np.testing.assert_allclose(found["first_token"], weights[:, :, 0], atol=WEIGHTS)
