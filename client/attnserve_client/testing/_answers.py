"""The fake model: embeddings and attention computed from the text alone, reduced as the contract defines."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from attnserve.v1 import attention_pb2, model_pb2, tensor_pb2
from attnserve.v1 import inference_service_pb2 as wire

from attnserve_client._selection import AttentionSelection
from attnserve_client._tensors import to_array
from attnserve_client.errors import InvalidRequest
from attnserve_client.testing._labels import head_of
from attnserve_client.testing._weights import band_keys, fill, fill_features

AXIS: Final = "seq"
PIECE: Final = 6
"""Longest token in characters. Longer words become several tokens, so that tokens and words differ."""

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the fake model.

    Attributes:
        dimensions: Length of the embedding.
        layers: Number of attention sites.
        heads: Heads of each site.
        max_length: Longest sequence in tokens.
        window: Tokens before and after it to which each token attends; None for all.
        labels: Labels of its head; empty for a model without a head.
    """

    dimensions: int
    layers: int
    heads: int
    max_length: int
    window: int | None = None
    labels: tuple[str, ...] = ()

    @property
    def form(self) -> attention_pb2.AttentionForm.ValueType:
        """The form of every site."""
        windowed = self.window is not None
        return attention_pb2.ATTENTION_FORM_WINDOWED if windowed else attention_pb2.ATTENTION_FORM_DENSE

    @property
    def sites(self) -> list[str]:
        """Names of the sites."""
        return [f"layer.{layer}" for layer in range(self.layers)]

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return ("embedding", "last_hidden_state", *(("logits",) if self.labels else ()))

    def describe(self, name: str, state: str) -> model_pb2.Model:
        """Return the description that `GetModel` answers with. Raise ValueError for an unknown state."""
        scores = model_pb2.Dimension(size=len(self.labels))
        seq = model_pb2.Dimension(symbol=AXIS)
        width = model_pb2.Dimension(size=self.dimensions)
        return model_pb2.Model(
            name=name,
            version="1",
            digest="sha256:" + hashlib.sha256(name.encode()).hexdigest(),
            state=model_pb2.ModelState.Value(f"MODEL_STATE_{state.upper()}"),
            inputs=[model_pb2.TensorSpec(name="input_ids", dtype=tensor_pb2.DATA_TYPE_INT64, shape=[seq])],
            outputs=[
                model_pb2.TensorSpec(name="embedding", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[width]),
                model_pb2.TensorSpec(name="last_hidden_state", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[seq, width]),
                model_pb2.TensorSpec(name="logits", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[scores]),
            ][: len(self.outputs)],
            head=head_of(self.labels),
            axes=[
                model_pb2.Axis(
                    symbol=AXIS,
                    max_length=self.max_length,
                    paddable=True,
                    padding_status=model_pb2.BATCHING_STATUS_PROVED,
                )
            ],
            sites=[
                model_pb2.Site(
                    name=f"layer.{layer}",
                    layer=layer,
                    kind=attention_pb2.ATTENTION_KIND_SELF,
                    form=self.form,
                    heads=self.heads,
                    kv_heads=self.heads,
                    head_dim=8,
                    query_axis=AXIS,
                    key_axis=AXIS,
                )
                for layer in range(self.layers)
            ],
            accepts_text=True,
            vocabulary_size=2**31,
            max_batch_size=64,
            max_text_bytes=1 << 20,
            max_response_bytes=64 << 20,
            precision="fp32",
            batching_policy=model_pb2.BATCHING_POLICY_PROVED,
            batch_status=model_pb2.BATCHING_STATUS_PROVED,
            batched=True,
            execution_provider="FakeExecutionProvider",
        )


@dataclass(frozen=True, slots=True)
class Unit:
    """One token or word of the fake tokenizer; `word` is the number of its word, or -1 for special tokens."""

    text: str
    word: int = -1
    start: int = 0
    end: int = 0
    segment: int = 0

    @property
    def special(self) -> bool:
        """Whether it is [CLS] or [SEP]."""
        return self.word < 0


