"""Small torch modules from both of torch's exporters: sites are found, named, and equal to torch's weights.

A site is a place in a graph that computes attention; it is tapped if the converted graph returns its weights. Needs
torch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from attnserve_server.conversion.assemble import Assembled, assemble
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from attnserve_server.conversion.graphs.reading import read_graph
from attnserve_server.conversion.inputs.signature import signature_of
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.sources.torch_export import quiet
from attnserve_server.engine.session import RuntimeSession
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch import Tensor, nn

WIDTH, HEADS, LONGEST = 32, 4, 64


class Multihead(nn.Module):
    """Torch's own module: with weights it uses single operators, without them the fused one."""

    def __init__(self, *, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=self.need_weights)[0]

    def weights(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, average_attn_weights=False)[1]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def weights(self, x: Tensor) -> Tensor:
        return self.layer.self_attn(x, x, x, average_attn_weights=False)[1]


class Attention(nn.Module):
    """Self-attention in single operators: causal by a buffer, as in GPT, or biased by distance, as in T5."""

    def __init__(self, *, biased: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.bias = nn.Embedding(2 * LONGEST, HEADS)
        self.register_buffer("triangle", torch.tril(torch.ones(LONGEST, LONGEST)).bool())
        self.biased = biased

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, _ = x.shape
        heads = [part.view(batch, length, HEADS, -1).transpose(1, 2) for part in self.qkv(x).split(WIDTH, -1)]
        scores = heads[0] @ heads[1].transpose(-2, -1)
        if self.biased:
            places = torch.arange(length, device=x.device)
            scores = scores + self.bias(places[None] - places[:, None] + LONGEST).permute(2, 0, 1)[None]
        else:
            scores = (scores / (WIDTH // HEADS) ** 0.5).masked_fill(~self.triangle[:length, :length], float("-inf"))
        weights = scores.softmax(-1)
        return (weights @ heads[2]).transpose(1, 2).flatten(2), weights


class Block(nn.Module):
    def __init__(self, *, biased: bool = False) -> None:
        super().__init__()
        self.attn = Attention(biased=biased)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))[0]

    def weights(self, x: Tensor) -> Tensor:
        return self.attn(self.norm(x))[1]


class Folded(nn.Module):
    """Heads folded into the batch, as BART and torch's own functions once had it."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def folded(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        return x.view(batch, length, HEADS, -1).transpose(1, 2).reshape(batch * HEADS, length, -1)

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.bmm(self.folded(self.query(x)) * 8**-0.5, self.folded(self.key(x)).transpose(1, 2))
        weights = scores.softmax(-1)
        batch, length, _ = x.shape
        output = torch.bmm(weights, self.folded(self.value(x))).view(batch, HEADS, length, -1)
        return output.transpose(1, 2).reshape(x.shape), weights.view(batch, HEADS, length, length)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x)[0]

    def weights(self, x: Tensor) -> Tensor:
        return self.both(x)[1]


def exported(module: nn.Module, exporter: str, opset: int, path: Path) -> Path:
    torch.manual_seed(3)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    example = torch.randn(2, 6, WIDTH)
    axes = {0: "batch", 1: "seq"}
    with quiet(), torch.no_grad():
        if exporter == "dynamo":
            torch.onnx.export(
                module.eval(), (example,), path, dynamo=True, opset_version=opset, input_names=["x"],
                dynamic_shapes=(axes,), external_data=True, verbose=False,
            )  # fmt: skip
        else:
            torch.onnx.export(
                module.eval(), (example,), path, dynamo=False, opset_version=opset, input_names=["x"],
                output_names=["y"], dynamic_axes={"x": axes},
            )  # fmt: skip
    return path


def assembled(path: Path, folder: Path) -> Assembled:
    proto = read_graph(path)
    return assemble(proto, Sampler(signature_of(proto.graph), 0), folder, Steps.silent())


def assert_equals_torch(done: Assembled, module: Any, dtype: type = np.float32) -> None:
    (site,) = done.sites
    assert not site.unavailable_reason
    session = RuntimeSession.load(done.model_path, provider="CPUExecutionProvider")
    x = np.random.default_rng(5).normal(size=(3, 9, WIDTH)).astype(dtype)
    items = np.array([2, 0])
    (weights,) = session.run({"x": x, site.items_input: items}, [site.weights_output])
    with torch.no_grad():
        expected = module.double().weights(torch.from_numpy(x).double()).numpy()
    # float32 sums in another order; float16 keeps 11 bits of scores up to 10.
    tolerance = 1e-5 if dtype is np.float32 else 1e-2
    np.testing.assert_allclose(weights, expected[items], rtol=0, atol=tolerance)


MODULES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "steps of torch's module": (lambda: Multihead(need_weights=True), "attention"),
    "operator of torch's module": (lambda: Multihead(need_weights=False), "attention"),
    "torch's layer": (Layer, "layer.self_attn"),
    "causal": (Block, "attn"),
    "biased": (lambda: Block(biased=True), "attn"),
    "folded": (Folded, "attention_0"),
}


@pytest.mark.parametrize(
    ("name", "exporter", "opset"),
    [
        ("steps of torch's module", "dynamo", 23),
        ("operator of torch's module", "dynamo", 18),
        ("torch's layer", "dynamo", 18),
        ("biased", "dynamo", 23),
        ("causal", "torchscript", 11),
        ("causal", "torchscript", 14),
        ("biased", "torchscript", 17),
        ("folded", "torchscript", 14),
    ],
)
def test_exports_are_tapped(name: str, exporter: str, opset: int, tmp_path: Path) -> None:
    make, module_path = MODULES[name]
    module = make()
    done = assembled(exported(module, exporter, opset, tmp_path / "model.onnx"), tmp_path)
    assert [site.name for site in done.sites] == [module_path]
    # Which sites are causal is proved when a bundle is certified; here only an operator's attribute states it.
    assert {site.kind for site in done.sites} <= ({"causal", "self"} if name == "causal" else {"self"})
    assert [(site.heads, site.query_axis, site.key_axis) for site in done.sites] == [(HEADS, "seq", "seq")]
    assert_equals_torch(done, module)


@pytest.mark.parametrize("opset", [11, 17])
def test_file_converted_to_float16_is_tapped(opset: int, tmp_path: Path) -> None:
    module = Block()
    model = onnx.load(exported(module, "torchscript", opset, tmp_path / "wide.onnx"))
    onnx.save(convert_float_to_float16(model), tmp_path / "half.onnx")
    done = assembled(tmp_path / "half.onnx", tmp_path)
    assert done.precision == "fp16"
    assert_equals_torch(done, module, np.float16)


def test_file_with_weights_beside_it_is_prepared(tmp_path: Path) -> None:
    path = exported(Block(), "torchscript", 17, tmp_path / "model.onnx")
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="model.data", size_threshold=0)
    assert (tmp_path / "model.data").exists()
    bundle = prepare_bundle(PrepareRequest(file=path, name="block", repository=tmp_path / "models"))
    (site,) = bundle.manifest.sites
    assert (site.name, site.kind, site.available) == ("attn", "causal", True)
