"""Decoders with a cache over a real server: whole sequences as text and tensors, and the cache's outputs on request.

A cache holds the keys and values of earlier tokens; a past is a cache that a request sends. The builders make decoders
as optimum and onnxruntime-genai write them, and their answers in float64. Each is converted once for the module.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from attnserve_client import AsyncClient, AttentionSelection, AttentionUnavailable, InvalidRequest
from attnserve_client.data_types import Continuation
from attnserve_server.app import Application
from attnserve_server.config import Settings
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from cache_graphs import POSITIONS, VOCABULARY, CachedDecoder
from crossed_caches import WIDTH, CrossedDecoder
from genai_graphs import GroupedDecoder
from tokenizers import Tokenizer, models, pre_tokenizers

CASES = {
    "optimum": CachedDecoder(),
    "total": CachedDecoder(total="total_sequence_length"),
    "folded": CachedDecoder(form="folded"),
    "grouped": GroupedDecoder(),
    "packed": GroupedDecoder(packed=True),
    "normed": GroupedDecoder(normed=True),
    "int4": GroupedDecoder(int4=True, packed=True),
    "int4_normed": GroupedDecoder(int4=True, normed=True),
}
WHOLE = {**CASES, "operator": CachedDecoder(form="operator"), "windowed": GroupedDecoder(window=3)}
"""The models, with two that take no past: one has no weights after it, and one needs a cache as long as its window."""
CROSSED = CrossedDecoder()
# float32 sums in another order.
TOLERANCE = 1e-5
LENGTHS = (9, 4, 1)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    files = {name: case.model() for name, case in WHOLE.items()}
    files |= {"merged": CROSSED.merged(), "decoder_model": CROSSED.apart(cached=False)}
    for name, model in files.items():
        file = folder / f"{name}.onnx"
        file.write_bytes(model.SerializeToString())
        request = PrepareRequest(
            file=file, name=name, repository=folder / "models", tokenizer=folder / "tokenizer.json", max_length=32
        )
        prepare_bundle(request)
    return folder / "models"


@pytest.fixture
async def client(repository: Path) -> AsyncIterator[AsyncClient]:
    # An overhead of a run that is worth any padding, so that one request's sequences share a run.
    settings = Settings(repository=repository, grpc_port=0, http_port=0, instances=1, run_overhead_tokens=1_000_000)
    application = Application(settings)
    await application.start()
    async with AsyncClient(f"127.0.0.1:{application.grpc_port}") as opened:
        yield opened
    await application.aclose()


def ids_of(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(1, VOCABULARY, length)


@pytest.mark.parametrize("name", WHOLE)
async def test_texts_of_mixed_lengths_share_a_batch_and_equal_the_definition(client: AsyncClient, name: str) -> None:
    each = [ids_of(length) for length in LENGTHS]
    results = await client.infer(name, [" ".join(f"w{number}" for number in ids) for ids in each], attention=True)
    assert {result.run.batch_size for result in results} == {len(LENGTHS)}
    for ids, result in zip(each, results, strict=True):
        expected = WHOLE[name].answer(ids)
        assert list(result.outputs) == ["logits"]
        np.testing.assert_allclose(result.outputs["logits"], expected.logits, rtol=0, atol=10 * TOLERANCE)
        for found, weights in zip(result.attention, expected.weights, strict=True):
            np.testing.assert_allclose(found.weights, weights, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["optimum", "operator", "folded", "grouped", "int4_normed"])
async def test_keys_and_values_are_returned_to_requests_that_name_them(client: AsyncClient, name: str) -> None:
    described = (await client.model(name)).outputs
    assert [spec.name for spec in described if not spec.on_request] == ["logits"]
    names = [spec.name for spec in described if spec.on_request]
    ids = ids_of(6)
    result = await client.infer(name, {"input_ids": ids}, outputs=[*names, "logits"])
    expected = WHOLE[name].answer(ids)
    assert set(names) == set(expected.presents)
    for kept in names:
        np.testing.assert_allclose(result.outputs[kept], expected.presents[kept], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(result.outputs["logits"], expected.logits, rtol=0, atol=10 * TOLERANCE)


async def test_positions_count_what_the_mask_keeps(client: AsyncClient) -> None:
    ids, mask = ids_of(6), np.array([0, 0, 1, 1, 0, 1])
    result = await client.infer("optimum", {"input_ids": ids, "attention_mask": mask}, attention=True)
    expected = CASES["optimum"].answer(ids, np.array([0, 0, 0, 1, 0, 2]), mask)
    kept = mask == 1
    np.testing.assert_allclose(result.outputs["logits"][kept], expected.logits[kept], rtol=0, atol=10 * TOLERANCE)
    for found, weights in zip(result.attention, expected.weights, strict=True):
        np.testing.assert_allclose(found.weights[:, kept], weights[:, kept], rtol=0, atol=TOLERANCE)


async def test_positions_that_a_request_sends_are_used(client: AsyncClient) -> None:
    ids, positions = ids_of(5), np.array([7, 3, 3, 40, 0])
    result = await client.infer("optimum", {"input_ids": ids, "position_ids": positions})
    expected = CASES["optimum"].answer(ids, positions)
    assert np.abs(expected.logits - CASES["optimum"].answer(ids).logits).max() > 0.1, "or nothing is tried"
    np.testing.assert_allclose(result.outputs["logits"], expected.logits, rtol=0, atol=10 * TOLERANCE)


async def test_positions_beyond_the_table_are_refused(client: AsyncClient) -> None:
    with pytest.raises(InvalidRequest, match=f"values of input 'position_ids' must be from -?\\d+ to {POSITIONS - 1}"):
        await client.infer("optimum", {"input_ids": ids_of(2), "position_ids": np.array([0, POSITIONS])})


@pytest.mark.parametrize("name", ["merged", "decoder_model"])
async def test_texts_of_a_decoder_attend_to_the_states_that_they_are_sent_with(client: AsyncClient, name: str) -> None:
    rng = np.random.default_rng(3)
    each = [(ids_of(length), rng.normal(size=(11 - length, WIDTH)).astype(np.float32)) for length in LENGTHS]
    masks = [np.arange(len(states)) != 1 for _, states in each]
    results = await client.infer(
        name,
        [
            {"input_ids": ids, "encoder_hidden_states": states, "encoder_attention_mask": mask.astype(np.int64)}
            for (ids, states), mask in zip(each, masks, strict=True)
        ],
        outputs=["logits", "present.0.encoder.key", "present.0.decoder.value"],
        attention=True,
    )
    for (ids, states), mask, result in zip(each, masks, results, strict=True):
        logits, weights, presents = CROSSED.answer(ids, states, mask)
        np.testing.assert_allclose(result.outputs["logits"], logits, rtol=0, atol=10 * TOLERANCE)
        for kept in ("present.0.encoder.key", "present.0.decoder.value"):
            np.testing.assert_allclose(result.outputs[kept], presents[kept], rtol=0, atol=TOLERANCE)
        for found, expected in zip(result.attention, weights, strict=True):
            np.testing.assert_allclose(found.weights, expected, rtol=0, atol=TOLERANCE)
    assert [spec.name for spec in (await client.model(name)).outputs if not spec.on_request] == ["logits"]


@pytest.mark.parametrize("name", CASES)
async def test_a_supplied_past_gives_the_end_of_the_whole_sequence(client: AsyncClient, name: str) -> None:
    past = (await client.model(name)).past
    assert past is not None
    ids = ids_of(9)
    expected = CASES[name].answer(ids)
    for before in (1, 4, 8):
        begun = await client.infer(name, {"input_ids": ids[:before]}, outputs=list(past.presents))
        sent = Continuation({"input_ids": ids[before:]}, past=past.after(begun.outputs))
        result = await client.infer(name, sent, outputs=["logits", *past.presents], attention=True)
        np.testing.assert_allclose(result.outputs["logits"], expected.logits[before:], rtol=0, atol=10 * TOLERANCE)
        for present, values in expected.presents.items():
            np.testing.assert_allclose(result.outputs[present], values, rtol=0, atol=TOLERANCE)
        for found, weights in zip(result.attention, expected.weights, strict=True):
            assert (found.query_axis, found.key_axis) == (past.new_axis, past.key_axis)
            np.testing.assert_allclose(found.weights, weights[:, before:], rtol=0, atol=TOLERANCE)
        # Pasts of equal length share a run where the proof permits it: GroupQueryAttention takes them one by one.
        assert past.batched is not isinstance(CASES[name], GroupedDecoder)
        shared = await client.infer(name, [sent, sent])
        assert [each.run.batch_size for each in shared] == [2 if past.batched else 1] * 2


@pytest.mark.parametrize("name", CASES)
async def test_scores_after_a_past_give_the_weights_or_are_refused(client: AsyncClient, name: str) -> None:
    model = await client.model(name)
    assert model.past is not None
    ids = ids_of(7)
    begun = await client.infer(name, {"input_ids": ids[:4]}, outputs=list(model.past.presents))
    sent = Continuation({"input_ids": ids[4:]}, past=model.past.after(begun.outputs))
    expected = CASES[name].answer(ids)
    for place, site in enumerate(model.sites):
        selection = AttentionSelection(sites=[site.name], values="scores")
        try:
            (found,) = (await client.infer(name, sent, outputs=[], attention=selection)).attention
        except AttentionUnavailable as refused:
            reason = site.scores_unavailable_reason or "sequences with a past does not compute scores"
            assert reason in str(refused)  # noqa: PT017 - whether a site is fused, and so refuses, is measured
            continue
        scores = found.scores.astype(np.float64)
        exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights = exponentials / exponentials.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(weights, expected.weights[place][:, 4:], rtol=0, atol=TOLERANCE)


async def test_a_merged_decoder_of_an_encoder_continues_with_the_keys_of_its_states(client: AsyncClient) -> None:
    past = (await client.model("merged")).past
    assert past is not None
    rng = np.random.default_rng(5)
    ids, states = ids_of(6), rng.normal(size=(7, WIDTH)).astype(np.float32)
    mask = np.arange(7) != 2
    encoder = {"encoder_hidden_states": states, "encoder_attention_mask": mask.astype(np.int64)}
    begun = await client.infer("merged", {"input_ids": ids[:4], **encoder}, outputs=list(past.presents))
    takes = {spec.name for spec in past.inputs}
    given = {name: value for name, value in {"input_ids": ids[4:], **encoder}.items() if name in takes}
    result = await client.infer("merged", Continuation(given, past=past.after(begun.outputs)), attention=True)
    logits, weights, _ = CROSSED.answer(ids, states, mask)
    np.testing.assert_allclose(result.outputs["logits"], logits[4:], rtol=0, atol=10 * TOLERANCE)
    for found, expected in zip(result.attention, weights, strict=True):
        np.testing.assert_allclose(found.weights, expected[:, 4:], rtol=0, atol=TOLERANCE)
