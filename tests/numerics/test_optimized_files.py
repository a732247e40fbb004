"""Files that onnxruntime's optimizer wrote: converted, and compared with the model's eager weights.

The torch modules of `classic_models` return their own weights; `exported` traces them. Needs torch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from attnserve_server.conversion.sources.torch_export import quiet
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.model.repository import MODEL_FILE, Bundle
from classic_models import HEADS, LAYERS, VOCABULARY, WIDTH, Array, Decoder, Encoder, Reader, exported
from onnxruntime import InferenceSession, SessionOptions
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.transformers.fusion_options import FusionOptions
from onnxruntime.transformers.optimizer import optimize_model

# float32 sums in another order than torch's.
FLOAT32_TOLERANCE = 1e-5
# float16 has 11 bits, and two layers precede the last weights.
FLOAT16_TOLERANCE = 1e-2
LENGTHS = (7, 3, 5)


Inputs = dict[str, torch.Tensor]


def tokens() -> Inputs:
    """Ids and mask of three sequences, padded."""
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).to(torch.int64)
    ids = torch.randint(1, VOCABULARY, mask.shape, generator=torch.Generator().manual_seed(2)) * mask
    return {"input_ids": ids, "attention_mask": mask}


def optimized(
    path: Path,
    model: torch.nn.Module,
    kind: str,
    inputs: Inputs,
    opset: int,
    *,
    raw: bool = True,
    half: bool = False,
    fused: bool = True,
) -> Path:
    """A file of the model, after the optimizer.

    `raw`: with masks as they are, not counted into lengths. `fused`: with attention as one operator.
    """
    options = FusionOptions(kind)
    options.use_raw_attention_mask(raw)
    options.use_multi_head_attention = kind == "bart"
    options.enable_attention = fused
    plain = exported(model, inputs, path, opset)
    better = optimize_model(
        plain, model_type=kind, num_heads=HEADS, hidden_size=WIDTH, optimization_options=options, opt_level=0
    )
    if half:
        better.convert_float_to_float16(keep_io_types=True)
    better.save_model_to_file(str(path))
    return path


def prepared(file: Path) -> Bundle:
    return prepare_bundle(PrepareRequest(file=file, name="tiny", repository=file.parent / "models"))


def assert_equals_eager(
    bundle: Bundle, model: torch.nn.Module, inputs: Inputs, *, half: bool = False, tolerance: float | None = None
) -> None:
    """Every site's weights against those that the module itself computes, but for padding."""
    with torch.no_grad():
        _, eager = model.eval()(*inputs.values())
    sites = bundle.manifest.sites
    session = RuntimeSession.load(bundle.path / MODEL_FILE, provider="CPUExecutionProvider")
    items = {str(site.items_input): np.arange(len(LENGTHS)) for site in sites}
    feeds: dict[str, Array] = {name: tensor.numpy() for name, tensor in inputs.items()}
    found = session.run({**feeds, **items}, [str(site.weights_output) for site in sites])
    assert len(found) == len(eager) == LAYERS
    tolerance = tolerance or (FLOAT16_TOLERANCE if half else FLOAT32_TOLERANCE)
    for own, reference in zip(found, eager, strict=True):
        for row, length in enumerate(LENGTHS):
            np.testing.assert_allclose(own[row, :, :length], reference.numpy()[row, :, :length], rtol=0, atol=tolerance)


@pytest.mark.parametrize(("opset", "raw"), [(11, False), (14, True), (17, False), (17, True)])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_optimized_encoder_gives_its_own_weights(opset: int, raw: bool, half: bool, tmp_path: Path) -> None:
    model = Encoder()
    bundle = prepared(optimized(tmp_path / "model.onnx", model, "bert", tokens(), opset, raw=raw, half=half))
    assert [site.operator for site in bundle.manifest.sites] == ["com.microsoft.Attention-1"] * LAYERS
    assert {(site.kind, site.query_axis, site.heads) for site in bundle.manifest.sites} == {("self", "seq", HEADS)}
    assert_equals_eager(bundle, model, tokens(), half=half)


@pytest.mark.parametrize(("opset", "half"), [(11, False), (17, False), (17, True)])
def test_optimized_decoder_gives_its_own_weights(opset: int, half: bool, tmp_path: Path) -> None:
    model, inputs = Decoder(), {"input_ids": tokens()["input_ids"]}
    bundle = prepared(optimized(tmp_path / "model.onnx", model, "gpt2", inputs, opset, half=half))
    assert [site.operator for site in bundle.manifest.sites] == ["com.microsoft.Attention-1"] * LAYERS
    assert {site.kind for site in bundle.manifest.sites} == {"causal"}
    assert_equals_eager(bundle, model, inputs, half=half)


@pytest.mark.parametrize(("opset", "half"), [(14, False), (17, False), (17, True)])
def test_optimized_cross_attention_gives_its_own_weights(opset: int, half: bool, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    inputs = {
        "queries": torch.randn(len(LENGTHS), max(LENGTHS), WIDTH, generator=generator),
        "memory": torch.randn(len(LENGTHS), 9, WIDTH, generator=generator),
    }
    model = Reader()
    bundle = prepared(optimized(tmp_path / "model.onnx", model, "bart", inputs, opset, half=half))
    assert [site.operator for site in bundle.manifest.sites] == ["com.microsoft.MultiHeadAttention-1"] * LAYERS
    sites = {(site.kind, site.query_axis, site.key_axis) for site in bundle.manifest.sites}
    assert sites == {("cross", "seq", "source_seq")}
    assert_equals_eager(bundle, model, inputs, half=half)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_optimized_file_whose_attention_was_left_alone_gives_its_own_weights(half: bool, tmp_path: Path) -> None:
    model = Encoder()
    bundle = prepared(optimized(tmp_path / "model.onnx", model, "bert", tokens(), 17, half=half, fused=False))
    assert [site.available for site in bundle.manifest.sites] == [True] * LAYERS
    assert_equals_eager(bundle, model, tokens(), half=half)


def test_quantized_attention_gives_its_own_weights(tmp_path: Path) -> None:
    model, file = Encoder(), tmp_path / "model.onnx"
    optimized(tmp_path / "plain.onnx", model, "bert", tokens(), 17)
    with quiet():
        quantize_dynamic(tmp_path / "plain.onnx", file, extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT})
    bundle = prepared(file)
    assert [site.operator for site in bundle.manifest.sites] == ["com.microsoft.QAttention-1"] * LAYERS
    assert bundle.manifest.precision == "int8"
    # From its own output it differs by rounding; from the module before quantization, by what int8 loses.
    assert bundle.manifest.check.weight_max_abs_error <= FLOAT32_TOLERANCE
    assert_equals_eager(bundle, model, tokens(), tolerance=0.02)


@pytest.mark.parametrize("opset", [14, 17])
def test_file_that_a_session_has_saved_gives_its_own_weights(opset: int, tmp_path: Path) -> None:
    # The runtime's optimizer merges MatMuls with their scales, and writes LayerNormalization in any opset:
    # findings/optimized_file_is_not_onnx.sh.
    model, options = Encoder(), SessionOptions()
    exported(model, tokens(), tmp_path / "plain.onnx", opset)
    options.optimized_model_filepath = str(tmp_path / "model.onnx")
    options.log_severity_level = 3
    InferenceSession(tmp_path / "plain.onnx", options, providers=["CPUExecutionProvider"])
    bundle = prepared(tmp_path / "model.onnx")
    assert [site.kind for site in bundle.manifest.sites] == ["self"] * LAYERS
    assert_equals_eager(bundle, model, tokens())
