#!/usr/bin/env bash
# Where a normalizer composes characters, a token's offsets end at the first part of the last one: text is missing.
#
# Versions: tokenizers 0.23.3.
# Source: Encoding.offsets, https://huggingface.co/docs/tokenizers/api/encoding; Unicode normalization forms,
# https://www.unicode.org/reports/tr15/
# Expected by most: the offsets of the last token of a text end where the text ends, and text[start:end] is the word.
# Observed: with NFC or NFKC, a composed character has the offsets of its first code point only. Decomposed Hangul of 6
# code points has the offsets (0, 4), "e" with a combining accent (0, 1). Both forms are the same text by Unicode, and
# clients send either. A server that cuts words out of a text by these offsets loses their last letters.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import unicodedata

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

composed = ["\u00e9", "\ud55c\uae00"]  # e with an acute accent; two syllables of Hangul
vocabulary = {"[UNK]": 0} | {word: number for number, word in enumerate(composed, 1)}
tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
short = 0
for form in ("NFC", "NFKC"):
    tokenizer.normalizer = getattr(normalizers, form)()
    for word in composed:
        own = tokenizer.encode(word)
        assert own.tokens == [word] and own.offsets == [(0, len(word))], "the control: a composed text"
        text = unicodedata.normalize("NFD", word)
        found = tokenizer.encode(text)
        assert found.tokens == [word], "the control: both texts are the same word"
        ((start, end),) = found.offsets
        print(f"{form}: {len(text)} code points of {ascii(text)}: offsets ({start}, {end})")
        short += end < len(text)
if short != 4:
    raise SystemExit("the offsets reach the end of the text: the behaviour is no longer there")
PYTHON
