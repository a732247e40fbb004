"""Maps as the inputs of BertViz, CircuitsVis and inseq: shapes, tokens and values.

The tools themselves run where they are installed; these tests are skipped without them, as in CI.
"""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest
from attnserve_client import AttentionMap, AttentionSelection, Client, Token
from attnserve_client.adapters import columns_of, to_bertviz, to_circuitsvis, to_inseq
from attnserve_client.testing import FakeServer

TEXT = "The wonderful buyer"
SIDES = {"seq": ("[SEP]", "a", "dog", "sat"), "source_seq": ("ein", "Hund")}


def tokens_of(axis: str) -> tuple[Token, ...]:
    return tuple(Token(index, text, special=text == "[SEP]") for index, text in enumerate(SIDES[axis]))


def map_of(kind: str, query_axis: str = "seq", key_axis: str = "seq", layer: int = 0, heads: int = 3) -> AttentionMap:
    """A map by hand, of an encoder-decoder whose sides are `SIDES`; a causal one has no weight above its diagonal."""
    queries, keys = tokens_of(query_axis), tokens_of(key_axis)
    weights = np.random.default_rng(layer).random((heads, len(queries), len(keys))).astype(np.float32)
    if kind == "causal":
        weights = np.tril(weights)
    weights /= weights.sum(axis=-1, keepdims=True)
    return AttentionMap(
        sites=(f"{kind}.{layer}",),
        layer=layer,
        kind=kind,
        form="dense",
        heads=tuple(range(heads)),
        query_axis=query_axis,
        key_axis=key_axis,
        query_tokens=queries,
        key_tokens=keys,
        raw=weights,
        model="translator",
    )


@pytest.fixture(scope="module")
def client() -> Any:
    with FakeServer() as server, Client(server.target) as opened:
        yield opened


def test_bertviz_gets_a_tensor_for_each_layer_and_the_tokens(client: Client) -> None:
    torch = pytest.importorskip("torch")
    result = client.infer("fake", TEXT, attention=True)
    given = to_bertviz(result)
    assert set(given) == {"attention", "tokens"}
    assert given["tokens"] == ["[CLS]", "The", "wonder", "##ful", "buyer", "[SEP]"]
    assert [tuple(layer.shape) for layer in given["attention"]] == [(1, 4, 6, 6)] * 2
    for layer, attention in zip(given["attention"], result.attention, strict=True):
        assert layer.dtype == torch.float32
        np.testing.assert_array_equal(layer.numpy()[0], attention.weights)
    plain = to_bertviz(result.attention, tensors="numpy")
    np.testing.assert_array_equal(plain["attention"][1][0], result.attention[1].weights)


def test_bertviz_gets_the_start_of_the_second_text(client: Client) -> None:
    result = client.infer("fake", ("one text", "two"), attention=AttentionSelection(unit="word"))
    given = to_bertviz(result, tensors="numpy")
    assert given["tokens"][given["sentence_b_start"]] == "two"


def test_bertviz_gets_the_sides_of_an_encoder_decoder() -> None:
    maps = [
        map_of("self", "source_seq", "source_seq"),
        *(map_of("causal", layer=layer) for layer in (1, 2)),
        *(map_of("cross", "seq", "source_seq", layer=layer) for layer in (3, 4)),
    ]
    given = to_bertviz(maps, tensors="numpy")
    assert given["encoder_tokens"] == ["ein", "Hund"]
    assert given["decoder_tokens"] == ["[SEP]", "a", "dog", "sat"]
    shapes = {name: [each.shape for each in given[name]] for name in given if name.endswith("attention")}
    assert shapes == {
        "encoder_attention": [(1, 3, 2, 2)],
        "decoder_attention": [(1, 3, 4, 4)] * 2,
        "cross_attention": [(1, 3, 4, 2)] * 2,
    }
    np.testing.assert_array_equal(given["cross_attention"][1][0], maps[4].weights)
    assert set(to_bertviz(maps[3:], tensors="numpy")) == {"cross_attention", "encoder_tokens", "decoder_tokens"}


def test_circuitsvis_gets_heads_with_names_and_hides_nothing_of_an_encoder(client: Client) -> None:
    found = client.infer("fake", TEXT, attention=True).attention[1]
    given = to_circuitsvis(found)
    assert given["tokens"] == ["[CLS]", "The", "wonder", "##ful", "buyer", "[SEP]"]
    np.testing.assert_array_equal(given["attention"], found.weights)
    assert given["attention_head_names"] == ["L1 H0", "L1 H1", "L1 H2", "L1 H3"]
    assert given["mask_upper_tri"] is False
    assert to_circuitsvis(map_of("causal"))["mask_upper_tri"] is True
    joined = client.infer("fake", TEXT, attention=AttentionSelection(layers=-1, heads="mean")).attention[0]
    assert to_circuitsvis(joined)["attention_head_names"] == ["L1 joined"]


