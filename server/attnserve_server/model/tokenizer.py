"""The tokenizer: text to token ids, with the span of every token and word in the caller's text.

It fails for a file that is not a tokenizer, and for a text that the file's own truncation cannot shorten enough.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer
from tokenizers.normalizers import Normalizer

from attnserve_server.domain.values import AxisUnits
from attnserve_server.model.prompts import without_prompt
from attnserve_server.model.sealing import TokenizerInvalid, failures_named, sealed, sized, special_tokens, spelling

__all__ = ["ID_BOUND", "TextTokenizer", "TokenizedText", "TokenizerInvalid", "TruncationFailed"]

ID_BOUND = 2**32
"""The library accepts ids from 0 to below this one."""


class TruncationFailed(Exception):
    """The tokenizer's own truncation cannot shorten a text, or a pair, to its length. The message is the library's."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedText:
    """A tokenized text, or pair of texts.

    Args:
        ids: token ids, int64 (N,).
        type_ids: 0 for the first text, 1 for the second, int64 (N,).
        mask: 0 for padding that the tokenizer adds, 1 elsewhere, int64 (N,).
        units: the text, span and word of each position.
    """

    ids: npt.NDArray[np.int64]
    type_ids: npt.NDArray[np.int64]
    mask: npt.NDArray[np.int64]
    units: AxisUnits


