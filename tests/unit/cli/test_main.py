"""The entry point `attnserve-server`: its commands, its version, and its sentence for each failure to start."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from attnserve_server import cli


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """Restore the root logger: `serve` binds it to the standard error of one test, which is closed afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr("sys.argv", ["attnserve-server", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


def test_the_version_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.startswith("attnserve-server 0.")


def test_a_repository_without_models_is_told_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code = run(monkeypatch, "serve", "--repository", str(tmp_path), "--grpc-port", "0", "--http-port", "0")
    assert code == cli.EXIT_REFUSED
    error = capsys.readouterr().err
    assert error.startswith(f"attnserve-server: no model in {tmp_path}: make one with")
    assert "Traceback" not in error


def test_every_command_is_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    for command in ("serve", "export", "prepare", "inspect", "check", "healthcheck"):
        assert command in shown


@pytest.mark.parametrize("missing", ["typer", "pydantic_settings", "onnxruntime", "grpc_health"])
def test_the_command_without_its_extra_says_so_in_one_sentence(missing: str) -> None:
    # None in sys.modules is how Python itself marks a module that is not to be found.
    program = f"import sys; sys.modules[{missing!r}] = None; from attnserve_server.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == cli.EXIT_REFUSED
    assert done.stdout == ""
    assert done.stderr.startswith(f"attnserve-server needs {missing}")
    assert done.stderr.endswith(": pip install 'attnserve[server]' (with a GPU: 'attnserve[server-gpu]')\n")
    assert done.stderr.count("\n") == 1
