"""The entry point `attnserve-server`: its commands, its version, and its sentence for each failure to start.

`run` sets `sys.argv` and returns the exit code. It is 2 for a repository without models, and for a missing library.
Some tests start another Python process.
"""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import attnserve_server
import pytest
from attnserve_server import cli


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr("sys.argv", ["attnserve-server", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


def test_version_is_that_of_the_distribution(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"attnserve-server {metadata.version('attnserve')}\n"
    assert attnserve_server.__version__ == metadata.version("attnserve")


def test_version_of_a_source_tree_that_is_not_installed_is_unknown() -> None:
    code = "import attnserve_server; print(attnserve_server.__version__)"
    environment = {"PYTHONPATH": str(Path(attnserve_server.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout == "unknown\n"


def test_package_has_no_other_lazy_attributes() -> None:
    with pytest.raises(AttributeError, match="module 'attnserve_server' has no attribute 'other'"):
        attnserve_server.other  # noqa: B018 - the access is the test


def test_repository_without_models_is_reported_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code = run(monkeypatch, "serve", "--repository", str(tmp_path), "--grpc-port", "0", "--http-port", "0")
    assert code == cli.EXIT_REFUSED
    error = capsys.readouterr().err
    assert error.startswith(f"attnserve-server: no model in {tmp_path}: make one with")
    assert "Traceback" not in error


def test_help_lists_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    for command in ("serve", "export", "prepare", "inspect", "check", "healthcheck"):
        assert command in shown


@pytest.mark.parametrize("missing", ["typer", "pydantic_settings", "onnxruntime", "grpc_health"])
def test_missing_extra_is_reported_in_one_sentence(missing: str) -> None:
    # None in sys.modules makes the import fail as for a missing module.
    program = f"import sys; sys.modules[{missing!r}] = None; from attnserve_server.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == cli.EXIT_REFUSED
    assert done.stdout == ""
    assert done.stderr.startswith(f"attnserve-server needs {missing}")
    assert done.stderr.endswith(": pip install 'attnserve[server]' (with a GPU: 'attnserve[server-gpu]')\n")
    assert done.stderr.count("\n") == 1
