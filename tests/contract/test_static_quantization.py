"""Files with constant scales, over a real server: the file's own rounding, and weights as integers represent them.

`Static` makes a graph of one layer in each form of static quantizers, and its results in float64. Each case is
converted once for the module, and served in this process.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from attnserve_client import AsyncClient
from attnserve_server.app import Application
from attnserve_server.config import Settings
from attnserve_server.conversion.check.findings import CheckRequest
from attnserve_server.conversion.check.recheck import check_bundle
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from attnserve_server.model.repository import Repository
from static_graphs import FORMS, WIDTH, Static

CASES = {f"{form}-{dtype.__name__}": Static(form, dtype) for form in FORMS for dtype in (np.uint8, np.int8)}
LENGTHS = (5, 3, 5, 8)
# Kernels round float32 numbers, and the definition float64 ones: a number near a tie is one step off. So are some
# results of the runtime's QLinearSoftmax.
A_STEP = 1.001


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("static")
    for name, case in CASES.items():
        onnx.save(case.model(), folder / "model.onnx")
        prepare_bundle(
            PrepareRequest(file=folder / "model.onnx", name=name, repository=folder / "models", max_length=16)
        )
    return folder / "models"


@pytest.fixture
async def client(repository: Path) -> AsyncIterator[AsyncClient]:
    application = Application(
        Settings(repository=repository, grpc_port=0, http_port=0, instances=1, run_overhead_tokens=1_000_000)
    )
    await application.start()
    async with AsyncClient(f"127.0.0.1:{application.grpc_port}") as opened:
        yield opened
    await application.aclose()


@pytest.mark.parametrize("name", CASES)
async def test_answers_and_weights_are_those_of_the_files_own_quantizers(client: AsyncClient, name: str) -> None:
    rng = np.random.default_rng(3)
    inputs = [{"x": rng.normal(size=(length, WIDTH)).astype(np.float32)} for length in LENGTHS]
    together = await client.infer(name, inputs, attention=True)
    for given, result in zip(inputs, together, strict=True):
        y, weights = CASES[name].reference(given["x"])
        assert np.abs(result.outputs["y"] - y).max() <= A_STEP * Static.step("product")
        assert np.abs(result.attention[0].weights - weights).max() <= A_STEP * Static.step("weights")
        alone = await client.infer(name, [given], attention=True)
        np.testing.assert_array_equal(result.attention[0].weights, alone[0].attention[0].weights)


def test_manifest_states_int8_and_weights_times_values_within_a_step(repository: Path) -> None:
    for name in CASES:
        manifest = Repository(repository).bundle(name, "1").manifest
        assert manifest.precision == "int8"
        assert [site.available for site in manifest.sites] == [True]
        assert (manifest.check.output_max_abs_error, manifest.check.weight_max_abs_error) == (0.0, 0.0)


def test_check_repeats_the_comparison(repository: Path) -> None:
    report = check_bundle(CheckRequest(path=repository / "QDQ-int8" / "1"))
    assert report.passed
    assert report.precision == "int8"
