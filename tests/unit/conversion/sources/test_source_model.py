"""Sources of an export: which exporters are tried, in which order, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from io import StringIO
from typing import Any, cast

import onnx
import pytest
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.sources.source_model import AUTO, SourceModel, graph_of, source_model
from rich.console import Console


@dataclass
class Picky:
    """A source that only some exporters can export."""

    able: tuple[str, ...]
    asked: list[tuple[str, int]] = field(default_factory=list)

    def to_graph(self, exporter: str, opset: int) -> onnx.ModelProto:
        self.asked.append((exporter, opset))
        if exporter not in self.able:
            raise BuildRefused(f"{exporter} cannot")
        return onnx.ModelProto()


def traced(source: Picky, exporter: str = AUTO, opset: int = 0, steps: Steps | None = None) -> tuple[Any, str, int]:
    return graph_of(cast("SourceModel", source), exporter, opset, steps or Steps.silent())


def test_auto_takes_the_first_exporter_that_can() -> None:
    source = Picky(("dynamo", "torchscript"))
    assert traced(source)[1:] == ("dynamo", 23)
    assert source.asked == [("dynamo", 23)]


def test_auto_moves_on_to_the_next_exporter_and_says_why() -> None:
    console = Console(record=True, width=200, file=StringIO())
    assert traced(Picky(("torchscript",)), steps=Steps(console))[1:] == ("torchscript", 17)
    assert "dynamo cannot; trying the next exporter" in console.export_text()


def test_exporter_that_was_asked_for_is_the_only_one_tried() -> None:
    source = Picky(("torchscript",))
    with pytest.raises(BuildRefused, match="dynamo cannot"):
        traced(source, "dynamo")
    assert source.asked == [("dynamo", 23)]


def test_opset_that_was_asked_for_is_kept() -> None:
    assert traced(Picky(("dynamo",)), "dynamo", 18)[1:] == ("dynamo", 18)


def test_where_no_exporter_can_the_first_one_s_reason_is_given() -> None:
    with pytest.raises(BuildRefused, match="dynamo cannot"):
        traced(Picky(()))


def test_unknown_exporter_is_refused() -> None:
    with pytest.raises(BuildRefused, match="exporter 'optimum' is not known; auto, dynamo, torchscript are"):
        traced(Picky(()), "optimum")


@pytest.mark.parametrize("asked", [{"normalize": True}, {"expect_sha256": "0" * 64}], ids=["scaled", "digest"])
def test_what_the_zoo_cannot_give_is_refused_before_it_is_made(asked: dict[str, Any]) -> None:
    with pytest.raises(BuildRefused, match="made on the spot"):
        source_model("zoo:causal", **asked)
