"""The inputs on which precisions are compared: English sentences, from `sentences.txt`, or random inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np

from attnserve_server.conversion.inputs.roles import is_position
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.domain.values import Array
from attnserve_server.model.manifest import NUMPY_DTYPES, InputRole, InputSpec, Manifest, TextSpec
from attnserve_server.model.tokenizer import TextTokenizer, TokenizedText, TruncationFailed

_RANDOM_LENGTHS = tuple(range(4, 68, 2))


@dataclass(frozen=True, slots=True)
class Material:
    """Sequences, without the batch axis, and a description of them."""

    description: str
    sequences: tuple[dict[str, Array], ...]


def sentences() -> tuple[str, ...]:
    """Return the sentences, of 3 to 120 words, which were written for calibration and quality checks."""
    text = files("attnserve_server.conversion.precision").joinpath("sentences.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line)


def as_inputs(
    texts: Sequence[str], inputs: Sequence[InputSpec], spec: TextSpec, tokenizer: TextTokenizer
) -> list[dict[str, Array]]:
    """Return the inputs of a model for each text, without the batch axis, cut to the model's greatest length.

    A second text that has an axis to itself is the same text. Texts that cannot be cut are left out.

    Returns:
        An empty list where text cannot fill all inputs.
    """
    made: list[dict[str, Array]] = []
    for text in texts:
        try:
            encoded = tokenizer.encode(text)
        except TruncationFailed:
            continue
        filled = {own.name: _filled(own, spec, encoded) for own in inputs}
        if any(array is None for array in filled.values()):
            return []
        made.append({own.name: np.asarray(filled[own.name], NUMPY_DTYPES[own.dtype]) for own in inputs})
    return made


def material_of(manifest: Manifest, tokenizer: TextTokenizer | None, sampler: Sampler) -> Material:
    """Return sentences where text can fill all inputs of a model, else (or without a tokenizer) random inputs."""
    if tokenizer is not None and manifest.text is not None:
        known = as_inputs(sentences(), manifest.inputs, manifest.text, tokenizer)
        if known:
            return Material(f"{len(known)} English sentences", tuple(known))
    symbols = sampler.signature.symbols
    longest = {symbol: manifest.axis(symbol).max_length for symbol in symbols}
    drawn = tuple(
        sampler.sequence({symbol: min(length, longest[symbol]) for symbol in symbols}, row)
        for row, length in enumerate(_RANDOM_LENGTHS)
    )
    return Material(f"{len(drawn)} random inputs", drawn)


def _filled(own: InputSpec, spec: TextSpec, encoded: TokenizedText) -> Array | None:
    """Return one input; None where text cannot fill it."""
    axis = own.shape[0] if len(own.shape) == 1 else None
    if not isinstance(axis, str) or axis not in spec.axes:
        return None
    ids, type_ids, mask = encoded.ids, encoded.type_ids, encoded.mask
    if axis == spec.pair_axis and spec.pair_start is not None:
        ids, type_ids, mask = (
            np.append(first, each) for first, each in ((spec.pair_start, ids), (0, type_ids), (1, mask))
        )
    length = min(len(ids), spec.axes[axis])
    if own.role is InputRole.TOKEN_IDS:
        return ids[:length]
    if own.role is InputRole.TOKEN_TYPE_IDS:
        return type_ids[:length]
    if own.role is InputRole.ATTENTION_MASK:
        return 1 - mask[:length] if own.inverted else mask[:length]
    if is_position(own.name):
        return np.arange(length)
    return None if own.fill is None else np.full(length, own.fill)
