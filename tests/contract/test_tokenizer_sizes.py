"""Padding and truncation of a tokenizer.json over a real server: kept where the model would see them, else left out.

`last_token` makes a graph whose answer is its last position's, so that padding which no mask hides shows. The cases are
the form of its mask, and the padding and truncation in tokenizer.json. Each is converted once for the module.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnserve_client import AsyncClient, AttentionSelection, InvalidRequest
from attnserve_server.app import Application
from attnserve_server.config import Settings
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from attnserve_server.model.repository import Bundle
from last_token_graphs import VOCABULARY, last_token, reference
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers

# float32 sums in another order.
TOLERANCE = 1e-5
FIXED = {"length": 8, "pad_id": 5, "pad_token": "[PAD]"}
CASES: dict[str, tuple[str, dict[str, Any] | None, dict[str, Any] | None]] = {
    "fixed": ("", FIXED, {"max_length": 8}),
    "left": ("", {**FIXED, "direction": "left"}, None),
    "multiple": ("", {"pad_to_multiple_of": 4, "pad_id": 5, "pad_token": "[PAD]"}, None),
    "cut": ("", None, {"max_length": 3, "direction": "left"}),
    "ignored": ("ignored", FIXED, None),
    "heeded": ("heeded", FIXED, {"max_length": 8}),
    "only_second": ("", None, {"max_length": 3, "strategy": "only_second"}),
}
TEXTS = ("w1 w2", "w7", " ".join(f"w{number}" for number in range(10, 22)))


def tokenizer_of(padding: dict[str, Any] | None, truncation: dict[str, Any] | None) -> Tokenizer:
    vocabulary = {**{f"w{number}": number for number in range(VOCABULARY) if number != 5}, "[PAD]": 5}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[PAD]"])
    if padding is not None:
        tokenizer.enable_padding(**padding)
    if truncation is not None:
        tokenizer.enable_truncation(**truncation)
    return tokenizer


def prepared(folder: Path, name: str, case: tuple[str, Any, Any], **changes: Any) -> tuple[Bundle, str]:
    mask, padding, truncation = case
    file = folder / "last.onnx"
    file.write_bytes(last_token(mask=mask).SerializeToString())
    tokenizer_of(padding, truncation).save(str(folder / "tokenizer.json"))
    console = Console(record=True, width=300, quiet=False, file=(folder / "console").open("w", encoding="utf-8"))
    request = PrepareRequest(
        file=file, name=name, repository=folder / "models", tokenizer=folder / "tokenizer.json", **changes
    )
    with console.file:
        bundle = prepare_bundle(request, Steps(console))
    return bundle, console.export_text()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sizes")
    for name, case in CASES.items():
        prepared(folder, name, case, max_length=32)
    return folder / "models"


@pytest.fixture
async def client(repository: Path) -> AsyncIterator[AsyncClient]:
    settings = Settings(repository=repository, grpc_port=0, http_port=0, instances=1, run_overhead_tokens=1_000_000)
    application = Application(settings)
    await application.start()
    async with AsyncClient(f"127.0.0.1:{application.grpc_port}") as opened:
        yield opened
    await application.aclose()


@pytest.mark.parametrize("name", ["fixed", "left", "multiple", "cut", "ignored"])
async def test_texts_run_as_the_tokenizer_pads_and_cuts_them(client: AsyncClient, name: str) -> None:
    mask, padding, truncation = CASES[name]
    oracle = tokenizer_of(padding, truncation)
    results = await client.infer(name, list(TEXTS), attention=True)
    for text, result in zip(TEXTS, results, strict=True):
        expected = oracle.encode(text)
        kept = np.array(expected.attention_mask) if mask else None
        last, weights = reference(np.array(expected.ids), kept)
        np.testing.assert_allclose(result.outputs["last"], last, rtol=0, atol=TOLERANCE)
        [each] = result.attention
        np.testing.assert_allclose(each.weights, weights, rtol=0, atol=TOLERANCE)
        assert [token.text for token in each.key_tokens] == expected.tokens
        assert [token.special for token in each.key_tokens] == [flag == 1 for flag in expected.special_tokens_mask]


async def test_padding_that_a_mask_hides_is_left_out_and_long_texts_are_not_cut(client: AsyncClient) -> None:
    results = await client.infer("heeded", list(TEXTS), attention=True)
    for text, result in zip(TEXTS, results, strict=True):
        ids = np.array([int(word[1:]) for word in text.split()])
        last, weights = reference(ids, pooled=True)
        np.testing.assert_allclose(result.outputs["last"], last, rtol=0, atol=TOLERANCE * len(ids))
        np.testing.assert_allclose(result.attention[0].weights, weights, rtol=0, atol=TOLERANCE)


async def test_padding_is_left_out_of_words_and_of_dropped_special_tokens(client: AsyncClient) -> None:
    (words,) = await client.infer("fixed", ["w1 w2"], outputs=[], attention=AttentionSelection(unit="word"))
    assert [token.text for token in words.attention[0].key_tokens] == ["w1", "w2", *["[PAD]"] * 6]
    assert [(token.start, token.end) for token in words.attention[0].key_tokens][:2] == [(0, 2), (3, 5)]
    (dropped,) = await client.infer("fixed", ["w1 w2"], outputs=[], attention=AttentionSelection(special_tokens="drop"))
    assert dropped.attention[0].weights.shape == (2, 2, 2)


async def test_a_text_that_the_tokenizer_cannot_cut_is_refused(client: AsyncClient) -> None:
    await client.infer("only_second", ["w1 w2 w3"])
    with pytest.raises(InvalidRequest, match=r"sequences\[0\].text.text.*too long, and the tokenizer cannot cut it"):
        await client.infer("only_second", [TEXTS[2]])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "fixed",
            "texts along 'seq' are padded to 8 tokens and cut to 8, as in tokenizer.json: the model has no mask",
        ),
        ("multiple", "texts along 'seq' are padded to a multiple of 4 tokens, as in tokenizer.json"),
        ("cut", "texts along 'seq' are cut to 3, as in tokenizer.json"),
        ("ignored", "texts along 'seq' are padded to 8 tokens, as in tokenizer.json"),
    ],
)
def test_conversion_reports_which_padding_is_kept(tmp_path: Path, name: str, said: str) -> None:
    bundle, shown = prepared(tmp_path, name, CASES[name], max_length=32)
    assert said in shown
    assert bundle.manifest.text is not None
    assert bundle.manifest.text.as_written == ("seq",)
    other, quiet = prepared(tmp_path, "heeded", CASES["heeded"], max_length=32)
    assert "as in tokenizer.json" not in quiet
    assert other.manifest.text is not None
    assert other.manifest.text.as_written == ()


def test_padding_past_the_greatest_length_is_refused_with_its_input(tmp_path: Path) -> None:
    said = "tokenizer.json pads texts to 8 tokens, which no mask hides, and the graph takes 6 at most"
    with pytest.raises(BuildRefused, match=said):
        prepared(tmp_path, "fixed", CASES["fixed"], max_length=6)


def test_bundles_without_padding_settings_keep_unmasked_padding(tmp_path: Path) -> None:
    manifest = prepared(tmp_path, "fixed", CASES["fixed"], max_length=32)[0].manifest
    assert manifest.text is not None
    silent = manifest.model_copy(update={"text": manifest.text.model_copy(update={"as_written": None})})
    assert silent.text_as_written == ("seq",)
    masked = prepared(tmp_path, "heeded", CASES["heeded"], max_length=32)[0].manifest
    assert masked.text is not None
    silent = masked.model_copy(update={"text": masked.text.model_copy(update={"as_written": None})})
    assert silent.text_as_written == ()
