"""The steps of a conversion: which options add them, and that progress counts exactly the steps that run.

`names` lists the steps for a source and options, without running them; `totals` converts a file and returns the counts
shown. A step that fails leaves no bundle.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from attnserve_server.conversion.pipeline import Conversion, Options, steps_of
from attnserve_server.conversion.sources.onnx_file import OnnxFile
from attnserve_server.conversion.sources.source import Source
from attnserve_server.conversion.sources.torch_source import TorchSource
from attnserve_server.model.repository import Repository
from limited_graphs import one_row
from onnx_files import encoder, saved
from rich.console import Console

ALWAYS = ["assemble", "limits", "certify", "check", "describe", "warm_up", "past", "golden", "write"]
FILE = OnnxFile(Path("model.onnx"))


def names(source: Source, **options: Any) -> list[str]:
    plain = {"name": "x", "repository": Path("models"), "fuse": False, **options}
    return [step.name for step in steps_of(source, Options(**plain))]


def test_plain_conversion_has_no_optional_step() -> None:
    assert names(FILE) == ALWAYS


@pytest.mark.parametrize(
    ("source", "options", "added"),
    [
        (FILE, {"fuse": True}, {"fuse"}),
        (FILE, {"try_more": True}, {"rewritings"}),
        (FILE, {"precision": "fp16"}, {"reduce", "quality"}),
        (FILE, {"requantize": "per-row"}, {"reduce", "quality"}),
        (TorchSource("model"), {"try_more": True}, {"exporters", "rewritings"}),
        (TorchSource("model", exporter="dynamo"), {"try_more": True}, {"rewritings"}),
        (TorchSource("model"), {"try_more": True, "precision": "int8"}, {"reduce", "rewritings", "quality"}),
    ],
)
def test_options_add_their_steps(source: Source, options: dict[str, Any], added: set[str]) -> None:
    found = names(source, **options)
    assert set(found) - set(ALWAYS) == added
    assert [name for name in found if name in ALWAYS] == ALWAYS


def totals(folder: Path, model: Any, **options: Any) -> list[str]:
    """The counts of the progress bar, such as "3/9", as a terminal shows them."""
    written = io.StringIO()
    file = saved(model, folder / "ranker.onnx")
    request = PrepareRequest(file=file, name="ranker", repository=folder / "models", **options)
    prepare_bundle(request, Steps(Console(file=written, force_terminal=True, width=100)))
    return re.findall(r"\d+/\d+", written.getvalue())


def test_progress_ends_at_the_last_of_all_steps(tmp_path: Path) -> None:
    counts = totals(tmp_path, encoder(), fuse=False)
    assert counts[-1] == f"{len(ALWAYS)}/{len(ALWAYS) + 1}"


def test_second_conversion_without_batches_extends_the_progress(tmp_path: Path) -> None:
    counts = totals(tmp_path, one_row(), fuse=False)
    assert counts[-1].endswith(f"/{1 + 2 * len(ALWAYS)}")
    assert Repository(tmp_path / "models").bundle("ranker").manifest.max_batch_size == 1


def test_failed_step_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: Conversion) -> None:
        raise BuildRefused("the disk of the test is full")

    monkeypatch.setattr(Conversion, "make_golden", failing)
    with pytest.raises(BuildRefused, match="the disk of the test is full"):
        totals(tmp_path, encoder())
    assert not (tmp_path / "models").exists()
