"""The command `attnserve`: its output as text and JSON, and its failures.

The fixture `attnserve` runs the command against a fake server, whose address it stores in ATTNSERVE_SERVER. Each kind
of failure has an exit code, such as 2 for a wrong command line and 3 for an invalid request.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from attnserve_client import AttentionMap, AttnserveError, Client, Overloaded, ResponseTooLarge, Token, __version__
from attnserve_client import cli as cli_package
from attnserve_client.cli._app import _json_data, app
from attnserve_client.cli._compare import Change, compare
from attnserve_client.cli._errors import EXIT_CODES, exit_code_of, sentence_of
from attnserve_client.cli._text import clean, fitted
from attnserve_client.errors import InternalFault, RequestCancelled
from attnserve_client.testing import FakeServer
from typer.testing import CliRunner, Result

TEXT = "The buyer agrees to assume all liabilities, except those specifically excluded in Schedule B."


@pytest.fixture
def attnserve(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("ATTNSERVE_SERVER", server.target)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*line: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(app, list(line), input=stdin)

    return run


def test_infer_prints_each_output(attnserve: Any) -> None:
    result = attnserve("infer", "fake", "hello world", "again")
    assert result.exit_code == 0, result.output
    assert "hello world" in result.stdout
    assert "embedding  float32 16  norm 1.0000" in result.stdout
    assert "batch of 2" in result.stdout


def test_infer_prints_json(attnserve: Any) -> None:
    result = attnserve("infer", "fake", "hello", "--json", "--output", "embedding", "--model-version", "1")
    answer = json.loads(result.stdout)
    assert answer["receipt"]["model"] == "fake"
    (one,) = answer["results"]
    assert one["outputs"]["embedding"]["shape"] == [16]
    # The embedding's norm is 1 to float32.
    assert np.linalg.norm(one["outputs"]["embedding"]["data"]) == pytest.approx(1.0, abs=1e-6)
    assert one["run"]["batch_size"] == 1
    assert list(one["outputs"]) == ["embedding"]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_json_writes_infinities_as_strings(dtype: type) -> None:
    data = _json_data(np.array([[1.5, -np.inf], [np.inf, -2]], dtype))
    assert json.loads(json.dumps(data, allow_nan=False)) == [[1.5, "-Infinity"], ["Infinity", -2.0]]
    assert _json_data(np.array(-np.inf, dtype)) == "-Infinity"
    assert _json_data(np.array([1, 2])) == [1, 2]


def test_infer_reads_a_text_from_each_line_of_standard_input(attnserve: Any, server: FakeServer) -> None:
    result = attnserve("infer", "fake", "-", "--json", stdin="first\n\nsecond\n")
    assert len(json.loads(result.stdout)["results"]) == 2
    assert [each.text.text for each in server.requests[0].sequences] == ["first", "second"]


def test_empty_standard_input_exits_with_the_reason(attnserve: Any) -> None:
    result = attnserve("infer", "fake", "-", stdin="\n")
    assert result.exit_code == 2
    assert "no text" in result.stderr


def test_explain_shows_the_last_layer_by_word_by_default(attnserve: Any, server: FakeServer) -> None:
    result = attnserve("explain", "fake", TEXT)
    assert result.exit_code == 0, result.output
    selection = server.requests[0].attention
    assert list(selection.layers) == [-1]
    assert (selection.head_reduction, selection.unit, selection.special_tokens) == (2, 2, 2)
    assert "fake, layer 1 (layer.1), 4 heads joined" in result.stdout
    assert "liabilities" in result.stdout
    assert "[CLS]" not in result.stdout
    assert "strongest links" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_explain_sends_its_options(attnserve: Any, server: FakeServer) -> None:
    attnserve("explain", "fake", "a b", "--layer", "0", "--heads", "0,2", "--unit", "token", "--keep-special")
    selection = server.requests[0].attention
    assert (list(selection.layers), list(selection.heads)) == ([0], [0, 2])
    assert (selection.unit, selection.special_tokens) == (1, 1)
    result = attnserve("explain", "fake", "a b", "--head", "each", "--layer", "rollout")
    assert result.exit_code == 3
    assert server.requests[1].attention.layer_reduction == 3
    several = attnserve("explain", "fake", "a b", "--head", "1,2")
    assert "mean of these heads" in several.stdout
    pair = attnserve("explain", "fake", "a query", "--pair", "a passage", "--top", "0")
    assert server.requests[-1].sequences[0].text.text_pair == "a passage"
    assert "strongest links" not in pair.stdout


def test_explain_draws_a_map_for_each_layer_within_eighty_columns(attnserve: Any) -> None:
    result = attnserve("explain", "fake", TEXT, "--layers", "0,-1")
    assert result.exit_code == 0, result.output
    assert "layer 0 (layer.0)" in result.stdout
    assert "layer 1 (layer.1)" in result.stdout
    assert max(map(len, result.stdout.splitlines()[1:])) <= 80
    found = json.loads(attnserve("explain", "fake", TEXT, "--layers", "0,1", "--json").stdout)
    assert [each["attention"]["layer"] for each in found["maps"]] == [0, 1]
    assert found["attention"] == found["maps"][0]["attention"]


def test_explain_rollout_is_the_layer_of_that_name(attnserve: Any) -> None:
    assert attnserve("explain", "fake", "a b", "--rollout").stdout == (
        attnserve("explain", "fake", "a b", "--layers", "rollout").stdout
    )


def test_explain_compares_two_models(attnserve: Any, server: FakeServer) -> None:
    result = attnserve("explain", "fake", TEXT, "--compare", "fake/1")
    assert "rows differ by 0.000 on average" in result.stdout
    assert [request.version for request in server.requests] == ["", "1"]
    found = json.loads(attnserve("explain", "fake", TEXT, "--compare", "fake", "--json").stdout)
    assert found["compare"]["attention"] == found["attention"]
    assert found["compare"]["changes"] == [{"distance": 0.0, "changes": []}]
    assert attnserve("explain", "fake", TEXT, "--compare", "other").exit_code == 4


def test_comparison_is_the_total_variation_distance_of_rows_and_their_greatest_changes() -> None:
    tokens = (Token(0, "a", 0, 1), Token(1, "b", 2, 3))
    first, second = (
        AttentionMap(("s",), 0, "self", "dense", (0,), "seq", "seq", tokens, tokens, np.array([rows], dtype=np.float32))
        for rows in ([[0.75, 0.25], [0.5, 0.5]], [[0.25, 0.75], [0.5, 0.5]])
    )
    found = compare(first, second, 1)
    assert found is not None
    assert found.distance == 0.25, "half of |0.75 - 0.25| + |0.25 - 0.75| in one of two rows"
    assert found.changes == (Change("a", "a", 0.75, 0.25),)
    other = replace(second, query_tokens=(Token(0, "ab", 0, 3),))
    assert compare(first, other, 1) is None, "other units"


def test_explain_prints_json(attnserve: Any) -> None:
    result = attnserve("explain", "fake", "-", "--json", "--top", "3", stdin="The buyer\nagrees\n")
    answer = json.loads(result.stdout)
    assert [token["text"] for token in answer["attention"]["keys"]] == ["The", "buyer", "agrees"]
    assert np.shape(answer["attention"]["weights"]) == (1, 3, 3)
    weights = [link["weight"] for link in answer["links"]]
    assert len(weights) == 3
    assert weights == sorted(weights, reverse=True)


def test_explain_writes_page_and_picture(attnserve: Any, tmp_path: Path) -> None:
    html, png = tmp_path / "map.html", tmp_path / "map.png"
    result = attnserve("explain", "fake", TEXT, "--html", str(html), "--png", str(png))
    assert result.exit_code == 0, result.output
    assert html.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "wrote" in result.stdout


def test_explain_draws_a_view_as_svg_with_the_links_that_it_lists(attnserve: Any, tmp_path: Path) -> None:
    svg = tmp_path / "map.svg"
    result = attnserve("explain", "fake", TEXT, "--svg", str(svg), "--view", "arcs", "--all-links")
    assert result.exit_code == 0, result.output
    drawing = ET.parse(svg).getroot()
    assert drawing.tag.endswith("svg")
    assert ">Without special tokens.<" in svg.read_text(encoding="utf-8")
    assert f"wrote {svg}" in result.stdout.replace("\n", "")
    refused = attnserve("explain", "fake", TEXT, "--svg", str(tmp_path), "--view", "bipartite")
    assert (refused.exit_code, "cannot write" in refused.output) == (2, True)


def test_explain_sends_two_texts_and_arrays_from_files(
    attnserve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "dog.npy", np.ones((3, 2), np.float32))
    sent: list[Any] = []
    real = Client.infer

    def noting(self: Client, model: str, inputs: Any, **options: Any) -> Any:
        sent.append(inputs)
        return real(self, model, inputs[0] if isinstance(inputs, tuple) else inputs, **options)

    monkeypatch.setattr(Client, "infer", noting)
    array = ("--tensor", f"pixels={tmp_path / 'dog.npy'}")
    for line, texts in (((), ("a dog",)), (("--pair", "ein Hund"), ("a dog", "ein Hund"))):
        result = attnserve("explain", "fake", "a dog", *line, *array)
        assert result.exit_code == 0, result.output
        *given, arrays = sent.pop()
        assert tuple(given) == texts
        np.testing.assert_array_equal(arrays["pixels"], np.ones((3, 2)))
    assert "ein Hund" in result.stdout


def test_malformed_array_files_exit_with_the_reason(attnserve: Any, tmp_path: Path) -> None:
    (tmp_path / "text.npy").write_text("no array", encoding="utf-8")
    (tmp_path / "empty.npy").write_bytes(b"")
    np.savez(tmp_path / "two.npz", np.ones(2))
    np.save(tmp_path / "object.npy", np.array([{}], object))
    for given, words in {
        "pixels": "is not NAME=FILE.npy",
        "=x.npy": "is not NAME=FILE.npy",
        f"x={tmp_path / 'missing.npy'}": "cannot read",
        f"x={tmp_path / 'text.npy'}": "is not a .npy file of one array",
        f"x={tmp_path / 'empty.npy'}": "is not a .npy file of one array",
        f"x={tmp_path / 'two.npz'}": "is not a .npy file of one array",
        f"x={tmp_path / 'object.npy'}": "is not a .npy file of one array",
    }.items():
        result = attnserve("explain", "fake", TEXT, "--tensor", given)
        assert result.exit_code == 2
        assert words.replace(" ", "") in "".join(result.stderr.split()).replace("│", "")


def test_unwritable_file_exits_with_the_reason(attnserve: Any, tmp_path: Path) -> None:
    for option in ("--html", "--png"):
        result = attnserve("explain", "fake", "text", option, str(tmp_path / "none" / "map"))
        assert result.exit_code == 2
        assert "cannot write" in result.stderr


def test_picture_without_matplotlib_prints_what_to_install(
    attnserve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    result = attnserve("explain", "fake", "text", "--png", str(tmp_path / "map.png"))
    assert result.exit_code == 2
    assert "attnserve[plot]" in result.stderr


@pytest.mark.parametrize("line", [("--layer", "last"), ("--layers", "1,x"), ("--heads", "middle"), ("--unit", "line")])
def test_invalid_options_exit_with_2(attnserve: Any, line: tuple[str, str]) -> None:
    result = attnserve("explain", "fake", "text", *line)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_models_are_listed_and_described(attnserve: Any) -> None:
    listed = attnserve("models")
    assert "fake" in listed.stdout
    assert "ready" in listed.stdout
    described = attnserve("models", "fake")
    assert "input_ids" in described.stdout
    assert "layer.1 (self, dense, 4 heads, seq × seq)" in described.stdout
    assert "batch  rows share runs (proved), under the policy 'proved'" in described.stdout
    assert json.loads(attnserve("models", "fake", "--json").stdout)["axes"][0]["padding_status"] == "proved"
    assert json.loads(attnserve("models", "--json").stdout)[0]["name"] == "fake"
    assert json.loads(attnserve("models", "fake", "--json").stdout)["sites"][0]["name"] == "layer.0"


def test_error_is_one_line_with_field_value_and_limit(attnserve: Any) -> None:
    result = attnserve("explain", "fake", "text", "--layer", "9")
    assert result.exit_code == 3
    what = "layer 9 is out of range; the model has 2 sites: -2 to 1"
    assert result.stderr == f"attnserve: attention.layers[0]: {what}\n"
    assert result.stdout == ""


def test_json_error_is_written_to_stderr(attnserve: Any) -> None:
    result = attnserve("models", "other", "--json")
    assert result.exit_code == 4
    error = json.loads(result.stderr)["error"]
    assert (error["reason"], error["metadata"]["model"]) == ("MODEL_NOT_FOUND", "other")


def test_missing_server_is_named(attnserve: Any, server: FakeServer) -> None:
    server.stop()
    result = attnserve("models", "--timeout", "0.5")
    assert result.exit_code in (8, 9)
    assert server.target in result.stderr


@pytest.mark.parametrize("addresses", ["", ",", "localhost:8001,"])
def test_server_without_an_address_exits_with_the_reason(attnserve: Any, addresses: str) -> None:
    result = attnserve("models", "--server", addresses)
    assert result.exit_code == 2
    assert "is empty or has an empty member" in " ".join(result.output.replace("│", " ").split())


def test_several_servers_are_given_with_commas(attnserve: Any, server: FakeServer) -> None:
    with FakeServer() as stopped:
        gone = stopped.target
    result = attnserve("models", "--server", f"{gone},{server.target}")
    assert result.exit_code == 0, result.output


def test_slow_server_exits_with_9(attnserve: Any, server: FakeServer) -> None:
    server.latency_s = 30.0
    result = attnserve("infer", "fake", "text", "--timeout", "0.3")
    assert result.exit_code == 9
    assert "--timeout" in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Overloaded("full"), 7),
        (ResponseTooLarge("too large"), 6),
        (InternalFault("internal error"), 10),
        (RequestCancelled("gone"), 11),
        (AttnserveError("else"), 1),
    ],
)
def test_each_remedy_has_an_exit_code(error: AttnserveError, code: int) -> None:
    assert exit_code_of(error) == code
    assert sentence_of(error, "here:1") == error.message
    assert len(EXIT_CODES) == len({kind for kind, _ in EXIT_CODES})


def test_internal_error_prints_the_request_id() -> None:
    assert "request id mine" in sentence_of(InternalFault("internal error", request_id="mine"), "here:1")


def test_help_has_examples_and_exit_codes(attnserve: Any) -> None:
    assert "Exit codes" in attnserve("--help").stdout
    for command in ("infer", "explain", "models"):
        shown = attnserve(command, "--help").stdout
        assert "Examples:" in shown
        assert "ATTNSERVE_SERVER" in shown


def test_texts_cannot_send_escape_sequences_to_the_terminal(attnserve: Any) -> None:
    assert clean("a\x1b[31mb\x07\u202ec") == "a [31mb  c"
    result = attnserve("infer", "fake", "hello\x1b]0;owned\x07 [bold]world[/bold]")
    assert "\x1b" not in result.stdout
    assert "[bold]world[/bold]" in result.stdout


def test_labels_have_the_given_width() -> None:
    assert fitted("liabilities", 6) == "liabi…"
    assert fitted("ab", 4) == "ab  "
    assert fitted("責任責任", 5) == "責任…"


def test_entry_point_runs_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["attnserve", "--help"])
    with pytest.raises(SystemExit) as caught:
        cli_package.main()
    assert caught.value.code == 0


def test_entry_point_without_its_extra_prints_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "typer", None)
    with pytest.raises(SystemExit) as caught:
        cli_package.main()
    assert caught.value.code == 2
    assert "pip install 'attnserve[cli]'" in capsys.readouterr().err


def test_version_option_prints_the_installed_version(attnserve: Any) -> None:
    assert attnserve("--version").stdout == f"attnserve {__version__}\n"