def tokenize(sequence: wire.Sequence, path: str) -> list[Unit]:
    """Return the tokens of a sequence: pieces of words between [CLS] and [SEP], or the given ids.

    Raises:
        InvalidRequest: The sequence's tensors are not one of `input_ids`; `path` is that of the sequence.
    """
    if sequence.WhichOneof("input") == "tensors":
        tensors = {tensor.name: to_array(tensor) for tensor in sequence.tensors.tensors}
        if set(tensors) != {"input_ids"} or tensors["input_ids"].ndim != 1 or not tensors["input_ids"].size:
            raise InvalidRequest.of(
                f"{path}.tensors.tensors", "the fake model takes one tensor `input_ids` of rank 1, not empty"
            )
        return [Unit(str(token), word) for word, token in enumerate(tensors["input_ids"].tolist())]
    units, word = [Unit("[CLS]")], 0
    for segment, text in enumerate((sequence.text.text, sequence.text.text_pair)):
        for match in re.finditer(r"\w+|[^\w\s]", text):
            for start in range(match.start(), match.end(), PIECE):
                end = min(match.end(), start + PIECE)
                mark = "" if start == match.start() else "##"
                units.append(Unit(mark + text[start:end], word, start, end, segment))
            word += 1
        if text:
            units.append(Unit("[SEP]"))
    return units


def outputs_of(units: list[Unit], shape: Shape) -> dict[str, Array]:
    """Return the outputs by name.

    Hidden states are (L, D), one from each token's text; the embedding is their normalized mean (D,); logits (labels,).
    """
    hidden = np.stack([_vector(unit.text, shape.dimensions) for unit in units])
    mean = hidden.mean(axis=0)
    outputs = {"embedding": mean / max(float(np.linalg.norm(mean)), 1e-9), "last_hidden_state": hidden}
    if shape.labels:
        outputs["logits"] = np.mean([_vector(f"label.{unit.text}", len(shape.labels)) for unit in units], axis=0)
    return outputs


def attention_of(
    units: list[Unit], selection: AttentionSelection, shape: Shape, check: Callable[[int], None]
) -> attention_pb2.Attention:
    """Return the selected attention, reduced in the contract's order.

    Args:
        units: The sequence's tokens.
        selection: A valid one, but for its queries.
        shape: The model's.
        check: Called with the number of tokens or words, which bounds the queries.
    """
    layers, sent = chosen_layers(selection, shape), selection.to_wire()
    heads = [head % shape.heads for head in sent.heads or range(shape.heads)]
    rollout = selection.layer_reduction == "rollout"
    scores = selection.values == "scores"
    numbers = _scores if scores else _weights
    by_layer = [_join(numbers(units, layer, shape)[heads], selection, rollout=rollout) for layer in layers]
    if rollout:
        identity, joined = np.eye(len(units)), np.eye(len(units))
        for weights in by_layer:
            joined = (weights[0] + identity) / 2 @ joined
        by_layer = [joined[None]]
    elif selection.layer_reduction == "mean":
        by_layer = [np.mean(by_layer, axis=0)]
    if selection.unit == "word":
        by_layer = [_by_word(weights, units) for weights in by_layer]
        units = _words(units)
    special = np.array([unit.special for unit in units])
    keys = list(range(len(units)))
    check(len(units))
    queries = [query % len(units) for query in sent.queries or keys]
    if selection.special_tokens == "drop":
        keys = [index for index in keys if not special[index]]
        queries = queries if selection.queries else keys
        by_layer = [weights[:, :, keys] if scores else _renormalised(weights[:, :, keys]) for weights in by_layer]
    whole_rows = rollout or selection.unit == "word" or selection.special_tokens == "drop"
    band = None
    if shape.window is not None and 2 * shape.window + 1 < len(units) and not whole_rows:
        band = band_keys(len(units), shape.window)[queries]
    answer = attention_pb2.Attention(axes=[_axis(units)])
    for position, weights in enumerate(by_layer):
        single = len(by_layer) == len(layers) and selection.layer_reduction not in ("mean", "rollout")
        names = [f"layer.{layer}" for layer in ([layers[position]] if single else layers)]
        answer.maps.append(
            attention_pb2.AttentionMap(
                sites=names,
                layer=layers[position] if single else -1,
                kind=attention_pb2.ATTENTION_KIND_SELF,
                form=shape.form,
                heads=heads,
                query_axis=AXIS,
                key_axis=AXIS,
                query_indices=queries if len(queries) < len(units) or selection.queries else [],
                key_indices=keys if len(keys) < len(units) else [],
            )
        )
        if selection.features:
            fill_features(answer.maps[-1], weights[:, queries], queries, keys, selection)
        else:
            fill(answer.maps[-1], weights[:, queries].astype(np.float32), keys, selection, band)
    return answer


