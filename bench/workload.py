"""The workload that all benchmarks share: sequences of token ids with lognormal lengths, like sentences.

A vocabulary of `FIRST_ORDINARY_ID` ids or fewer raises ValueError.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

MEDIAN_TOKENS = 32
SIGMA = 0.8
SHORTEST, LONGEST = 4, 256
CLS, SEP, FIRST_ORDINARY_ID = 101, 102, 1000
"""Ids of BERT's uncased vocabulary."""


def sequences(count: int, vocabulary_size: int, seed: int = 0) -> list[Array]:
    """Return `count` arrays of int64 ids (N,), each from [CLS] to [SEP], with N lognormal and clipped."""
    random = np.random.default_rng(seed)
    lengths = np.clip(np.rint(random.lognormal(np.log(MEDIAN_TOKENS), SIGMA, count)), SHORTEST, LONGEST)
    return [sequence(int(length), vocabulary_size, random) for length in lengths]


def sequence(length: int, vocabulary_size: int, random: np.random.Generator) -> Array:
    """Return ids (N,) of one sequence of ordinary tokens between [CLS] and [SEP]."""
    ids = random.integers(FIRST_ORDINARY_ID, vocabulary_size, length, dtype=np.int64)
    ids[0], ids[-1] = CLS, SEP
    return ids


def sorted_batches(items: list[Array], max_tokens: int = 384) -> list[Array]:
    """Return batches (B, T) of similar lengths, padded with 0, each of `max_tokens` positions or one sequence.

    Empty `items` raises ValueError.
    """
    batches: list[list[Array]] = [[]]
    for ids in sorted(items, key=len):
        if batches[-1] and len(ids) * (len(batches[-1]) + 1) > max_tokens:
            batches.append([])
        batches[-1].append(ids)
    return [_pad(batch) for batch in batches]


def _pad(batch: list[Array]) -> Array:
    padded = np.zeros((len(batch), max(map(len, batch))), dtype=np.int64)
    for row, ids in enumerate(batch):
        padded[row, : len(ids)] = ids
    return padded
