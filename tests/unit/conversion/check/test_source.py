"""Comparison of a bundle with a torch model: the finding for each way in which they can differ.

A bundle is the folder of one converted model. `Twin` replaces the torch model, so that no test needs torch. A
difference is a finding that failed; a source or bundle that cannot be compared raises BuildRefused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.check import source as room
from attnserve_server.conversion.check.findings import CheckRequest, Finding
from attnserve_server.conversion.check.opened import bundle_at
from attnserve_server.conversion.check.recheck import check_bundle
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.conversion.verify.compare import Reference
from attnserve_server.domain.values import Array
from attnserve_server.model.repository import Bundle
from foreign_graphs import Foreign
from onnx_files import VOCABULARY, encoder, saved

WEIGHTS = "attention.block.0.attention"


@dataclass
class Twin:
    """A model that answers as the bundle does, unless a test changes it."""

    bundle: Bundle
    vocabulary_sizes: Mapping[str, int] = field(default_factory=lambda: {"input_ids": VOCABULARY})
    max_lengths: Mapping[str, int] = field(default_factory=lambda: {"seq": 40})
    change: Callable[[Reference], Reference] = lambda answer: answer
    name: str = "twin"
    architecture: str = "Twin"

    def reference(self, feeds: Mapping[str, Array]) -> Reference:
        found = GraphRunner(self.bundle.model_path).run(dict(feeds), ["hidden", WEIGHTS])
        return self.change(Reference({"hidden": found["hidden"]}, [found[WEIGHTS]]))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("check")
    file = saved(encoder(), folder / "source.onnx")
    return prepare_bundle(PrepareRequest(file=file, name="encoder", repository=folder / "models", fuse=False))


def findings(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, Finding]:
    monkeypatch.setattr(room, "load_model", lambda *_, **__: Twin(bundle, **changes))
    checked = check_bundle(CheckRequest(bundle.path, against="twin", attack_seconds=0))
    return {finding.what: finding for finding in checked.findings}


def test_equal_outputs_and_weights_pass(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    found = findings(bundle, monkeypatch)
    assert found["outputs"].passed
    assert found["attention weights"].passed
    assert found["outputs"].detail == "beside Twin"


def test_weights_that_the_model_does_not_return_are_not_compared(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = findings(bundle, monkeypatch, change=lambda answer: Reference(answer.outputs, [None]))
    assert found["outputs"].passed
    assert "attention weights" not in found


@pytest.mark.parametrize(
    ("change", "what", "detail"),
    [
        (lambda answer: Reference({"hidden": answer.outputs["hidden"] + 1}, answer.weights), "outputs", "beside Twin"),
        (
            lambda answer: Reference(answer.outputs, [answer.weights[0][..., ::-1]]),
            "attention weights",
            "beside its eager mode",
        ),
        (lambda answer: Reference({"other": answer.outputs["hidden"]}, answer.weights), "outputs", "no output hidden"),
        (lambda answer: Reference(answer.outputs, []), "attention weights", "0 attention tensors for 1 sites"),
        (
            lambda answer: Reference({"hidden": answer.outputs["hidden"][:1]}, answer.weights),
            "outputs",
            "the source's outputs have other shapes",
        ),
    ],
    ids=["outputs", "weights", "name", "count", "shape"],
)
def test_difference_fails_with_its_detail(
    change: Callable[[Reference], Reference],
    what: str,
    detail: str,
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finding = findings(bundle, monkeypatch, change=change)[what]
    assert finding.passed is False
    assert detail in finding.detail


def test_model_that_does_not_run_fails(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Reference) -> Reference:
        raise RuntimeError("out of memory")

    finding = findings(bundle, monkeypatch, change=broken)["outputs"]
    assert (finding.passed, finding.detail) == (False, "the source does not run: RuntimeError")


def test_model_with_another_vocabulary_fails(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = findings(bundle, monkeypatch, vocabulary_sizes={"input_ids": 7})["outputs"]
    assert finding.passed is False
    assert finding.detail == f"the source has 7 ids, the bundle {VOCABULARY}"


def test_model_without_an_axis_of_the_bundle_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BuildRefused, match="twin has no axis 'seq': the bundle is of another model"):
        findings(bundle, monkeypatch, max_lengths={})


def test_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildRefused, match=r"is not a bundle: it has no manifest\.json"):
        bundle_at(tmp_path)


def test_padding_does_not_count_as_a_difference(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(answer: Reference) -> Reference:
        hidden = answer.outputs["hidden"].copy()
        hidden[0, 3:] = np.nan  # the first sequence of the check has three positions
        return Reference({"hidden": hidden}, answer.weights)

    assert findings(bundle, monkeypatch, change=noisy)["outputs"].passed


def test_file_that_runs_only_once_it_is_repaired_is_compared(tmp_path: Path) -> None:
    file = saved(Foreign(mask="broadcast").model(), tmp_path / "source.onnx")
    made = prepare_bundle(PrepareRequest(file=file, name="foreign", repository=tmp_path / "models", fuse=False))
    checked = check_bundle(CheckRequest(made.path, against=str(file), attack_seconds=0))
    [found] = [finding for finding in checked.findings if finding.what == "outputs"]
    assert found.passed
