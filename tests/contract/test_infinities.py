"""Infinities as answers: a model that hides positions with them is converted, checked and served; NaN is not.

`span_head` makes a graph whose scores are -inf or +inf where a mask hides the position. It is converted once for the
module in each precision.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from attnserve_client import AsyncClient
from attnserve_server.app import Application
from attnserve_server.config import Settings
from attnserve_server.conversion.check.findings import CheckRequest
from attnserve_server.conversion.check.opened import bundle_at
from attnserve_server.conversion.check.recheck import check_bundle
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from attnserve_server.engine.golden import read_golden
from masked_head_graphs import VOCABULARY, scores, span_head

# float32 sums in another order; scores and their squares are below 20.
TOLERANCE = 1e-4
PRECISIONS = ("fp32", "fp16", "int8")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("infinities")
    for precision in PRECISIONS:
        file = folder / "span.onnx"
        file.write_bytes(span_head().SerializeToString())
        request = PrepareRequest(
            file=file, name=precision, repository=folder / "models", max_length=32, precision=precision
        )
        prepare_bundle(request)
    return folder / "models"


@pytest.fixture
async def served(repository: Path) -> AsyncIterator[Application]:
    settings = Settings(
        repository=repository, grpc_port=0, http_port=0, instances=1, run_overhead_tokens=1_000_000, batching="tested"
    )
    application = Application(settings)
    await application.start()
    yield application
    await application.aclose()


@pytest.mark.parametrize("name", PRECISIONS)
def test_bundles_of_infinite_answers_pass_their_check(repository: Path, name: str) -> None:
    checked = check_bundle(CheckRequest(repository / name / "1", attack_seconds=5.0))
    assert checked.passed, checked.findings


def test_golden_answers_hold_the_infinities(repository: Path) -> None:
    sequences = read_golden(bundle_at(repository / "fp32" / "1"))
    assert any(np.isinf(sequence.outputs["logits"]).any() for sequence in sequences), "nothing was tried"


async def test_infinities_are_answers(served: Application) -> None:
    made = []
    for length in (9, 4, 1):
        rng = np.random.default_rng(length)
        allowed = rng.integers(0, 2, length)
        allowed[0] = 1
        ids = rng.integers(1, VOCABULARY, length)
        made.append({"input_ids": ids, "attention_mask": np.ones_like(ids), "allowed": allowed})
    async with AsyncClient(f"127.0.0.1:{served.grpc_port}") as client:
        results = await client.infer("fp32", made, attention=True)
    assert {result.run.batch_size for result in results} == {3}
    for given, result in zip(made, results, strict=True):
        shown, expected = given["allowed"] == 1, scores(given["input_ids"])
        np.testing.assert_allclose(result.outputs["logits"][shown], expected[shown], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(result.outputs["distances"][shown], expected[shown] ** 2, rtol=0, atol=TOLERANCE)
        assert (result.outputs["logits"][~shown] == -np.inf).all()
        assert (result.outputs["log_probabilities"][~shown] == -np.inf).all()
        assert (result.outputs["distances"][~shown] == np.inf).all()


async def test_padding_alone_may_be_infinite(tmp_path: Path) -> None:
    file = tmp_path / "span.onnx"
    file.write_bytes(span_head(hides=False).SerializeToString())
    prepare_bundle(PrepareRequest(file=file, name="span", repository=tmp_path / "models", max_length=32))
    application = Application(Settings(repository=tmp_path / "models", grpc_port=0, http_port=0, instances=1))
    await application.start()
    async with AsyncClient(f"127.0.0.1:{application.grpc_port}") as client:
        long, short = (
            {"input_ids": ids, "attention_mask": np.ones_like(ids)} for ids in (np.arange(1, 9), np.arange(1, 4))
        )
        results = await client.infer("span", [long, short])
    await application.aclose()
    assert all(np.isfinite(result.outputs["logits"]).all() for result in results)
    np.testing.assert_allclose(results[1].outputs["logits"], scores(short["input_ids"]), rtol=0, atol=TOLERANCE)
