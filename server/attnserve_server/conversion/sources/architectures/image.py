"""Image encoders: ViT, Swin and their kin. Pixels of one size in, hidden states of patches out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from attnserve_server.conversion.sources.architectures.base import Family, InputTensor
from attnserve_server.conversion.sources.architectures.text import HIDDEN
from attnserve_server.conversion.sources.source_model import Grid

PIXELS = "pixel_values"


class Image(Family):
    """The size of the image is the configuration's, and fixed."""

    @property
    def inputs(self) -> tuple[InputTensor, ...]:
        """Pixels, (channels, height, width)."""
        return (pixels(self.source.config),)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Hidden states of patches, and of the class token where there is one."""
        return (HIDDEN,)

    @property
    def max_lengths(self) -> dict[str, int]:
        """Nothing is dynamic but the batch."""
        return {}

    @property
    def grids(self) -> dict[int, Grid]:
        """Of the patches, behind the class token where there is one."""
        return grids(self.source.config)

    def outputs(self, answer: Any, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:  # noqa: ARG002
        """(B, patches, D)."""
        return (answer.last_hidden_state,)

    def weights(self, answer: Any) -> Sequence[torch.Tensor | None]:
        """One per layer."""
        return tuple(answer.attentions)


def pixels(config: Any) -> InputTensor:
    """The input that an image model's configuration asks for."""
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return InputTensor(PIXELS, (int(getattr(config, "num_channels", 3)), int(height), int(width)), "numbers")


def grids(config: Any) -> dict[int, Grid]:
    """The grid of an image model whose patches keep their size from layer to layer, by the length of its axis.

    Taken from the configuration: as many patches as fit, behind one position if the model has a class token.
    """
    patch = getattr(config, "patch_size", None)
    if not isinstance(patch, int):
        return {}
    _channels, height, width = pixels(config).shape
    rows, columns = int(height) // patch, int(width) // patch
    return {rows * columns: Grid(rows, columns), rows * columns + 1: Grid(rows, columns, leading=1)}
