"""Cross-attention of a real server: two texts, and words over the patches of an image.

The builders of `two_sided_graphs` make both models, and `weights` their maps in float64. One server process serves
them.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from attnserve_client import AttentionSelection, Client, InvalidRequest
from attnserve_client.data_types import PatchGrid
from onnx_files import saved
from serving import command, serve
from tiny_bundle import VOCABULARY, tiny_tokenizer
from two_sided_graphs import IMAGE, PATCH, attended, encoder_decoder, table, weights, words_over_patches

CLS, SEP = (VOCABULARY.index(token) for token in ("[CLS]", "[SEP]"))
MODELS = {
    "translator": encoder_decoder(len(VOCABULARY)),
    "clip": words_over_patches(len(VOCABULARY), leading=1),
    "rigid": words_over_patches(len(VOCABULARY), 6),
}
# float32 sums in another order than float64 ones.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("sides")
    tokenizer = folder / "tokenizer.json"
    tiny_tokenizer().save(str(tokenizer))
    for name, model in MODELS.items():
        file = saved(model, folder / f"{name}.onnx")
        line = [command("attnserve-server"), "prepare", str(file), "--name", name]
        line += ["--repository", str(folder / "models")]
        line += ["--tokenizer", str(tokenizer)] if name != "rigid" else []
        line += ["--pair-start", "[SEP]"] if name == "translator" else []
        done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
    with serve(folder / "models", folder) as running:
        yield running.target


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[Client]:
    with Client(server) as client:
        yield client


def ids(*words: str) -> np.ndarray:
    return np.array([VOCABULARY.index(word) for word in words])


def crossing(model: onnx.ModelProto, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Weights of the decoder's site over the encoder's, (H, L, S)."""
    embedded = table(model, "source.words")[source]
    encoded = attended(model, "encoder", embedded, embedded)
    return weights(model, "decoder.cross", table(model, "target.words")[target], encoded)


def pixels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(3, *IMAGE)).astype(np.float32)


def looking(model: onnx.ModelProto, words: np.ndarray, image: np.ndarray, leading: int) -> np.ndarray:
    """Weights of the words over the positions of the image, (H, L, leading + patches)."""
    rows, columns = IMAGE[0] // PATCH, IMAGE[1] // PATCH
    cells = image.astype(np.float64).reshape(3, rows, PATCH, columns, PATCH).transpose(1, 3, 0, 2, 4)
    patches = np.einsum("rcdij,wdij->rcw", cells, table(model, "cut")).reshape(rows * columns, -1)
    if leading:
        patches = np.concatenate([table(model, "class")[0], patches])
    patches = attended(model, "vision", patches, patches)
    text = table(model, "words")[words]
    return weights(model, "text.0.cross", attended(model, "text.0.self", text, text), patches)


def test_two_texts_have_separate_axes_and_tokens(client: Client) -> None:
    pairs = [("the cat sat", "a dog"), ("a mat", "the dog looked at a cat")]
    results = client.infer("translator", pairs, attention=AttentionSelection(sites=["decoder.cross"]))
    assert {result.run.batch_size for result in results} == {2}
    for (text, pair), result in zip(pairs, results, strict=True):
        source, target = ids("[CLS]", *text.split(), "[SEP]"), ids("[SEP]", "[CLS]", *pair.split(), "[SEP]")
        (found,) = result.attention
        assert (found.kind, found.query_axis, found.key_axis) == ("cross", "seq", "source_seq")
        np.testing.assert_allclose(found.weights, crossing(MODELS["translator"], source, target), atol=TOLERANCE)
        assert [token.text for token in found.key_tokens] == ["[CLS]", *text.split(), "[SEP]"]
        assert [token.text for token in found.query_tokens] == ["[SEP]", "[CLS]", *pair.split(), "[SEP]"]
        positions = [
            (pair[token.start : token.end], token.segment) for token in found.query_tokens if not token.special
        ]
        assert positions == [(word, 1) for word in pair.split()]


