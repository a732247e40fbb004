"""`embed` and `rerank` of both clients against the fake server, and which model they choose."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from attnserve_client import AsyncClient, Client, InvalidRequest, ModelInfo
from attnserve_client._helpers import embeds, named_output, only_model, ranked, ranks
from attnserve_client.data_types import Ranked
from attnserve_client.testing import FakeServer

TEXTS = [f"text {number}" for number in range(150)]


def test_embeddings_are_those_of_infer_in_the_order_of_the_texts() -> None:
    with FakeServer() as server, Client(server.target) as client:
        found = client.embed(TEXTS)
        one = client.embed(TEXTS[7], model="fake")
        expected = [result.outputs["embedding"] for result in client.infer("fake", TEXTS[:3])]
        none = client.embed([])
        sizes = [len(request.sequences) for request in server.requests[:3]]
    assert (found.shape, none.shape, found.dtype) == ((150, 16), (0, 16), np.float32)
    np.testing.assert_array_equal(found[:3], expected)
    np.testing.assert_array_equal(found[7], one)
    assert sizes == [64, 64, 22], "the model's max_batch_size is 64"


async def test_a_ranking_is_by_score_with_ties_in_order() -> None:
    with FakeServer(labels=("relevance",)) as server:
        async with AsyncClient(server.target) as client:
            found = await client.rerank("a query", TEXTS[:5])
            top = await client.rerank("a query", TEXTS[:5], model="fake", top_n=2)
            pairs = [(sequence.text.text, sequence.text.text_pair) for sequence in server.requests[0].sequences]
            alone = await client.infer("fake", ("a query", found[0].text), labels=True)
            assert await client.rerank("a query", []) == []
    assert pairs == [("a query", text) for text in TEXTS[:5]]
    assert sorted(one.index for one in found) == list(range(5))
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    assert alone.labels is not None
    assert alone.labels.labels[0].score == found[0].score
    assert top == found[:2]
    assert ranked(["a", "b", "c"], [0.5, 0.9, 0.5], None) == [
        Ranked(1, 0.9, "b"), Ranked(0, 0.5, "a"), Ranked(2, 0.5, "c")
    ]  # fmt: skip


def test_a_model_that_cannot_do_it_is_refused_by_name() -> None:
    with FakeServer() as server, Client(server.target) as client:
        with pytest.raises(InvalidRequest, match="no ready model scores pairs of texts; known: fake"):
            client.rerank("a", ["b"], model="fake")
        assert server.requests == []


def test_the_only_model_is_chosen_by_its_highest_version() -> None:
    with FakeServer() as server, Client(server.target) as client:
        (one,) = client.models()
    newer, other = replace(one, version="2"), replace(one, name="other")
    assert only_model([one, newer], "embeds", embeds) is newer
    assert only_model([one, replace(newer, state="loading")], "embeds", embeds) is one
    with pytest.raises(InvalidRequest, match="2 models could be meant, fake, other: name one"):
        only_model([one, other], "embeds", embeds)
    with pytest.raises(InvalidRequest, match="known: none"):
        only_model([], "embeds", embeds)
    assert not ranks(one)


@pytest.mark.parametrize(
    ("shapes", "name"),
    [
        ({"embedding": (4,), "pooled": (4,)}, "embedding"),
        ({"pooled": (4,), "hidden": ("seq", 4)}, "pooled"),
        ({"pooled": (4,), "other": (4,)}, None),
        ({"hidden": ("seq", 4)}, None),
    ],
)
def test_the_embedding_is_the_output_of_that_name_or_the_only_vector(
    shapes: dict[str, tuple[str | int, ...]], name: str | None
) -> None:
    with FakeServer() as server, Client(server.target) as client:
        (model,) = client.models()
    specs = tuple(replace(model.outputs[0], name=each, shape=shape) for each, shape in shapes.items())
    made: ModelInfo = replace(model, outputs=specs)
    assert embeds(made) is (name is not None)
    if name is not None:
        assert named_output(made).name == name
