"""Image encoders such as ViT, and image-text models with a separate encoder for each, such as CLIP.

A configuration that lacks the size of images, or another number that is read here, raises AttributeError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from attnserve_server.conversion.inputs.signature import SEQUENCE
from attnserve_server.conversion.learning.fixed_axes import PatchGrid
from attnserve_server.conversion.sources.architectures.base import Family, InputTensor
from attnserve_server.conversion.sources.architectures.text import HIDDEN

PIXELS = "pixel_values"


class Image(Family):
    """Pixels of one fixed size, which the configuration states, to hidden states of patches."""

    @property
    def inputs(self) -> tuple[InputTensor, ...]:
        """Pixels, (channels, height, width)."""
        return (_pixels(self.source.config),)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Hidden states of the patches, after that of the class token if there is one."""
        return (HIDDEN,)

    @property
    def max_lengths(self) -> dict[str, int]:
        """Empty: only the batch axis is dynamic."""
        return {}

    @property
    def grids(self) -> dict[int, PatchGrid]:
        """The grid of the patches, with and without a class token before them."""
        return _grids(self.source.config)

    def outputs(self, answer: Any, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:  # noqa: ARG002
        """Return (B, patches, D)."""
        return (answer.last_hidden_state,)

    def weights(self, answer: Any) -> Sequence[torch.Tensor | None]:
        """Return the weights of each layer."""
        return tuple(answer.attentions)


def _pixels(config: Any) -> InputTensor:
    """Return the image input that a configuration states."""
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return InputTensor(PIXELS, (int(getattr(config, "num_channels", 3)), int(height), int(width)), "numbers")


def _grids(config: Any) -> dict[int, PatchGrid]:
    """Return the grid of an image model whose patches keep their size in all layers, by the length of its axis.

    The configuration does not state whether there is a class token, so both lengths are returned.
    """
    patch = getattr(config, "patch_size", None)
    if not isinstance(patch, int):
        return {}
    _channels, height, width = _pixels(config).shape
    rows, columns = int(height) // patch, int(width) // patch
    return {rows * columns: PatchGrid(rows, columns), rows * columns + 1: PatchGrid(rows, columns, leading=1)}


class ImageText(Family):
    """One text and one image in each row of the batch, to an embedding of each.

    Scores of every text with every image would mix rows. The caller computes them from the embeddings.
    """

    @property
    def inputs(self) -> tuple[InputTensor, ...]:
        """Ids and mask of the text, (L,) each, and pixels of the image."""
        text = self.source.config.text_config
        return (
            InputTensor("input_ids", (SEQUENCE,), "ids", int(text.vocab_size)),
            InputTensor("attention_mask", (SEQUENCE,), "mask"),
            _pixels(self.source.config.vision_config),
        )

    @property
    def output_names(self) -> tuple[str, ...]:
        """The embedding of each side, of length 1, then the hidden states of each side."""
        return ("text_embeds", "image_embeds", "text_hidden_state", "image_hidden_state")

    @property
    def max_lengths(self) -> dict[str, int]:
        """The positions of the text encoder."""
        return {SEQUENCE: int(self.source.config.text_config.max_position_embeddings)}

    @property
    def padding_id(self) -> int:
        """The padding id of the text encoder."""
        return int(getattr(self.source.config.text_config, "pad_token_id", None) or 0)

    @property
    def grids(self) -> dict[int, PatchGrid]:
        """The grid of the image's patches, with and without a class token before them."""
        return _grids(self.source.config.vision_config)

    def outputs(self, answer: Any, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:  # noqa: ARG002
        """Return (B, D) for text and image, then (B, L, D) and (B, patches, D)."""
        return (
            answer.text_embeds,
            answer.image_embeds,
            answer.text_model_output.last_hidden_state,
            answer.vision_model_output.last_hidden_state,
        )

    def weights(self, answer: Any) -> Sequence[torch.Tensor | None]:
        """Return the layers of the text encoder, whose input is the first, then those of the image encoder."""
        return [*answer.text_model_output.attentions, *answer.vision_model_output.attentions]
