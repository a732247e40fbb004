"""ONNX files as sources: the facts that are read from a file, and the fallback to a batch of one row.

`read` returns the graph with its facts, and the warnings. A token that the tokenizer lacks raises BuildRefused.
"""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import onnx
import pytest
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.sources.onnx_file import OnnxFile
from attnserve_server.conversion.sources.source import SourceGraph
from attnserve_server.model.repository import sha256_of
from limited_graphs import one_row
from onnx_files import VOCABULARY, encoder, saved
from rich.console import Console
from tiny_bundle import tiny_tokenizer


def source(model: onnx.ModelProto, folder: Path, **changes: Any) -> OnnxFile:
    return OnnxFile(saved(model, folder / "ranker.onnx"), **changes)


def read(file: OnnxFile, folder: Path) -> tuple[SourceGraph, str]:
    """The graph, and the warnings."""
    console = Console(record=True, width=200, file=StringIO())
    return file.read(folder, Steps(console)), console.export_text()


def test_graph_has_the_facts_of_the_file(tmp_path: Path) -> None:
    file = source(encoder(), tmp_path, max_length=33)
    graph, warnings = read(file, tmp_path)
    assert (graph.name, graph.sha256) == ("ranker.onnx", sha256_of(file.file))
    assert (graph.exporter, graph.opset) == ("hand 1", 23)
    assert (dict(graph.max_lengths), graph.vocabulary_size) == ({"seq": 33}, VOCABULARY)
    assert (graph.tokenizer, graph.pair_start, graph.traced, graph.others) == (None, None, False, ())
    assert warnings == ""


def test_fixed_length_that_the_graph_does_not_need_bounds_the_length(tmp_path: Path) -> None:
    tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    graph, warnings = read(source(encoder(length=12), tmp_path, tokenizer=tmp_path / "tokenizer.json"), tmp_path)
    assert dict(graph.max_lengths) == {"seq": 12}
    assert "the graph does not depend on its fixed length of 12" in warnings


def test_token_that_the_tokenizer_lacks_is_refused(tmp_path: Path) -> None:
    tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    file = source(encoder(), tmp_path, tokenizer=tmp_path / "tokenizer.json", pair_start="<start>")
    with pytest.raises(BuildRefused, match="the tokenizer has no token '<start>', which --pair-start names"):
        read(file, tmp_path)


def test_batch_is_fixed_at_one_row_if_the_graph_runs_on_one_only(tmp_path: Path) -> None:
    file = source(one_row(), tmp_path)
    graph, _ = read(file, tmp_path)
    alone = file.without_batches(graph, tmp_path, Steps.silent())
    assert alone is not None
    assert (graph.signature.fixed_batch, alone.signature.fixed_batch) == (None, 1)
    assert alone.sampler.signature == alone.signature
    assert [value.type.tensor_type.shape.dim[0].dim_value for value in alone.proto.graph.input] == [1]


def test_graph_that_runs_on_batches_has_no_fallback(tmp_path: Path) -> None:
    file = source(encoder(), tmp_path)
    assert file.without_batches(read(file, tmp_path)[0], tmp_path, Steps.silent()) is None
