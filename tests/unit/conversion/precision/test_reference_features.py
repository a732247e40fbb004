"""The reference of row features: counts of all rows of known texts, against NumPy from the weights of the same runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from attnserve_server.cli.convert import _texts
from attnserve_server.conversion.precision.reference_features import MAX_TEXTS, with_reference_features
from attnserve_server.domain.values import AttentionFeature
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.model.manifest import Manifest
from tiny_bundle import HEADS, LAYERS, VOCABULARY, tiny_manifest, write_tiny_files
from typer import BadParameter

TEXTS = ("the cat sat", "a dog", "on the mat and on the mat")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[RuntimeSession, Path]:
    files = write_tiny_files(tmp_path_factory.mktemp("tiny"))
    return RuntimeSession.load(files["model.onnx"], provider="CPUExecutionProvider"), files["tokenizer.json"]


def test_every_row_of_every_head_is_counted(tiny: tuple[RuntimeSession, Path]) -> None:
    session, tokenizer = tiny
    made = with_reference_features(tiny_manifest(), session, tokenizer, "proved", TEXTS).reference_features
    assert made is not None
    assert (made.inputs, made.sequences) == ("3 given texts", 3)
    assert list(made.sites) == [f"layer{layer}" for layer in range(LAYERS)]
    rows = sum(HEADS * (len(text.split()) + 2) for text in TEXTS)
    for features in made.sites.values():
        assert {sum(counts) for counts in features.values()} == {rows}
    entropy, bounds = (of[AttentionFeature.ENTROPY] for of in (made.sites["layer0"], made.buckets))
    ids = [[2, *(VOCABULARY.index(word) for word in text.split()), 3] for text in TEXTS]
    found = np.zeros(len(bounds) + 1, int)
    for one in ids:
        feeds = {"input_ids": np.array([one]), "attention_mask": np.ones((1, len(one)), np.int64)}
        items = {f"attention_items.layer{layer}": np.array([0]) for layer in range(LAYERS)}
        (weights,) = session.run({**feeds, **items}, ("attention.layer0",))
        exact = weights[0].astype(np.float64)
        values = -(exact * np.log(exact)).sum(axis=2)
        found += np.bincount((values[..., np.newaxis] > bounds).sum(axis=2).ravel(), minlength=len(found))
    assert list(entropy) == found.tolist()
    assert Manifest.model_validate_json(with_reference(made).model_dump_json()) == with_reference(made)


def with_reference(reference: object) -> Manifest:
    return tiny_manifest().model_copy(update={"reference_features": reference})


def test_english_sentences_are_the_default_and_many_texts_are_thinned_out(tiny: tuple[RuntimeSession, Path]) -> None:
    session, tokenizer = tiny
    default = with_reference_features(tiny_manifest(), session, tokenizer, "proved").reference_features
    many = with_reference_features(tiny_manifest(), session, tokenizer, "proved", ("a dog",) * (MAX_TEXTS + 1))
    assert default is not None
    assert default.inputs == "158 English sentences"
    assert many.reference_features is not None
    assert many.reference_features.sequences == MAX_TEXTS // 2 + 1


def test_a_model_without_text_or_without_a_tokenizer_has_none(tiny: tuple[RuntimeSession, Path]) -> None:
    session, tokenizer = tiny
    for manifest, file in ((tiny_manifest(text=False), tokenizer), (tiny_manifest(), None)):
        assert with_reference_features(manifest, session, file, "proved") is manifest


def test_texts_of_a_file_are_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes("one\n\n  \nzwei für\n".encode())
    assert _texts(path) == ("one", "zwei für")
    assert _texts(None) == ()
    for content, why in ((b"\n \n", "has no text"), (b"a\xff", "byte 1 is not UTF-8")):
        path.write_bytes(content)
        with pytest.raises(BadParameter, match=why):
            _texts(path)
