"""Whatever file is brought: one sentence and exit code 2, or a bundle that is whole; never a traceback or a path."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from attnserve_server.build.runtime import Runner
from attnserve_server.cli import bring
from attnserve_server.model.repository import Repository, verify
from bad_files import BAD_MODELS, ODD_MODELS, OUTSIDE, endless, nested_deeply, outside
from onnx_files import saved
from typer.testing import CliRunner, Result


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    app = typer.Typer()
    bring.register(app)
    return app


def prepare(app: typer.Typer, file: Path, *options: object) -> Result:
    line = ("prepare", file, "--name", "x", "--repository", file.parent / "bundles", *options)
    return CliRunner().invoke(app, [str(argument) for argument in line], env={"COLUMNS": "200"})


def refused(result: Result, folder: Path) -> str:
    """The one sentence of a refusal, after which nothing is left behind."""
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in result.output
    assert str(folder) not in errors[0]
    assert not list(folder.rglob("bundles"))
    return errors[0]


@pytest.mark.parametrize("what", BAD_MODELS)
def test_model_that_cannot_be_served_is_refused(what: str, app: typer.Typer, tmp_path: Path) -> None:
    make, words = BAD_MODELS[what]
    said = refused(prepare(app, saved(make(), tmp_path / "ranker.onnx")), tmp_path)
    assert re.search(words, said), said


@pytest.mark.parametrize("way", OUTSIDE)
def test_external_data_that_is_not_in_the_models_folder_is_refused(way: str, app: typer.Typer, tmp_path: Path) -> None:
    said = refused(prepare(app, outside(tmp_path, way)), tmp_path)
    assert re.search(OUTSIDE[way], said), said


@pytest.mark.parametrize("depth", [10, 40, 2000])
def test_graphs_within_graphs_end_no_stack(depth: int, app: typer.Typer, tmp_path: Path) -> None:
    file = tmp_path / "ranker.onnx"
    file.write_bytes(nested_deeply(depth))
    said = refused(prepare(app, file), tmp_path)
    assert re.search("not a valid ONNX model|is not an ONNX file, or is cut short", said)


@pytest.mark.parametrize("what", ODD_MODELS)
def test_odd_model_is_served_all_the_same(what: str, app: typer.Typer, tmp_path: Path) -> None:
    make, words = ODD_MODELS[what]
    result = prepare(app, saved(make(), tmp_path / "ranker.onnx"))
    assert result.exit_code == 0, (result.output, result.exception)
    assert re.search(words, result.stderr)
    verify(Repository(tmp_path / "bundles").bundle("x"))


def test_loop_without_end_is_stopped(app: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runner, "limit_s", 0.2)
    said = refused(prepare(app, saved(endless(), tmp_path / "ranker.onnx")), tmp_path)
    assert "the model does not run: one run took more than 0.2 s" in said


@pytest.mark.parametrize("command", ["prepare", "inspect"])
@pytest.mark.parametrize("what", ["a folder", "an empty file", "text", "another format's name"])
def test_what_is_no_onnx_file_is_refused(what: str, command: str, app: typer.Typer, tmp_path: Path) -> None:
    file = tmp_path / ("model.onnxtxt" if what == "another format's name" else "ranker.onnx")
    if what == "a folder":
        file.mkdir()
    else:
        file.write_bytes(b"" if what == "an empty file" else b"ir_version: 9")
    line = ["inspect", str(file)] if command == "inspect" else None
    result = CliRunner().invoke(app, line) if line else prepare(app, file)
    assert re.search("is a folder|is not an ONNX file|no bundle", refused(result, tmp_path))
