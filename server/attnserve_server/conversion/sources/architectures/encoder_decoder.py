"""Encoder-decoders over text: BART, T5 and their kin. Two sequences in, and an axis for each."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from attnserve_server.conversion.inputs.signature import SEQUENCE
from attnserve_server.conversion.sources.architectures.base import Family, InputTensor
from attnserve_server.conversion.sources.architectures.text import HIDDEN, positions

SOURCE_SEQUENCE = "source_seq"
"""The symbol of the encoder's axis; the decoder's is `seq`, as it is of a decoder that stands alone."""
ENCODER_HIDDEN = "encoder_last_hidden_state"


class EncoderDecoder(Family):
    """The whole of the decoder's input in one go, as in training: nothing is generated, and nothing cached."""

    @property
    def inputs(self) -> tuple[InputTensor, ...]:
        """Ids and mask of both sides."""
        vocabulary_size = int(self.source.get_input_embeddings().num_embeddings)
        specs = [
            InputTensor("input_ids", (SOURCE_SEQUENCE,), "ids", vocabulary_size),
            InputTensor("attention_mask", (SOURCE_SEQUENCE,), "mask"),
            InputTensor("decoder_input_ids", (SEQUENCE,), "ids", vocabulary_size),
        ]
        if "decoder_attention_mask" in inspect.signature(self.source.forward).parameters:
            specs.append(InputTensor("decoder_attention_mask", (SEQUENCE,), "mask"))
        return tuple(specs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Hidden states of both sides, the decoder's first."""
        return (HIDDEN, ENCODER_HIDDEN)

    @property
    def max_lengths(self) -> dict[str, int]:
        """Of both sequences; most of these models have as many positions on either side."""
        longest = positions(self.source)
        return {SOURCE_SEQUENCE: longest, SEQUENCE: longest}

    @property
    def pair_start(self) -> int | None:
        """As the configuration has it."""
        start = getattr(self.source.config, "decoder_start_token_id", None)
        return None if start is None else int(start)

    def outputs(self, answer: Any, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:  # noqa: ARG002
        """(B, T, D) of the decoder, (B, S, D) of the encoder."""
        return answer.last_hidden_state, answer.encoder_last_hidden_state

    def weights(self, answer: Any) -> Sequence[torch.Tensor | None]:
        """The encoder's layers; then each layer of the decoder: its own sequence, then the encoder's."""
        pairs = zip(answer.decoder_attentions, answer.cross_attentions, strict=True)
        return [*answer.encoder_attentions, *(weights for pair in pairs for weights in pair)]
