"""Masks of floats that are added to scores, over a real server: -inf hides a key, and padding stays hidden.

`Added` makes a graph of one or two layers with such a mask, and their weights in float64. Each case is converted once
for the module, and served in this process. Masks that no request may send must be refused with InvalidRequest.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from additive_graphs import FORMS, SHAPES, Added
from attnserve_client import AsyncClient, InvalidRequest
from attnserve_server.app import Application
from attnserve_server.config import Settings
from attnserve_server.conversion.check.findings import CheckRequest
from attnserve_server.conversion.check.opened import bundle_at
from attnserve_server.conversion.check.recheck import check_bundle
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle

LENGTHS = (9, 5, 2, 1)
# float32 sums in another order; float16 has 11 bits.
TOLERANCES = {"fp32": (1e-4, 1e-5), "fp16": (3e-2, 1e-2)}
CASES = {f"{form}{number}": Added(shape=shape, form=form) for form in FORMS for number, shape in enumerate(SHAPES)} | {
    "floored": Added(floored=True),
    "half": Added(dtype=np.float16),
    "half_operator": Added(form="operator", dtype=np.float16),
}
REDUCED = {"reduced": Added(shape="[B,1,S,S]")}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("additive")
    for name, case in (CASES | REDUCED).items():
        file = folder / "added.onnx"
        file.write_bytes(case.model().SerializeToString())
        precision = "fp16" if name in REDUCED else "fp32"
        prepare_bundle(
            PrepareRequest(file=file, name=name, repository=folder / "models", max_length=32, precision=precision)
        )
    return folder / "models"


@pytest.fixture
async def client(repository: Path) -> AsyncIterator[AsyncClient]:
    settings = Settings(
        repository=repository, grpc_port=0, http_port=0, instances=1, run_overhead_tokens=1_000_000, batching="tested"
    )
    application = Application(settings)
    await application.start()
    async with AsyncClient(f"127.0.0.1:{application.grpc_port}") as opened:
        yield opened
    await application.aclose()


async def test_infinite_masks_in_one_batch_are_answered_as_alone(client: AsyncClient) -> None:
    for name, case in (CASES | REDUCED).items():
        output_tolerance, weight_tolerance = TOLERANCES[
            "fp32" if case.dtype is np.float32 and name in CASES else "fp16"
        ]
        fillers = (-np.inf, float(np.finfo(np.float16).min))
        for filler in fillers:
            inputs = [case.feeds(length, filler=filler) for length in LENGTHS]
            results = await client.infer(name, inputs, attention=True)
            for given, result in zip(inputs, results, strict=True):
                y, maps = case.reference(given)
                np.testing.assert_allclose(result.outputs["y"], y, rtol=0, atol=output_tolerance, err_msg=name)
                assert len(result.attention) == 2
                for each, expected in zip(result.attention, maps, strict=True):
                    np.testing.assert_allclose(each.weights, expected, rtol=0, atol=weight_tolerance, err_msg=name)


async def test_other_infinities_and_nan_are_refused_with_their_input(client: AsyncClient) -> None:
    legal = CASES["steps1"].feeds(4)
    for name, number, said in (
        ("mask", np.nan, "element 2 is nan; input 'mask' is added to scores: floats must be finite, or -inf"),
        ("mask", np.inf, "element 2 is inf; input 'mask' is added to scores: floats must be finite, or -inf"),
        ("x", -np.inf, "element 2 is -inf; floats must be finite"),
        ("x", np.nan, "element 2 is nan; floats must be finite"),
    ):
        wrong = {**legal, name: legal[name].copy()}
        wrong[name].reshape(-1)[2] = number
        with pytest.raises(InvalidRequest) as refused:
            await client.infer("steps1", [wrong])
        fields = [(violation.field, violation.description) for violation in refused.value.violations]
        assert fields == [(f"sequences[0].tensors.tensors[{list(legal).index(name)}].data", said)]


@pytest.mark.parametrize(("name", "row"), [("steps0", 0), ("steps2", 3), ("floored", None)])
async def test_rows_that_hide_every_key_are_refused_where_the_model_answers_nan(
    client: AsyncClient, name: str, row: int | None
) -> None:
    given = CASES[name].feeds(5)
    mask = given["mask"].copy()
    mask.reshape(-1, mask.shape[-1])[row or 0] = -np.inf
    if row is None:
        # The graph itself bounds the mask, so that softmax is even over such a row.
        (result,) = await client.infer(name, [{**given, "mask": mask}])
        even, _ = CASES[name].reference({**given, "mask": np.full_like(mask, np.finfo(np.float32).min)})
        np.testing.assert_allclose(result.outputs["y"], even, rtol=0, atol=TOLERANCES["fp32"][0])
        return
    with pytest.raises(InvalidRequest, match=f"row {row} of input 'mask' is -inf throughout"):
        await client.infer(name, [{**given, "mask": mask}])


async def test_get_model_returns_which_input_is_a_mask(client: AsyncClient) -> None:
    additive = {spec.name: spec.additive_mask for spec in (await client.model("steps1")).inputs}
    assert additive == {"x": False, "mask": True}


def test_padding_hides_keys(repository: Path) -> None:
    for name, case in (CASES | REDUCED).items():
        lowest = np.finfo(np.float16 if name in REDUCED else case.dtype).min
        manifest = bundle_at(repository / name / "1").manifest
        assert manifest.input("mask").padding == float(lowest), name
        assert manifest.axis("seq").paddable, name


@pytest.mark.parametrize("name", ["steps1", "operator2", "reduced"])
def test_bundles_of_added_masks_pass_their_check(repository: Path, name: str) -> None:
    assert check_bundle(CheckRequest(repository / name / "1", attack_seconds=5.0)).passed
