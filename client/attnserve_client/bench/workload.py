"""What is sent: requests made before the clock starts, of random data or of a file's texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from attnserve.v1 import inference_service_pb2 as wire

from attnserve_client._errors import InvalidRequest
from attnserve_client._inputs import Input, request_of, sequence_of
from attnserve_client._models import ModelInfo, TensorSpec
from attnserve_client._selection import AttentionSelection
from attnserve_client.bench.lengths import Lengths

SELECTIONS: Final[dict[str, AttentionSelection]] = {
    "mean": AttentionSelection(layers=[-1], heads="mean"),
    "top": AttentionSelection(layers=[-1], heads="mean", top_k=16),
    "all": AttentionSelection(),
}
"""What the share of requests that asks for attention asks for: the last layer's mean over heads, its 16 strongest links
of each row, or all maps."""
KINDS: Final = 1000
"""How many different requests there are at most; they are sent in turns."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests to send in turns.

    Attributes:
        requests: the messages.
        sequences: how many sequences each has.
        tokens: how many tokens each has; None where the server counts them, as with texts.
    """

    requests: tuple[wire.InferRequest, ...]
    sequences: int
    tokens: tuple[int, ...] | None

    def request(self, index: int) -> wire.InferRequest:
        """The message to send as number `index`, from 0."""
        return self.requests[index % len(self.requests)]

    def tokens_of(self, index: int) -> int:
        """How many tokens it has; 0 where that is not known."""
        return 0 if self.tokens is None else self.tokens[index % len(self.requests)]


@dataclass(frozen=True, slots=True)
class Asked:
    """What each request asks for, beside its sequences.

    Attributes:
        outputs: names of outputs; None: all.
        attention: asked for by a share of the requests.
        share: that share, from 0 to 1, spread evenly.
        sequences: how many sequences a request has.
    """

    outputs: Sequence[str] | None = None
    attention: AttentionSelection = SELECTIONS["mean"]
    share: float = 0.0
    sequences: int = 1

    def with_attention(self, index: int) -> bool:
        """Whether request number `index` is among them."""
        return int((index + 1) * self.share + 1e-9) > int(index * self.share + 1e-9)


def of_texts(model: ModelInfo, texts: Sequence[str], asked: Asked) -> Workload:
    """Requests of texts, one after another; from the first again where they run out."""
    kinds = -(-len(texts) // asked.sequences)
    groups = [
        [texts[(kind * asked.sequences + row) % len(texts)] for row in range(asked.sequences)] for kind in range(kinds)
    ]
    return Workload(
        tuple(_request(model, list(group), asked, kind) for kind, group in enumerate(groups)), asked.sequences, None
    )


def of_lengths(model: ModelInfo, lengths: Lengths, asked: Asked, *, seed: int, kinds: int = KINDS) -> Workload:
    """Requests of random numbers: ids of the vocabulary, noise, masks that mask nothing.

    Raises:
        InvalidRequest: sequences would be longer than the model takes.
    """
    longest = max((axis.max_length for axis in model.axes), default=lengths.high)
    if model.axes and lengths.high > longest:
        raise InvalidRequest.of("lengths", f"{model.name} takes {longest} positions at most, not {lengths.high}")
    random = np.random.default_rng(seed)
    requests, tokens = [], []
    for kind in range(kinds):
        drawn = lengths.draw(asked.sequences, random)
        inputs: list[Input] = [_arrays(model, int(length), random) for length in drawn]
        requests.append(_request(model, inputs, asked, kind))
        tokens.append(int(drawn.sum()))
    return Workload(tuple(requests), asked.sequences, tuple(tokens))


def _request(model: ModelInfo, inputs: list[Input], asked: Asked, kind: int) -> wire.InferRequest:
    return request_of(
        model=model.name,
        version=model.version,
        sequences=[sequence_of(one, model) for one in inputs],
        outputs=asked.outputs,
        attention=asked.attention if asked.with_attention(kind) else None,
        priority="normal",
        request_id="",
        validate_only=False,
    )


def _arrays(model: ModelInfo, length: int, random: np.random.Generator) -> dict[str, npt.NDArray[Any]]:
    """An array for each input that a caller must give; each axis as long as it may be, up to `length`."""
    extents = {axis.symbol: min(length, axis.max_length) for axis in model.axes}
    return {spec.name: _array(spec, extents, random) for spec in model.inputs if not spec.optional}


def _array(spec: TensorSpec, extents: dict[str, int], random: np.random.Generator) -> npt.NDArray[Any]:
    shape = [extents.get(extent, 1) if isinstance(extent, str) else extent for extent in spec.shape]
    dtype = np.dtype(spec.dtype)
    if dtype.kind == "f" and not spec.index_ranges:
        return random.standard_normal(shape).astype(dtype)
    if spec.vocabulary_size > 1:
        return random.integers(1, spec.vocabulary_size, shape).astype(dtype)  # 0 is often the padding's id
    ones = np.ones(shape, dtype)
    for each in spec.index_ranges:
        place = (...,) if each.column is None else (..., each.column)
        reach = extents.get(each.along, 0)
        ones[place] = np.clip(ones[place], each.least - reach, each.greatest + reach)
    return ones
