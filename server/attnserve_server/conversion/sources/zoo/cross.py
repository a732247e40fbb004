"""Models of the zoo of two sequences: cross-attention from a decoder to an encoder, and from a text to an image.

With L queries and S keys, cross-attention takes time O(L * S * d_model) and memory O(L * S), beside the O(L^2) and
O(S^2) of the self-attention on each side. Requested weights cost O(H * L * S) more.

The zoo is a set of models that are generated from a seed. Tensors of other shapes than the models state fail in torch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn, ones

from attnserve_server.conversion.sources.zoo.dense import CausalAttention, DenseAttention
from attnserve_server.conversion.sources.zoo.skeleton import Embedding, Layer, ZooModule, ZooSize, mean_of

IMAGE, PATCH = 32, 8
"""Pixels along each side of an image and of a patch: 4 x 4 patches, row by row."""
PATCHES = (IMAGE // PATCH) ** 2


class EncoderDecoder(ZooModule):
    """Self-attention over the source, causal self-attention over the target, cross-attention from target to source.

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.3.
    """

    shapes: Mapping[str, tuple[str | int, ...]] = {
        "input_ids": ("source_seq",),
        "attention_mask": ("source_seq",),
        "decoder_input_ids": ("seq",),
        "decoder_attention_mask": ("seq",),
    }

    def __init__(self, size: ZooSize) -> None:
        super().__init__()
        width, heads = size.width, size.heads
        self.embedding = Embedding(width)
        self.encoder = nn.ModuleList(Layer(width, DenseAttention(width, heads)) for _ in range(size.layers))
        self.decoder = nn.ModuleList(
            Layer(width, CausalAttention(width, heads), DenseAttention(width, heads)) for _ in range(size.layers)
        )

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, decoder_attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the target's hidden states (B, L, d_model) and their mean over unpadded positions (B, d_model)."""
        memory, memory_mask = self.embedding(input_ids), attention_mask.bool()
        for layer in self.encoder:
            memory = layer(memory, memory_mask)
        hidden, mask = self.embedding(decoder_input_ids), decoder_attention_mask.bool()
        for layer in self.decoder:
            hidden = layer(hidden, mask, memory, memory_mask)
        return hidden, mean_of(hidden, mask)


class CrossModalEncoder(ZooModule):
    """Self-attention over the text, and cross-attention from the text to the patches of an image.

    Source: Lu et al. 2019, "ViLBERT: Pretraining Task-Agnostic Visiolinguistic Representations for Vision-and-Language
    Tasks" (co-attention, here from text to image only), with patches as in Dosovitskiy et al. 2021, "An Image is Worth
    16x16 Words: Transformers for Image Recognition at Scale".
    """

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
        """Return the text's hidden states (B, L, d_model) and their mean over unpadded positions (B, d_model).

        `pixel_values` is float (B, 3, 32, 32).
        """
        image = self.patches(pixel_values).flatten(2).transpose(1, 2) + self.patch_positions
        every_patch = ones(image.shape[:2], dtype=torch.bool, device=image.device)
        hidden, mask = self.embedding(input_ids), attention_mask.bool()
        for layer in self.layers:
            hidden = layer(hidden, mask, image, every_patch)
        return hidden, mean_of(hidden, mask)
