"""Masks that a file reduces to a count of ones, over a real server: read whole where possible, else refused.

`counted` makes a graph of onnxruntime's `Attention` or `MultiHeadAttention` that reads the count, and `weights_of` the
weights under the whole mask. `group_query_graphs.Decoder` needs the count itself, so only its requests are refused.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import group_query_graphs
import numpy as np
import onnx
import pytest
from attnserve_client import AsyncClient, InvalidRequest
from attnserve_server.app import Application
from attnserve_server.config import Settings
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from counted_graphs import FORMS, VOCABULARY, counted, weights_of

# float32 sums in another order; a score beside -10,000 keeps three decimals, which exp does not enlarge below that.
TOLERANCE = 1e-5
MASKS = ([1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 1, 1, 0], [1, 1, 1, 1, 1])


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("counted")
    for name, model in {
        **{form: counted(form) for form in FORMS},
        "grouped": group_query_graphs.Decoder().model(),
    }.items():
        onnx.save(model, folder / "model.onnx")
        request = PrepareRequest(file=folder / "model.onnx", name=name, repository=folder / "models", max_length=16)
        warnings: list[str] = []
        steps = Steps.silent()
        steps.warn = warnings.append  # type: ignore[method-assign]
        prepare_bundle(request, steps)
        expected = "reads only the number of ones" if name == "grouped" else "its attention now reads the whole mask"
        assert any(expected in warning for warning in warnings), name
    return folder / "models"


@pytest.fixture
async def client(repository: Path) -> AsyncIterator[AsyncClient]:
    application = Application(Settings(repository=repository, grpc_port=0, http_port=0, instances=1))
    await application.start()
    async with AsyncClient(f"127.0.0.1:{application.grpc_port}") as opened:
        yield opened
    await application.aclose()


@pytest.mark.parametrize("form", FORMS)
async def test_masks_with_holes_and_padding_on_the_left_are_answered_as_before_the_count(
    client: AsyncClient, form: str
) -> None:
    rng = np.random.default_rng(1)
    inputs = [
        {"input_ids": rng.integers(1, VOCABULARY, len(mask)), "attention_mask": np.array(mask, np.int64)}
        for mask in MASKS
    ]
    results = await client.infer(form, inputs, attention=True)
    for given, result in zip(inputs, results, strict=True):
        expected = weights_of(form, given["input_ids"], given["attention_mask"])
        np.testing.assert_allclose(result.attention[0].weights, expected, rtol=0, atol=TOLERANCE)


async def test_count_that_no_mask_can_replace_refuses_a_zero_before_a_one(client: AsyncClient) -> None:
    rule = "at least one 1 must come first, and no 1 may follow a 0; leave the padding out, or put it behind the tokens"
    follow = "ones follow it, and the model counts the ones of input 'attention_mask'"
    ids = np.arange(1, 6)
    for mask, said in (
        ([0, 0, 1, 1, 1], f"element 0 is 0 and {follow}: {rule}"),
        ([1, 0, 1, 1, 0], f"element 1 is 0 and {follow}: {rule}"),
        ([0, 0, 0, 0, 0], f"element 0 is 0 and so are all: {rule}"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            await client.infer("grouped", [{"input_ids": ids, "attention_mask": np.array(mask, np.int64)}])
        found = [(violation.field, violation.description) for violation in refused.value.violations]
        assert found == [("sequences[0].tensors.tensors[1].data", said)]
    await client.infer("grouped", [{"input_ids": ids, "attention_mask": np.array([1, 1, 1, 0, 0])}])
