"""Makes ONNX files of timm and open_clip models with both of torch's exporters.

`python vision_files.py FOLDER` writes a case for each model and exporter, in an environment with timm, open_clip and
torch: the file, its inputs, and the answers in torch. `bench.foreign` serves and compares them. An exporter that fails
makes a case without a file, which states the error. A model that cannot be made ends the script, and a case that FOLDER
already has raises FileExistsError.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import cases_of_command_line, quiet

LAYERS, HEADS = 2, 4
OPERATORS = torch.library.Library("torchvision", "DEF")
"""torchvision from a package index is built for CUDA. Beside torch for CPUs its own operators do not load, and its
import fails unless these two are declared. No model here runs them."""
for _name in ("nms", "qnms"):
    OPERATORS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def timm_vit() -> torch.nn.Module:
    """Return a ViT of timm."""
    import timm

    return timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=32, patch_size=8, depth=LAYERS, embed_dim=32,
        num_heads=HEADS, num_classes=5,
    )  # fmt: skip


def timm_swin() -> torch.nn.Module:
    """Return a Swin transformer of timm, whose windows shift."""
    import timm

    return timm.create_model(
        "swin_tiny_patch4_window7_224", pretrained=False, img_size=32, patch_size=4, window_size=4, embed_dim=16,
        depths=(2,), num_heads=(2,), num_classes=5,
    )  # fmt: skip


class Image(torch.nn.Module):
    """The image encoder of an open_clip model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return (B, E)."""
        output: torch.Tensor = self.model.encode_image(image)
        return output


class Text(torch.nn.Module):
    """The text encoder of an open_clip model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Return (B, E)."""
        output: torch.Tensor = self.model.encode_text(text)
        return output


def clip() -> Any:
    """Return an open_clip model with random weights."""
    import open_clip

    shape = {"layers": LAYERS, "width": 32}
    return open_clip.model.CLIP(
        embed_dim=16,
        vision_cfg={**shape, "image_size": 32, "patch_size": 8, "head_width": 8},
        text_cfg={**shape, "context_length": 16, "vocab_size": 60, "heads": HEADS},
    )


def images(size: int = 32) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Return random images."""
    random = np.random.default_rng(70)
    return [{"image": random.normal(size=(3, size, size)).astype(np.float32)} for _ in range(3)]


def ids() -> list[dict[str, np.ndarray[Any, Any]]]:
    """Return random ids; the greatest, the end of the text, is last."""
    random = np.random.default_rng(71)
    return [{"text": np.append(random.integers(1, 59, 15), 59)} for _ in range(3)]


def exported(module: torch.nn.Module, name: str, example: Any, *, dynamo: bool) -> Callable[[Path], Path]:
    """Return a function that writes a module by the dynamo exporter, or by TorchScript, with a dynamic batch."""

    def write(place: Path) -> Path:
        target = place / "model.onnx"
        batch = torch.from_numpy(np.stack([example, example]))
        how: dict[str, Any] = {"dynamic_axes": {name: {0: "batch"}, "output": {0: "batch"}}, "opset_version": 17}
        if dynamo:
            how = {"dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},), "opset_version": 20, "external_data": False}
        # In evaluation mode these modules run one fused operator that no exporter writes.
        torch.backends.mha.set_fastpath_enabled(False)
        with quiet(), torch.no_grad():
            torch.onnx.export(
                module, (batch,), str(target), dynamo=dynamo, input_names=[name], output_names=["output"], **how
            )
        return target

    return write


def main() -> None:
    """Entry point."""
    cases = cases_of_command_line(__doc__)
    torch.manual_seed(72)
    both = clip()
    for package, model, module, rows, sites in (
        ("timm", "timm ViT", timm_vit(), images(), LAYERS),
        ("timm", "timm Swin", timm_swin(), images(), LAYERS),
        ("open_clip_torch", "open_clip image", Image(both), images(), LAYERS),
        ("open_clip_torch", "open_clip text", Text(both), ids(), LAYERS),
    ):
        module.eval()
        name = next(iter(rows[0]))
        with torch.no_grad():
            outputs = [{"output": module(torch.from_numpy(row[name])[None])[0].numpy()} for row in rows]
        for tool, dynamo in (("torch.onnx dynamo", True), ("torch.onnx TorchScript", False)):
            write = exported(module, name, rows[0][name], dynamo=dynamo)
            cases.add(tool, package, model, write, rows, outputs=outputs, sites=sites)


if __name__ == "__main__":
    main()
