"""Invalid files: each ends in one sentence and exit code 2, or in a whole bundle; never a traceback or a path.

The commands are `prepare`, which converts an ONNX file to a bundle (the folder of one model), and `inspect`.
`BAD_MODELS` and `ODD_MODELS` have a builder and words of the expected output for each file.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import typer
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.model.holding import verify
from attnserve_server.model.manifest import TextSpec
from attnserve_server.model.repository import Repository
from bad_files import BAD_MODELS, ODD_MODELS, OUTSIDE, endless, nested_deeply, outside, tanh
from commands import call, conversion_app
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx_files import WIDTH, encoder, saved
from tiny_bundle import VOCABULARY, tiny_tokenizer
from two_sided_graphs import encoder_decoder
from typer.testing import CliRunner, Result

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    return conversion_app()


def prepare(app: typer.Typer, file: Path, *options: object) -> Result:
    return call(app, "prepare", file, "--name", "x", "--repository", file.parent / "bundles", *options)


def refused(result: Result, folder: Path) -> str:
    """Return the one sentence of a refusal; assert that no file was written."""
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


@pytest.mark.parametrize("what", BAD_MODELS)
def test_inspect_describes_a_model_or_refuses_it(what: str, app: typer.Typer, tmp_path: Path) -> None:
    make, _ = BAD_MODELS[what]
    result = CliRunner().invoke(app, ["inspect", str(saved(make(), tmp_path / "ranker.onnx"))])
    if result.exit_code == 0:
        assert "no attention sites" in result.stdout
    else:
        refused(result, tmp_path)


@pytest.mark.parametrize("way", OUTSIDE)
def test_external_data_that_is_not_in_the_models_folder_is_refused(way: str, app: typer.Typer, tmp_path: Path) -> None:
    said = refused(prepare(app, outside(tmp_path, way)), tmp_path)
    assert re.search(OUTSIDE[way], said), said


@pytest.mark.parametrize("depth", [10, 40, 2000])
def test_deeply_nested_graphs_do_not_overflow_the_stack(depth: int, app: typer.Typer, tmp_path: Path) -> None:
    file = tmp_path / "ranker.onnx"
    file.write_bytes(nested_deeply(depth))
    said = refused(prepare(app, file), tmp_path)
    assert re.search("not a valid ONNX model|is not an ONNX file, or is cut short", said)


@pytest.mark.parametrize("what", ODD_MODELS)
def test_unusual_model_is_served(what: str, app: typer.Typer, tmp_path: Path) -> None:
    make, words = ODD_MODELS[what]
    result = prepare(app, saved(make(), tmp_path / "ranker.onnx"))
    assert result.exit_code == 0, (result.output, result.exception)
    assert re.search(words, result.stderr)
    verify(Repository(tmp_path / "bundles").bundle("x"))


def test_model_without_attention_is_refused_where_attention_is_required(app: typer.Typer, tmp_path: Path) -> None:
    said = refused(prepare(app, saved(tanh(), tmp_path / "ranker.onnx"), "--require-attention"), tmp_path)
    assert "ranker.onnx has no attention site that gives weights" in said
    assert prepare(app, saved(encoder(), tmp_path / "ranker.onnx"), "--require-attention").exit_code == 0


def rigid(length: int) -> onnx.ModelProto:
    """An encoder whose nodes need the length that it was exported with."""
    model = encoder(length=length)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1, length, WIDTH]), "shape"))
    model.graph.node[-1].output[:] = ["before"]
    model.graph.node.append(onnx.helper.make_node("Reshape", ["before", "shape"], ["hidden"]))
    return model


def averaging(length: int) -> onnx.ModelProto:
    """An encoder that runs on any length, but divides by the one that it was exported with."""
    model = encoder(length=length)
    tensors = {"share": np.array(1 / length, np.float32), "axis": np.array([1])}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in tensors.items())
    model.graph.node.append(onnx.helper.make_node("Mul", ["hidden", "share"], ["shared"]))
    model.graph.node.append(onnx.helper.make_node("ReduceSum", ["shared", "axis"], ["mean"], keepdims=0))
    model.graph.output.append(onnx.helper.make_tensor_value_info("mean", onnx.TensorProto.FLOAT, ["batch", WIDTH]))
    return model


def test_fixed_length_that_the_graph_does_not_need_becomes_dynamic(app: typer.Typer, tmp_path: Path) -> None:
    tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    model = saved(encoder(length=12), tmp_path / "ranker.onnx")
    result = prepare(app, model, "--tokenizer", tmp_path / "tokenizer.json")
    assert result.exit_code == 0, result.output
    assert "the graph does not depend on its fixed length of 12: it accepts texts of up to 12 tokens" in result.stderr
    manifest = Repository(tmp_path / "bundles").bundle("x").manifest
    assert manifest.text == TextSpec(axis="seq", max_tokens=12, as_written=())
    assert [spec.shape for spec in manifest.inputs] == [("seq",), ("seq",)]
    assert manifest.axis("seq").paddable
    assert (manifest.sites[0].query_axis, manifest.outputs[0].shape) == ("seq", ("seq", WIDTH))


@pytest.mark.parametrize(
    ("model", "start", "words"),
    [
        (lambda: encoder_decoder(50), "[NOWHERE]", "the tokenizer has no token '[NOWHERE]'"),
        (encoder, "[SEP]", "'input_ids' alone holds token ids"),
        (tanh, "", "has no input of token ids, such as input_ids, for --tokenizer to fill"),
        (lambda: encoder(length=12, masked=False), "", "fixed length of 12: text needs a dynamic axis"),
        (lambda: rigid(12), "", "fixed length of 12: text needs a dynamic axis"),
        (lambda: averaging(12), "", "fixed length of 12: text needs a dynamic axis"),
    ],
    ids=["no such token", "no second input", "no ids", "no mask", "length is needed", "length is a divisor"],
)
def test_text_that_a_model_cannot_take_is_refused(
    model: Callable[[], onnx.ModelProto], start: str, words: str, app: typer.Typer, tmp_path: Path
) -> None:
    tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    options = ("--tokenizer", tmp_path / "tokenizer.json", *(("--pair-start", start) if start else ()))
    assert words in refused(prepare(app, saved(model(), tmp_path / "ranker.onnx"), *options), tmp_path)


def test_second_text_starts_with_the_named_token(app: typer.Typer, tmp_path: Path) -> None:
    tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    options = ("--tokenizer", tmp_path / "tokenizer.json", "--pair-start", "[SEP]")
    assert prepare(app, saved(encoder_decoder(50), tmp_path / "ranker.onnx"), *options).exit_code == 0
    text = Repository(tmp_path / "bundles").bundle("x").manifest.text
    assert text is not None
    assert (text.axis, text.pair_axis, text.pair_start) == ("source_seq", "seq", VOCABULARY.index("[SEP]"))


@pytest.mark.parametrize("command", ["export", "prepare", "inspect"])
def test_exit_codes_are_in_the_help(command: str, app: typer.Typer) -> None:
    shown = " ".join(call(app, command, "--help").output.split())
    assert "Exit codes: 0, success; 1, internal error; 2, refused" in shown


def mutations() -> st.SearchStrategy[bytes]:
    """A real file, cut anywhere, or with a few of its bytes changed."""
    whole = encoder().SerializeToString()
    # Most bytes are two tables, where all changes have the same effect, so the rest is changed as often as the tables.
    places = st.one_of(
        st.integers(0, 1500), st.integers(len(whole) - 800, len(whole) - 1), st.integers(0, len(whole) - 1)
    )
    changes = st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4)

    def changed(pairs: list[tuple[int, int]]) -> bytes:
        content = bytearray(whole)
        for place, value in pairs:
            content[place] = value
        return bytes(content)

    return st.one_of(st.integers(0, len(whole) - 1).map(lambda end: whole[:end]), changes.map(changed))


@settings(max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=mutations())
def test_truncated_or_changed_file_is_refused_or_converted_whole(content: bytes, app: typer.Typer) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "ranker.onnx"
        file.write_bytes(content)
        result = prepare(app, file)
        if result.exit_code == 0:
            verify(Repository(folder / "bundles").bundle("x"))
        else:
            refused(result, folder)


def test_endless_loop_is_stopped(app: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphRunner, "limit_s", 0.2)
    said = refused(prepare(app, saved(endless(), tmp_path / "ranker.onnx")), tmp_path)
    assert "the model does not run: one run took more than 0.2 s" in said


@pytest.mark.parametrize("command", ["prepare", "inspect"])
@pytest.mark.parametrize("what", ["a folder", "an empty file", "text", "another format's name"])
def test_file_of_another_format_is_refused(what: str, command: str, app: typer.Typer, tmp_path: Path) -> None:
    file = tmp_path / ("model.onnxtxt" if what == "another format's name" else "ranker.onnx")
    if what == "a folder":
        file.mkdir()
    else:
        file.write_bytes(b"" if what == "an empty file" else b"ir_version: 9")
    line = ["inspect", str(file)] if command == "inspect" else None
    result = CliRunner().invoke(app, line) if line else prepare(app, file)
    assert re.search("is a folder|is not an ONNX file|is not a bundle", refused(result, tmp_path))
