"""Words in a tokenized text: which tokens are whose pieces, and where each word stands. Tokenizing is not here."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenizers import Encoding, Tokenizer


@dataclass(slots=True)
class Words:
    """Words in the order of their first pieces, counted over all segments."""

    ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    spans: list[tuple[int, int, int]] = field(default_factory=list)

    def add(self, encoding: Encoding, texts: Sequence[str]) -> None:
        """Append the words of an encoding of `texts`, one for each segment."""
        number: dict[tuple[int, int], int] = {}
        extents: list[tuple[int, int, int]] = []
        base = len(self.texts)
        for word, segment, (start, end) in zip(encoding.word_ids, encoding.sequence_ids, encoding.offsets, strict=True):
            if word is None or segment is None:
                self.ids.append(-1)
                continue
            # The tokenizer counts the words of each segment from 0.
            index = number.setdefault((segment, word), len(number))
            self.ids.append(base + index)
            if index == len(extents):
                extents.append((segment, start, end))
            else:
                _, first, last = extents[index]
                extents[index] = (segment, min(first, start), max(last, end))
        claimed = {(segment, start) for segment, start, _ in extents}
        for segment, start, end in extents:
            first, last = _without_outer_space(texts[segment], start, end)
            if last == end:
                while (segment, last) not in claimed and _is_mark(texts[segment], last):
                    last += 1
            self.spans.append((segment, first, last))
            self.texts.append(texts[segment][first:last])


def cuts_words(tokenizer: Tokenizer) -> bool:
    """Whether words can be told at all: without a pre-tokenizer that cuts, the whole text counts as one word."""
    if tokenizer.pre_tokenizer is None:
        return False
    probe = "a b"
    if tokenizer.normalizer is not None:
        probe = tokenizer.normalizer.normalize_str(probe)
    return len(tokenizer.pre_tokenizer.pre_tokenize_str(probe)) > 1


def _without_outer_space(text: str, start: int, end: int) -> tuple[int, int]:
    """The span without white space at its ends; as it is where it is nothing else."""
    inner = text[start:end].strip()
    if not inner:
        return start, end
    first = start + text[start:end].index(inner[0])
    return first, first + len(inner)


def _is_mark(text: str, position: int) -> bool:
    """Whether a combining mark stands there, which belongs to the character before it."""
    return position < len(text) and unicodedata.category(text[position]).startswith("M")
