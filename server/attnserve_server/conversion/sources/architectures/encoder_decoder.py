"""Encoder-decoders: BART, T5 and others over two texts, Whisper over a spectrogram and a text.

A configuration that lacks a number that is read here raises AttributeError.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from attnserve_server.conversion.inputs.signature import SEQUENCE
from attnserve_server.conversion.sources.architectures.base import Family, InputTensor
from attnserve_server.conversion.sources.architectures.text import HIDDEN, positions

SOURCE_SEQUENCE = "source_seq"
"""Symbol of the encoder's axis. The decoder's is `seq`, as in a model with a decoder only."""
ENCODER_HIDDEN = "encoder_last_hidden_state"


class EncoderDecoder(Family):
    """The decoder reads its whole input at once, as in training. Nothing is generated and nothing is cached."""

    @property
    def inputs(self) -> tuple[InputTensor, ...]:
        """Ids and mask of both sequences."""
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
        """Hidden states of the decoder, then of the encoder."""
        return (HIDDEN, ENCODER_HIDDEN)

    @property
    def max_lengths(self) -> dict[str, int]:
        """The positions of the model, for both sequences: most of these models have the same number for each."""
        longest = positions(self.source)
        return {SOURCE_SEQUENCE: longest, SEQUENCE: longest}

    @property
    def pair_start(self) -> int | None:
        """The decoder's start token in the configuration."""
        start = getattr(self.source.config, "decoder_start_token_id", None)
        return None if start is None else int(start)

    def outputs(self, answer: Any, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:  # noqa: ARG002
        """Return (B, T, D) of the decoder and (B, S, D) of the encoder."""
        return answer.last_hidden_state, answer.encoder_last_hidden_state

    def weights(self, answer: Any) -> Sequence[torch.Tensor | None]:
        """Return the encoder's layers, then for each layer of the decoder self-attention and cross-attention."""
        pairs = zip(answer.decoder_attentions, answer.cross_attentions, strict=True)
        return [*answer.encoder_attentions, *(weights for pair in pairs for weights in pair)]


class Speech(EncoderDecoder):
    """Whisper and others: a spectrogram of one length and the decoder's text. Silence fills shorter recordings."""

    @property
    def inputs(self) -> tuple[InputTensor, ...]:
        """A spectrogram, (mel bins, frames), and the decoder's ids and mask, (L,) each."""
        config = self.source.config
        frames = 2 * int(config.max_source_positions)  # the encoder halves them
        return (
            InputTensor("input_features", (int(config.num_mel_bins), frames), "numbers"),
            InputTensor("decoder_input_ids", (SEQUENCE,), "ids", int(config.vocab_size)),
            InputTensor("decoder_attention_mask", (SEQUENCE,), "mask"),
        )

    @property
    def max_lengths(self) -> dict[str, int]:
        """The positions of the decoder."""
        return {SEQUENCE: int(self.source.config.max_target_positions)}

    @property
    def pair_start(self) -> int | None:
        """None: the decoder's text is the only one."""
        return None
