"""Windowed attention through a real server over loopback: bands, links and sizes, by wire, client and page.

In windowed attention each query attends to near keys only; its weights come as a band, a column for each key of the
window. `Windowed` makes a graph of one layer, and its weights in float64.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnserve_client import AsyncClient, AttentionSelection
from attnserve_server.app import Application
from attnserve_server.attention.bands import band_keys
from attnserve_server.config import Settings
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from attnserve_server.model.bands import BlockBand
from windowed_graphs import Windowed

CASE = Windowed(block=4, before=1, after=1)
OTHERS = {
    "global": Windowed(block=4, before=1, after=1, global_keys=3),
    "causal": Windowed(block=4, before=2, after=0, causal=True),
    "gathered": Windowed("gathered", before=3, after=2, global_keys=3),
    "gathered_causal": Windowed("gathered", before=5, after=0),
}
LENGTHS = (30, 9, 17, 2)
ALL = (*LENGTHS, 1)
SHORTEST = {"global": 3, "gathered": 3}
"""Positions that a graph itself needs at least: it gathers so many global keys."""


def lengths_of(name: str) -> tuple[int, ...]:
    return tuple(length for length in ALL if length >= SHORTEST.get(name, 1))


# float32 sums in another order.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def windowed_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("windowed")
    file = folder / "windowed.onnx"
    file.write_bytes(CASE.model().SerializeToString())
    prepare_bundle(PrepareRequest(file=file, name="windowed", repository=folder / "models", max_length=64))
    for name, case in OTHERS.items():
        file.write_bytes(case.model().SerializeToString())
        prepare_bundle(PrepareRequest(file=file, name=name, repository=folder / "models", max_length=64))
    return folder / "models"


@pytest.fixture
async def client(windowed_repository: Path) -> AsyncIterator[AsyncClient]:
    settings = Settings(
        repository=windowed_repository,
        grpc_port=0,
        http_port=0,
        instances=1,
        run_overhead_tokens=10**6,
        batching="tested",
    )
    application = Application(settings)
    await application.start()
    async with AsyncClient(f"127.0.0.1:{application.grpc_port}") as opened:
        yield opened
    await application.aclose()


def inputs(lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, Any]]:
    made = []
    for length in lengths:
        feeds = CASE.feeds(length, seed=length)
        made.append({name: array[0] for name, array in feeds.items()})
    return made


async def test_long_sequences_answer_with_their_band_and_short_ones_with_all_keys(client: AsyncClient) -> None:
    sites = (await client.model("windowed")).sites
    assert [(site.form, site.unavailable_reason) for site in sites] == [("windowed", "")]
    results = await client.infer("windowed", inputs(), attention=True)
    for length, given, result in zip(LENGTHS, inputs(), results, strict=True):
        [each] = result.attention
        expected = CASE.reference({name: array[None] for name, array in given.items()})[0]
        np.testing.assert_allclose(each.weights, expected, rtol=0, atol=TOLERANCE)
        if length <= 12:  # the columns of three blocks
            assert each.band is None
            continue
        assert each.band.shape == (2, length, 12)
        np.testing.assert_array_equal(each.band_keys, band_keys(BlockBand(block=4, before=1, after=1), length, length))
        assert (each.outside == (expected[0] == 0)).all()


@pytest.mark.parametrize(
    "selection",
    [
        AttentionSelection(),
        AttentionSelection(heads="mean", dtype="uint8", queries=[0, -1]),
        AttentionSelection(top_k=9),
        AttentionSelection(layer_reduction="rollout"),
    ],
    ids=["all", "two rows", "links", "rollout"],
)
async def test_sizes_are_predicted_exactly_before_a_run(client: AsyncClient, selection: AttentionSelection) -> None:
    [predicted, *_] = await client.infer("windowed", inputs(), outputs=[], attention=selection, validate_only=True)
    results = await client.infer("windowed", inputs(), outputs=[], attention=selection)
    held = 0
    for result in results:
        for each in result.attention:
            arrays = [each.raw] if isinstance(each.raw, np.ndarray) else [*map(each.raw.__getattribute__, LINKS)]
            held += sum(array.nbytes for array in [*arrays, each.band_keys, each.residual] if array is not None)
    assert predicted.predicted_bytes == held


LINKS = ("row_offsets", "keys", "weights")


async def test_links_of_a_band_are_the_strongest_of_the_definition(client: AsyncClient) -> None:
    results = await client.infer("windowed", inputs(), outputs=[], attention=AttentionSelection(top_k=1, heads=[1]))
    for given, result in zip(inputs(), results, strict=True):
        expected = CASE.reference({name: array[None] for name, array in given.items()})[0, 1]
        assert result.attention[0].raw.keys.tolist() == expected.argmax(axis=1).tolist()


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("top_k", [0, 2, 40])
async def test_bands_wider_than_a_sequence_hold_only_its_own_keys(client: AsyncClient, name: str, top_k: int) -> None:
    lengths = lengths_of(name)
    results = await client.infer(name, inputs(lengths), attention=AttentionSelection(top_k=top_k) if top_k else True)
    for length, given, result in zip(lengths, inputs(lengths), results, strict=True):
        [each] = result.attention
        expected = OTHERS[name].reference({name: array[None] for name, array in given.items()})[0]
        if not top_k:
            np.testing.assert_allclose(each.weights, expected, rtol=0, atol=TOLERANCE)
            continue
        assert ((each.raw.keys >= 0) & (each.raw.keys < length)).all()
        strongest = np.sort(expected, axis=2)[..., ::-1][..., :top_k]
        kept = np.sort(each.weights, axis=2)[..., ::-1][..., :top_k]
        np.testing.assert_allclose(kept, strongest, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(each.residual, 1 - strongest.sum(axis=2), rtol=0, atol=2 * TOLERANCE)


@pytest.mark.parametrize("name", ["windowed", *OTHERS])
async def test_rollout_over_bands_works_at_every_length(client: AsyncClient, name: str) -> None:
    lengths = lengths_of(name)
    results = await client.infer(
        name, inputs(lengths), outputs=[], attention=AttentionSelection(layer_reduction="rollout")
    )
    for length, given, result in zip(lengths, inputs(lengths), results, strict=True):
        case = OTHERS.get(name, CASE)
        weights = case.reference({name: array[None] for name, array in given.items()})[0].mean(axis=0)
        [each] = result.attention
        np.testing.assert_allclose(each.weights[0], (weights + np.eye(length)) / 2, rtol=0, atol=TOLERANCE)
