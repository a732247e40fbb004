"""Image-text models with a tower for each: CLIP and its kin. A row of the batch is one text and one image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from attnserve_server.conversion.inputs.signature import SEQUENCE
from attnserve_server.conversion.sources.architectures.base import Family, InputTensor
from attnserve_server.conversion.sources.architectures.image import grids, pixels
from attnserve_server.conversion.sources.source_model import Grid


class ImageText(Family):
    """Both embeddings of each row. Scores of every text with every image mix rows, so the caller multiplies them."""

    @property
    def inputs(self) -> tuple[InputTensor, ...]:
        """Ids and mask of the text, (L,) each, and pixels of the image."""
        text = self.source.config.text_config
        return (
            InputTensor("input_ids", (SEQUENCE,), "ids", int(text.vocab_size)),
            InputTensor("attention_mask", (SEQUENCE,), "mask"),
            pixels(self.source.config.vision_config),
        )

    @property
    def output_names(self) -> tuple[str, ...]:
        """One embedding of each side, of length 1, and both towers' hidden states."""
        return ("text_embeds", "image_embeds", "text_hidden_state", "image_hidden_state")

    @property
    def max_lengths(self) -> dict[str, int]:
        """Of the text."""
        return {SEQUENCE: int(self.source.config.text_config.max_position_embeddings)}

    @property
    def padding_id(self) -> int:
        """The text tower's."""
        return int(getattr(self.source.config.text_config, "pad_token_id", None) or 0)

    @property
    def grids(self) -> dict[int, Grid]:
        """Of the image's patches, behind the class token where there is one."""
        return grids(self.source.config.vision_config)

    def outputs(self, answer: Any, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:  # noqa: ARG002
        """(B, D) twice, then (B, L, D) and (B, patches, D)."""
        return (
            answer.text_embeds,
            answer.image_embeds,
            answer.text_model_output.last_hidden_state,
            answer.vision_model_output.last_hidden_state,
        )

    def weights(self, answer: Any) -> Sequence[torch.Tensor | None]:
        """The image's tower is computed first."""
        return [*answer.vision_model_output.attentions, *answer.text_model_output.attentions]
