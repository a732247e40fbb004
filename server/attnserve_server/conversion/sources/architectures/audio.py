"""Speech: Whisper and its kin. A spectrogram of one length in, and the decoder's text."""

from __future__ import annotations

from attnserve_server.conversion.inputs.signature import SEQUENCE
from attnserve_server.conversion.sources.architectures.base import InputTensor
from attnserve_server.conversion.sources.architectures.encoder_decoder import EncoderDecoder


class Speech(EncoderDecoder):
    """The encoder takes two frames for each of its positions; silence fills up shorter recordings."""

    @property
    def inputs(self) -> tuple[InputTensor, ...]:
        """A spectrogram, (mel bins, frames), and the decoder's ids and mask, (L,) each."""
        config = self.source.config
        frames = 2 * int(config.max_source_positions)
        return (
            InputTensor("input_features", (int(config.num_mel_bins), frames), "numbers"),
            InputTensor("decoder_input_ids", (SEQUENCE,), "ids", int(config.vocab_size)),
            InputTensor("decoder_attention_mask", (SEQUENCE,), "mask"),
        )

    @property
    def max_lengths(self) -> dict[str, int]:
        """Of the decoder's text."""
        return {SEQUENCE: int(self.source.config.max_target_positions)}

    @property
    def pair_start(self) -> int | None:
        """The decoder's is the only text."""
        return None
