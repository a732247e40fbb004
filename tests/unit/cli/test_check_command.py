"""`attnserve-server check`: its findings, its output and its exit codes.

The command checks a bundle, the folder of one converted model, on its own or against its source. The exit code is 0
where every finding passes, 1 where one fails, and 2 where the check cannot run, as for a folder that is no bundle.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from attnserve_server.cli._app import app
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from attnserve_server.engine.golden import GOLDEN_FILE
from attnserve_server.model.holding import verify
from attnserve_server.model.repository import Bundle, Repository, write_bundle
from click.testing import Result
from made_by_hand import proved
from onnx import numpy_helper
from onnx_files import encoder, saved
from tiny_bundle import tiny_manifest, write_tiny_files
from typer.testing import CliRunner

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A converted encoder. Its source is `source.onnx`, beside its repository."""
    folder = tmp_path_factory.mktemp("check")
    file = saved(encoder(), folder / "source.onnx")
    return prepare_bundle(PrepareRequest(file=file, name="encoder", repository=folder / "models"))


def source_of(bundle: Bundle) -> Path:
    return bundle.path.parents[2] / "source.onnx"


def check(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["check", *map(str, arguments)])


def findings(*arguments: object) -> dict[str, dict[str, Any]]:
    done = check(*arguments, "--json")
    return {finding["what"]: finding for finding in json.loads(done.stdout)["findings"]}


def changed(bundle: Bundle, root: Path, change: Any, *, golden: bool = True) -> Path:
    """The bundle with another graph and matching digests, without golden answers if `golden` is false."""
    model = onnx.load(bundle.model_path)
    change(model)
    file = saved(model, root / "changed.onnx")
    files = {name: bundle.path / name for name in bundle.manifest.files} | {"model.onnx": file}
    manifest = bundle.manifest
    if not golden:
        manifest = manifest.model_copy(update={"golden": None})
        del files[GOLDEN_FILE]
    return write_bundle(root / "models", manifest, files).path


def scaled(name: str, factor: float) -> Any:
    def change(model: onnx.ModelProto) -> None:
        (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), name))

    return change


def test_sound_bundle_passes_every_check(bundle: Bundle) -> None:
    done = check(bundle.path)
    assert done.exit_code == 0, done.output
    for what in ("files", "golden answers", "padding along seq", "batch neighbours", "weights @ value"):
        assert f"ok  {what}" in done.stdout
    assert "FAILED" not in done.stdout


def test_json_has_the_same_findings(bundle: Bundle) -> None:
    done = check(bundle.path, "--json")
    report = json.loads(done.stdout)
    assert (done.exit_code, report["passed"], report["digest"]) == (0, True, bundle.manifest.digest)
    assert all(finding["passed"] for finding in report["findings"])
    assert report["quality"] is None


def test_bundle_is_compared_with_the_file_it_was_made_from(bundle: Bundle) -> None:
    outputs = findings(bundle.path, "--against", source_of(bundle))["outputs"]
    assert outputs["passed"]
    # The same graph on the same processor: only the order of sums may differ.
    assert outputs["error"] < 1e-5


def test_source_with_other_weights_fails(bundle: Bundle, tmp_path: Path) -> None:
    other = encoder()
    scaled("words", 1.5)(other)
    done = check(bundle.path, "--against", saved(other, tmp_path / "other.onnx"))
    assert done.exit_code == 1
    assert "FAILED  outputs" in done.stdout


def test_source_with_other_inputs_fails(bundle: Bundle, tmp_path: Path) -> None:
    found = findings(bundle.path, "--against", saved(encoder(masked=False), tmp_path / "other.onnx"))
    assert found["outputs"]["detail"] == "the source has no input attention_mask"


def test_changed_file_fails_and_is_not_loaded(bundle: Bundle, tmp_path: Path) -> None:
    path = changed(bundle, tmp_path, scaled("words", 1.0))
    with (path / "model.onnx").open("ab") as file:
        file.write(b"\0")
    found = findings(path)
    assert list(found) == ["files"]
    assert "sha256" in found["files"]["detail"]
    assert check(path).exit_code == 1


def test_replaced_graph_with_a_matching_digest_fails(bundle: Bundle, tmp_path: Path) -> None:
    path = changed(bundle, tmp_path, scaled("words", 2.0))
    found = findings(path)
    assert found["files"]["passed"]
    assert not found["golden answers"]["passed"]
    assert found["golden answers"]["error"] > found["golden answers"]["allowed"]
    assert found["golden answers"]["detail"].endswith("on CPUExecutionProvider")


def test_golden_answers_are_compared_on_the_named_provider(bundle: Bundle) -> None:
    done = check(bundle.path, "--provider", "NoSuchExecutionProvider")
    assert done.exit_code == 2
    assert "execution provider NoSuchExecutionProvider is not available: the runtime offers" in done.stderr


