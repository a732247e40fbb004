"""A statically quantized ViT is served with its own rounding, as its file is written or as the runtime optimizes it.

The optimizers change the rounding between its constant quantizers, on some processors by several steps of 8 bits, and
taps may keep them from that. Needs torch and transformers, and is skipped on processors that multiply int8 exactly,
where the runtime fuses other nodes; a conversion that refuses the file raises CheckFailed.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.engine.session_options import multiplies_int8_exactly
from attnserve_server.model.equality import FLOORS
from onnxruntime import quantization
from onnxruntime.quantization import CalibrationDataReader
from transformers import ViTConfig, ViTModel

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        multiplies_int8_exactly(),
        reason="this processor multiplies int8 exactly: the runtime fuses the quantizers, which was not tried",
    ),
]


class Images(CalibrationDataReader):
    """Random images, one at a time."""

    def __init__(self, images: np.ndarray[Any, Any]) -> None:
        self.rest = iter(images[:, None])

    def get_next(self) -> Any:
        image = next(self.rest, None)
        return None if image is None else {"pixel_values": image}


class LastHidden(torch.nn.Module):
    """The model with one output."""

    def __init__(self, model: ViTModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.model(pixel_values).last_hidden_state
        return hidden


@pytest.fixture(scope="module", params=["QUInt8", "QInt8"])
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The file of a tiny ViT, its activations quantized to this type, and the images of its calibration."""
    torch.manual_seed(2)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=4,
        initializer_range=0.3, attn_implementation="eager",
    )  # fmt: skip
    module = LastHidden(ViTModel(config, add_pooling_layer=False)).eval()
    images = np.random.default_rng(4).normal(size=(3, 3, 16, 16)).astype(np.float32)
    folder = tmp_path_factory.mktemp("vit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (torch.from_numpy(images[:2]),), folder / "vit.onnx", dynamo=False, opset_version=17,
            input_names=["pixel_values"], output_names=["last_hidden_state"],
            dynamic_axes={"pixel_values": {0: "batch"}, "last_hidden_state": {0: "batch"}},
        )  # fmt: skip
    quantization.quantize_static(
        folder / "vit.onnx",
        folder / "quantized.onnx",
        Images(images),
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType[request.param],
        weight_type=quantization.QuantType.QInt8,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )
    return folder / "quantized.onnx", images


def test_both_sites_are_tapped_and_outputs_are_those_of_the_file(quantized: tuple[Path, Any], tmp_path: Path) -> None:
    file, images = quantized
    bundle = prepare_bundle(PrepareRequest(file=file, name="vit", repository=tmp_path))
    assert [site.available for site in bundle.manifest.sites] == [True, True]
    found = GraphRunner(bundle.path / "model.onnx").run({"pixel_values": images}, ["last_hidden_state"])
    options = ort.SessionOptions()
    options.log_severity_level = 4
    answers = []
    for level in (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
        options.graph_optimization_level = level
        session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        answers.append(session.run(["last_hidden_state"], {"pixel_values": images})[0])
    least = min(float(np.abs(found["last_hidden_state"] - each).max()) for each in answers)
    assert least <= FLOORS["int8"][0] * np.abs(answers[0]).max()
