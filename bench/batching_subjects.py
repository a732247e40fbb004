"""The models that `bench.batching` serves to find answers that depend on their batch, each with its random requests.

Each is a graph of `bench.batching_graphs`. `Subject.requests` raises ValueError without lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx

from bench import batching_graphs as graphs
from bench.batching_graphs import VOCABULARY, WIDTH, Feeds


def texts(random: np.random.Generator, length: int) -> Feeds:
    """Ids of one text and a mask of ones."""
    ids = random.integers(1, VOCABULARY, length, dtype=np.int64)
    return {"input_ids": ids, "attention_mask": np.ones(length, np.int64)}


def masked_features(random: np.random.Generator, length: int) -> Feeds:
    """Features of very different sizes, as audio and tables have them, and a mask of ones."""
    size = 10 ** random.uniform(-1, 1)
    values = random.normal(size=(length, WIDTH)) * size
    return {"x": values.astype(np.float32), "attention_mask": np.ones(length, np.int64)}


def wide_features(random: np.random.Generator, length: int) -> Feeds:
    """64-wide features of different sizes. Small ones attend evenly, large ones to themselves only."""
    size = 10 ** random.uniform(-1.5, 0.5)
    return {"x": (random.normal(size=(length, 64)) * size).astype(np.float32)}


@dataclass(frozen=True, slots=True)
class Subject:
    """A model with its random requests.

    `batches`: whether its requests must share runs by default, as those of the two controls must;
    if not, forcing them together must change an answer.
    """

    name: str
    what: str
    graph: Callable[[], onnx.ModelProto]
    request: Callable[[np.random.Generator, int], Feeds]
    batches: bool = False

    def requests(self, count: int, lengths: Sequence[int], seed: int = 0) -> list[Feeds]:
        """Return `count` requests, with lengths drawn from `lengths`. The same seed gives the same requests.

        Raises:
            ValueError: `lengths` is empty, and `count` is not 0.
        """
        random = np.random.default_rng(seed)
        return [self.request(random, int(random.choice(lengths))) for _ in range(count)]


SUBJECTS: Final = (
    Subject("int8-bert", "dynamic int8 BERT style", graphs.int8_bert, texts),
    Subject("experts", "mixture of experts, capacity over the flat batch", graphs.experts, texts),
    Subject("greatest-length", "scale by the greatest length", graphs.greatest_length, texts),
    Subject("quantized-features", "DynamicQuantizeLinear on float input", graphs.quantized_features, masked_features),
    Subject("if-on-length", "If on the length", graphs.if_on_length, texts),
    Subject("rotary-switch", "rotary base that switches with the position", graphs.rotary_switch, texts),
    Subject("unmasked", "unmasked attention over 64-wide features", graphs.unmasked, wide_features),
    Subject("masked-bert", "masked BERT style (control, batches)", graphs.bert, texts, batches=True),
    Subject("finite-bert", "finite mask (control, batches)", lambda: graphs.bert("-1e9"), texts, batches=True),
)
