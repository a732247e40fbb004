"""Linear attention in common torch modules, by both exporters, against its definition in float64.

Linear attention implies weights: products of features of queries and keys, divided by their sums. `LinearAttention`
writes it in three ways. Each is traced, converted and run. Needs torch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.conversion.sources.torch_export import Traceable, trace
from attnserve_server.model.repository import MODEL_FILE
from torch import Tensor, einsum, nn
from torch.nn.functional import elu

HEADS, WIDTH = 4, 32


class LinearAttention(nn.Module):
    """With einsum, and three ways to divide: in an einsum of three, by scaled values, or with heads in front."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spelling = spelling
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def features(self, frames: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        query, key = (elu(self.split(part, frames)) + 1 for part in (self.query, self.key))
        return query, key * mask[:, :, None, None].to(key.dtype)

    def split(self, part: nn.Module, frames: Tensor) -> Tensor:
        return part(frames).view(*frames.shape[:2], HEADS, -1)

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        frames, mask = inputs
        query, key = self.features(frames, mask)
        value = self.split(self.value, frames)
        if self.spelling == "heads in front":
            query, key, value = (each.transpose(1, 2) for each in (query, key, value))
            inverse = 1.0 / einsum("...nd,...d->...n", query, key.sum(dim=-2))
            context = einsum("...nd,...ne->...de", key, value)
            attended = einsum("...de,...nd,...n->...ne", context, query, inverse).transpose(1, 2)
        else:
            length = frames.shape[1] if self.spelling == "values scaled" else 1
            context = einsum("nshd,nshm->nhdm", key, value / length)
            inverse = 1 / (einsum("nlhd,nhd->nlh", query, key.sum(dim=1)) + 1e-6)
            attended = einsum("nlhd,nhdm,nlh->nlhm", query, context, inverse) * length
        return (attended.reshape(*frames.shape[:2], WIDTH),)


@pytest.mark.parametrize(("exporter", "opset"), [("dynamo", 18), ("torchscript", 17)])
@pytest.mark.parametrize("spelling", ["product of three", "values scaled", "heads in front"])
def test_weights_are_those_of_the_features(spelling: str, exporter: str, opset: int, tmp_path: Path) -> None:
    module = LinearAttention(spelling)
    mask = torch.ones(3, 11, dtype=torch.int64)
    mask[1, 7:] = mask[2, 4:] = 0
    example = {"frames": torch.linspace(-2, 2, 3 * 11 * WIDTH).reshape(3, 11, WIDTH), "attention_mask": mask}
    shapes = {"frames": ("seq", WIDTH), "attention_mask": ("seq",)}
    graph = trace(Traceable(module, example, shapes, ["attended"], {"seq": 64}), exporter, opset)
    onnx.save(graph, tmp_path / "linear.onnx")
    request = PrepareRequest(
        file=tmp_path / "linear.onnx", name="linear", repository=tmp_path / "models", max_length=64
    )
    bundle = prepare_bundle(request)
    (site,) = bundle.manifest.sites
    assert (site.form, site.heads, site.query_axis, site.key_axis) == ("linear", HEADS, "seq", "seq")
    frames = np.random.default_rng(0).normal(size=(3, 9, WIDTH)).astype(np.float32)
    kept = np.ones((3, 9), np.int64)
    kept[1, 5:] = 0
    found = GraphRunner(bundle.path / MODEL_FILE).run(
        {"frames": frames, "attention_mask": kept}, [str(site.weights_output)]
    )[str(site.weights_output)]
    with torch.inference_mode():
        wide = module.double().features(torch.from_numpy(frames).double(), torch.from_numpy(kept))
    query, key = (each.numpy().transpose(0, 2, 1, 3) for each in wide)
    products = query @ key.transpose(0, 1, 3, 2)
    # float32 MatMuls over eight features; the divisor's 1e-6 is far below that.
    np.testing.assert_allclose(found, products / products.sum(-1, keepdims=True), atol=1e-5, rtol=0)
