"""Text encoders and decoders, such as BERT and GPT-2: one sequence of ids to hidden states."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.inputs.signature import SEQUENCE
from attnserve_server.conversion.sources.architectures.base import Family, InputTensor

HIDDEN, EMBEDDING = "last_hidden_state", "embedding"


class Text(Family):
    """One text. `pooling` "mean" adds the mean over unpadded tokens, (B, D)."""

    def __init__(self, source: Any, pooling: str = "", *, normalize: bool = False) -> None:
        super().__init__(source)
        self._pooling, self._normalize = pooling, normalize

    @property
    def inputs(self) -> tuple[InputTensor, ...]:
        """Ids and mask, (L,) each, and token types if the model has more than one."""
        accepted = inspect.signature(self.source.forward).parameters
        for name in ("input_ids", "attention_mask"):
            if name not in accepted:
                raise BuildRefused(
                    f"{type(self.source).__name__} has no input {name}: its architecture is not supported"
                )
        vocabulary_size = int(self.source.get_input_embeddings().num_embeddings)
        specs = [
            InputTensor("input_ids", (SEQUENCE,), "ids", vocabulary_size),
            InputTensor("attention_mask", (SEQUENCE,), "mask"),
        ]
        # Models with one token type accept the input, and ignore it.
        if "token_type_ids" in accepted and getattr(self.source.config, "type_vocab_size", 0) > 1:
            specs.append(InputTensor("token_type_ids", (SEQUENCE,), "zeros"))
        return tuple(specs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Hidden states, then the embedding if `pooling` is set."""
        return (HIDDEN, EMBEDDING) if self._pooling else (HIDDEN,)

    @property
    def max_lengths(self) -> dict[str, int]:
        """The positions of the model."""
        return {SEQUENCE: positions(self.source)}

    def outputs(self, answer: Any, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return hidden states (B, L, D) and, if pooled, (B, D)."""
        hidden = answer.last_hidden_state
        if not self._pooling:
            return (hidden,)
        mask = tensors["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        if self._normalize:
            pooled = torch.nn.functional.normalize(pooled, dim=-1)
        return hidden, pooled

    def weights(self, answer: Any) -> Sequence[torch.Tensor | None]:
        """Return the weights of each layer."""
        return tuple(answer.attentions)


def positions(source: Any) -> int:
    """Return the greatest length of a model. RoBERTa and others count positions from after their padding id."""
    declared = getattr(source.config, "max_position_embeddings", None)
    for name, module in source.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.num_embeddings) - int(module.padding_idx) - 1
    return int(declared) if declared else 512
