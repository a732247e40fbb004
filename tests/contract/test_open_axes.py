"""Axes that belong together, over a real server: images of an open size, frames beside tokens, a sum of two axes.

The builders make graphs whose files leave such axes open. They are converted once for the module, where the relations
of the axes are found.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnserve_client import AsyncClient, InvalidRequest
from attnserve_server.app import Application
from attnserve_server.config import Settings
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from open_axes_graphs import cross_decoder, image_encoder, with_memory

Array = np.ndarray[Any, np.dtype[Any]]
FRAMES = "encoder_sequence_length / 2"
SUM = "memory_length + length"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("open")
    models = {"image": image_encoder(), "decoder": cross_decoder(), "memory": with_memory()}
    for name, model in models.items():
        file = folder / f"{name}.onnx"
        file.write_bytes(model.SerializeToString())
        length = 64 if name == "memory" else None
        prepare_bundle(PrepareRequest(file=file, name=name, repository=folder / "models", max_length=length))
    return folder / "models"


@pytest.fixture
async def client(repository: Path) -> AsyncIterator[AsyncClient]:
    settings = Settings(
        repository=repository, grpc_port=0, http_port=0, instances=1, run_overhead_tokens=1_000_000, batching="tested"
    )
    application = Application(settings)
    await application.start()
    async with AsyncClient(f"127.0.0.1:{application.grpc_port}") as opened:
        yield opened
    await application.aclose()


def softmax(scores: Array) -> Array:
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


async def test_an_image_of_the_solved_size_has_its_maps_over_a_grid(client: AsyncClient) -> None:
    pixels = np.random.default_rng(0).normal(size=(3, 16, 16)).astype(np.float32)
    (result,) = await client.infer("image", [{"pixel_values": pixels}], attention=True)
    assert result.attention[0].weights.shape == (1, 17, 17)
    grid = result.attention[0].grids["fixed_17"]
    assert (grid.rows, grid.columns, grid.leading) == (4, 4, 1)


async def test_frames_of_a_decoder_may_be_more_than_its_tokens(client: AsyncClient) -> None:
    rng = np.random.default_rng(1)
    states = rng.normal(size=(1500, 8)).astype(np.float32)
    ids = np.arange(1, 6)
    (result,) = await client.infer("decoder", [{"input_ids": ids, "encoder_hidden_states": states}], attention=True)
    tensors = {tensor.name: _array(tensor) for tensor in cross_decoder().graph.initializer}
    queries = (tensors["words"][ids] + tensors["positions"][:5]).astype(np.float64)
    expected = softmax(0.35 * queries @ states.astype(np.float64).T)
    np.testing.assert_allclose(result.attention[0].weights[0], expected, rtol=0, atol=1e-6)  # float32 sums
    axes = {axis.symbol: axis.max_length for axis in (await client.model("decoder")).axes}
    assert axes == {"decoder_sequence_length": 32, FRAMES: 2048}


def remembered(length: int, more: int, seed: int) -> dict[str, Array]:
    """One sequence of a memory and new positions; the mask hides a key of the memory."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(length + more, np.float32)
    mask[1] = -np.inf
    drawn = {"memory": rng.normal(size=(length, 8)), "new": rng.normal(size=(more, 8))}
    return {**{name: array.astype(np.float32) for name, array in drawn.items()}, "mask": mask}


async def test_a_mask_over_two_axes_is_padded_as_their_sum(client: AsyncClient) -> None:
    sequences = [remembered(3, 5, 0), remembered(3, 2, 1), remembered(6, 4, 2), remembered(3, 9, 3)]
    for given, result in zip(sequences, await client.infer("memory", sequences, attention=True), strict=True):
        keys = np.concatenate([given["memory"], given["new"]]).astype(np.float64)
        weights = softmax(given["new"].astype(np.float64) @ keys.T + given["mask"])
        # Float32 sums of a few products; scores reach about 30.
        np.testing.assert_allclose(result.attention[0].weights[0], weights, rtol=0, atol=1e-5)
        np.testing.assert_allclose(result.outputs["y"], weights @ keys, rtol=0, atol=1e-4)
    described = {axis.symbol: axis for axis in (await client.model("memory")).axes}
    assert (described[SUM].max_length, described[SUM].formula) == (128, SUM)


async def test_a_sequence_that_breaks_a_relation_is_refused_with_input_relation_and_values(
    client: AsyncClient,
) -> None:
    wrong = {**remembered(3, 5, 0), "mask": np.zeros(9, np.float32)}
    with pytest.raises(InvalidRequest) as refused:
        await client.infer("memory", [remembered(3, 5, 0), wrong])
    (violation,) = refused.value.violations
    assert violation.field == "sequences[1].tensors.tensors"
    assert violation.description == (
        f"axis 0 of input 'mask' has 9 positions; by the relation {SUM} it must have 3 + 5 = 8"
    )


def _array(tensor: Any) -> Array:
    from onnx import numpy_helper  # noqa: PLC0415 - one test needs it

    return numpy_helper.to_array(tensor)
