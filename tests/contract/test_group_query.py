"""Windows of onnxruntime's grouped attention over a real server: maps, links, words and rollout of short sequences.

`Decoder` makes a graph around one `GroupQueryAttention` for each layer, with a window of keys and, in float64, its
weights. Each case is converted once for the module, and served in this process.
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
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from group_query_graphs import VOCABULARY, Decoder
from tokenizers import Tokenizer, models, pre_tokenizers

LENGTHS = (8, 5, 3, 2, 1)
IDS = {length: np.random.default_rng(length).integers(1, VOCABULARY, length) for length in LENGTHS}
# float32 sums in another order.
TOLERANCE = 1e-5
CASES = {
    "narrow": Decoder(layers=2),
    "wide": Decoder(window=20, layers=2),
    "column": Decoder(layers=2, ends="[B,1]"),
    "row": Decoder(layers=2, ends="[1,B]"),
    "sent": Decoder(layers=2, sent=True),
    "sent_column": Decoder(layers=2, ends="[B,1]", sent=True),
}


def pieces() -> Tokenizer:
    """Words of two pieces each: `w5` is `w`, 1, and `5`."""
    vocabulary = {"[PAD]": 0, "w": 1, **{f"##{number}": number for number in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grouped")
    pieces().save(str(folder / "tokenizer.json"))
    for name, case in CASES.items():
        file = folder / f"{name}.onnx"
        file.write_bytes(case.model().SerializeToString())
        request = PrepareRequest(
            file=file, name=name, repository=folder / "models", tokenizer=folder / "tokenizer.json", max_length=64
        )
        prepare_bundle(request)
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


def inputs(name: str = "narrow") -> list[dict[str, np.ndarray]]:
    case = CASES[name]
    if not case.sent:
        return [{"input_ids": ids, "attention_mask": np.ones_like(ids)} for ids in IDS.values()]
    shape = (1,) if case.ends == "[B,1]" else ()
    return [{"input_ids": ids, "seqlens_k": np.full(shape, len(ids) - 1, np.int32)} for ids in IDS.values()]


@pytest.mark.parametrize("name", CASES)
async def test_maps_of_windows_hold_only_the_sequences_own_keys(client: AsyncClient, name: str) -> None:
    sites = (await client.model(name)).sites
    assert [(site.form, site.kind, site.unavailable_reason) for site in sites] == [("windowed", "causal", "")] * 2
    results = await client.infer(name, inputs(name), attention=True)
    assert {result.run.batch_size for result in results} == {len(LENGTHS)}, "all in one batch, or nothing is tried"
    for ids, result in zip(IDS.values(), results, strict=True):
        hidden, maps = CASES[name].reference(ids)
        np.testing.assert_allclose(result.outputs["hidden"], hidden, rtol=0, atol=20 * TOLERANCE)
        for each, expected in zip(result.attention, maps, strict=True):
            assert each.weights.shape == (2, len(ids), len(ids))
            np.testing.assert_allclose(each.weights, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("top_k", [1, 3, 9])
async def test_links_of_windows_name_keys_of_the_sequence_alone(client: AsyncClient, name: str, top_k: int) -> None:
    results = await client.infer(name, inputs(name), outputs=[], attention=AttentionSelection(top_k=top_k))
    for ids, result in zip(IDS.values(), results, strict=True):
        for each, expected in zip(result.attention, CASES[name].reference(ids)[1], strict=True):
            raw, at = each.raw, each.raw.row_offsets
            assert ((raw.keys >= 0) & (raw.keys < len(ids))).all()
            for row, wanted in enumerate(expected.reshape(-1, len(ids))):
                kept = raw.keys[at[row] : at[row + 1]]
                assert len(set(kept.tolist())) == len(kept)
                greatest = np.sort(wanted)[::-1][: len(kept)]
                np.testing.assert_allclose(raw.weights[at[row] : at[row + 1]], greatest, rtol=0, atol=TOLERANCE)
            left_out = 1 - np.add.reduceat(np.append(raw.weights, 0), at[:-1]).reshape(each.residual.shape)
            np.testing.assert_allclose(each.residual, left_out, rtol=0, atol=2 * TOLERANCE)


@pytest.mark.parametrize("name", CASES)
async def test_rollout_over_windows_works_at_every_length(client: AsyncClient, name: str) -> None:
    results = await client.infer(
        name, inputs(name), outputs=[], attention=AttentionSelection(layer_reduction="rollout")
    )
    for ids, result in zip(IDS.values(), results, strict=True):
        first, second = (each.mean(axis=0) for each in CASES[name].reference(ids)[1])
        eye = np.eye(len(ids))
        expected = (second + eye) / 2 @ (first + eye) / 2
        [each] = result.attention
        np.testing.assert_allclose(each.weights[0], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.sent])
async def test_words_over_windows_join_the_pieces_of_each_word(client: AsyncClient, name: str) -> None:
    texts = ["w2 w3 w4 w5", "w6 w7", "w8"]
    results = await client.infer(name, texts, outputs=[], attention=AttentionSelection(unit="word"))
    for text, result in zip(texts, results, strict=True):
        words = text.split()
        ids = np.array([[1, int(word[1:])] for word in words]).reshape(-1)
        for each, expected in zip(result.attention, CASES[name].reference(ids)[1], strict=True):
            joined = expected.reshape(2, len(words), 2, len(words), 2).sum(axis=4).mean(axis=2)
            assert [token.text for token in each.key_tokens] == words
            np.testing.assert_allclose(each.weights, joined, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "selection",
    [
        AttentionSelection(),
        AttentionSelection(top_k=2),
        AttentionSelection(layer_reduction="mean"),
        AttentionSelection(layer_reduction="rollout"),
    ],
    ids=["all", "links", "mean", "rollout"],
)
async def test_sizes_of_answers_with_windows_are_predicted_exactly(
    client: AsyncClient, selection: AttentionSelection
) -> None:
    [predicted, *_] = await client.infer("narrow", inputs(), outputs=[], attention=selection, validate_only=True)
    held = 0
    for result in await client.infer("narrow", inputs(), outputs=[], attention=selection):
        for each in result.attention:
            parts = [each.raw] if isinstance(each.raw, np.ndarray) else [*map(each.raw.__getattribute__, LINKS)]
            held += sum(array.nbytes for array in [*parts, each.band_keys, each.residual] if array is not None)
    assert predicted.predicted_bytes == held


LINKS = ("row_offsets", "keys", "weights")


def test_lengths_without_an_axis_are_refused_when_the_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "scalar.onnx"
    file.write_bytes(Decoder(ends="[]").model().SerializeToString())
    with pytest.raises(BuildRefused, match="seqlens_k must be at least 1D"):
        prepare_bundle(PrepareRequest(file=file, name="scalar", repository=tmp_path / "models", max_length=16))


@pytest.mark.parametrize("name", ["narrow", "wide", "sent"])
async def test_scores_are_those_of_the_definition_in_a_batch_with_other_selections(
    client: AsyncClient, name: str
) -> None:
    """In one batch with sequences that select weights, or nothing."""
    selections = (AttentionSelection(values="scores"), AttentionSelection(), None)
    asked = [client.infer(name, inputs(name), outputs=[], attention=each) for each in selections[:2]]
    results, others, _ = await asyncio.gather(*asked, client.infer(name, inputs(name)))
    dry = await client.infer(name, inputs(name), outputs=[], attention=selections[0], validate_only=True)
    sizes = 0
    for ids, result, other in zip(IDS.values(), results, others, strict=True):
        [first, second], weighed = result.attention, other.attention
        np.testing.assert_allclose(first.scores, CASES[name].first_scores(ids), rtol=0, atol=TOLERANCE)
        for each, weights in zip((first, second), weighed, strict=True):
            exponentials = np.exp(each.scores.astype(float))
            softmax = exponentials / exponentials.sum(axis=-1, keepdims=True)
            np.testing.assert_allclose(softmax, weights.weights, rtol=0, atol=TOLERANCE)
            band = 0 if each.band_keys is None else each.band_keys.nbytes
            sizes += each.raw.nbytes + band
            with pytest.raises(ValueError, match="holds scores"):
                each.links()
    assert dry[0].predicted_bytes == results[0].predicted_bytes == sizes


async def test_scores_of_joined_heads_and_half_precision_are_plain_numbers(client: AsyncClient) -> None:
    given, whole = inputs("wide")[0], AttentionSelection(values="scores")
    joined = AttentionSelection(values="scores", heads="mean", queries=[-1, 2], dtype="float16")
    [each], [mean] = [
        (await client.infer("wide", given, outputs=[], attention=selection)).attention[:1]
        for selection in (whole, joined)
    ]
    expected = each.scores[:, [-1, 2]].mean(axis=0, keepdims=True)
    # float16 has 11 bits, and scores are below 8.
    np.testing.assert_allclose(mean.scores, expected, rtol=0, atol=4e-3)
    assert np.isneginf(mean.scores[0, 1, 3:]).all()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"unit": "word"}, "unit"),
        ({"layer_reduction": "rollout"}, "layer_reduction"),
        ({"top_k": 2}, "top_k"),
        ({"min_weight": 0.5}, "min_weight"),
        ({"dtype": "uint8"}, "dtype"),
        ({"features": "entropy"}, "features"),
    ],
)
async def test_fields_without_meaning_for_scores_are_refused(
    client: AsyncClient, fields: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await client.infer("narrow", inputs()[0], attention=AttentionSelection(values="scores", **fields))
    assert [each.field for each in refused.value.violations] == [f"attention.{field}"]
