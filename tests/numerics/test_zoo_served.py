"""One server over the zoo: every form's weights on the wire, and the axes and tokens of each map.

The zoo is the project's own set of torch models, one for each kind of attention. Needs `zoo_bundles`, which exports
them with torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from attnserve_client import AttentionSelection, Client, InferenceResult
from attnserve_server.conversion.sources.zoo import model as zoo
from attnserve_server.model.repository import Bundle
from attnserve_server.model.tokenizer import TextTokenizer
from serving import serve
from zoo_bundles import NAMES, TINY, Array, Definition

# float32 throughout, as in the tests of the bundles themselves.
TOLERANCE = 1e-5
TEXTS = ("The cat sat on a mat", "Oui", "dog and bone")
REPLIES = ("le chat", "Yes, of course it is", "os")


@pytest.fixture(scope="module")
def client(
    zoo_bundles: dict[str, Bundle], zoo_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    """A client of one server over all of the zoo's bundles."""
    assert set(zoo_bundles) == set(NAMES)
    with serve(zoo_repository, tmp_path_factory.mktemp("zoo-server")) as server, Client(server.target) as client:
        yield client


def ids_of(text: str, bundle: Bundle) -> Array:
    tokenizer = TextTokenizer.load(bundle.path / "tokenizer.json", "seq")
    return np.array(tokenizer.encode(text, "", limit=512).ids)


def definition_of(name: str) -> Definition:
    return Definition(
        name, {key: tensor.numpy() for key, tensor in zoo.zoo_model(name, TINY).module.state_dict().items()}
    )


def check(name: str, result: InferenceResult, inputs: dict[str, Array]) -> None:
    expected = definition_of(name).weights(inputs)
    assert [map_.sites[0] for map_ in result.attention] == list(expected)
    for map_ in result.attention:
        np.testing.assert_allclose(map_.weights, expected[map_.sites[0]], atol=TOLERANCE, rtol=0)
        assert map_.weights.shape[1:] == (len(map_.query_tokens), len(map_.key_tokens))


@pytest.mark.parametrize("name", ["self", "causal", "top-k", "linear", "multi-scale"])
def test_texts_of_mixed_lengths_in_one_batch_answer_the_definition(
    name: str, client: Client, zoo_bundles: dict[str, Bundle]
) -> None:
    for text, result in zip(TEXTS, client.infer(name, list(TEXTS), attention=True), strict=True):
        ids = ids_of(text, zoo_bundles[name])
        check(name, result, {"input_ids": ids})
        tokens = [token.text for token in result.attention[0].query_tokens]
        assert (tokens[0], tokens[-1], len(tokens)) == ("[CLS]", "[SEP]", len(text) + 2)
        assert result.outputs["last_hidden_state"].shape == (len(ids), 32)


def test_the_form_of_linear_attention_is_returned(client: Client) -> None:
    (map_,) = client.infer("linear", "The cat", attention=True).attention
    assert (map_.kind, map_.form) == ("self", "linear")


def test_pooled_keys_span_the_tokens_that_they_are_means_of(client: Client) -> None:
    whole, halves, quarters = client.infer("multi-scale", "A cat sat", attention=True).attention
    assert (halves.query_axis, halves.key_axis, quarters.key_axis) == ("seq", "seq_by_2", "seq_by_4")
    assert [token.text for token in whole.key_tokens] == ["[CLS]", "A", "Ġ", "c", "a", "t", "Ġ", "s", "a", "t", "[SEP]"]
    assert [token.text for token in quarters.key_tokens] == ["[CLS] A Ġ c", "a t Ġ s", "a t [SEP]"]
    assert [(token.start, token.end) for token in quarters.key_tokens] == [(0, 3), (3, 7), (7, 9)]
    assert len(halves.key_tokens) == 6
    assert quarters.query_tokens == whole.query_tokens


def test_predicted_bytes_equal_the_size_of_the_answer(client: Client) -> None:
    for name in ("linear", "multi-scale"):
        predicted = client.infer(name, "A cat sat", attention=True, validate_only=True).predicted_bytes
        result = client.infer(name, "A cat sat", attention=True)
        sizes = [map_.weights.nbytes for map_ in result.attention] + [each.nbytes for each in result.outputs.values()]
        assert predicted == result.predicted_bytes == sum(sizes)


def test_pooled_positions_are_not_counted_as_tokens(client: Client) -> None:
    result = client.infer("multi-scale", "A cat sat", attention=True)
    assert (result.run.useful_tokens, result.run.computed_tokens) == (11, 11)


def test_selections_apply_to_pooled_and_linear_maps(client: Client, zoo_bundles: dict[str, Bundle]) -> None:
    text = "The cat sat"
    for name in ("linear", "multi-scale"):
        expected = definition_of(name).weights({"input_ids": ids_of(text, zoo_bundles[name])})
        for map_ in client.infer(
            name, text, attention=AttentionSelection(queries=[-1, 2], head_reduction="mean")
        ).attention:
            wanted = expected[map_.sites[0]].mean(0, keepdims=True)[:, [-1, 2]]
            np.testing.assert_allclose(map_.weights, wanted, atol=TOLERANCE, rtol=0)
    by_word = client.infer("multi-scale", text, attention=AttentionSelection(unit="word")).attention[-1]
    assert [token.text for token in by_word.query_tokens] == ["[CLS]", "The", "cat", "sat", "[SEP]"]
    assert [token.text for token in by_word.key_tokens] == ["[CLS] T h e", "Ġ c a t", "Ġ s a t", "[SEP]"]


def test_both_texts_of_an_encoder_decoder_name_their_own_axis(client: Client, zoo_bundles: dict[str, Bundle]) -> None:
    pairs = list(zip(TEXTS, REPLIES, strict=True))
    for (source, target), result in zip(pairs, client.infer("cross", pairs, attention=True), strict=True):
        ids, decoded = (ids_of(text, zoo_bundles["cross"]) for text in (source, target))
        crossed = result.attention[-1]
        assert (crossed.kind, crossed.query_axis, crossed.key_axis) == ("cross", "seq", "source_seq")
        assert len(crossed.key_tokens) == len(ids)
        inputs = {"input_ids": ids, "decoder_input_ids": decoded[-len(crossed.query_tokens) :]}
        check("cross", result, inputs)
        assert "".join(token.text for token in crossed.key_tokens).replace("Ġ", " ") == f"[CLS]{source}[SEP]"
        assert target in "".join(token.text for token in crossed.query_tokens).replace("Ġ", " ")


def test_the_words_of_a_text_attend_to_the_patches_of_an_image(client: Client, zoo_bundles: dict[str, Bundle]) -> None:
    rng = np.random.default_rng(2)
    each = [
        {
            "input_ids": ids_of(text, zoo_bundles["cross-modal"]),
            "pixel_values": rng.normal(size=(3, 32, 32)).astype(np.float32),
        }
        for text in TEXTS
    ]
    for inputs, result in zip(each, client.infer("cross-modal", each, attention=True), strict=True):
        check("cross-modal", result, inputs)
        assert result.run.batch_size == len(TEXTS)
        crossed = result.attention[-1]
        assert (crossed.query_axis, crossed.key_axis) == ("seq", "fixed_16")
        assert crossed.query_tokens[0].text == "[CLS]"
        assert len(crossed.key_tokens) == 16