def test_wrong_weights_fail_without_golden_answers(bundle: Bundle, tmp_path: Path) -> None:
    def swap(model: onnx.ModelProto) -> None:
        """Scale the scores of the tap: its outputs still are attention weights, but of another model."""
        (softmax,) = [node for node in model.graph.node if node.op_type == "Softmax"]
        model.graph.initializer.append(numpy_helper.from_array(np.array(3, np.float32), "three"))
        tripled = onnx.helper.make_node("Mul", [softmax.input[0], "three"], ["tripled"])
        softmax.input[0] = "tripled"
        model.graph.node.insert(list(model.graph.node).index(softmax), tripled)

    found = findings(changed(bundle, tmp_path, swap, golden=False))
    assert found["golden answers"]["passed"] is None
    assert not found["weights @ value"]["passed"]


def test_bundle_without_golden_answers_is_checked(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    path = write_bundle(tmp_path / "models", tiny_manifest(), write_tiny_files(tmp_path / "files")).path
    found = findings(path)
    assert found["golden answers"] == {
        "what": "golden answers",
        "passed": None,
        "error": None,
        "allowed": None,
        "detail": "the bundle has none: an older release wrote it",
    }
    assert found["padding along seq"]["passed"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["nothing"], "nothing is not a bundle"),
        ([".", "--against", "x"], "is not a bundle: it has no manifest.json"),
    ],
)
def test_folder_without_a_manifest_is_refused(arguments: list[str], why: str, tmp_path: Path) -> None:
    done = check(tmp_path / arguments[0], *arguments[1:])
    assert done.exit_code == 2
    assert why in done.stderr
    assert "Traceback" not in done.stderr


def test_source_that_cannot_be_read_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no graph")
    done = check(bundle.path, "--against", broken)
    assert done.exit_code == 2
    assert "broken.onnx" in done.stderr


def test_help_lists_against_and_the_exit_codes(tmp_path: Path) -> None:
    done = check("--help")
    assert "--against" in done.stdout
    assert "Exit codes: 0, every finding passed; 1, a finding failed, or an internal error" in " ".join(
        done.stdout.split()
    )


def old(bundle: Bundle, root: Path) -> Path:
    """The bundle in format 1, which has no certificate."""
    files = {name: bundle.path / name for name in bundle.manifest.files}
    manifest = bundle.manifest.model_copy(update={"format": 1, "certificate": None})
    return write_bundle(root / "models", manifest, files).path


def test_bundle_of_format_1_passes_and_its_missing_certificate_is_listed(bundle: Bundle, tmp_path: Path) -> None:
    path = old(bundle, tmp_path)
    assert check(path).exit_code == 0
    assert findings(path)["certificate"]["passed"] is None
    assert "add --certify" in findings(path)["certificate"]["detail"]
    assert sorted(place.name for place in path.parent.iterdir()) == ["1"]


def test_certify_writes_a_version_with_a_certificate_and_lists_its_changes(bundle: Bundle, tmp_path: Path) -> None:
    path = old(bundle, tmp_path)
    done = check(path, "--certify")
    assert done.exit_code == 0, done.output
    assert "wrote encoder/2, sha256:" in done.stdout
    assert "batch: no certificate -> " in done.stdout
    assert "padding along seq: no certificate -> " in done.stdout
    repository = Repository(tmp_path / "models")
    before, after = repository.bundle("encoder", "1"), repository.bundle("encoder", "2")
    verify(after)
    assert (before.manifest.format, after.manifest.format) == (1, 2)
    assert (after.manifest.digest, after.manifest.files) == (before.manifest.digest, before.manifest.files)
    assert [clause.axis for clause in after.manifest.certificate.clauses] == ["batch", "seq"]
    assert after.manifest.golden == before.manifest.golden
    assert check(after.path).exit_code == 0


def test_json_has_the_version_that_certify_wrote(bundle: Bundle, tmp_path: Path) -> None:
    report = json.loads(check(old(bundle, tmp_path), "--certify", "--json").stdout)
    assert report["certified"]["version"] == "2"
    assert len(report["certified"]["changes"]) == 2


def test_certify_writes_nothing_if_a_finding_failed(bundle: Bundle, tmp_path: Path) -> None:
    path = changed(bundle, tmp_path, scaled("words", 2.0))
    done = check(path, "--certify")
    assert done.exit_code == 1
    assert "wrote" not in done.stdout
    assert sorted(place.name for place in path.parent.iterdir()) == ["1"]


def test_stored_certificate_that_allows_too_much_fails(tmp_path: Path) -> None:
    file = saved(encoder(masked=False), tmp_path / "bare.onnx")
    made = prepare_bundle(PrepareRequest(file=file, name="bare", repository=tmp_path / "made"))
    forged = made.manifest.model_copy(update={"certificate": proved("seq")})
    files = {name: made.path / name for name in made.manifest.files if name != GOLDEN_FILE}
    path = write_bundle(tmp_path / "models", forged.model_copy(update={"golden": None}), files).path
    padding = findings(path)["padding along seq"]
    assert not padding["passed"]
    assert padding["detail"].startswith("the stored certificate has proved, the graph is refuted")
    assert check(path).exit_code == 1
    assert check(path, "--certify").exit_code == 0, "a fresh certificate takes its place"
    assert not Repository(tmp_path / "models").bundle("bare", "2").manifest.under("tested").axis("seq").paddable
