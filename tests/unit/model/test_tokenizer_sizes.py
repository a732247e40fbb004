"""Padding and truncation of a tokenizer.json, compared with the `tokenizers` library itself.

`sized` makes a tokenizer with these settings, and `read` loads it as the server does. A text that its truncation cannot
shorten enough raises TruncationFailed where the library raises.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnserve_server.model.tokenizer import TextTokenizer, TokenizedText, TruncationFailed
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

PAD, UNKNOWN, FIRST, LAST = 0, 1, 2, 3


def base() -> Tokenizer:
    """Words of two pieces, `w` and a number, between [CLS] and [SEP]."""
    vocabulary = {"[PAD]": PAD, "[UNK]": UNKNOWN, "[CLS]": FIRST, "[SEP]": LAST, "w": 4}
    vocabulary |= {f"##{number}": number + 5 for number in range(30)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def sized(padding: dict[str, Any] | None, truncation: dict[str, Any] | None) -> Tokenizer:
    tokenizer = base()
    if padding is not None:
        tokenizer.enable_padding(pad_token="[PAD]", **{"pad_id": PAD, **padding})
    if truncation is not None:
        tokenizer.enable_truncation(**truncation)
    return tokenizer


def read(tokenizer: Tokenizer, folder: Path, written: tuple[str, ...] = ("seq",)) -> TextTokenizer:
    tokenizer.save(str(folder / "tokenizer.json"))
    return TextTokenizer.load(folder / "tokenizer.json", "seq", written)


def assert_alike(found: TokenizedText, expected: Any) -> None:
    assert found.ids.tolist() == expected.ids
    assert found.type_ids.tolist() == expected.type_ids
    assert found.mask.tolist() == expected.attention_mask
    units = found.units
    assert units.length == len(expected.ids)
    assert list(units.special) == [flag == 1 for flag in expected.special_tokens_mask]
    plain = [place for place, flag in enumerate(expected.special_tokens_mask) if not flag]
    assert [(units.starts[at], units.ends[at]) for at in plain] == [expected.offsets[at] for at in plain]
    assert [units.texts[at] for at in range(units.length)] == expected.tokens
    for at, (word, segment) in enumerate(zip(expected.word_ids, expected.sequence_ids, strict=True)):
        assert (units.word_ids[at] < 0) == (word is None)
        if word is not None:
            assert units.segments[at] == segment


PADDINGS = st.none() | st.fixed_dictionaries(
    {"direction": st.sampled_from(["left", "right"])},
    optional={
        "length": st.none() | st.integers(1, 14),
        "pad_to_multiple_of": st.none() | st.integers(2, 8),
        "pad_type_id": st.integers(0, 2),
        "pad_id": st.sampled_from([PAD, LAST]),
    },
)
TRUNCATIONS = st.none() | st.fixed_dictionaries(
    {
        "max_length": st.integers(6, 14),
        "direction": st.sampled_from(["left", "right"]),
        "strategy": st.sampled_from(["longest_first", "only_first", "only_second"]),
        # Other strategies are tested below, because the library fails on pairs with them.
        "stride": st.just(0),
    }
)
WORDS = st.lists(st.integers(0, 29), min_size=1, max_size=9)


@settings(max_examples=150, deadline=None)
@given(padding=PADDINGS, truncation=TRUNCATIONS, words=WORDS, pair=st.none() | WORDS)
def test_texts_are_padded_and_truncated_as_by_the_library(
    padding: dict[str, Any] | None, truncation: dict[str, Any] | None, words: list[int], pair: list[int] | None
) -> None:
    texts = [" ".join(f"w{number}" for number in each) for each in (words, pair or [])]
    oracle = sized(padding, truncation)
    try:
        expected = oracle.encode(*texts) if pair else oracle.encode(texts[0])
    except Exception as error:  # noqa: BLE001 - the library raises no better: one of two texts cannot be cut enough
        with pytest.raises(TruncationFailed, match=re.escape(str(error))):
            TextTokenizer(oracle, "seq", ("seq",)).encode(texts[0], texts[1] if pair else "")
        return
    found = TextTokenizer(sized(padding, truncation), "seq", ("seq",)).encode(texts[0], texts[1] if pair else "")
    assert_alike(found, expected)
    # Words are whole if nothing was truncated, and otherwise have their remaining text.
    for word, (segment, start, end) in zip(found.units.words, found.units.word_spans, strict=True):
        assert texts[segment][start:end] == word
        assert word


@pytest.mark.parametrize(
    ("padding", "expected"),
    [
        ({"length": 8}, [2, 4, 6, 4, 7, 3, 0, 0]),
        ({"length": 8, "direction": "left"}, [0, 0, 2, 4, 6, 4, 7, 3]),
        ({"length": 3}, [2, 4, 6, 4, 7, 3]),
        ({"pad_to_multiple_of": 4}, [2, 4, 6, 4, 7, 3, 0, 0]),
        ({"length": 5, "pad_to_multiple_of": 4}, [2, 4, 6, 4, 7, 3, 0, 0]),
        ({}, [2, 4, 6, 4, 7, 3]),
        ({"length": 8, "pad_id": 3}, [2, 4, 6, 4, 7, 3, 3, 3]),
    ],
    ids=["fixed", "left", "shorter", "multiple", "both", "longest of a batch of one", "another id"],
)
def test_padding_strategies(padding: dict[str, Any], expected: list[int], tmp_path: Path) -> None:
    tokenizer = read(sized(padding, None), tmp_path)
    assert tokenizer.encode("w1 w2").ids.tolist() == expected
    assert read(sized(padding, None), tmp_path, written=()).encode("w1 w2").ids.tolist() == [2, 4, 6, 4, 7, 3]


def test_padding_is_special_and_has_no_word(tmp_path: Path) -> None:
    tokenizer = read(sized({"length": 8}, {"max_length": 6}), tmp_path)
    units = tokenizer.encode("w1 w2 w3").units
    assert units.texts == ("[CLS]", "w", "##1", "w", "##2", "[SEP]", "[PAD]", "[PAD]")
    assert units.special == (True, False, False, False, False, True, True, True)
    assert units.word_ids == (-1, 0, 0, 1, 1, -1, -1, -1)
    assert units.words == ("w1", "w2")
    assert units.word_spans == ((0, 0, 2), (0, 3, 5))
    assert set(zip(units.starts[-2:], units.ends[-2:], strict=True)) == {(0, 0)}


def test_truncated_word_has_the_text_of_its_remaining_tokens(tmp_path: Path) -> None:
    right = read(sized(None, {"max_length": 5}), tmp_path).encode("w1 w22").units
    assert right.words == ("w1", "w")
    left = read(sized(None, {"max_length": 5, "direction": "left"}), tmp_path).encode("w11 w2").units
    assert left.words == ("11", "w2")
    assert left.word_ids == (-1, 0, 1, 1, -1)


def test_padding_token_outside_the_vocabulary_keeps_its_name(tmp_path: Path) -> None:
    tokenizer = base()
    tokenizer.enable_padding(pad_id=99, pad_token="<blank>", length=6)
    units = read(tokenizer, tmp_path).encode("w1").units
    assert units.texts[-2:] == ("<blank>", "<blank>")


def test_text_of_a_special_token_is_plain_text_with_padding(tmp_path: Path) -> None:
    tokens = read(sized({"length": 20}, None), tmp_path).encode("w1 [SEP] w2")
    assert tokens.ids.tolist().count(LAST) == 1
    assert tokens.mask.tolist() == [1] * int(tokens.mask.sum()) + [0] * int(20 - tokens.mask.sum())


def test_words_of_ids_are_found_without_padding(tmp_path: Path) -> None:
    tokenizer = read(sized({"length": 20}, {"max_length": 4}), tmp_path)
    units = tokenizer.units_of_ids(np.array([2, 4, 6, 4, 7, 3, 0, 0]))
    assert units.word_ids == (-1, 0, 0, 1, 1, -1, -1, -1)
    assert units.words == ("w1", "w2")


@pytest.mark.parametrize(("written", "count"), [((), 3), (("target",), 7), (("seq",), 3)])
def test_second_text_is_padded_along_its_own_axis(tmp_path: Path, written: tuple[str, ...], count: int) -> None:
    tokenizer = base()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.enable_padding(length=6)
    second = read(tokenizer, tmp_path, written).encode_second("w1", "target", start=2)
    assert len(second.ids) == len(second.mask) == second.units.length == count
    assert second.mask.sum() == 3


@pytest.mark.parametrize("direction", ["left", "right"])
@pytest.mark.parametrize("stride", [0, 1, 3])
def test_stride_does_not_change_the_kept_tokens(stride: int, direction: str, tmp_path: Path) -> None:
    ids = {"right": [2, 4, 6, 4, 7, 3], "left": [2, 4, 8, 4, 9, 3]}
    truncation = {"max_length": 6, "stride": stride, "direction": direction}
    tokenizer = sized(None, truncation)
    assert tokenizer.encode("w1 w2 w3 w4").ids == ids[direction]
    assert read(tokenizer, tmp_path).encode("w1 w2 w3 w4").ids.tolist() == ids[direction]


@pytest.mark.parametrize("length", [0, 1, 2])
def test_lengths_filled_by_special_tokens_are_those_of_the_library(length: int, tmp_path: Path) -> None:
    base().save(str(tmp_path / "tokenizer.json"))
    described = json.loads((tmp_path / "tokenizer.json").read_text())
    described["truncation"] = {"direction": "Right", "max_length": length, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    expected = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("w1 w2")
    assert_alike(TextTokenizer.load(tmp_path / "tokenizer.json", "seq", ("seq",)).encode("w1 w2"), expected)


def test_padding_and_truncation_of_the_file_survive_sealing(tmp_path: Path) -> None:
    leaking = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "</s>": 2, "w1": 3}, unk_token="<unk>"))
    leaking.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    leaking.add_special_tokens(["<pad>", "<unk>", "</s>"])
    leaking.enable_padding(pad_id=0, pad_token="<pad>", length=5)
    tokens = read(leaking, tmp_path).encode("w1 </s> <pad>")
    assert json.loads((tmp_path / "tokenizer.json").read_text())["padding"]["strategy"] == {"Fixed": 5}
    assert tokens.ids.tolist() == [3, 1, 1, 0, 0]
    assert tokens.units.texts[-1] == "<pad>"