def test_maps_of_two_texts_reduce_to_words(client: Client) -> None:
    selection = AttentionSelection(sites=["decoder.cross"], unit="word", special_tokens="drop", heads="mean")
    (found,) = client.infer("translator", ("the cat sat", "a dog"), attention=selection).attention
    assert [token.text for token in found.query_tokens] == ["a", "dog"]
    assert [token.text for token in found.key_tokens] == ["the", "cat", "sat"]
    expected = crossing(
        MODELS["translator"], ids("[CLS]", "the", "cat", "sat", "[SEP]"), ids("[SEP]", "[CLS]", "a", "dog", "[SEP]")
    )
    kept = expected.mean(0)[2:4, 1:4]
    np.testing.assert_allclose(found.weights[0], kept / kept.sum(-1, keepdims=True), atol=TOLERANCE)


def test_ids_sent_as_tensors_have_tokens_on_both_sides(client: Client) -> None:
    sent = {"input_ids": ids("[CLS]", "the", "cat"), "decoder_input_ids": ids("[SEP]", "a")}
    (found,) = client.infer("translator", sent, attention=AttentionSelection(sites=["decoder.cross"])).attention
    assert [token.text for token in found.key_tokens] == ["[CLS]", "the", "cat"]
    assert [token.text for token in found.query_tokens] == ["[SEP]", "a"]


def test_without_a_second_text_the_start_token_is_the_only_query(client: Client) -> None:
    (found,) = client.infer("translator", "the cat", attention=AttentionSelection(sites=["decoder.cross"])).attention
    assert [token.text for token in found.query_tokens] == ["[SEP]"]
    info = client.model("translator")
    assert (info.text_axis, info.text_pair_axis) == ("source_seq", "seq")


def test_words_over_patches_have_the_image_grid(client: Client) -> None:
    image = pixels()
    sent = ("a dog sat", {"pixel_values": image})
    (found,) = client.infer("clip", sent, attention=AttentionSelection(sites=["text.0.cross"])).attention
    expected = looking(MODELS["clip"], ids("[CLS]", "a", "dog", "sat", "[SEP]"), image, leading=1)
    np.testing.assert_allclose(found.weights, expected, atol=TOLERANCE)
    assert [token.text for token in found.key_tokens[:3]] == ["[0]", "r1 c1", "r1 c2"]
    assert found.grids == {found.key_axis: PatchGrid(2, 3, 1)}
    panels = {panel.token.text: panel.weights for panel in found.over_patches()}
    np.testing.assert_allclose(panels["dog"], expected.mean(0)[2, 1:].reshape(2, 3), atol=TOLERANCE)


def test_fixed_axes_of_words_and_patches_are_distinguished(client: Client) -> None:
    image, words = pixels(1), ids("a", "dog", "sat", "on", "the", "mat")
    (found,) = client.infer(
        "rigid", {"input_ids": words, "pixel_values": image}, attention=AttentionSelection(layers=[-1])
    ).attention
    np.testing.assert_allclose(found.weights, looking(MODELS["rigid"], words, image, leading=0), atol=TOLERANCE)
    assert found.kind == "cross"
    assert list(found.grids) == [found.key_axis]
    with pytest.raises(InvalidRequest, match="length 5, but the model takes 6"):
        client.infer("rigid", {"input_ids": words[:5], "pixel_values": image})


def test_command_draws_both_kinds_of_map(server: str, tmp_path: Path) -> None:
    np.save(tmp_path / "dog.npy", pixels())
    lines = {
        "translator": ["the cat sat", "--pair", "a dog"],
        "clip": ["a dog sat", "--tensor", f"pixel_values={tmp_path / 'dog.npy'}"],
    }
    for model, given in lines.items():
        png, html = tmp_path / f"{model}.png", tmp_path / f"{model}.html"
        line = [
            command("attnserve"),
            "explain",
            model,
            *given,
            "--server",
            server,
            "--png",
            str(png),
            "--html",
            str(html),
        ]
        done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert png.read_bytes().startswith(b"\x89PNG")
        assert "dog" in html.read_text(encoding="utf-8")
        assert "dog" in done.stdout
