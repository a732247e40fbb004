"""Swin: an image encoder whose patches look at those of their own window, which shifts from layer to layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnserve_server.conversion.sources.architectures.image import Image
from attnserve_server.conversion.sources.source_model import Grid


class Swin(Image):
    """Source: Liu et al. 2021, "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", 3.2."""

    @property
    def grids(self) -> dict[int, Grid]:
        """One per stage: between them, four patches become one."""
        sizes = [layer.input_resolution for layer in self._layers()]
        return {int(rows * columns): Grid(int(rows), int(columns)) for rows, columns in sizes}

    def call(self, tensors: Mapping[str, Tensor], *, weights: bool) -> Any:
        """The source's own answer, with every layer's weights: by itself it gives one layer's of each stage."""
        if not weights:
            return super().call(tensors, weights=False)
        seen: list[Tensor] = []
        layers = self._layers()
        hooks = [layer.attention.register_forward_hook(lambda *said: seen.append(said[2][1])) for layer in layers]
        try:
            answer = super().call(tensors, weights=False)
        finally:
            for hook in hooks:
                hook.remove()
        rows = answer.last_hidden_state.shape[0]
        answer.attentions = tuple(
            _over_patches(layer, windows, rows) for layer, windows in zip(layers, seen, strict=True)
        )
        return answer

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Attend step by step: the fused operator takes windows for rows of the batch, and keeps their weights."""
        before = self.source.config._attn_implementation  # noqa: SLF001 - it has no public name
        sizes = [(layer, layer.window_size, layer.shift_size) for layer in self._layers()]
        self.source.set_attn_implementation("eager")
        try:
            yield
        finally:
            self.source.set_attn_implementation(before)
            # The model clamps windows to small images for good, and with the older exporter to a traced tensor.
            for layer, window, shift in sizes:
                layer.window_size, layer.shift_size = window, shift

    def weights(self, answer: Any) -> Sequence[Tensor | None]:
        """One per layer, laid out over all patches."""
        return tuple(answer.attentions)

    def _layers(self) -> list[Any]:
        return [layer for stage in self.source.encoder.layers for layer in stage.blocks]


def _over_patches(layer: Any, windows: Tensor, rows: int) -> Tensor:
    """Weights inside windows, (B * windows, H, W, W), over the patches of the layer's grid: (B, H, L, L)."""
    height, width = layer.input_resolution
    side, shift = int(layer.window_size), int(layer.shift_size)
    patches = torch.arange(height * width).reshape(height, width).roll((-shift, -shift), (0, 1))
    cut = patches.reshape(height // side, side, width // side, side).transpose(1, 2).reshape(-1, side * side)
    heads = windows.shape[1]
    inside = windows.reshape(rows, -1, heads, side * side, side * side).transpose(1, 2)
    laid = windows.new_zeros(rows, heads, height * width, height * width)
    laid[:, :, cut[:, :, None], cut[:, None, :]] = inside
    return laid
