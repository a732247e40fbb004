"""`dimensions` of /v1/embeddings, where a model was trained for embeddings of several sizes."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from attnserve_server.app import Application
from attnserve_server.config import Settings
from attnserve_server.model.heads import EmbeddingSpec
from attnserve_server.model.repository import write_bundle
from http_calls import Answer, call
from tiny_bundle import WIDTH, tiny_manifest


@pytest.fixture
async def server(settings: Settings, tmp_path: Path, tiny_files: dict[str, Path]) -> AsyncIterator[Application]:
    """A server of `scaled` and `plain`, the tiny model with two sizes of embeddings. That of `scaled` has length 1.

    The manifest alone states that length: the graph is the same.
    """
    for name, normalized in (("scaled", True), ("plain", False)):
        embedding = EmbeddingSpec(pooling="mean", normalized=normalized, sizes=(2, 4))
        write_bundle(tmp_path, tiny_manifest(name).model_copy(update={"embedding": embedding}), tiny_files)
    application = Application(settings.model_copy(update={"repository": tmp_path}))
    await application.start()
    yield application
    await application.aclose()


async def embed(server: Application, model: str, **fields: object) -> Answer:
    return await call(server.rest_port, "POST", "/v1/embeddings", {"model": model, "input": "the cat", **fields})


async def values(server: Application, model: str, **fields: object) -> np.ndarray:
    answer = await embed(server, model, **fields)
    assert answer.status == 200, answer.body
    found = answer.json["data"][0]["embedding"]
    return np.frombuffer(base64.b64decode(found), "<f4") if isinstance(found, str) else np.array(found, np.float32)


@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_the_first_values_of_an_embedding_are_returned(server: Application, encoding: str) -> None:
    whole = await values(server, "plain", encoding_format=encoding)
    assert (await values(server, "plain", encoding_format=encoding, dimensions=WIDTH)).tobytes() == whole.tobytes()
    for size in (2, 4):
        found = await values(server, "plain", encoding_format=encoding, dimensions=size)
        assert found.tobytes() == whole[:size].tobytes()


@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_a_part_of_an_embedding_of_length_1_has_that_length_again(server: Application, encoding: str) -> None:
    whole = await values(server, "scaled", encoding_format=encoding)
    for size in (2, 4):
        found = await values(server, "scaled", encoding_format=encoding, dimensions=size)
        part = whole[:size].astype(np.float64)
        # A float32 has 24 bits.
        np.testing.assert_allclose(found, part / np.linalg.norm(part), rtol=1e-7)
    assert (await values(server, "scaled", encoding_format=encoding, dimensions=WIDTH)).tobytes() == whole.tobytes()


async def test_other_sizes_are_refused_by_name(server: Application) -> None:
    answer = await embed(server, "plain", dimensions=3)
    assert (answer.status, answer.json["error"]["param"]) == (400, "dimensions")
    assert answer.json["error"]["message"] == "dimensions: 3 is none of 2, 4, 8, the sizes of 'plain'"
