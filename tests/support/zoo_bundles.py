"""Tiny bundles of the zoo's models, exported once per test run, and the definition of their weights in NumPy.

The zoo is the project's own set of torch models, one for each kind of attention. `export_zoo` needs torch, and raises
BuildRefused for an unknown name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from attnserve_server.conversion.convert import ExportRequest, export_bundle
from attnserve_server.conversion.sources.source import ZooOptions

Array = np.ndarray[Any, np.dtype[Any]]

NAMES = ("self", "causal", "cross", "top-k", "linear", "multi-scale", "cross-modal")
"""All models but `sliding-window`, whose bands `tests/numerics/test_windowed.py` covers."""
TINY = ZooOptions(size="tiny", layers=1, seed=5)
HEADS, WIDTH = 4, 32
STRIDES = {"stride_1": (1, 2), "stride_2": (2, 1), "stride_4": (4, 1)}
"""Stride and number of heads (of four) by the end of a site's name."""


def export_zoo(repository: Path) -> None:
    """Export the models into a repository, each under its name."""
    for name in NAMES:
        export_bundle(
            ExportRequest(source=f"zoo:{name}", name=name, repository=repository, zoo_options=TINY, exporter="dynamo")
        )


class Definition:
    """A model of one layer, computed step by step in float64 from its parameters, one sequence at a time."""

    def __init__(self, name: str, parameters: Mapping[str, Array]) -> None:
        self.name = name
        self.parameters = {key: array.astype(np.float64) for key, array in parameters.items()}

    def weights(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Weights (H, L, S) by site."""
        ids = inputs["input_ids"]
        hidden = self._embedded(ids)
        if self.name == "cross":
            found = {"encoder.0.attention": self._dense("encoder.0.attention", hidden, hidden)}
            memory = self._layer("encoder.0", hidden, found["encoder.0.attention"])
            target = self._embedded(inputs["decoder_input_ids"])
            causal = np.tril(np.ones((len(target), len(target)), bool))
            found["decoder.0.attention"] = self._dense("decoder.0.attention", target, target, causal)
            looked = self._after("decoder.0", target, target, found["decoder.0.attention"])
            found["decoder.0.cross_attention"] = self._dense("decoder.0.cross_attention", looked, memory)
            return found
        if self.name == "multi-scale":
            return self._scales(hidden)
        site = "layers.0.attention"
        if self.name == "linear":
            query, key = (self._heads(f"{site}.{part}", hidden) for part in ("query", "key"))
            features = [np.where(each > 0, each + 1, np.exp(each)) for each in (query, key)]
            products = features[0] @ features[1].transpose(0, 2, 1)
            return {site: products / products.sum(-1, keepdims=True)}
        if self.name == "top-k":
            return {site: self._top_k(site, hidden)}
        allowed = np.tril(np.ones((len(ids), len(ids)), bool)) if self.name == "causal" else None
        found = {site: self._dense(site, hidden, hidden, allowed)}
        if self.name == "cross-modal":
            looked = self._after("layers.0", hidden, hidden, found[site])
            patches = self._patches(inputs["pixel_values"].astype(np.float64))
            found["layers.0.cross_attention"] = self._dense("layers.0.cross_attention", looked, patches)
        return found

    def _embedded(self, ids: Array) -> Array:
        angles = np.arange(len(ids))[:, None] * 10_000.0 ** -(np.arange(0, WIDTH, 2) / WIDTH)
        return self.parameters["embedding.table.weight"][ids] + np.concatenate([np.sin(angles), np.cos(angles)], -1)

    def _patches(self, pixels: Array) -> Array:
        kernel, size = self.parameters["patches.weight"], self.parameters["patches.weight"].shape[-1]
        rows = []
        for top in range(0, pixels.shape[1], size):
            for left in range(0, pixels.shape[2], size):
                patch = pixels[:, top : top + size, left : left + size]
                rows.append((kernel * patch).sum((1, 2, 3)) + self.parameters["patches.bias"])
        return np.stack(rows) + self.parameters["patch_positions"]

    def _linear(self, name: str, hidden: Array) -> Array:
        return hidden @ self.parameters[f"{name}.weight"].T + self.parameters[f"{name}.bias"]

    def _heads(self, name: str, hidden: Array) -> Array:
        """Project and reshape (T, W) to (H, T, D)."""
        return self._linear(name, hidden).reshape(len(hidden), HEADS, -1).transpose(1, 0, 2)

    def _dense(self, name: str, queries: Array, keys: Array, allowed: Array | None = None) -> Array:
        query, key = self._heads(f"{name}.query", queries), self._heads(f"{name}.key", keys)
        return softmax(query @ key.transpose(0, 2, 1) / np.sqrt(query.shape[-1]), allowed)

    def _top_k(self, name: str, hidden: Array, kept: int = 8) -> Array:
        query, key = self._heads(f"{name}.query", hidden), self._heads(f"{name}.key", hidden)
        scores = query @ key.transpose(0, 2, 1) / np.sqrt(query.shape[-1])
        greatest = np.sort(scores, -1)[..., -min(kept, len(hidden))]
        return softmax(scores, scores >= greatest[..., None])

    def _scales(self, hidden: Array) -> dict[str, Array]:
        site = "layers.0.attention"
        query, key = (self._heads(f"{site}.{part}", hidden) for part in ("query", "key"))
        found, first = {}, 0
        for name, (stride, heads) in STRIDES.items():
            windows = [key[:, at : at + stride].mean(1) for at in range(0, len(hidden), stride)]
            own = slice(first, first + heads)
            scores = query[own] @ np.stack(windows, 1)[own].transpose(0, 2, 1) / np.sqrt(query.shape[-1])
            found[f"{site}.scales.{name}"] = softmax(scores)
            first += heads
        return found

    def _after(self, layer: str, hidden: Array, keys: Array, weights: Array, part: str = "attention") -> Array:
        """Return hidden states after one attention, its residual and its normalization."""
        value = self._heads(f"{layer}.{part}.value", keys)
        mixed = (weights @ value).transpose(1, 0, 2).reshape(len(hidden), -1)
        return self._scaled(f"{layer}.{part}_norm", hidden + self._linear(f"{layer}.{part}.output", mixed))

    def _layer(self, layer: str, hidden: Array, weights: Array) -> Array:
        hidden = self._after(layer, hidden, hidden, weights)
        inner = self._linear(f"{layer}.feed_forward.0", hidden)
        inner = 0.5 * inner * (1 + erf(inner / np.sqrt(2)))
        return self._scaled(f"{layer}.feed_forward_norm", hidden + self._linear(f"{layer}.feed_forward.2", inner))

    def _scaled(self, name: str, hidden: Array) -> Array:
        centred = hidden - hidden.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * self.parameters[f"{name}.weight"] + self.parameters[f"{name}.bias"]


def softmax(scores: Array, allowed: Array | None = None) -> Array:
    """Return the softmax over the allowed entries of the last axis."""
    scores = scores if allowed is None else np.where(allowed, scores, -np.inf)
    exponents = np.exp(scores - scores.max(-1, keepdims=True))
    return exponents / exponents.sum(-1, keepdims=True)


def erf(numbers: Array) -> Array:
    """Return the error function of each element."""

    return np.vectorize(math.erf)(numbers)
