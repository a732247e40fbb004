"""`pytest --quick` leaves out what needs torch or is slow, and lists it; without the option every test is collected.

Two tests run pytest in a subprocess, which only collects.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import quick

SLOW = "tests/unit/conversion/proof/test_attack.py"


def collected(*options: str) -> str:
    line = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", *options]
    return subprocess.run(line, cwd=quick.ROOT, capture_output=True, text=True, check=False, timeout=120).stdout


def test_listed_modules_exist() -> None:
    assert [path for path in quick.IMPORT_TORCH if not (quick.ROOT / path).is_file()] == []


@pytest.mark.slow
def test_slow_tests_and_modules_that_import_torch_are_left_out_and_listed() -> None:
    output = collected("--quick", SLOW, str(Path(quick.IMPORT_TORCH[0]).parent))
    assert "test_attack_" not in output
    assert f"{quick.IMPORT_TORCH[0]}: whole module: needs torch" in output
    assert f"{SLOW}: " in output
    assert output.count("left out by --quick") == 1


@pytest.mark.slow
def test_without_the_option_nothing_is_left_out() -> None:
    output = collected(SLOW)
    assert "test_attack_" in output
    assert "left out" not in output


@pytest.mark.parametrize(
    ("markers", "fixtures", "reasons"),
    [
        ((), (), []),
        (("slow",), (), ["slow"]),
        (("torch",), (), ["needs torch"]),
        ((), ("minilm_repository",), ["needs torch"]),
        ((), ("tmp_path",), []),
    ],
)
def test_reason_follows_from_markers_and_fixtures(
    markers: tuple[str, ...], fixtures: tuple[str, ...], reasons: list[str]
) -> None:
    class Item:
        fixturenames = fixtures

        def get_closest_marker(self, name: str) -> bool:
            return name in markers

    assert list(quick.reasons_of(Item())) == reasons  # type: ignore[arg-type]
