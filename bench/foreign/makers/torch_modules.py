"""Makes ONNX files of torch's own attention modules with both of its exporters.

`python torch_modules.py FOLDER` writes a case for each module and exporter, in this project's environment: the file,
its inputs, and the answers and attention weights in torch. `bench.foreign` serves and compares them. An exporter that
fails makes a case without a file, which states the error. A case that FOLDER already has raises FileExistsError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import cases_of_command_line, quiet
from models import LENGTHS, Arrays
from torch import nn

WIDTH, HEADS, LAYERS, KEYS = 32, 4, 2, 7


@dataclass(frozen=True)
class Module:
    """A module with its sequences, and the names of its inputs' dynamic axes."""

    name: str
    module: nn.Module
    sequences: tuple[Arrays, ...]
    axes: dict[str, dict[int, str]]

    def answers(self) -> tuple[list[Arrays], list[Arrays]]:
        """Return the output and the weights, (H, L, S) by layer, of each sequence alone."""
        outputs, weights = [], []
        for sequence in self.sequences:
            seen: list[torch.Tensor] = []
            restored = _watched(self.module, seen)
            with torch.no_grad():
                output = self.module(*(torch.from_numpy(array)[None] for array in sequence.values()))
            restored()
            outputs.append({"output": output[0].numpy()})
            weights.append({str(layer): each[0].numpy() for layer, each in enumerate(seen)})
        return outputs, weights

    def export(self, place: Path, *, dynamo: bool) -> Path:
        """Write the module by torch's dynamo exporter, or by TorchScript."""
        target = place / "model.onnx"
        example = tuple(torch.from_numpy(np.stack([array, array])) for array in self.sequences[0].values())
        names = list(self.sequences[0])
        how: dict[str, Any] = {
            "dynamic_axes": {**self.axes, "output": next(iter(self.axes.values()))},
            "opset_version": 17,
        }
        if dynamo:
            shapes = tuple(dict.fromkeys(self.axes[name], torch.export.Dim.DYNAMIC) for name in names)
            how = {"dynamic_shapes": shapes, "opset_version": 20, "external_data": False}
        # In evaluation mode these modules run one fused operator that no exporter writes.
        torch.backends.mha.set_fastpath_enabled(False)
        with quiet(), torch.no_grad():
            torch.onnx.export(
                self.module, example, str(target), dynamo=dynamo, input_names=names, output_names=["output"], **how
            )
        return target


def _watched(module: nn.Module, seen: list[torch.Tensor]) -> Any:
    """Make every MultiheadAttention compute its weights, and collect them. Return a function that undoes it."""
    hooks, found = [], [each for each in module.modules() if isinstance(each, nn.MultiheadAttention)]
    slow = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)

    def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "need_weights": True, "average_attn_weights": False}

    def after(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(output[1])

    for each in found:
        hooks += [each.register_forward_pre_hook(before, with_kwargs=True), each.register_forward_hook(after)]

    def undo() -> None:
        torch.backends.mha.set_fastpath_enabled(slow)
        for hook in hooks:
            hook.remove()

    return undo


class Encoder(nn.Module):
    """nn.TransformerEncoder, with a padding mask that is True at padding."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, dropout=0.0, batch_first=True)
        self.inner = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        """Return (B, T, W)."""
        output: torch.Tensor = self.inner(x, src_key_padding_mask=padding)
        return output


class Causal(nn.Module):
    """nn.TransformerEncoder as a decoder, with the mask that torch makes for it."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, dropout=0.0, batch_first=True)
        self.inner = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, T, W)."""
        mask = torch.full((x.size(1), x.size(1)), float("-inf")).triu(1)
        output: torch.Tensor = self.inner(x, mask=mask)
        return output


class Decoder(nn.Module):
    """nn.TransformerDecoder: self and cross attention in turns."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 64, dropout=0.0, batch_first=True)
        self.inner = nn.TransformerDecoder(layer, LAYERS)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """Return (B, T, W)."""
        output: torch.Tensor = self.inner(x, memory)
        return output


class Single(nn.Module):
    """nn.MultiheadAttention over a query and a memory, without its weights."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """Return (B, T, W)."""
        output: torch.Tensor = self.inner(x, memory, memory, need_weights=False)[0]
        return output


def _rows(lengths: Sequence[int], *, padding: bool = False, memory: bool = False) -> tuple[Arrays, ...]:
    random = np.random.default_rng(7)
    rows = []
    for length in lengths:
        row: Arrays = {"x": random.normal(size=(length, WIDTH)).astype(np.float32)}
        if padding:
            row["padding"] = np.zeros(length, np.bool_)
        if memory:
            row["memory"] = random.normal(size=(KEYS, WIDTH)).astype(np.float32)
        rows.append(row)
    return tuple(rows)


def modules() -> list[Module]:
    """Return the modules."""
    torch.manual_seed(8)
    along, across = {0: "batch", 1: "seq"}, {0: "batch", 1: "memory_seq"}
    alone, padded, both = {"x": along}, {"x": along, "padding": along}, {"x": along, "memory": across}
    made = [
        Module("nn.TransformerEncoder", Encoder(), _rows(LENGTHS), alone),
        Module("nn.TransformerEncoder, padding mask", Encoder(), _rows(LENGTHS, padding=True), padded),
        Module("nn.TransformerEncoder, causal", Causal(), _rows(LENGTHS), alone),
        Module("nn.TransformerDecoder", Decoder(), _rows(LENGTHS, memory=True), both),
        Module("nn.MultiheadAttention", Single(), _rows(LENGTHS, memory=True), both),
        Module("nn.MultiheadAttention, add_zero_attn", Single(add_zero_attn=True), _rows(LENGTHS, memory=True), both),
        Module("nn.MultiheadAttention, bias_kv", Single(add_bias_kv=True), _rows(LENGTHS, memory=True), both),
    ]
    for each in made:
        each.module.eval()
    return made


def main() -> None:
    """Entry point."""
    cases = cases_of_command_line(__doc__)
    for module in modules():
        outputs, weights = module.answers()
        for tool, dynamo in (("torch.onnx dynamo", True), ("torch.onnx TorchScript", False)):
            cases.add(
                tool,
                "torch",
                module.name,
                lambda place, m=module, d=dynamo: m.export(place, dynamo=d),
                module.sequences,
                outputs=outputs,
                weights=weights,
                sites=len(weights[0]),
            )


if __name__ == "__main__":
    main()
