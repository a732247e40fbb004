"""Torch sources: the order in which exporters are tried, and the options that are refused.

An exporter, `dynamo` or `torchscript`, traces a torch model to ONNX. `Picky` is a model that only some can export; no
test exports one. Refusals raise BuildRefused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from io import StringIO
from typing import Any, cast

import onnx
import pytest
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.sources.source import Task, TorchModel
from attnserve_server.conversion.sources.torch_source import AUTO, TorchSource, _sized, export_graph, load_model
from attnserve_server.model.heads import EmbeddingSpec
from rich.console import Console


@dataclass
class Picky:
    """A model that only some exporters can export."""

    able: tuple[str, ...]
    calls: list[tuple[str, int]] = field(default_factory=list)

    def to_graph(self, exporter: str, opset: int) -> onnx.ModelProto:
        self.calls.append((exporter, opset))
        if exporter not in self.able:
            raise BuildRefused(f"{exporter} cannot")
        return onnx.ModelProto()


def exported(source: Picky, exporter: str = AUTO, opset: int = 0, steps: Steps | None = None) -> tuple[Any, str, int]:
    return export_graph(cast("TorchModel", source), exporter, opset, steps or Steps.silent())


def test_auto_uses_the_first_exporter_that_succeeds() -> None:
    source = Picky(("dynamo", "torchscript"))
    assert exported(source)[1:] == ("dynamo", 23)
    assert source.calls == [("dynamo", 23)]


def test_auto_warns_before_it_tries_the_next_exporter() -> None:
    console = Console(record=True, width=200, file=StringIO())
    assert exported(Picky(("torchscript",)), steps=Steps(console))[1:] == ("torchscript", 17)
    assert "dynamo cannot; trying the next exporter" in console.export_text()


def test_requested_exporter_is_the_only_one_tried() -> None:
    source = Picky(("torchscript",))
    with pytest.raises(BuildRefused, match="dynamo cannot"):
        exported(source, "dynamo")
    assert source.calls == [("dynamo", 23)]


def test_requested_opset_overrides_the_exporters_default() -> None:
    assert exported(Picky(("dynamo",)), "dynamo", 18)[1:] == ("dynamo", 18)


def test_error_of_the_first_exporter_is_raised_if_all_fail() -> None:
    with pytest.raises(BuildRefused, match="dynamo cannot"):
        exported(Picky(()))


def test_unknown_exporter_is_refused() -> None:
    with pytest.raises(BuildRefused, match="exporter 'optimum' is unknown; use one of auto, dynamo, torchscript"):
        exported(Picky(()), "optimum")


@pytest.mark.parametrize("options", [{"normalize": True}, {"expect_sha256": "0" * 64}], ids=["scaled", "digest"])
def test_options_that_the_zoo_lacks_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BuildRefused, match="generated during export: remove --normalize and --expect-sha256"):
        load_model("zoo:causal", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"pooling": "max"}, "pooling 'max' is unknown; use 'mean'"), ({"normalize": True}, "add --pooling mean")],
)
def test_contradictory_options_are_refused_before_the_model_is_loaded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BuildRefused, match=message):
        TorchSource("/no/such/folder", **options)


def test_only_auto_leaves_other_exporters_to_try() -> None:
    assert TorchSource("model").exporters == ("dynamo", "torchscript")
    assert TorchSource("model", exporter="dynamo").exporters == ("dynamo",)


def test_an_embedding_gets_the_sizes_of_its_files_or_of_the_options() -> None:
    value = onnx.helper.make_tensor_value_info("embedding", onnx.TensorProto.FLOAT, ["batch", 12])
    graph = onnx.helper.make_graph([], "graph", [], [value])
    stated = Task(embedding=EmbeddingSpec(pooling="mean", sizes=(4, 12)))
    for requested, expected in (((), (4,)), ((8, 2, 8), (2, 8))):
        embedding = _sized(stated, requested, graph).embedding
        assert embedding is not None
        assert embedding.sizes == expected, "the full length is no part"
    with pytest.raises(BuildRefused, match="--embedding-size 12 is not from 1 to 11: the embedding has 12 values"):
        _sized(stated, (12,), graph)
    with pytest.raises(BuildRefused, match="add --pooling mean"):
        _sized(Task(), (4,), graph)
