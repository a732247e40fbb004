"""Prompts and mask tokens: spans and words count from the caller's text, and the prompt's tokens count as special.

A prompt is a text, such as `query: `, that a model expects before the caller's text. The mask token is the only special
token that a caller's text may contain, and only if `load` is given it; other special tokens become ordinary tokens.
`TOKENIZER` is a tiny tokenizer made by hand; nothing raises.
"""

from __future__ import annotations

from pathlib import Path

from attnserve_server.model.tokenizer import TextTokenizer
from head_checkpoints import tokenizer

TOKENIZER = TextTokenizer(tokenizer(), "seq")


def test_tokens_of_the_prompt_are_special_and_have_no_span() -> None:
    units = TOKENIZER.encode("dogs sat", prompt="the cat: ").units
    assert units.texts == ("[CLS]", "the", "cat", "[UNK]", "dog", "##s", "sat", "[SEP]")
    assert units.special == (True, True, True, True, False, False, False, True)
    assert list(zip(units.starts, units.ends, strict=True))[4:7] == [(0, 3), (3, 4), (5, 8)]
    assert set(units.starts[:4]) | set(units.ends[:4]) == {0}
    assert units.words == ("dogs", "sat")
    assert units.word_spans == ((0, 0, 4), (0, 5, 8))
    assert units.word_ids == (-1, -1, -1, -1, 0, 0, 1, -1)


def test_a_word_that_reaches_into_the_text_begins_at_the_text() -> None:
    units = TOKENIZER.encode("s sat", prompt="the cat").units
    assert units.texts[3] == "##s"
    assert (units.starts[3], units.ends[3]) == (0, 1)
    assert units.words == ("s", "sat")
    assert units.word_spans == ((0, 0, 1), (0, 2, 5))


def test_spans_of_the_second_text_stay() -> None:
    units = TOKENIZER.encode("dog", "a mat", prompt="the: ").units
    own = [place for place, special in enumerate(units.special) if not special]
    assert [(units.segments[at], units.starts[at], units.ends[at]) for at in own] == [(0, 0, 3), (1, 0, 1), (1, 2, 5)]
    assert units.word_spans == ((0, 0, 3), (1, 0, 1), (1, 2, 5))


def test_without_a_prompt_nothing_changes() -> None:
    assert TOKENIZER.encode("dogs sat", prompt="").units == TOKENIZER.encode("dogs sat").units


def test_a_text_can_spell_the_mask_token_alone(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    tokenizer().save(str(file))
    masking = TextTokenizer.load(file, "seq", mask_token="[MASK]")
    units = masking.encode("the [MASK] sat [SEP]").units
    assert units.texts[:4] == ("[CLS]", "the", "[MASK]", "sat")
    assert units.special[2] is False
    assert (units.starts[2], units.ends[2]) == (4, 10)
    assert "[SEP]" not in units.texts[4:-1]
    assert "[MASK]" not in TextTokenizer.load(file, "seq").encode("the [MASK] sat").units.texts
