"""MiniLM as `quantize_dynamic` leaves it, with one scale per row: a sentence has the same embedding in any batch.

Skipped without the package of MiniLM. Needs torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.graphs.reading import checked
from attnserve_server.conversion.precision.per_row import with_scale_per_row
from attnserve_server.conversion.precision.sentences import sentences
from attnserve_server.conversion.sources.torch_source import export_graph, load_model
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.model.equality import Equality
from quantized_graphs import dynamically_quantized
from tokenizers import Tokenizer

Array = np.ndarray[Any, np.dtype[Any]]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(minilm_source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """MiniLM with its mean pooling in float32, quantized, and rewritten."""
    folder = tmp_path_factory.mktemp("requantized")
    source = load_model(str(minilm_source), pooling="mean", normalize=False, steps=Steps.silent())
    graph, _, _ = export_graph(source, "torchscript", 17, Steps.silent())
    quantized = dynamically_quantized(graph, folder / "quantized.onnx", per_channel=True)
    proto, report = with_scale_per_row(checked(onnx.load(quantized), "quantized"))
    assert (report.rewritten, report.unrounded, report.left) == (24, 0, ())
    onnx.save(checked(proto, "rewritten"), folder / "rewritten.onnx")
    return {
        "float": folder / "quantized.source.onnx",
        "quantized": quantized,
        "rewritten": folder / "rewritten.onnx",
    }


@pytest.fixture(scope="module")
def ids(minilm_source: Path) -> list[Array]:
    """Every twentieth sentence, shortest and longest among them in no order."""
    tokenizer = Tokenizer.from_file(str(minilm_source / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return [np.array(tokenizer.encode(text).ids) for text in sentences()[::20]]


def embeddings(path: Path, groups: list[list[Array]]) -> Array:
    """Of all sequences, in order, (N, D); each group is one padded batch."""
    session = RuntimeSession.load(path, provider="CPUExecutionProvider")
    made: list[Array] = []
    for group in groups:
        length = max(map(len, group))
        rows = np.stack([np.pad(own, (0, length - len(own))) for own in group])
        mask = np.stack([np.arange(length) < len(own) for own in group]).astype(np.int64)
        feeds = {"input_ids": rows, "attention_mask": mask, "token_type_ids": np.zeros_like(rows)}
        made.append(session.run({name: feeds[name] for name in session.input_names}, ["embedding"])[0])
    return np.concatenate(made)


def test_embedding_is_the_same_in_any_batch_and_near_the_files_own(files: dict[str, Path], ids: list[Array]) -> None:
    alone = {name: embeddings(path, [[own] for own in ids]) for name, path in files.items()}
    together = {name: embeddings(files[name], [ids]) for name in ("quantized", "rewritten")}
    equality = Equality("int8")
    worst = {
        name: max(equality.error("embedding", *pair) for pair in zip(together[name], alone[name], strict=True))
        for name in together
    }
    assert worst["rewritten"] <= 1
    assert worst["quantized"] > 1  # the positive control
    cosines = {
        (one, other): (
            (alone[one] * alone[other]).sum(-1)
            / np.linalg.norm(alone[one], axis=-1)
            / np.linalg.norm(alone[other], axis=-1)
        )
        for one, other in (("rewritten", "quantized"), ("rewritten", "float"), ("quantized", "float"))
    }
    # int8 costs MiniLM about 1 % of the cosine; finer scales cost no more than one for the whole sequence.
    assert cosines["rewritten", "quantized"].min() > 0.97
    assert cosines["rewritten", "float"].mean() > cosines["quantized", "float"].mean() - 1e-3