def chosen_layers(selection: AttentionSelection, shape: Shape) -> list[int]:
    """Return the positions of the selected sites, ascending."""
    sent = selection.to_wire()
    chosen = {shape.sites.index(name) for name in sent.sites} | {layer % shape.layers for layer in sent.layers}
    return sorted(chosen) or list(range(shape.layers))


def _vector(text: str, width: int) -> Array:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).standard_normal(width).astype(np.float32)


def _weights(units: list[Unit], layer: int, shape: Shape) -> Array:
    """Return the weights (H, L, L) of one layer; rows sum to 1."""
    exponentials = np.exp(_scores(units, layer, shape))
    weights: Array = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return weights


def _scores(units: list[Unit], layer: int, shape: Shape) -> Array:
    """Return the scores (H, L, L) of one layer; minus infinity outside the window."""
    maps = []
    for head in range(shape.heads):
        queries = np.stack([_vector(f"q{layer}.{head}.{unit.text}", 8) for unit in units])
        keys = np.stack([_vector(f"k{layer}.{head}.{unit.text}", 8) for unit in units])
        scores = queries.astype(np.float64) @ keys.T / np.sqrt(8)
        if shape.window is not None:
            places = np.arange(len(units))
            scores[abs(places[:, None] - places[None, :]) > shape.window] = -np.inf
        maps.append(scores)
    return np.stack(maps)


def _join(weights: Array, selection: AttentionSelection, *, rollout: bool) -> Array:
    reduction = selection.head_reduction or ("mean" if rollout else "each")
    if reduction == "each":
        if rollout:
            raise InvalidRequest.of("attention.head_reduction", "`each` cannot be had together with `rollout`")
        return weights
    joined: Array = weights.mean(axis=0) if reduction == "mean" else weights.max(axis=0)
    return _renormalised(joined[None]) if rollout else joined[None]


def _groups(units: list[Unit]) -> list[list[int]]:
    groups: list[list[int]] = []
    for index, unit in enumerate(units):
        if groups and not unit.special and units[groups[-1][0]].word == unit.word:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _words(units: list[Unit]) -> list[Unit]:
    words = []
    for group in _groups(units):
        first, last = units[group[0]], units[group[-1]]
        text = first.text + "".join(units[index].text.removeprefix("##") for index in group[1:])
        words.append(Unit(text, first.word, first.start, last.end, first.segment))
    return words


def _by_word(weights: Array, units: list[Unit]) -> Array:
    """Sum the weights of a word's pieces over keys, and average them over queries."""
    groups = _groups(units)
    summed: Array = np.stack([weights[:, :, group].sum(axis=2) for group in groups], axis=2)
    averaged: Array = np.stack([summed[:, group].mean(axis=1) for group in groups], axis=1)
    return averaged


def _renormalised(weights: Array) -> Array:
    total = weights.sum(axis=-1, keepdims=True)
    divided: Array = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return divided


def _axis(units: list[Unit]) -> attention_pb2.AxisUnits:
    return attention_pb2.AxisUnits(
        axis=AXIS,
        length=len(units),
        texts=[unit.text for unit in units],
        starts=[unit.start for unit in units],
        ends=[unit.end for unit in units],
        special=[unit.special for unit in units],
        segments=[unit.segment for unit in units],
    )
