"""Files that onnxruntime's own optimizer has been over: brought, and compared with the model's own eager weights."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from attnserve_server.build.prepare import PrepareRequest, prepare_bundle
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.model.repository import MODEL_FILE, Bundle
from classic_models import HEADS, LAYERS, VOCABULARY, WIDTH, Array, Decoder, Encoder, exported
from onnxruntime.transformers.fusion_options import FusionOptions
from onnxruntime.transformers.optimizer import optimize_model

# float32 sums in another order than torch's.
FLOAT32_TOLERANCE = 1e-5
# float16 has 11 bits, and two layers of them stand before the last weights.
FLOAT16_TOLERANCE = 1e-2
LENGTHS = (7, 3, 5)


@cache
def batch() -> dict[str, torch.Tensor]:
    """Ids and mask of three sequences, padded."""
    generator = torch.Generator().manual_seed(2)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).to(torch.int64)
    ids = torch.randint(1, VOCABULARY, mask.shape, generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask}


def optimized(path: Path, model: torch.nn.Module, kind: str, opset: int, *, raw: bool, half: bool) -> Path:
    inputs = dict(list(batch().items())[: 2 if kind == "bert" else 1])
    options = FusionOptions(kind)
    options.use_raw_attention_mask(raw)
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


def weights_of(bundle: Bundle, feeds: dict[str, Array]) -> list[Array]:
    session = RuntimeSession.load(bundle.path / MODEL_FILE, provider="CPUExecutionProvider")
    sites = bundle.manifest.sites
    items = {str(site.items_input): np.arange(len(LENGTHS)) for site in sites}
    return list(session.run({**feeds, **items}, [str(site.weights_output) for site in sites]))


def assert_equals_eager(
    bundle: Bundle, model: torch.nn.Module, inputs: dict[str, torch.Tensor], tolerance: float
) -> None:
    with torch.no_grad():
        _, eager = model.eval()(*inputs.values())
    found = weights_of(bundle, {name: array.numpy() for name, array in inputs.items()})
    assert len(found) == len(eager) == LAYERS
    for own, reference in zip(found, eager, strict=True):
        for row, length in enumerate(LENGTHS):
            np.testing.assert_allclose(own[row, :, :length], reference.numpy()[row, :, :length], rtol=0, atol=tolerance)


@pytest.mark.parametrize(("opset", "raw"), [(11, False), (14, True), (17, False), (17, True)])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_optimized_encoder_gives_its_own_weights(opset: int, raw: bool, half: bool, tmp_path: Path) -> None:
    # `raw`: the mask as it is; else the optimizer has it counted into one length for each row.
    model = Encoder()
    bundle = prepared(optimized(tmp_path / "model.onnx", model, "bert", opset, raw=raw, half=half))
    assert [site.operator for site in bundle.manifest.sites] == ["com.microsoft.Attention-1"] * LAYERS
    assert {(site.kind, site.query_axis, site.heads) for site in bundle.manifest.sites} == {("self", "seq", HEADS)}
    assert_equals_eager(bundle, model, batch(), FLOAT16_TOLERANCE if half else FLOAT32_TOLERANCE)


@pytest.mark.parametrize(("opset", "half"), [(11, False), (17, False), (17, True)])
def test_optimized_decoder_gives_its_own_weights(opset: int, half: bool, tmp_path: Path) -> None:
    model = Decoder()
    bundle = prepared(optimized(tmp_path / "model.onnx", model, "gpt2", opset, raw=True, half=half))
    assert [site.operator for site in bundle.manifest.sites] == ["com.microsoft.Attention-1"] * LAYERS
    assert {site.kind for site in bundle.manifest.sites} == {"causal"}
    inputs = {"input_ids": batch()["input_ids"]}
    assert_equals_eager(bundle, model, inputs, FLOAT16_TOLERANCE if half else FLOAT32_TOLERANCE)
