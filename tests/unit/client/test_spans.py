"""Weights between stretches of a text: which units they cover, sums over keys, means over queries, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
from attnserve_client import AttentionMap, AttentionSelection, Client, Token
from attnserve_client.testing import FakeServer

TEXT = "Derivative Works of the Work"
# float32 results of float64 sums.
TOLERANCE = 1e-6


def map_of(text: str, heads: int = 1, second: str = "") -> AttentionMap:
    """A map of the words of a text, between two special tokens; of a pair, words of both on one axis."""
    tokens = [Token(0, "[CLS]", special=True)]
    for segment, part in enumerate((text, second)):
        at = 0
        for word in part.split():
            start = part.index(word, at)
            at = start + len(word)
            tokens.append(Token(len(tokens), word, start, at, segment=segment))
    tokens.append(Token(len(tokens), "[SEP]", special=True))
    count = len(tokens)
    weights = np.random.default_rng(3).dirichlet(np.ones(count), size=(heads, count)).astype(np.float32)
    return AttentionMap(
        sites=("s",),
        layer=0,
        kind="self",
        form="dense",
        heads=tuple(range(heads)),
        query_axis="seq",
        key_axis="seq",
        query_tokens=tuple(tokens),
        key_tokens=tuple(tokens),
        raw=weights,
    )


def test_a_stretch_sums_its_keys_and_averages_its_queries() -> None:
    found = map_of(TEXT, heads=2)
    work, derivative = (24, 28), (0, 16)
    both = found.over_spans([work, derivative])
    mean = found.weights.mean(axis=0)
    expected = [
        [mean[5, 5], mean[5, 1:3].sum()],
        [mean[1:3, 5].mean(), mean[1:3, 1:3].sum(axis=1).mean()],
    ]
    np.testing.assert_allclose(both, expected, rtol=0, atol=TOLERANCE)
    assert both.dtype == np.float32
    np.testing.assert_allclose(found.over_spans([work], head=1)[0, 0], found.weights[1, 5, 5], atol=TOLERANCE)


def test_rows_and_columns_may_be_other_stretches() -> None:
    found = map_of(TEXT)
    every = [(token.start, token.end) for token in found.key_tokens if not token.special]
    rows = found.over_spans([(20, 23)], every)
    np.testing.assert_allclose(rows, found.weights[0, 4:5, 1:6], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("span", [(2, 5), (0, 10), (9, 10), (0, 11)])
def test_a_unit_that_is_covered_in_part_counts_whole(span: tuple[int, int]) -> None:
    found = map_of(TEXT)
    np.testing.assert_allclose(found.over_spans([span])[0, 0], found.weights[0, 1, 1], rtol=0, atol=TOLERANCE)


def test_texts_of_a_pair_differ_by_their_segment() -> None:
    found = map_of("a cat", second="a dog")
    both = found.over_spans([(2, 5), (2, 5, 0), (2, 5, 1)])
    columns = [2, 2, 4]
    np.testing.assert_allclose(both, found.weights[0][np.ix_(columns, columns)], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("span", [(28, 40), (5, 5), (10, 11)])
def test_a_stretch_without_a_unit_is_refused(span: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"queries\[1\] is \({span[0]}, {span[1]}\), where this map has no unit"):
        map_of(TEXT).over_spans([(0, 4), span])
    with pytest.raises(ValueError, match=r"keys\[0\] is"):
        map_of(TEXT).over_spans([(0, 4)], [span])


def test_a_stretch_of_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match=r"queries\[0\] is \(1,\); it must be \(start, end\)"):
        map_of(TEXT).over_spans([(1,)])  # type: ignore[list-item]


def test_stretches_of_words_are_those_of_their_tokens(shared_server: FakeServer) -> None:
    text = "The wonderful buyer agrees"
    with Client(shared_server.target) as client:
        (words,) = client.infer("fake", text, attention=AttentionSelection(layers=-1, unit="word")).attention
    spans = [(token.start, token.end) for token in words.key_tokens if not token.special]
    inner = words.head_weights(1)[1:-1, 1:-1]
    np.testing.assert_allclose(words.over_spans(spans, head=1), inner, rtol=0, atol=TOLERANCE)
