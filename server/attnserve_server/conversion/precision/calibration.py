"""Calibration: how far normalised values reach, seen on English sentences before a graph is brought to eight bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.graphs.reading import save
from attnserve_server.conversion.precision.calibrated import Ranges, normalised_values
from attnserve_server.conversion.precision.sentences import as_inputs, sentences
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.domain.values import Array
from attnserve_server.model.manifest import InputSpec, TextSpec
from attnserve_server.model.tokenizer import TextTokenizer

_EVERY = 3
"""One sentence in so many is looked at; the others are new to the model that is then judged on all of them."""


def ranges_of(
    proto: onnx.ModelProto, inputs: Sequence[InputSpec], text: TextSpec | None, tokenizer: Path | None, work: Path
) -> Ranges:
    """The greatest |x| of each channel of every normalised value that goes into a product with constant weights.

    Args:
        proto: the source, in float32.
        inputs: its inputs.
        text: how text becomes inputs; None: it takes none, and nothing is seen. Random inputs would tell little of
            what real ones reach.
        tokenizer: its tokenizer.json.
        work: a folder for a file.

    Returns:
        By the names of the values; empty where there is nothing to see, or the graph does not run on text.
    """
    if text is None or tokenizer is None:
        return {}
    sequences = as_inputs(sentences()[::_EVERY], inputs, text, TextTokenizer.load(tokenizer, text.axis))
    model = ir.from_proto(proto)
    values = normalised_values(model.graph)
    if not sequences or not values:
        return {}
    model.graph.outputs.extend(value for value in values if not value.is_graph_output())
    save(model, work / "calibration.onnx")
    names = [str(value.name) for value in values]
    seen: dict[str, Array] = {}
    try:
        runner = GraphRunner(work / "calibration.onnx")
        for inputs_of_one in sequences:
            found = runner.run({name: array[None] for name, array in inputs_of_one.items()}, names)
            for name, array in found.items():
                reach = np.abs(array).reshape(-1, array.shape[-1]).max(axis=0)
                seen[name] = np.maximum(seen[name], reach) if name in seen else reach
    except BuildRefused:
        return {}
    return {name: reach for name, reach in seen.items() if np.isfinite(reach).all()}
