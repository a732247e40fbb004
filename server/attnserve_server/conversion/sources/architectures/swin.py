"""Swin: an image encoder whose patches attend within windows, which shift from layer to layer.

Exceptions of torch and transformers pass through. An image whose grid of patches is no multiple of the window raises
RuntimeError when weights are requested.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnserve_server.conversion.learning.fixed_axes import PatchGrid
from attnserve_server.conversion.sources.architectures.base import eager
from attnserve_server.conversion.sources.architectures.image import Image


class Swin(Image):
    """Source: Liu et al. 2021, "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", 3.2."""

    @property
    def grids(self) -> dict[int, PatchGrid]:
        """The grid of each stage: between stages, four patches are merged into one."""
        sizes = [layer.input_resolution for layer in self._layers()]
        return {int(rows * columns): PatchGrid(int(rows), int(columns)) for rows, columns in sizes}

    def call(self, tensors: Mapping[str, Tensor], *, weights: bool) -> Any:
        """Run the model, and return the weights of every layer; the model itself returns one layer of each stage."""
        if not weights:
            return super().call(tensors, weights=False)
        collected: list[Tensor] = []
        layers = self._layers()
        hooks = [layer.attention.register_forward_hook(lambda *call: collected.append(call[2][1])) for layer in layers]
        try:
            answer = super().call(tensors, weights=False)
        finally:
            for hook in hooks:
                hook.remove()
        rows = answer.last_hidden_state.shape[0]
        answer.attentions = tuple(
            _over_patches(layer, windows, rows) for layer, windows in zip(layers, collected, strict=True)
        )
        return answer

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Use eager attention: the fused operator treats windows as rows of the batch, and does not return weights."""
        sizes = [(layer, layer.window_size, layer.shift_size) for layer in self._layers()]
        try:
            with eager(self.source):
                yield
        finally:
            # The model permanently clamps windows to small images; with TorchScript, to a traced tensor.
            for layer, window, shift in sizes:
                layer.window_size, layer.shift_size = window, shift

    def weights(self, answer: Any) -> Sequence[Tensor | None]:
        """Return the weights of each layer over all patches."""
        return tuple(answer.attentions)

    def _layers(self) -> list[Any]:
        return [layer for stage in self.source.encoder.layers for layer in stage.blocks]


def _over_patches(layer: Any, windows: Tensor, rows: int) -> Tensor:
    """Lay out weights within windows, (B * windows, H, W, W), over the patches of the layer's grid, (B, H, L, L).

    Raises:
        RuntimeError: the grid is no multiple of the window.
    """
    height, width = layer.input_resolution
    side, shift = int(layer.window_size), int(layer.shift_size)
    patches = torch.arange(height * width).reshape(height, width).roll((-shift, -shift), (0, 1))
    cut = patches.reshape(height // side, side, width // side, side).transpose(1, 2).reshape(-1, side * side)
    heads = windows.shape[1]
    inside = windows.reshape(rows, -1, heads, side * side, side * side).transpose(1, 2)
    laid = windows.new_zeros(rows, heads, height * width, height * width)
    laid[:, :, cut[:, :, None], cut[:, None, :]] = inside
    return laid
