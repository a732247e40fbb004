"""Text to token ids, with every token's and word's place in the caller's text. Batches and tensors are not here."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from attnserve_server.domain.values import AxisUnits
from attnserve_server.model.sealing import TokenizerInvalid, sealed, sized, special_tokens

__all__ = ["ID_BOUND", "CannotBeCut", "TextTokenizer", "TokenizedText", "TokenizerInvalid"]

ID_BOUND = 2**32
"""Ids from here on, and those below 0, cannot be asked of the library."""


class CannotBeCut(Exception):
    """A text, or a pair, that the tokenizer's own truncation cannot bring to its length; the library says why."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedText:
    """A text, or a pair, as a model takes it: ids and type ids int64 (N,), and what each position stands for.

    `mask` int64 (N,): 0 for padding that the tokenizer itself adds, 1 elsewhere.
    """

    ids: npt.NDArray[np.int64]
    type_ids: npt.NDArray[np.int64]
    mask: npt.NDArray[np.int64]
    units: AxisUnits


class TextTokenizer:
    """A tokenizer for which the text of a special token is text like any other.

    It cuts and pads as its file says along the axes `as_written`, and along no other. Any number of threads may use it
    at once: after loading nothing in it changes.
    """

    def __init__(self, tokenizer: Tokenizer, axis: str, as_written: Collection[str] = ()) -> None:
        self._axis = axis
        self._special = special_tokens(tokenizer)
        self._special_ids = frozenset(self._special)
        padding, truncation = tokenizer.padding, tokenizer.truncation
        self._tokenizer = sealed(tokenizer, self._special)
        self._knows_words = cuts_words(self._tokenizer)
        self._as_written = frozenset(as_written)
        self._written = self._tokenizer
        if self._as_written and (padding or truncation):
            self._written = sized(self._tokenizer, padding, truncation)
        self._pad_names = {int(padding["pad_id"]): str(padding["pad_token"])} if padding else {}

    @classmethod
    def load(cls, path: Path, axis: str, as_written: Collection[str] = ()) -> TextTokenizer:
        """Read a `tokenizer.json`.

        Args:
            path: the file.
            axis: symbol of the axis that tokens run along.
            as_written: symbols of the axes along which the file's padding and truncation are kept.

        Raises:
            TokenizerInvalid: the file cannot be read, or does not hold a tokenizer.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise TokenizerInvalid(error.strerror or type(error).__name__) from error
        try:
            # From bytes and not from the file, so that no message of the library can hold the path.
            tokenizer = Tokenizer.from_buffer(content)
        except ValueError as error:
            raise TokenizerInvalid(str(error)) from error
        return cls(tokenizer, axis, as_written)

    @property
    def axis(self) -> str:
        """Symbol of the axis that tokens run along."""
        return self._axis

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that mark structure, such as [CLS] and [SEP]. The unknown token is not among them: it stands for text."""
        return self._special_ids

    def encode(self, text: str, pair: str = "", *, limit: int | None = None) -> TokenizedText:
        """Tokenize a text, or a pair of texts, with the special tokens that the model wants around them.

        Padding that the tokenizer adds is special, belongs to no word and has no place in the text.

        Args:
            text: the first text.
            pair: the second; empty: there is none.
            limit: past so many tokens nobody will look at the units, which take as long as the tokens: they are only
                counted. None: they are always told.

        Returns:
            N positions; none where the tokenizer adds no special tokens and its normalisation leaves nothing. Offsets
            count Unicode code points in the text that the caller sent, before any normalisation; a token's are as its
            tokenizer tells them (some count the space before a word as part of its first token), and a word's leave
            out white space at both ends and take in the combining marks that normalisation strips from its end.

        Raises:
            CannotBeCut: it is too long for the tokenizer's own truncation, which cuts the other text only.
        """
        return self._encode(text, pair, self._axis, limit)

    def _encode(self, text: str, pair: str, axis: str, limit: int | None) -> TokenizedText:
        tokenizer = self._written if axis in self._as_written else self._tokenizer
        try:
            encoding = tokenizer.encode(text, pair) if pair else tokenizer.encode(text)
        except Exception as error:
            if tokenizer.truncation is None:
                raise
            raise CannotBeCut(str(error)) from error
        ids = np.array(encoding.ids, dtype=np.int64)
        type_ids = np.array(encoding.type_ids, dtype=np.int64)
        mask = np.array(encoding.attention_mask, dtype=np.int64)
        if limit is not None and len(ids) > limit:
            return TokenizedText(ids, type_ids, mask, AxisUnits(axis=axis, length=len(ids)))
        words = Words()
        if self._knows_words:
            words.add(encoding, (text, pair))
        special = tuple(flag == 1 for flag in encoding.special_tokens_mask)
        offsets = [(0, 0) if flag else span for flag, span in zip(special, encoding.offsets, strict=True)]
        texts = (self._token_text(number) for number in encoding.ids)
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
        """Tokenize the second of two texts that each have an axis to themselves, as a decoder's does.

        Args:
            text: the text. Empty: nothing but `start`.
            axis: symbol of the axis that its tokens run along.
            start: id of the token that it stands behind; None: nothing stands before it.
            limit: as for `encode`.

        Returns:
            N positions, told as `encode` tells them; the segment of its tokens is 1.
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
                texts=(self._token_text(start), *units.texts),
                starts=(0, *units.starts),
                ends=(0, *units.ends),
                special=(True, *units.special),
                segments=(0, *units.segments),
                word_ids=(-1, *units.word_ids) if self._knows_words else (),
            )
        return TokenizedText(ids, np.zeros(len(ids), np.int64), mask, units)

    def units_of_ids(self, ids: npt.NDArray[np.integer], axis: str = "", *, words: bool = True) -> AxisUnits:
        """What each position of a sequence of token ids stands for.

        There is no text of the caller's to point into, so offsets and segments stay empty. Words are told only if each
        stretch between special tokens, decoded and encoded again, gives the same ids.

        Args:
            ids: token ids, (N,). An id that the tokenizer does not have has the text "".
            axis: symbol of the axis that they run along; empty: that of the first text.
            words: whether words are wanted; finding them takes longer than all the rest.
        """
        numbers: list[int] = ids.tolist()
        found = self._words_of_ids(numbers) if words and self._knows_words else Words()
        return AxisUnits(
            axis=axis or self._axis,
            length=len(numbers),
            texts=tuple(self._token_text(number) for number in numbers),
            special=tuple(number in self._special_ids for number in numbers),
            word_ids=tuple(found.ids),
            words=tuple(found.texts),
        )

    def id_of(self, token: str) -> int | None:
        """The id of a token, special ones included, as the vocabulary spells it; None where there is no such token."""
        special = next((number for number, content in self._special.items() if content == token), None)
        return self._tokenizer.token_to_id(token) if special is None else special

    def _words_of_ids(self, numbers: Sequence[int]) -> Words:
        words = Words()
        if any(not 0 <= number < ID_BOUND for number in numbers):
            return words
        for special, run in _runs(numbers, self._special_ids):
            if special:
                words.ids.extend([-1] * len(run))
                continue
            text = self._tokenizer.decode(run, skip_special_tokens=False)
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            if encoding.ids != run:
                return Words()
            words.add(encoding, (text,))
        return words

    def _token_text(self, number: int) -> str:
        if not 0 <= number < ID_BOUND:
            return ""
        return self._special.get(number) or self._tokenizer.id_to_token(number) or ""


def _runs(numbers: Sequence[int], special_ids: frozenset[int]) -> Iterator[tuple[bool, list[int]]]:
    for special, run in groupby(numbers, key=special_ids.__contains__):
        yield special, list(run)


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