def test_circuitsvis_gets_tensors_on_request() -> None:
    torch = pytest.importorskip("torch")
    given = to_circuitsvis(map_of("causal"), tensors="torch")
    assert torch.equal(given["attention"], torch.from_numpy(map_of("causal").weights.copy()))


def test_inseq_gets_a_column_for_each_generated_token() -> None:
    maps = [map_of("causal", layer=layer) for layer in (0, 1)]
    given = columns_of(maps)
    columns = given["target_attributions"]
    assert columns.shape == (4, 3, 2, 3)
    assert given["attr_pos_start"] == 1
    assert [token.text for token in given["source"]] == ["[SEP]"]
    assert [token.text for token in given["target"]] == list(SIDES["seq"])
    # The column of "sat" is the row of "dog", which generated it.
    np.testing.assert_array_equal(columns[:3, 2, 1], maps[1].weights[:, 2, :3].T)
    np.testing.assert_array_equal(np.isnan(columns[:, :, 0, 0]), [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]])


def test_inseq_gets_the_source_of_a_decoder() -> None:
    found = map_of("cross", "seq", "source_seq")
    given = columns_of([found])
    assert [token.text for token in given["target"]] == ["a", "dog", "sat"]
    assert [token.text for token in given["source"]] == ["ein", "Hund"]
    np.testing.assert_array_equal(given["source_attributions"][:, 0, 0], found.weights[:, 0].T)
    aligned = columns_of([found], generated=False)
    assert aligned["source_attributions"].shape == (2, 4, 1, 3)
    assert len(aligned["target"]) == 4


def test_inseq_gets_rows_of_an_encoder_as_columns_of_the_same_token() -> None:
    found = map_of("self")
    given = columns_of([found])
    assert given["source"] == given["target"] == list(tokens_of("seq"))
    np.testing.assert_array_equal(given["source_attributions"][:, 2, 0, 1], found.weights[1, 2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: to_bertviz([]), "there is no attention map; pass attention=True"),
        (lambda: to_bertviz([map_of("self"), map_of("self", layer=1, heads=2)]), "of shapes"),
        (lambda: to_bertviz([map_of("self"), map_of("self", "source_seq", "source_seq")]), "another sequence"),
        (lambda: to_circuitsvis(map_of("cross", "seq", "source_seq")), r"two sides \(seq and source_seq\)"),
        (lambda: to_circuitsvis(map_of("self"), tensors="jax"), "tensors is 'jax'"),  # type: ignore[arg-type]
        (lambda: columns_of([map_of("self"), map_of("causal")]), "differs from"),
    ],
)
def test_maps_that_a_tool_cannot_show_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_maps_without_all_rows_are_refused(client: Client) -> None:
    one_row = client.infer("fake", TEXT, attention=AttentionSelection(queries=[1])).attention
    for call in (lambda: to_bertviz(one_row, tensors="numpy"), lambda: to_circuitsvis(one_row[0])):
        with pytest.raises(ValueError, match="1 rows and 6 columns; select it without `queries`"):
            call()


@pytest.mark.parametrize(
    ("missing", "call"),
    [
        ("torch", lambda: to_bertviz([map_of("self")])),
        ("inseq", lambda: to_inseq([map_of("self")])),
    ],
)
def test_without_the_library_the_message_names_it(missing: str, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(wanted: str, *rest: Any) -> Any:
        if wanted.split(".", maxsplit=1)[0] == missing:
            raise ImportError(wanted)
        return real(wanted, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=f"needs {missing}: pip install {missing}"):
        call()


@pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning")  # BertViz's own
def test_bertviz_itself_takes_them() -> None:
    bertviz = pytest.importorskip("bertviz", reason="pip install bertviz")
    maps = [map_of("self", "source_seq", "source_seq"), map_of("causal"), map_of("cross", "seq", "source_seq")]
    for view in (bertviz.head_view, bertviz.model_view):
        assert "Hund" in view(**to_bertviz(maps), html_action="return").data
        assert "dog" in view(**to_bertviz([map_of("self")]), html_action="return").data


def test_circuitsvis_itself_takes_them() -> None:
    circuitsvis = pytest.importorskip("circuitsvis", reason="pip install circuitsvis")
    given = to_circuitsvis(map_of("causal"))
    assert "L0 H2" in circuitsvis.attention.attention_heads(**given).local_src
    patterns = circuitsvis.attention.attention_patterns(given["tokens"], given["attention"])
    assert "dog" in patterns.local_src


@pytest.mark.parametrize(
    "maps", [[map_of("causal"), map_of("causal", layer=1)], [map_of("cross", "seq", "source_seq")]]
)
def test_inseq_itself_takes_them(maps: list[AttentionMap]) -> None:
    pytest.importorskip("inseq", reason="pip install inseq")
    made = to_inseq(maps)
    aggregated = made[0].aggregate()
    name = "target_attributions" if maps[0].kind == "causal" else "source_attributions"
    expected = columns_of(maps)[name].mean(axis=(2, 3))
    np.testing.assert_allclose(getattr(aggregated, name).numpy(), expected, rtol=1e-5)
    assert "dog" in made.show(display=False, return_html=True)
