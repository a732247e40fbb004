"""Cross-modal attention: the tokens of a text look at the patches of an image.

Source: Lu et al. 2019, "ViLBERT: Pretraining Task-Agnostic Visiolinguistic Representations for Vision-and-Language
Tasks" (co-attention, here from text to image alone), with patches as in Dosovitskiy et al. 2021, "An Image is Worth
16x16 Words: Transformers for Image Recognition at Scale". With L tokens and P patches, time O(L * P * d_model)
and memory O(L * P), beside the text's own O(L^2); weights, if asked for, O(H * L * P).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn, ones

from attnserve_server.conversion.sources.zoo.self_attention import DenseAttention
from attnserve_server.conversion.sources.zoo.skeleton import Embedding, Layer, ZooModule, ZooSize, mean_of

IMAGE, PATCH = 32, 8
"""Pixels along each side of an image, and of a patch: 4 x 4 patches, row after row."""
PATCHES = (IMAGE // PATCH) ** 2


class CrossModalEncoder(ZooModule):
    """Self-attention over the text, and cross-attention from text to image."""

    shapes: Mapping[str, tuple[str | int, ...]] = {
        "input_ids": ("seq",),
        "attention_mask": ("seq",),
        "pixel_values": (3, IMAGE, IMAGE),
    }

    def __init__(self, size: ZooSize) -> None:
        super().__init__()
        width, heads = size.width, size.heads
        self.embedding = Embedding(width)
        self.patches = nn.Conv2d(3, width, kernel_size=PATCH, stride=PATCH)
        self.patch_positions = nn.Parameter(Tensor(PATCHES, width))
        self.layers = nn.ModuleList(
            Layer(width, DenseAttention(width, heads), DenseAttention(width, heads)) for _ in range(size.layers)
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states of the text (B, L, d_model), and their mean over unpadded positions (B, d_model).

        `pixel_values` is float (B, 3, 32, 32).
        """
        image = self.patches(pixel_values).flatten(2).transpose(1, 2) + self.patch_positions
        seen = ones(image.shape[:2], dtype=torch.bool, device=image.device)
        hidden, mask = self.embedding(input_ids), attention_mask.bool()
        for layer in self.layers:
            hidden = layer(hidden, mask, image, seen)
        return hidden, mean_of(hidden, mask)
