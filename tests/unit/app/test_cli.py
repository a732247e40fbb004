"""The command line: what it is told in one sentence, and how it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
from attnserve_server import cli


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
    for command in ("serve", "export", "prepare", "inspect", "healthcheck"):
        assert command in shown
