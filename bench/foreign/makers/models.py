"""Small transformers with random weights, their exports, and their answers in eager mode, for the scripts beside it.

Needs torch and transformers, and tokenizers for `word_tokenizer`. An export that fails raises the exporter's error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from cases import quiet

LENGTHS = (9, 4, 6)
VOCABULARY = 60
Arrays = dict[str, "np.ndarray[Any, Any]"]


Answer = tuple[torch.Tensor, Sequence[torch.Tensor]]
"""A batch's output, and the weights of each layer."""


def answers_of(
    sequences: Sequence[Arrays], output: str, run: Callable[[Mapping[str, torch.Tensor]], Answer]
) -> tuple[list[Arrays], list[Arrays]]:
    """Return the outputs and the weights, (H, L, S) by layer, of each sequence alone.

    Args:
        sequences: inputs of each sequence by name.
        output: name of the output.
        run: computes a batch of one sequence.
    """
    outputs, weights = [], []
    for sequence in sequences:
        batch = {name: torch.from_numpy(array)[None] for name, array in sequence.items()}
        with torch.no_grad():
            found, attention = run(batch)
        outputs.append({output: found[0].numpy()})
        weights.append({str(layer): each[0].numpy() for layer, each in enumerate(attention)})
    return outputs, weights


@dataclass(frozen=True)
class Tiny:
    """A model in eager mode, with sequences for it.

    Attributes:
        name: for the table.
        module: in evaluation mode; its first output is served.
        sequences: inputs of each sequence by name.
        axes: the symbol of each dynamic axis of the inputs and of `output`, by name and position.
        output: name of the output.
        layers: number of layers with attention.
    """

    name: str
    module: Any
    sequences: tuple[Arrays, ...]
    axes: Mapping[str, Mapping[int, str]]
    output: str
    layers: int

    def answers(self) -> tuple[list[Arrays], list[Arrays]]:
        """Return the outputs and the weights, (H, L, S) by layer, of each sequence alone."""

        def run(batch: Mapping[str, torch.Tensor]) -> Answer:
            found = self.module(**batch, output_attentions=True)
            return found[0], found.attentions

        return answers_of(self.sequences, self.output, run)

    def export(self, path: Path, *, dynamo: bool = False, opset: int = 17) -> Path:
        """Write the model by torch's dynamo exporter, or by TorchScript, with dynamic batch and lengths."""
        wrapped = _First(self.module, list(self.sequences[0]))
        example = tuple(torch.from_numpy(np.stack([array, array])) for array in self.sequences[0].values())
        with quiet(), torch.no_grad():
            if dynamo:
                shapes = {
                    name: {0: torch.export.Dim("batch"), **{p: torch.export.Dim(s) for p, s in more.items() if p}}
                    for name, more in self.axes.items()
                    if name != self.output
                }
                torch.onnx.export(
                    wrapped.eval(),
                    example,
                    str(path),
                    dynamo=True,
                    opset_version=opset,
                    input_names=list(self.sequences[0]),
                    output_names=[self.output],
                    dynamic_shapes=(tuple(shapes.values()),),
                    external_data=False,
                )
            else:
                torch.onnx.export(
                    wrapped.eval(),
                    example,
                    str(path),
                    dynamo=False,
                    opset_version=opset,
                    input_names=list(self.sequences[0]),
                    output_names=[self.output],
                    dynamic_axes={name: dict(axes) for name, axes in self.axes.items()},
                )
        return path


class _First(torch.nn.Module):
    """The first output of a model, with its inputs by position."""

    def __init__(self, module: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.module(**dict(zip(self.names, inputs, strict=True)), return_dict=True)[0]
        return answer


def word_tokenizer() -> Any:
    """Return a tokenizer of transformers that makes token N of the word "wN", and adds none."""
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{n}": n for n in range(VOCABULARY)}, "w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="w0", eos_token="w1", pad_token="w0", unk_token="w0"
    )


def texts(*, masked: bool = True) -> tuple[Arrays, ...]:
    """Return random ids of three lengths, with masks of ones."""
    random = np.random.default_rng(3)
    rows = []
    for length in LENGTHS:
        row: Arrays = {"input_ids": random.integers(1, VOCABULARY, length)}
        if masked:
            row["attention_mask"] = np.ones(length, np.int64)
        rows.append(row)
    return tuple(rows)


_TOKENS = {0: "batch", 1: "sequence"}
_TEXT_AXES = {"input_ids": _TOKENS, "attention_mask": _TOKENS, "last_hidden_state": _TOKENS}
SPREAD = {"initializer_range": 0.3}
"""Wider than the default, so that attention is far from uniform."""
_SMALL = {"vocab_size": VOCABULARY, "attn_implementation": "eager", **SPREAD}


def bert() -> Tiny:
    """Return an encoder: BERT (Devlin et al. 2019)."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **_SMALL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=40,
    )  # fmt: skip
    module = transformers.BertModel(config, add_pooling_layer=False).eval()
    return Tiny("BERT", module, texts(), _TEXT_AXES, "last_hidden_state", 2)


def gpt2() -> Tiny:
    """Return a decoder without a cache: GPT-2 (Radford et al. 2019)."""
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        **_SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=40, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    module = transformers.GPT2Model(config).eval()
    return Tiny("GPT-2", module, texts(), _TEXT_AXES, "last_hidden_state", 2)


def vit() -> Tiny:
    """Return an image encoder: ViT (Dosovitskiy et al. 2021)."""
    torch.manual_seed(2)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=4,
        attn_implementation="eager", **SPREAD,
    )  # fmt: skip
    module = transformers.ViTModel(config, add_pooling_layer=False).eval()
    random = np.random.default_rng(4)
    images = tuple({"pixel_values": random.normal(size=(3, 16, 16)).astype(np.float32)} for _ in LENGTHS)
    axes = {"pixel_values": {0: "batch"}, "last_hidden_state": {0: "batch"}}
    return Tiny("ViT", module, images, axes, "last_hidden_state", 2)
