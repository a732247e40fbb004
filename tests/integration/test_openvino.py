"""A server on OpenVINO's plug-in provider answers as one on the CPU provider does, and refuses what it cannot serve.

Needs `minilm_server`, a server over MiniLM on the CPU provider. The plug-in lists Intel's processors only. Elsewhere
the server refuses to start, and the comparison is skipped.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from attnserve_client import AsyncClient, InferenceResult
from attnserve_server.engine import openvino
from attnserve_server.engine.providers import CPU, OPENVINO
from attnserve_server.model.equality import WEIGHTS_PREFIX, Equality, equality_of
from attnserve_server.model.repository import Repository
from eager import Reference
from openvino_here import needs_bf16, needs_openvino, why_absent
from serving import RunningServer, command, serve


async def answers(server: RunningServer, references: list[Reference]) -> list[InferenceResult]:
    """The answers to all texts, sent at the same time; every second one selects all attention."""
    async with AsyncClient(server.target) as client:
        calls = (
            client.infer("minilm", reference.text, attention=True if at % 2 == 0 else None, timeout=60)
            for at, reference in enumerate(references)
        )
        return await asyncio.gather(*calls)


def greatest_error(found: list[InferenceResult], expected: list[InferenceResult], rule: Equality) -> float:
    """The greatest difference over the allowed one, of outputs and of weights."""
    errors = [0.0]
    for own, true in zip(found, expected, strict=True):
        errors += [rule.error(name, own.outputs[name], true.outputs[name]) for name in true.outputs]
        assert len(own.attention) == len(true.attention)
        for one, other in zip(own.attention, true.attention, strict=True):
            assert one.sites == other.sites
            errors.append(rule.error(f"{WEIGHTS_PREFIX}{one.sites[0]}", one.weights, other.weights))
    return max(errors)


@pytest.fixture(scope="module", params=["0", "24"], ids=["exact shapes", "prepared shapes"])
def openvino_server(
    request: pytest.FixtureRequest, minilm_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """Two instances on one session, so that runs overlap."""
    folder = tmp_path_factory.mktemp("openvino-server")
    flags = ("--provider", "openvino", "--instances", "2", "--shape-buckets", request.param)
    with serve(minilm_repository, folder, *flags) as server:
        yield server


@needs_openvino
async def test_answers_of_mixed_batches_equal_those_of_the_cpu_provider(
    openvino_server: RunningServer,
    minilm_server: RunningServer,
    minilm_repository: Path,
    minilm_references: list[Reference],
    request: pytest.FixtureRequest,
) -> None:
    rule = equality_of(Repository(minilm_repository).bundle("minilm").manifest)
    expected = await answers(minilm_server, minilm_references)
    found = await answers(openvino_server, minilm_references)
    assert {answer.receipt.execution_provider for answer in expected} == {CPU}
    assert {answer.receipt.execution_provider for answer in found} == {OPENVINO}
    assert {answer.receipt.precision for answer in found} == {"fp32"}
    assert any(answer.run.batch_size > 1 for answer in found), "the texts shared no run"
    assert greatest_error(found, expected, rule) <= 1
    # The control: two texts do not have equal answers.
    assert greatest_error([found[0]], [expected[2]], rule) > 1
    events = [json.loads(line)["event"] for line in openvino_server.log.read_text().splitlines() if line[:1] == "{"]
    assert ("shapes are prepared" in events) == ("prepared" in request.node.name)


@needs_bf16
async def test_bfloat16_is_stated_and_stays_within_its_tolerance(
    minilm_server: RunningServer, minilm_repository: Path, minilm_references: list[Reference], tmp_path: Path
) -> None:
    expected = await answers(minilm_server, minilm_references)
    with serve(minilm_repository, tmp_path, "--provider", "openvino", "--precision", "bf16") as server:
        found = await answers(server, minilm_references)
        async with AsyncClient(server.target) as client:
            assert (await client.model("minilm")).precision == openvino.ROUNDED
    assert {answer.receipt.precision for answer in found} == {openvino.ROUNDED}
    assert greatest_error(found, expected, Equality(openvino.ROUNDED)) <= 1
    assert greatest_error(found, expected, Equality("fp32")) > 1, "nothing was rounded"


def start(repository: Path, *flags: str) -> tuple[int, str]:
    line = [command("attnserve-server"), "serve", "--repository", str(repository), *flags]
    done = subprocess.run(
        [*line, "--grpc-port", "0", "--http-port", "0"], capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_bfloat16_on_another_provider_refuses_to_start(minilm_repository: Path) -> None:
    code, output = start(minilm_repository, "--provider", "cpu", "--precision", "bf16")
    assert code == 2
    assert "precision is bf16, but provider is cpu" in output
    assert "set --provider openvino, or --precision bundle" in output
    assert "Traceback" not in output


@pytest.mark.skipif(not why_absent(), reason="the plug-in serves here")
def test_absent_plug_in_refuses_to_start_with_the_remedy(minilm_repository: Path) -> None:
    code, output = start(minilm_repository, "--provider", "openvino")
    assert code == 2
    assert why_absent() in output
    assert "Traceback" not in output