class TextTokenizer:
    """A tokenizer that never turns text into a special token, except the mask token of a masked-language model.

    It pads and truncates along the axes `as_written`, as its file declares, and along no other. Immutable after
    loading: any number of threads may use it.
    """

    def __init__(self, tokenizer: Tokenizer, axis: str, as_written: Collection[str] = (), file: bytes = b"") -> None:
        self._axis, self.file = axis, file
        self._special = special_tokens(tokenizer)
        self._special_ids = frozenset(self._special)
        padding, truncation = tokenizer.padding, tokenizer.truncation
        self._tokenizer = sealed(tokenizer, self._special)
        self._knows_words = _has_words(self._tokenizer)
        self._as_written = frozenset(as_written)
        self._written = self._tokenizer
        if self._as_written and (padding or truncation):
            self._written = sized(self._tokenizer, padding, truncation)
        self._pad_names = {int(padding["pad_id"]): str(padding["pad_token"])} if padding else {}

    @classmethod
    def load(
        cls, source: Path | bytes, axis: str, as_written: Collection[str] = (), mask_token: str = ""
    ) -> TextTokenizer:
        """Read a `tokenizer.json`.

        Args:
            source: the file, or its content.
            axis: symbol of the axis of the tokens.
            as_written: symbols of the axes along which the file's padding and truncation apply.
            mask_token: the only special token that a text may spell; it is then a token of the text. Empty: none.

        Raises:
            TokenizerInvalid: the file cannot be read, is not a tokenizer, or the library fails with it.
        """
        try:
            content = source if isinstance(source, bytes) else source.read_bytes()
        except OSError as error:
            raise TokenizerInvalid(error.strerror or type(error).__name__) from error
        try:
            # From bytes, so that no message of the library can hold the path.
            tokenizer = Tokenizer.from_buffer(content)
        except ValueError as error:
            raise TokenizerInvalid(str(error)) from error
        with failures_named():
            return cls(spelling(tokenizer, mask_token) if mask_token else tokenizer, axis, as_written, content)

    @property
    def axis(self) -> str:
        """Symbol of the axis of the tokens."""
        return self._axis

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens, such as [CLS] and [SEP]. The unknown token is not one: it represents text."""
        return self._special_ids

    def encode(self, text: str, pair: str = "", *, prompt: str = "", limit: int | None = None) -> TokenizedText:
        """Tokenize a text, or a pair of texts, with the special tokens of the model.

        Padding that the tokenizer adds is special, and has no word and no span.

        Args:
            text: the first text.
            pair: the second text; empty: there is none.
            prompt: a text that is tokenized before the first one; see `without_prompt`.
            limit: if there are more tokens than this, only their number is returned, without units, because the request
                will be refused. None: always return units.

        Returns:
            N positions; none if the tokenizer adds no special tokens and its normalisation removes the whole text.
            Spans count Unicode code points of the caller's text, before normalisation. A token's span is the
            tokenizer's own (some include the space before a word). A word's span excludes white space at both ends, and
            includes the characters at its end that normalisation strips as combining marks, or composes with those
            before them.

        Raises:
            TruncationFailed: the text is too long for the tokenizer's own truncation, which shortens the other text
            only.
        """
        tokens = self._encode(prompt + text, pair, self._axis, limit)
        if not prompt or not tokens.units.special:
            return tokens
        return replace(tokens, units=without_prompt(tokens.units, prompt))

    def _encode(self, text: str, pair: str, axis: str, limit: int | None) -> TokenizedText:
        tokenizer = self._written if axis in self._as_written else self._tokenizer
        try:
            encoding = tokenizer.encode(text, pair) if pair else tokenizer.encode(text)
        except Exception as error:
            if tokenizer.truncation is None:
                raise
            raise TruncationFailed(str(error)) from error
        ids = np.array(encoding.ids, dtype=np.int64)
        type_ids = np.array(encoding.type_ids, dtype=np.int64)
        mask = np.array(encoding.attention_mask, dtype=np.int64)
        if limit is not None and len(ids) > limit:
            return TokenizedText(ids, type_ids, mask, AxisUnits(axis=axis, length=len(ids)))
        words = _Words(self._tokenizer.normalizer)
        if self._knows_words:
            words.add(encoding, (text, pair))
        special = tuple(flag == 1 for flag in encoding.special_tokens_mask)
        offsets = [(0, 0) if flag else span for flag, span in zip(special, encoding.offsets, strict=True)]
        texts = (self.token_text(number) for number in encoding.ids)
        units = AxisUnits(
            axis=axis,
            length=len(ids),
            texts=tuple(
                self._pad_names.get(number, shown) if not seen else shown
                for number, shown, seen in zip(encoding.ids, texts, encoding.attention_mask, strict=True)
            ),
            starts=tuple(start for start, _ in offsets),
            ends=tuple(end for _, end in offsets),
            special=special,
            segments=tuple(segment or 0 for segment in encoding.sequence_ids),
            word_ids=tuple(words.ids),
            words=tuple(words.texts),
            word_spans=tuple(words.spans),
        )
        return TokenizedText(ids, type_ids, mask, units)

    def encode_second(
        self, text: str, axis: str, *, start: int | None = None, limit: int | None = None
    ) -> TokenizedText:
        """Tokenize the second of two texts that have an axis each, such as a decoder's.

        Args:
            text: the text; empty: only `start`.
            axis: symbol of the axis of its tokens.
            start: id of the token before the text; None: no such token.
            limit: as for `encode`.

        Returns:
            N positions, as from `encode`; the segment of the text's tokens is 1.
        """
        one = self._encode(text, "", axis, limit) if text else None
        known = AxisUnits(axis=axis, length=0) if one is None else one.units
        ids, mask = (np.zeros(0, np.int64),) * 2 if one is None else (one.ids, one.mask)
        units = replace(
            known,
            axis=axis,
            segments=tuple(0 if special else 1 for special in known.special),
            word_spans=tuple((1, start, end) for _, start, end in known.word_spans),
        )
        if start is None:
            return TokenizedText(ids, np.zeros(len(ids), np.int64), mask, units)
        mask = np.concatenate([np.ones(1, np.int64), mask])
        ids = np.concatenate([np.array([start], np.int64), ids])
        units = replace(units, length=len(ids))
        if units.texts or len(ids) == 1:
            units = replace(
                units,
                texts=(self.token_text(start), *units.texts),
                starts=(0, *units.starts),
                ends=(0, *units.ends),
                special=(True, *units.special),
                segments=(0, *units.segments),
                word_ids=(-1, *units.word_ids) if self._knows_words else (),
            )
        return TokenizedText(ids, np.zeros(len(ids), np.int64), mask, units)

    def units_of_ids(self, ids: npt.NDArray[np.integer], axis: str = "", *, words: bool = True) -> AxisUnits:
        """Return the units of a sequence of token ids.

        There is no text of the caller, so spans and segments are empty. There are words only if each run of ids between
        special tokens gives the same ids after decoding and encoding.

        Args:
            ids: token ids, (N,). An id that the tokenizer does not have gets the text "".
            axis: symbol of their axis; empty: that of the first text.
            words: whether to find words, which takes longer than all the rest.
        """
        numbers: list[int] = ids.tolist()
        found = self._words_of_ids(numbers) if words and self._knows_words else _Words(None)
        return AxisUnits(
            axis=axis or self._axis,
            length=len(numbers),
            texts=tuple(self.token_text(number) for number in numbers),
            special=tuple(number in self._special_ids for number in numbers),
            word_ids=tuple(found.ids),
            words=tuple(found.texts),
        )

    def id_of(self, token: str) -> int | None:
        """Return the id of a token, special or not, as the vocabulary spells it; None if there is no such token."""
        special = next((number for number, content in self._special.items() if content == token), None)
        return self._tokenizer.token_to_id(token) if special is None else special

    def _words_of_ids(self, numbers: Sequence[int]) -> _Words:
        words = _Words(self._tokenizer.normalizer)
        if any(not 0 <= number < ID_BOUND for number in numbers):
            return words
        for special, run in _runs(numbers, self._special_ids):
            if special:
                words.ids.extend([-1] * len(run))
                continue
            text = self._tokenizer.decode(run, skip_special_tokens=False)
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            if encoding.ids != run:
                return _Words(None)
            words.add(encoding, (text,))
        return words

    @property
    def longest_token_bytes(self) -> int:
        """Bytes of UTF-8 of the longest token."""
        return max((len(token.encode()) for token in self._tokenizer.get_vocab()), default=0)

    def token_text(self, number: int) -> str:
        """Return the token of an id, special or not, as the vocabulary spells it; empty if there is no such token."""
        if not 0 <= number < ID_BOUND:
            return ""
        return self._special.get(number) or self._tokenizer.id_to_token(number) or ""


def _runs(numbers: Sequence[int], special_ids: frozenset[int]) -> Iterator[tuple[bool, list[int]]]:
    for special, run in groupby(numbers, key=special_ids.__contains__):
        yield special, list(run)


@dataclass(slots=True)
class _Words:
    """Collects words, in the order of their first pieces, counted over all segments.

    Args:
        normalizer: of the tokenizer; None: it has none.
        ids: word of each token; -1: none.
        texts: text of each word.
        spans: (segment, start, end) of each word.
    """

    normalizer: Normalizer | None
    ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    spans: list[tuple[int, int, int]] = field(default_factory=list)

    def add(self, encoding: Encoding, texts: Sequence[str]) -> None:
        """Append the words of an encoding of `texts`, of which there is one for each segment."""
        number: dict[tuple[int, int], int] = {}
        spans: list[tuple[int, int, int]] = []
        base = len(self.texts)
        for word, segment, (start, end) in zip(encoding.word_ids, encoding.sequence_ids, encoding.offsets, strict=True):
            if word is None or segment is None:
                self.ids.append(-1)
                continue
            # The tokenizer numbers the words of each segment from 0.
            index = number.setdefault((segment, word), len(number))
            self.ids.append(base + index)
            if index == len(spans):
                spans.append((segment, start, end))
            else:
                _, first, last = spans[index]
                spans[index] = (segment, min(first, start), max(last, end))
        claimed = {(segment, start) for segment, start, _ in spans}
        for segment, start, end in spans:
            first, last = _without_outer_space(texts[segment], start, end)
            if last == end:
                while (segment, last) not in claimed and self._belongs(texts[segment], first, last):
                    last += 1
            self.spans.append((segment, first, last))
            self.texts.append(texts[segment][first:last])

    def _belongs(self, text: str, first: int, position: int) -> bool:
        """Whether the character at `position` belongs to the word that starts at `first` and ends before it.

        A combining mark does. So does a character that normalisation composes with those before it, such as the
        decomposed vowel of a Hangul syllable: it changes the normalised word, and adds no character. The library
        gives the composed character the span of the first one only.
        """
        if position >= len(text) or text[position].isspace():
            return False
        if unicodedata.category(text[position]).startswith("M"):
            return True
        if self.normalizer is None or text[position].isascii():
            return False
        without = self.normalizer.normalize_str(text[first:position])
        composed = self.normalizer.normalize_str(text[first : position + 1])
        return composed != without and len(composed) <= len(without)


def _has_words(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer has words: without a pre-tokenizer that splits at spaces, the whole text is one word."""
    if tokenizer.pre_tokenizer is None:
        return False
    probe = "a b"
    if tokenizer.normalizer is not None:
        probe = tokenizer.normalizer.normalize_str(probe)
    return len(tokenizer.pre_tokenizer.pre_tokenize_str(probe)) > 1


def _without_outer_space(text: str, start: int, end: int) -> tuple[int, int]:
    """The span without white space at its ends; unchanged if it is white space only."""
    inner = text[start:end].strip()
    if not inner:
        return start, end
    first = start + text[start:end].index(inner[0])
    return first, first + len(inner)
