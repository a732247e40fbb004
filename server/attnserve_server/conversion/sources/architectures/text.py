"""Text encoders and decoders, such as BERT and GPT-2: one sequence of ids to hidden states, and to a head's scores.

`Text.inputs` raises BuildRefused for a model without ids or mask. Other exceptions, those of torch and transformers,
pass through.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.inputs.signature import SEQUENCE
from attnserve_server.conversion.sources.architectures.base import Family, InputTensor
from attnserve_server.conversion.sources.architectures.heads import Head
from attnserve_server.conversion.sources.architectures.pooling import Embedder
from attnserve_server.conversion.sources.sentence_transformers import Modules
from attnserve_server.model.heads import HeadKind

HIDDEN, EMBEDDING = "last_hidden_state", "embedding"


class Text(Family):
    """One text. `modules` add an embedding of the text, (B, D); `head` the scores of the model's head."""

    HEADS: ClassVar[frozenset[HeadKind]] = frozenset({"sequence_labels", "token_labels", "spans", "masked_tokens"})
    """The heads that can be traced."""

    def __init__(self, source: Any, modules: Modules | None = None, head: Head | None = None) -> None:
        super().__init__(source)
        self._embedder, self._head = None if modules is None else Embedder(modules), head
        self._hidden: list[torch.Tensor] = []
        if head is not None:
            # The answer of a model with a head has no hidden states of its last layer.
            source.base_model.register_forward_hook(self._keep_hidden)

    @property
    def inputs(self) -> tuple[InputTensor, ...]:
        """Ids and mask, (L,) each, and token types if the model has more than one. BuildRefused without ids or mask."""
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
        """The head's scores if there is a head, hidden states, then the embedding if there is one."""
        scores = self._head.outputs if self._head else ()
        return (*scores, HIDDEN, EMBEDDING) if self._embedder else (*scores, HIDDEN)

    @property
    def max_lengths(self) -> dict[str, int]:
        """The positions of the model."""
        return {SEQUENCE: positions(self.source)}

    def outputs(self, answer: Any, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return the head's scores, hidden states (B, L, D) and, if there is an embedding, (B, D)."""
        if self._head is None:
            scores, hidden = (), answer.last_hidden_state
        else:
            scores, hidden = tuple(answer[name] for name in self._head.outputs), self._hidden.pop()
        if self._embedder is None:
            return (*scores, hidden)
        return *scores, hidden, self._embedder(hidden, tensors["attention_mask"])

    def weights(self, answer: Any) -> Sequence[torch.Tensor | None]:
        """Return the weights of each layer."""
        return tuple(answer.attentions)

    def _keep_hidden(self, module: torch.nn.Module, given: Any, answer: Any) -> None:
        del module, given
        self._hidden[:] = [answer.last_hidden_state]


def positions(source: Any) -> int:
    """Return the greatest length of a model; 512 where its configuration states none.

    RoBERTa and others count positions from after their padding id.
    """
    declared = getattr(source.config, "max_position_embeddings", None)
    for name, module in source.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.num_embeddings) - int(module.padding_idx) - 1
    return int(declared) if declared else 512
