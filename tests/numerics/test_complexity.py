"""The complexity benchmark measures real bundles; its page and plot show what was measured and what was left out.

Needs `bench` of this checkout, and torch for `zoo_bundles`, tiny bundles of the project's own torch models. A bundle is
the folder of one converted model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from attnserve_server.model.repository import MODEL_FILE, Bundle

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench() -> object:
    sys.path.insert(0, str(ROOT))
    try:
        from bench import complexity, complexity_page  # noqa: PLC0415 - not installed: it is found in the checkout
    finally:
        sys.path.remove(str(ROOT))
    return complexity, complexity_page


def test_points_are_measured_fitted_and_shown(
    bench, zoo_bundles: dict[str, Bundle], tmp_path: Path, monkeypatch
) -> None:
    complexity, page = bench
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(complexity, "MEMORY_BUDGET_MIB", 0.0)
    models = {"self": zoo_bundles["self"].path / MODEL_FILE}
    first, second = complexity.sweep(models, (64, 128))
    assert first.seconds > 0
    assert first.mib >= 0
    # With a budget of 0 the second point is predicted to exceed it, unless the first took no memory.
    assert second.skipped.startswith(f"{first.mib:.0f} MiB at 64 predict more than 0 MiB") or first.mib == 0
    quadratic = [complexity.Point("self", length, 1e-9 * length**2, 1e-5 * length) for length in (256, 512, 1024)]
    assert complexity.slopes(quadratic) == {"self": {"time": 2.0, "memory": 1.0}}
    points = [*quadratic, complexity.Point("self", 2048, skipped="too much")]
    report = {"heads": 4, "width": 64, "machine": "this one", "slopes": complexity.slopes(points)}
    report["points"] = [
        {
            "pattern": point.pattern,
            "length": point.length,
            "seconds": point.seconds,
            "mib": point.mib,
            "skipped": point.skipped,
        }
        for point in points
    ]
    page.write(report, tmp_path)
    words = (tmp_path / "reference" / "complexity.md").read_text()
    assert "| scaled dot-product | 0.0655 | 0.262 | 1.05 | - | 2.0 |" in words
    assert "- scaled dot-product at 2,048: too much" in words
    assert json.loads((tmp_path / "reference" / "complexity.json").read_text()) == report
    assert (tmp_path / "images" / "complexity.png").read_bytes().startswith(b"\x89PNG")


def test_every_pattern_of_the_page_is_one_of_the_zoo(bench) -> None:
    from attnserve_server.conversion.sources.zoo.model import BUILDERS  # noqa: PLC0415 - torch is slow to import

    complexity, _ = bench
    assert set(complexity.PATTERNS) == set(BUILDERS)
