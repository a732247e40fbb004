"""The recipes and the notebook run against real servers, on real text, and show what their pages state.

Needs the package of MiniLM and torch, for its export. The recipes of word timings and of drift have small models too.
A recipe without a test fails the last one.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import onnx
import pytest
from attnserve_client import Client
from attnserve_server.model.repository import write_bundle
from onnx import numpy_helper
from serving import RunningServer, command, serve
from tiny_bundle import tiny_graph, tiny_manifest, tiny_tokenizer

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "examples" / "recipes"
NOTEBOOK = ROOT / "examples" / "attention.ipynb"
LICENSE = ROOT / "LICENSE"
MOVED_LAYER, MOVED_HEAD = 1, 0


def recipe(name: str) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def small_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The model of word timings, and three versions of the tiny model: 2 equals 1, and 3 has another head."""
    folder = tmp_path_factory.mktemp("recipes")
    timings = recipe("word_timings")
    line = [command("attnserve-server"), "prepare", str(timings.make(folder / "aligner")), "--name", "aligner"]
    line += ["--repository", str(folder / "models"), "--tokenizer", str(folder / "aligner/tokenizer.json"), "--no-try"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    for version in ("1", "2", "3"):
        graph = tiny_graph()
        if version == "3":
            # The columns of one head of the queries: its scores are three times as great.
            (weight,) = (each for each in graph.graph.initializer if each.name == f"wq{MOVED_LAYER}")
            changed = numpy_helper.to_array(weight).copy()
            half = changed.shape[1] // 2
            changed[:, MOVED_HEAD * half : (MOVED_HEAD + 1) * half] *= 3
            weight.CopyFrom(numpy_helper.from_array(changed, weight.name))
        file = folder / f"{version}.onnx"
        onnx.save(graph, file)
        files = {"model.onnx": file, "tokenizer.json": folder / "tokenizer.json"}
        write_bundle(folder / "models", tiny_manifest(version=version), files)
    with serve(folder / "models", folder) as server:
        yield server


def test_clauses_of_a_real_licence_link_their_defined_terms(
    minilm_server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    review = recipe("clause_review")
    picture = tmp_path / "clause.svg"
    found = review.main(minilm_server.target, "minilm", LICENSE, 5, picture)
    text = LICENSE.read_text(encoding="utf-8").splitlines()
    terms = set(review.defined_terms("\n".join(text)))
    assert terms == {
        *("License", "Licensor", "Legal Entity", "You", "Your", "Source", "Object", "Work"),
        *("Derivative Works", "Contribution", "Contributor"),
    }
    assert {link.clause for link in found} == {*"123456789", "4(a)", "4(c)", "4(d)"}
    for link in found:
        for term, line in (link.query, link.key):
            assert term in terms
            # A term may go on in the next line.
            assert term in " ".join(" ".join(text[line - 1 : line + 1]).split())
        assert link.query[0] != link.key[0]
    assert [link.times_even for link in found] == sorted((link.times_even for link in found), reverse=True)
    printed = capsys.readouterr().out.splitlines()
    assert len([line for line in printed if ", line " in line]) == 5
    assert "between other words" in printed[-2]
    drawn = {element.text for element in ET.parse(picture).iter() if element.tag.endswith("text")}
    for term, line in (found[0].query, found[0].key):
        assert set(term.split()) <= drawn
        assert line >= found[0].paragraph


def test_symptoms_of_a_note_are_linked_to_drugs_with_a_control(
    minilm_server: RunningServer, capsys: pytest.CaptureFixture[str]
) -> None:
    clinical = recipe("clinical_note")
    pairs = clinical.main(minilm_server.target, "minilm", clinical.NOTE, clinical.DRUGS, clinical.SYMPTOMS)
    assert len(pairs) == len(clinical.DRUGS) * len(clinical.SYMPTOMS)
    assert all(0 < pair.weight < 1 and 0 < pair.without_name < 1 for pair in pairs)
    # The name matters: in the strongest link, the same place without it has less than half of the weight.
    assert pairs[0].without_name < pairs[0].weight / 2
    assert pairs[0].rank <= 3
    printed = capsys.readouterr().out
    assert "to what the output depends on" in printed


def test_uses_of_variables_look_at_their_setters(
    minilm_server: RunningServer, capsys: pytest.CaptureFixture[str]
) -> None:
    flow = recipe("code_flow")
    found, everywhere = flow.main(minilm_server.target, "minilm", RECIPES / "bm42.py", "sparse_vectors")
    lines = (RECIPES / "bm42.py").read_text(encoding="utf-8").splitlines()
    assert len(found) >= 10
    for each in found:
        assert each.use.text == each.setter.text
        assert each.use.text in lines[each.use.line - 1]
        assert each.use.text in lines[each.setter.line - 1]
        assert each.setter.line <= each.use.line
    # The head was chosen on other functions, and still finds more setters than heads do on average.
    assert flow.share(found) > everywhere
    assert "chosen on" in capsys.readouterr().out


def test_positions_in_code_count_letters_and_not_bytes() -> None:
    source = "def f(é):\n    ü = é\n    return ü, é\n"
    ((text, names),) = recipe("code_flow").functions(source).values()
    assert [(name.text, text[name.start : name.end], name.line, name.sets) for name in names] == [
        ("é", "é", 1, True),
        ("ü", "ü", 2, True),
        ("é", "é", 2, False),
        ("ü", "ü", 3, False),
        ("é", "é", 3, False),
    ]


def test_sparse_vectors_of_one_row_find_the_paragraphs(
    minilm_server: RunningServer, capsys: pytest.CaptureFixture[str]
) -> None:
    bm42 = recipe("bm42")
    answers = bm42.main(minilm_server.target, "minilm", LICENSE, bm42.QUERIES)
    assert len(answers) == len(bm42.QUERIES)
    assert sum(1 / answer.bm42 for answer in answers) / len(answers) > 0.5
    assert sum(1 / answer.bm25 for answer in answers) / len(answers) > 0.5
    assert "a row is" in capsys.readouterr().out
    # The vectors are the row of [CLS] itself.
    documents = bm42.paragraphs(LICENSE.read_text(encoding="utf-8"))[1:3]
    with Client(minilm_server.target) as client:
        vectors = bm42.sparse_vectors(client, "minilm", documents)
        for document, vector in zip(documents, vectors, strict=True):
            (whole,) = client.infer("minilm", document, attention={"layers": -1, "unit": "word"}).attention
            expected: dict[str, float] = {}
            for token, weight in zip(whole.key_tokens, whole.head_weights()[0].tolist(), strict=True):
                for word in () if token.special else bm42.words_of(token.text):
                    expected[word] = max(expected.get(word, 0.0), weight)
            assert vector == pytest.approx(expected, abs=1e-5)


def test_words_are_timed_by_the_head_that_aligns(
    small_server: RunningServer, capsys: pytest.CaptureFixture[str]
) -> None:
    timings = recipe("word_timings")
    found = timings.main(small_server.target, "aligner")
    assert [each.word for each in found] == timings.TRANSCRIPT.split()
    for each in found:
        # A frame is 20 ms: the noise may move a boundary by one.
        assert each.start_s == pytest.approx(each.true_start_s, abs=0.021)
        assert each.end_s == pytest.approx(each.true_end_s, abs=0.021)
    printed = capsys.readouterr().out.splitlines()
    errors = [int(line.split()[-2]) for line in printed if line.startswith("head ")]
    assert errors[0] <= 20
    assert errors[1] >= 200, "the other head compares noise, and must not align"


def test_alignment_divides_all_frames_in_order() -> None:
    weights = np.array([[0.8, 0.1, 0.1, 0.1], [0.1, 0.6, 0.6, 0.1], [0.8, 0.1, 0.1, 0.8]], np.float32)
    align = recipe("word_timings").align
    assert align(weights) == [(0, 1), (1, 3), (3, 4)]
    with pytest.raises(ValueError, match="2 frames are fewer than 3 words"):
        align(weights[:, :2])


def test_drift_is_nothing_between_equal_versions_of_a_real_model(minilm_server: RunningServer) -> None:
    moved, cosines = recipe("drift").main(minilm_server.target, "minilm", ("1", "1"), LICENSE, 3)
    assert len(moved) == 6 * 12 * 4
    # Runs of one text may share a batch or not, which rounds in another order.
    assert max(abs(shift.size) for shift in moved) < 1e-3
    assert min(cosines) > 0.99999


def test_drift_names_the_head_that_changed(small_server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    drift = recipe("drift")
    texts = [
        "the cat sat on a mat.",
        "a dog looked at the cat.",
        "the dog and the cat sat.",
        "the cat looked at a mat.",
        "a cat and a dog looked.",
        "the mat and the dog sat on a cat.",
    ]
    file = Path(small_server.log).with_name("texts.txt")
    file.write_text(" ".join(texts), encoding="utf-8")
    equal, _ = drift.main(small_server.target, "tiny", ("1", "2"), file, 3)
    assert max(abs(shift.size) for shift in equal) < 1e-3
    moved, _ = drift.main(small_server.target, "tiny", ("1", "3"), file, 3)
    assert {(shift.layer, shift.head) for shift in moved if abs(shift.size) > 1e-3} == {(MOVED_LAYER, MOVED_HEAD)}
    assert abs(moved[0].size) > 0.5
    assert moved[0].low * moved[0].high > 0, "its interval must leave out 0"
    assert "6 texts" in capsys.readouterr().out


def test_drift_of_other_models_is_refused() -> None:
    drift = recipe("drift")
    one, other = (drift.Answers(np.zeros((2, sites, 4, 4)), [], [], []) for sites in (1, 2))
    with pytest.raises(ValueError, match=r"\(1, 4\) and \(2, 4\) sites and heads"):
        drift.shifts(one, other)


def run_cells(cells: list[dict[str, Any]]) -> list[Any]:
    """Run the code cells of a notebook in one namespace, and return the last value of each that has one."""
    names: dict[str, Any] = {"__name__": "__main__"}
    values = []
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        body = ast.parse("".join(cell["source"]), cell["id"])
        last = body.body.pop() if isinstance(body.body[-1], ast.Expr) else None
        exec(compile(body, cell["id"], "exec"), names)
        if isinstance(last, ast.Expr):
            values.append(eval(compile(ast.Expression(last.value), cell["id"], "eval"), names))
    return values


def test_the_notebook_runs_and_draws(minilm_server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNSERVE_SERVER", minilm_server.target)
    values = run_cells(json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"])
    shown = [value._repr_svg_() for value in values if hasattr(value, "_repr_svg_")]
    assert len(shown) == 4
    assert all(ET.fromstring(each).tag.endswith("svg") for each in shown)
    pages = [value._repr_html_() for value in values if hasattr(value, "_repr_html_")]
    assert sum("<iframe" in page for page in pages) == 1
    assert any("<table" in page for page in pages), "the table of pandas"
    sentence = next(value for value in values if isinstance(value, str) and value.startswith("layer "))
    assert float(sentence.split("looks ")[1].split()[0]) < 1.5, "MiniLM has heads that look at neighbours"


def test_the_notebook_is_stored_without_outputs_and_as_jupyter_writes_it() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert text == json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_every_recipe_has_a_test_and_a_page() -> None:
    names = {path.stem for path in RECIPES.glob("*.py")}
    tested = Path(__file__).read_text(encoding="utf-8")
    assert len(names) == 6
    assert {name for name in names if f'recipe("{name}")' not in tested} == set()
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/how-to/recipes").glob("*.md"))
    assert {name for name in names if f"examples/recipes/{name}.py" not in pages} == set()
