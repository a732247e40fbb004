"""`export` and `prepare`: their reports, and their error sentences and exit codes.

`prepare` converts an ONNX file, and `export` a checkpoint, to a bundle: the folder of one model. Bad input exits with
2, and an internal error with 1.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from attnserve_server.model.repository import Repository
from commands import call, conversion_app
from onnx_files import encoder, saved
from open_axes_graphs import cross_decoder, image_encoder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    return conversion_app()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return saved(encoder(), tmp_path / "ranker.onnx")


def test_prepare_reports_the_bundle_and_its_check(app: typer.Typer, file: Path, tmp_path: Path) -> None:
    result = call(app, "prepare", file, "--name", "ranker", "--repository", tmp_path / "models")
    assert result.exit_code == 0, result.output
    assert "ranker/1: 1 of 1 attention sites, fp32" in result.stdout
    assert "checked against the file itself" in result.stdout
    steps = [line for line in result.stderr.splitlines() if line]
    assert steps[0] == "reading the file"
    assert steps[-1] == "writing the bundle"


def test_json_output_is_the_manifest_alone(app: typer.Typer, file: Path, tmp_path: Path) -> None:
    result = call(app, "prepare", file, "--name", "ranker", "--repository", tmp_path / "models", "--json")
    manifest = Repository(tmp_path / "models").bundle("ranker").manifest
    assert json.loads(result.stdout) == json.loads(manifest.model_dump_json())


def test_versions_count_up_and_an_existing_one_is_refused(app: typer.Typer, file: Path, tmp_path: Path) -> None:
    line = ("prepare", file, "--name", "ranker", "--repository", tmp_path / "models")
    assert "ranker/5:" in call(app, *line, "--version", "5").stdout
    assert "ranker/6:" in call(app, *line).stdout
    refused = call(app, *line, "--version", "5")
    assert refused.exit_code == 2
    assert "error: bundle ranker/5: this version exists already" in refused.stderr


@pytest.mark.parametrize(
    ("command", "source"),
    [("prepare", "text.onnx"), ("prepare", "missing.onnx"), ("export", "folder"), ("inspect", "text.onnx"),
     ("inspect", "missing.onnx"), ("inspect", "folder"), ("export", "package:no_such_package_here")],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_exit_code_two(
    command: str, source: str, app: typer.Typer, tmp_path: Path
) -> None:
    (tmp_path / "text.onnx").write_text("no model", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    place = source if source.startswith("package:") else tmp_path / source
    options = () if command == "inspect" else ("--name", "x", "--repository", tmp_path / "models")
    result = call(app, command, place, *options)
    assert result.exit_code == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in result.output
    assert str(tmp_path) not in errors[0]
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    "options",
    [("--name", "../up"), ("--name", ""), ("--name", "x", "--version", "0"), ("--name", "x", "--version", "v1")],
)
def test_impossible_names_and_versions_are_usage_errors(options: tuple[str, ...], app: typer.Typer, file: Path) -> None:
    result = call(app, "prepare", file, "--repository", file.parent / "models", *options)
    assert result.exit_code == 2
    assert "Usage" in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max-length", "many"), "'many' is neither a length of 1 or more nor AXIS=N"),
        (("--max-length", "0"), "'0' is neither a length of 1 or more nor AXIS=N"),
        (("--max-length", "8", "--max-length", "9"), "8 and 9 are given"),
        (("--max-length", "seq=none"), "'seq=none' is not NAME=SIZE"),
        (("--axis", "height"), "'height' is not NAME=SIZE with a size of 1 or more"),
        (("--axis", "height=4", "--axis", "height=8"), "'height' is given twice"),
    ],
)
def test_impossible_sizes_are_usage_errors(options: tuple[str, ...], words: str, app: typer.Typer, file: Path) -> None:
    result = call(app, "prepare", file, "--name", "x", "--repository", file.parent / "models", *options)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.replace("\u2502", " ").split())


def test_an_open_image_is_refused_with_the_options_that_fix_it(app: typer.Typer, tmp_path: Path) -> None:
    wide = saved(image_encoder(rows=2, columns=5), tmp_path / "wide.onnx")
    line = ("prepare", wide, "--name", "wide", "--repository", tmp_path / "models", "--no-fuse", "--no-try")
    refused = call(app, *line)
    assert refused.exit_code == 2
    assert "fix them with --axis height=SIZE --axis width=SIZE" in refused.stderr
    result = call(app, *line, "--axis", "height=8", "--axis", "width=20")
    assert result.exit_code == 0, result.output
    assert "axis 'height' is 8, by --axis" in result.stderr
    (axis,) = Repository(tmp_path / "models").bundle("wide").manifest.axes
    assert (axis.grid, axis.leading) == ((2, 5), 1)
    shown = call(app, "inspect", tmp_path / "models" / "wide" / "1").stdout
    assert "axis 'num_channels' is 3, because of Conv 'cut'" in shown


def test_one_axis_takes_the_length_that_its_option_gives(app: typer.Typer, tmp_path: Path) -> None:
    file = saved(cross_decoder("frames"), tmp_path / "decoder.onnx")
    line = ("prepare", file, "--name", "d", "--repository", tmp_path / "models", "--no-fuse", "--no-try")
    result = call(app, *line, "--max-length", "16", "--max-length", "frames=1500")
    assert result.exit_code == 0, result.output
    assert "axis 'frames': up to 1500 positions (--max-length AXIS=N)" in result.stderr
    manifest = Repository(tmp_path / "models").bundle("d").manifest
    assert {axis.symbol: axis.max_length for axis in manifest.axes} == {"decoder_sequence_length": 16, "frames": 1500}


def test_failed_file_operation_is_one_sentence(app: typer.Typer, file: Path, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file stands here", encoding="utf-8")
    result = call(app, "prepare", file, "--name", "ranker", "--repository", tmp_path / "models")
    assert result.exit_code == 2
    assert "error: bundle ranker/1: could not be written" in result.stderr
    tokenizer = ("--tokenizer", tmp_path)
    refused = call(app, "prepare", file, "--name", "ranker", "--repository", tmp_path / "elsewhere", *tokenizer)
    assert refused.exit_code == 2
    assert "Traceback" not in refused.output


def test_missing_package_is_reported_with_its_install_command(
    app: typer.Typer, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.startswith("attnserve_server.conversion")]:
        monkeypatch.delitem(sys.modules, module)
    real = importlib.import_module("builtins").__import__

    def without_onnx(name: str, *arguments: object, **named: object) -> object:
        if name.partition(".")[0] == "onnx":
            raise ModuleNotFoundError("No module named 'onnx'", name="onnx")
        return real(name, *arguments, **named)

    monkeypatch.setattr("builtins.__import__", without_onnx)
    result = call(app, "prepare", file, "--name", "ranker", "--repository", tmp_path / "models")
    assert result.exit_code == 2
    assert result.stderr == "error: onnx is not installed; run: pip install 'attnserve[convert,server]'\n"


def test_help_imports_no_heavy_library() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; import typer\n"
        "from attnserve_server.cli import convert, inspect\n"
        "app = typer.Typer(); convert.register(app); inspect.register(app)\n"
        "result = CliRunner().invoke(app, ['export', '--help']); assert result.exit_code == 0, result.output\n"
        "assert 'Examples' in result.output\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnx_ir'} & set(sys.modules); assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_internal_error_is_one_sentence_and_a_variable_shows_its_traceback(
    app: typer.Typer, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> None:
        raise KeyError("lost")

    monkeypatch.setattr(importlib.import_module("attnserve_server.conversion.inspect"), "inspect_model", broken)
    result = call(app, "inspect", file)
    assert result.exit_code == 1
    how = "please report it (ATTNSERVE_TRACEBACK=1 prints the traceback)"
    assert result.stderr == f"error: internal error: KeyError: 'lost'; {how}\n"
    monkeypatch.setenv("ATTNSERVE_TRACEBACK", "1")
    assert isinstance(call(app, "inspect", file).exception, KeyError)


def test_report_has_a_line_for_the_batch_and_for_each_axis(app: typer.Typer, file: Path, tmp_path: Path) -> None:
    line = ("prepare", file, "--name", "ranker", "--repository", tmp_path / "models")
    shown = call(app, *line, "--batching", "off").stdout.splitlines()
    assert any(words.startswith("batch: ") and "rows run alone" in words for words in shown)
    assert any(words.startswith("axis seq: ") and "equal lengths only" in words for words in shown)
    shown = call(app, *line).stdout.splitlines()
    assert any(words.startswith("batch: ") and "rows share runs" in words for words in shown)
    assert any(words.startswith("axis seq: ") and "padded" in words for words in shown)
