"""Prompts of embedding models: the text before the caller's text, and the units of a sequence that has one."""

from __future__ import annotations

from dataclasses import replace

from attnserve_server.domain.values import AxisUnits


def without_prompt(units: AxisUnits, prompt: str) -> AxisUnits:
    """Return units whose spans count from the caller's text, after the prompt that was tokenized before it.

    A token of the prompt becomes a special token without a span and a word, because it is not in the caller's text. A
    token or a word that reaches from the prompt into the text begins at the text.

    Args:
        units: of prompt and text, tokenized as one text, and of its pair.
        prompt: the text before the first text.

    Raises:
        ValueError: the units have special tokens, and no segments or spans.
    """
    cut = len(prompt)
    of_text = tuple(
        special or segment == 1 or end > cut
        for special, segment, end in zip(units.special, units.segments, units.ends, strict=True)
    )
    kept = [word for word, (segment, _, end) in enumerate(units.word_spans) if segment == 1 or end > cut]
    numbers = {word: number for number, word in enumerate(kept)}
    spans = [units.word_spans[word] for word in kept]
    return replace(
        units,
        starts=_shifted(units, units.starts, cut),
        ends=_shifted(units, units.ends, cut),
        special=tuple(special or not own for special, own in zip(units.special, of_text, strict=True)),
        word_ids=tuple(numbers.get(word, -1) for word in units.word_ids),
        words=tuple(
            units.words[word] if segment == 1 else units.words[word][max(cut - start, 0) :]
            for word, (segment, start, _) in zip(kept, spans, strict=True)
        ),
        word_spans=tuple(
            (segment, start, end) if segment == 1 else (segment, max(start - cut, 0), end - cut)
            for segment, start, end in spans
        ),
    )


def _shifted(units: AxisUnits, places: tuple[int, ...], cut: int) -> tuple[int, ...]:
    return tuple(
        place if segment == 1 else max(place - cut, 0) for place, segment in zip(places, units.segments, strict=True)
    )
