"""What is sent: requests of random data or of texts, built before the clock starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from attnserve.v1 import inference_service_pb2 as wire

from attnserve_client._inputs import Input, request_of, sequence_of
from attnserve_client._models import ModelInfo
from attnserve_client._selection import AttentionSelection
from attnserve_client._specs import TensorSpec
from attnserve_client.bench.lengths import Lengths
from attnserve_client.errors import InvalidRequest

SELECTIONS: Final[dict[str, AttentionSelection]] = {
    "mean": AttentionSelection(layers=[-1], heads="mean"),
    "top": AttentionSelection(layers=[-1], heads="mean", top_k=16),
    "all": AttentionSelection(),
}
"""Selections by name: the last layer's mean over heads, its 16 strongest links of each row, or all maps."""
KINDS: Final = 1000
"""Number of different requests of random data; they are sent in turn."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests to send in turn.

    Attributes:
        requests: The messages.
        sequences: Number of sequences in each.
        tokens: Number of tokens in each; None if only the server knows it, as for texts.
    """

    requests: tuple[wire.InferRequest, ...]
    sequences: int
    tokens: tuple[int, ...] | None

    def request(self, index: int) -> wire.InferRequest:
        """Return the message to send as number `index`, from 0."""
        return self.requests[index % len(self.requests)]

    def tokens_of(self, index: int) -> int:
        """Return the number of tokens of request number `index`; 0 if unknown."""
        return 0 if self.tokens is None else self.tokens[index % len(self.requests)]


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What each request selects, and its number of sequences.

    Attributes:
        outputs: Names of outputs; None for all.
        attention: The selection of those requests that select attention.
        share: Share of those requests, from 0 to 1, spread evenly.
        sequences: Sequences in each request.
    """

    outputs: Sequence[str] | None = None
    attention: AttentionSelection = SELECTIONS["mean"]
    share: float = 0.0
    sequences: int = 1

    def with_attention(self, index: int) -> bool:
        """Return whether request number `index` selects attention."""
        return int((index + 1) * self.share + 1e-9) > int(index * self.share + 1e-9)


def of_texts(model: ModelInfo, texts: Sequence[str], options: RequestOptions) -> Workload:
    """Build requests of texts in order, starting again at the first text where they run out.

    `texts` has one text or more: without any, `Workload.request` raises ZeroDivisionError.
    """
    rows = range(options.sequences)
    kinds = range(-(-len(texts) // options.sequences))
    groups = [[texts[(kind * len(rows) + row) % len(texts)] for row in rows] for kind in kinds]
    return Workload(
        tuple(_request(model, list(group), options, kind) for kind, group in enumerate(groups)), options.sequences, None
    )


def of_lengths(
    model: ModelInfo, lengths: Lengths, options: RequestOptions, *, seed: int, kinds: int = KINDS
) -> Workload:
    """Build requests of random arrays: ids of the vocabulary, normal noise, and masks that hide nothing.

    Raises:
        InvalidRequest: A sequence would be longer than the model allows.
    """
    longest = max((axis.max_length for axis in model.axes), default=lengths.high)
    if model.axes and lengths.high > longest:
        raise InvalidRequest.of("lengths", f"{lengths.high} exceeds the {longest} positions that {model.name} takes")
    random = np.random.default_rng(seed)
    requests, tokens = [], []
    for kind in range(kinds):
        drawn = lengths.draw(options.sequences, random)
        inputs: list[Input] = [_arrays(model, int(length), random) for length in drawn]
        requests.append(_request(model, inputs, options, kind))
        tokens.append(int(drawn.sum()))
    return Workload(tuple(requests), options.sequences, tuple(tokens))


def _request(model: ModelInfo, inputs: list[Input], options: RequestOptions, kind: int) -> wire.InferRequest:
    return request_of(
        model=model.name,
        version=model.version,
        sequences=[sequence_of(one, model) for one in inputs],
        outputs=options.outputs,
        attention=options.attention if options.with_attention(kind) else None,
        priority="normal",
        request_id="",
        validate_only=False,
    )


def _arrays(model: ModelInfo, length: int, random: np.random.Generator) -> dict[str, npt.NDArray[Any]]:
    """Return an array for each required input; each axis has `length` positions, or its maximum if that is less."""
    lengths = {axis.symbol: min(length, axis.max_length) for axis in model.axes}
    return {spec.name: _array(spec, lengths, random) for spec in model.inputs if not spec.optional}


def _array(spec: TensorSpec, lengths: dict[str, int], random: np.random.Generator) -> npt.NDArray[Any]:
    shape = [lengths.get(dimension, 1) if isinstance(dimension, str) else dimension for dimension in spec.shape]
    dtype = np.dtype(spec.dtype)
    if dtype.kind == "f" and not spec.index_ranges:
        return random.standard_normal(shape).astype(dtype)
    if spec.vocabulary_size > 1:
        return random.integers(1, spec.vocabulary_size, shape).astype(dtype)  # id 0 is often the padding token
    ones = np.ones(shape, dtype)
    for each in spec.index_ranges:
        place = (...,) if each.column is None else (..., each.column)
        reach = lengths.get(each.along, 0)
        ones[place] = np.clip(ones[place], each.least - reach, each.greatest + reach)
    return ones
