"""Small transformers in torch, in the form that graph optimizers recognise, with their own eager weights.

Needs torch. Parameters are random, from fixed seeds. A model with a table of positions fails beyond `POSITIONS`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from attnserve_server.conversion.sources.torch_export import quiet
from torch import nn

VOCABULARY, WIDTH, HEADS, LAYERS, POSITIONS = 60, 32, 4, 2, 40
Array = np.ndarray[Any, np.dtype[Any]]


class Encoder(nn.Module):
    """BERT (Devlin et al. 2019): (B, T) ids and mask to (B, T, W), and the weights of each layer, (B, H, T, T)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(POSITIONS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(_EncoderLayer() for _ in range(LAYERS))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        places = torch.arange(ids.size(1)).unsqueeze(0)
        hidden = self.norm(self.words(ids) + self.positions(places))
        bias = (1.0 - mask.unsqueeze(1).unsqueeze(2).to(torch.float32)) * -10000.0
        weights = []
        for layer in self.layers:
            hidden, own = layer(hidden, bias)
            weights.append(own)
        return hidden, weights


class _EncoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm, self.last_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def heads(array: torch.Tensor) -> torch.Tensor:
            return array.view(array.size(0), array.size(1), HEADS, WIDTH // HEADS).permute(0, 2, 1, 3)

        query, key, value = heads(self.query(hidden)), heads(self.key(hidden)), heads(self.value(hidden))
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(WIDTH // HEADS)
        weights = torch.softmax(scores + bias, dim=-1)
        mixed = torch.matmul(weights, value).permute(0, 2, 1, 3).contiguous()
        hidden = self.norm(self.out(mixed.view(mixed.size(0), mixed.size(1), WIDTH)) + hidden)
        wide = nn.functional.gelu(self.wide(hidden))
        return self.last_norm(self.narrow(wide) + hidden), weights


class _Answer(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.model(*inputs)[0]
        return answer


def exported(model: nn.Module, inputs: dict[str, torch.Tensor], path: Path, opset: int) -> onnx.ModelProto:
    """By torch's TorchScript exporter, with a dynamic batch and length; the weights are not among the outputs."""
    axes = {name: {0: "batch", 1: "source_seq" if name == "memory" else "seq"} for name in [*inputs, "hidden"]}
    with quiet(), torch.no_grad():
        torch.onnx.export(
            _Answer(model).eval(),
            tuple(inputs.values()),
            path,
            dynamo=False,
            opset_version=opset,
            input_names=list(inputs),
            output_names=["hidden"],
            dynamic_axes=axes,
        )
    return onnx.load(path)


class Decoder(nn.Module):
    """GPT-2 (Radford et al. 2019): (B, T) ids to (B, T, W), and the weights of each layer, (B, H, T, T)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(POSITIONS, WIDTH)
        self.layers = nn.ModuleList(_DecoderLayer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        places = torch.arange(ids.size(1)).unsqueeze(0)
        hidden = self.words(ids) + self.positions(places)
        weights = []
        for layer in self.layers:
            hidden, own = layer(hidden)
            weights.append(own)
        return self.norm(hidden), weights


class _Conv1D(nn.Module):
    """A linear layer with a transposed matrix over flat rows, which is exported as one Gemm."""

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(narrow, wide) * 0.2)
        self.bias = nn.Parameter(torch.randn(wide) * 0.2)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        shape = (*rows.size()[:-1], self.bias.size(0))
        return torch.addmm(self.bias, rows.view(-1, rows.size(-1)), self.weight).view(shape)


class _DecoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first_norm, self.second_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.packed, self.out = _Conv1D(WIDTH, 3 * WIDTH), _Conv1D(WIDTH, WIDTH)
        self.wide, self.narrow = _Conv1D(WIDTH, 2 * WIDTH), _Conv1D(2 * WIDTH, WIDTH)
        seen = torch.tril(torch.ones(POSITIONS, POSITIONS, dtype=torch.bool))
        self.register_buffer("seen", seen.view(1, 1, POSITIONS, POSITIONS))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def heads(array: torch.Tensor) -> torch.Tensor:
            return array.view((*array.size()[:-1], HEADS, WIDTH // HEADS)).permute(0, 2, 1, 3)

        query, key, value = (heads(part) for part in self.packed(self.first_norm(hidden)).split(WIDTH, dim=2))
        scores = torch.matmul(query, key.transpose(-1, -2)) / (value.size(-1) ** 0.5)
        queries, keys = scores.size(-2), scores.size(-1)
        seen = self.seen[:, :, keys - queries : keys, :keys]
        weights = torch.softmax(torch.where(seen, scores, torch.tensor(-10000.0)), dim=-1)
        mixed = torch.matmul(weights, value).permute(0, 2, 1, 3).contiguous()
        hidden = hidden + self.out(mixed.view((*mixed.size()[:-2], WIDTH)))
        wide = nn.functional.gelu(self.wide(self.second_norm(hidden)), approximate="tanh")
        return hidden + self.narrow(wide), weights


class Reader(nn.Module):
    """Whisper's cross-attention (Radford et al. 2022): (B, T, W) over (B, S, W), and the weights, (B, H, T, S)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.norm = nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(_ReaderLayer() for _ in range(LAYERS))

    def forward(self, queries: torch.Tensor, memory: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        hidden = self.norm(queries)
        weights = []
        for layer in self.layers:
            hidden, own = layer(hidden, memory)
            weights.append(own)
        return hidden, weights


class _ReaderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.key = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm, self.last_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def heads(array: torch.Tensor, length: int) -> torch.Tensor:
            return array.view(array.size(0), length, HEADS, WIDTH // HEADS).transpose(1, 2).contiguous()

        query = heads(self.query(hidden) * (WIDTH // HEADS) ** -0.5, hidden.size(1))
        key, value = heads(self.key(memory), -1), heads(self.value(memory), -1)
        weights = torch.softmax(torch.matmul(query, key.transpose(2, 3)), dim=-1)
        mixed = torch.matmul(weights, value).transpose(1, 2).contiguous()
        hidden = self.norm(hidden + self.out(mixed.reshape(hidden.size(0), hidden.size(1), WIDTH)))
        return self.last_norm(self.narrow(nn.functional.gelu(self.wide(hidden))) + hidden), weights
