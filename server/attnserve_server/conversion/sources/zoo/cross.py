"""Cross-attention: an encoder reads a source, and a decoder's tokens look at it.

Source: Vaswani et al. 2017, section 3.2.3. With L target and S source tokens, cross-attention takes time
O(L * S * d_model) and memory O(L * S), beside the encoder's own O(S^2) and the decoder's O(L^2); its weights, if asked
for, O(H * L * S).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from attnserve_server.conversion.sources.zoo.causal import CausalAttention
from attnserve_server.conversion.sources.zoo.self_attention import DenseAttention
from attnserve_server.conversion.sources.zoo.skeleton import Embedding, Layer, ZooModule, ZooSize, mean_of


class EncoderDecoder(ZooModule):
    """Self-attention over the source, causal self-attention over the target, cross-attention from target to source."""

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
        """Hidden states of the target (B, L, d_model), and their mean over unpadded positions (B, d_model)."""
        memory, memory_mask = self.embedding(input_ids), attention_mask.bool()
        for layer in self.encoder:
            memory = layer(memory, memory_mask)
        hidden, mask = self.embedding(decoder_input_ids), decoder_attention_mask.bool()
        for layer in self.decoder:
            hidden = layer(hidden, mask, memory, memory_mask)
        return hidden, mean_of(hidden, mask)
