"""The commands that bring a model: what they print, one clear sentence and exit code 2 for what cannot be."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import typer
from attention_graphs import Case
from attnserve_server.cli import convert as bring
from attnserve_server.conversion.inspect import axis_of_bundle, inspect_model
from attnserve_server.model.certificate import Clause, MaskNeed, PathStep, Verdict
from attnserve_server.model.manifest import AxisSpec, DerivedLength
from attnserve_server.model.repository import Repository, write_bundle
from made_by_hand import SURVIVED, certificate
from onnx_files import encoder, saved
from tiny_bundle import tiny_manifest, write_tiny_files
from two_sided_graphs import words_over_patches
from typer.testing import CliRunner, Result
from windowed_graphs import Windowed


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    app = typer.Typer()
    bring.register(app)
    return app


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return saved(encoder(), tmp_path / "ranker.onnx")


def call(app: typer.Typer, *arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def test_prepare_reports_the_bundle_and_its_check(app: typer.Typer, file: Path, tmp_path: Path) -> None:
    result = call(app, "prepare", file, "--name", "ranker", "--repository", tmp_path / "models")
    assert result.exit_code == 0, result.output
    assert "ranker/1: 1 of 1 attention sites, fp32" in result.stdout
    assert "checked against the file itself" in result.stdout
    steps = [line for line in result.stderr.splitlines() if line]
    assert steps[0] == "reading the file"
    assert steps[-1] == "writing the bundle"


def test_json_is_the_manifest_and_nothing_else(app: typer.Typer, file: Path, tmp_path: Path) -> None:
    result = call(app, "prepare", file, "--name", "ranker", "--repository", tmp_path / "models", "--json")
    manifest = Repository(tmp_path / "models").bundle("ranker").manifest
    assert json.loads(result.stdout) == json.loads(manifest.model_dump_json())


def test_versions_count_up_and_a_taken_one_is_refused(app: typer.Typer, file: Path, tmp_path: Path) -> None:
    line = ("prepare", file, "--name", "ranker", "--repository", tmp_path / "models")
    assert "ranker/5:" in call(app, *line, "--version", "5").stdout
    assert "ranker/6:" in call(app, *line).stdout
    refused = call(app, *line, "--version", "5")
    assert refused.exit_code == 2
    assert "error: bundle ranker/5: there is such a version already" in refused.stderr


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


def test_what_the_disk_refuses_is_one_sentence(app: typer.Typer, file: Path, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file stands here", encoding="utf-8")
    result = call(app, "prepare", file, "--name", "ranker", "--repository", tmp_path / "models")
    assert result.exit_code == 2
    assert "error: bundle ranker/1: could not be written" in result.stderr
    tokenizer = ("--tokenizer", tmp_path)
    refused = call(app, "prepare", file, "--name", "ranker", "--repository", tmp_path / "elsewhere", *tokenizer)
    assert refused.exit_code == 2
    assert "Traceback" not in refused.output


def test_missing_extra_is_told_with_its_install_line(
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
    assert (
        result.stderr
        == "error: onnx is not installed; bringing a model needs: pip install 'attnserve[convert,server]'\n"
    )


def test_help_needs_none_of_the_heavy_libraries() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; import typer; from attnserve_server.cli import bring\n"
        "app = typer.Typer(); bring.register(app)\n"
        "result = CliRunner().invoke(app, ['export', '--help']); assert result.exit_code == 0, result.output\n"
        "assert 'Examples' in result.output\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnx_ir'} & set(sys.modules); assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_what_nobody_foresaw_is_a_sentence_too_and_its_place_is_told_when_asked(
    app: typer.Typer, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> None:
        raise KeyError("lost")

    monkeypatch.setattr(importlib.import_module("attnserve_server.conversion.inspect"), "inspect_model", broken)
    result = call(app, "inspect", file)
    assert result.exit_code == 1
    assert result.stderr == "error: not foreseen: KeyError: 'lost' (ATTNSERVE_TRACEBACK=1 shows where)\n"
    monkeypatch.setenv("ATTNSERVE_TRACEBACK", "1")
    assert isinstance(call(app, "inspect", file).exception, KeyError)


def test_report_says_what_holds_for_the_batch_and_for_each_axis(app: typer.Typer, file: Path, tmp_path: Path) -> None:
    line = ("prepare", file, "--name", "ranker", "--repository", tmp_path / "models")
    shown = call(app, *line, "--batching", "off").stdout.splitlines()
    assert any(words.startswith("batch: ") and "rows run alone" in words for words in shown)
    assert any(words.startswith("axis seq: ") and "equal lengths only" in words for words in shown)
    shown = call(app, *line).stdout.splitlines()
    assert any(words.startswith("batch: ") and "rows share runs" in words for words in shown)
    assert any(words.startswith("axis seq: ") and "padded" in words for words in shown)


MEAN = PathStep(node="/mean", operator="ReduceMean", words="averages over all positions")
REFUTED = Clause(
    axis="seq",
    verdict=Verdict.REFUTED,
    reason="a mean over padded positions",
    path=(MEAN,),
    targets={"hidden": Verdict.REFUTED, "attention.layer0": Verdict.PROVED},
)


@pytest.fixture
def certified(tmp_path: Path) -> Path:
    """A bundle with a certificate that was made by hand."""
    need = MaskNeed(input="attention_mask", need="some", allowed_value=1)
    attacked = Clause(axis="batch", verdict=Verdict.UNKNOWN, reason="Foo is not known", attack=SURVIVED)
    made = certificate(clauses=(attacked, REFUTED), masks=(need,)).model_copy(update={"noise": {"hidden": 2e-7}})
    manifest = tiny_manifest().model_copy(update={"certificate": made})
    (tmp_path / "files").mkdir()
    return write_bundle(tmp_path / "models", manifest, write_tiny_files(tmp_path / "files")).path


def test_inspect_shows_the_path_behind_each_verdict(app: typer.Typer, certified: Path) -> None:
    needed = "a position in each row of attention_mask allowed equal to 1"
    assert call(app, "inspect", certified, "--batching").stdout.splitlines() == [
        "tiny/1",
        "batch neighbours: unknown, rows share runs under tested",
        "  why: Foo is not known",
        "  attack: 20 probes in 1.0 s, worst 0.1 of what counts as equal",
        "padding along seq: refuted, padded under no policy",
        "  why: a mean over padded positions, at ReduceMean '/mean'",
        "  path from the padded position:",
        "    /mean (ReduceMean): averages over all positions",
        "  hidden: refuted",
        "  attention.layer0: proved",
        f"padded only with {needed}; other sequences run with equal lengths",
        "noise among batch shapes, identical neighbours: at most 2e-07, at hidden",
    ]


def test_inspect_tells_the_certificate_as_json_too(app: typer.Typer, certified: Path) -> None:
    described = json.loads(call(app, "inspect", certified, "--batching", "--json").stdout)
    batch, seq = described["batching"]["clauses"]
    assert (batch["axis"], batch["under"]) == ("batch", {"proved": False, "tested": True, "off": False})
    assert seq["path"] == [{"node": "/mean", "operator": "ReduceMean", "words": "averages over all positions"}]
    assert described["batching"]["masks"][0]["input"] == "attention_mask"
    assert [axis["paddable"] for axis in described["axes"]] == [False]


def test_inspect_of_batching_needs_a_bundle_and_names_certify_for_an_old_one(
    app: typer.Typer, file: Path, tmp_path: Path
) -> None:
    refused = call(app, "inspect", file, "--batching")
    assert refused.exit_code == 2
    assert "error: ranker.onnx is no bundle" in refused.stderr
    (tmp_path / "files").mkdir()
    old = tiny_manifest().model_copy(update={"format": 1, "certificate": None})
    path = write_bundle(tmp_path / "models", old, write_tiny_files(tmp_path / "files")).path
    assert "check BUNDLE --certify" in call(app, "inspect", path, "--batching").stdout
    assert json.loads(call(app, "inspect", path, "--json").stdout)["batching"]["format"] == 1


def test_inspect_shows_a_bare_file(app: typer.Typer, tmp_path: Path) -> None:
    model = Case(heads=4, kv_heads=2, attributes={"is_causal": 1}).model()
    result = call(app, "inspect", saved(model, tmp_path / "bare.onnx"))
    assert result.exit_code == 0
    for words in ("axis symbols: batch, query_len, key_len", "batch x 4 x query_len x 8", "attention_0", "4 over 2"):
        assert words in result.stdout
    assert "causal, dense" in result.stdout
    assert "query_len, key_len" in result.stdout


def test_inspect_tells_cross_attention_by_its_axes(tmp_path: Path) -> None:
    (cross,) = inspect_model(saved(Case().model(), tmp_path / "cross.onnx")).sites
    assert (cross.kind, cross.query_axis, cross.key_axis) == ("cross", "query_len", "key_len")
    model = encoder(length=None)
    (unnamed,) = inspect_model(saved(model, tmp_path / "unnamed.onnx")).sites
    assert (unnamed.kind, unnamed.query_axis, unnamed.key_axis) == ("self", "", "")


def test_inspect_says_why_a_site_gives_no_weights(app: typer.Typer, tmp_path: Path) -> None:
    model = Case(kv_heads=4).model()
    model.graph.node[0].input.extend(["", "past"])
    model.graph.input.append(
        onnx.helper.make_tensor_value_info("past", onnx.TensorProto.FLOAT, ["batch", 4, "past", 8])
    )
    path = saved(model, tmp_path / "cached.onnx")
    said = json.loads(call(app, "inspect", path, "--json").stdout)
    assert said["sites"][0]["available"] is False
    assert "past_key" in said["sites"][0]["unavailable_reason"]
    assert "no: it takes past_key" in call(app, "inspect", path).stdout


def test_inspect_tells_the_same_facts_of_a_bundle_in_both_ways(app: typer.Typer, file: Path, tmp_path: Path) -> None:
    call(app, "prepare", file, "--name", "ranker", "--repository", tmp_path / "models")
    folder = tmp_path / "models" / "ranker" / "1"
    facts = json.loads(call(app, "inspect", folder, "--json").stdout)
    assert facts == json.loads(inspect_model(folder).model_dump_json())
    assert facts["axis_symbols"] == ["batch", "seq"]
    assert facts["sites"][0] | {"available": True, "query_axis": "seq", "heads": 4} == facts["sites"][0]
    shown = call(app, "inspect", folder).stdout
    assert (facts["source"], facts["precision"], facts["max_batch_size"]) == ("ranker.onnx", "fp32", 32)
    assert facts["text_axes"] == []
    whole = "made from ranker.onnx; fp32, takes no text, batches of up to 32"
    for words in (
        "ranker/1",
        whole,
        facts["digest"],
        "block.0.attention",
        "self, dense",
        "seq, seq",
        "batch x seq x 16",
    ):
        assert words in shown


def test_inspect_tells_how_wide_a_band_is(app: typer.Typer, tmp_path: Path) -> None:
    windowed = Windowed(block=4, before=1, after=1)
    call(app, "prepare", saved(windowed.model(), tmp_path / "long.onnx"), "--name", "long", "--repository", tmp_path)
    folder = tmp_path / "long" / "1"
    [site] = inspect_model(folder).sites
    assert (site.form, site.band, site.band_width) == ("windowed", "blocks", windowed.width)
    assert f"band of {windowed.width}" in call(app, "inspect", folder).stdout


def test_inspect_of_a_model_without_attention_says_so(app: typer.Typer, tmp_path: Path) -> None:
    path = saved(encoder(attend=False), tmp_path / "plain.onnx")
    assert "no attention sites" in call(app, "inspect", path).stdout


def test_inspect_of_a_tampered_bundle_is_refused(app: typer.Typer, file: Path, tmp_path: Path) -> None:
    call(app, "prepare", file, "--name", "ranker", "--repository", tmp_path / "models")
    model = tmp_path / "models" / "ranker" / "1" / "model.onnx"
    model.write_bytes(model.read_bytes() + b"\0")
    result = call(app, "inspect", model.parent)
    assert result.exit_code == 2
    assert "error: bundle ranker/1: model.onnx: sha256" in result.stderr


def test_inspect_shows_what_the_axes_of_a_bundle_are(app: typer.Typer, tmp_path: Path) -> None:
    file = saved(words_over_patches(50, leading=1), tmp_path / "clip.onnx")
    call(app, "prepare", file, "--name", "clip", "--repository", tmp_path / "models")
    folder = tmp_path / "models" / "clip" / "1"
    assert [(axis.symbol, axis.how) for axis in inspect_model(folder).axes] == [
        ("seq", ""),
        ("fixed_7", "fixed, 2 x 3 patches behind 1"),
    ]
    assert "fixed, 2 x 3 patches behind 1" in call(app, "inspect", folder).stdout


@pytest.mark.parametrize(
    ("stride", "offset", "words"),
    [(4, 3, "(seq + 3) / 4"), (1, 1, "seq + 1"), (2, 0, "seq / 2"), (2, -1, "(seq - 1) / 2")],
)
def test_derived_axes_are_shown_as_what_they_are_made_of(stride: int, offset: int, words: str) -> None:
    form = DerivedLength(source="seq", stride=stride, offset=offset)
    axis = AxisSpec(symbol="pooled", max_length=9, paddable=True, derived=form)
    assert axis_of_bundle(axis).how == words
