"""Calibration for int8: the greatest |x| of each channel of normalized activations, on English sentences.

An activation with a known range takes one scale for all rows, so that rounding it costs no work for each row:

    x = LayerNormalization(h; gamma, beta)     ->     LayerNormalization(h; gamma / s, beta / s), rounded to uint8
    y = x @ W + bias                           ->     MatMulIntegerToFloat(rounded, diag(s) W, bias)

The factors s, one for each channel, move a part of the rounding error from the activations to the weights. Source:
Xiao et al. 2023, SmoothQuant, eq. 4. int8.py does the rewriting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.graphs.reading import save
from attnserve_server.conversion.precision.sentences import as_inputs, sentences
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.domain.values import Array
from attnserve_server.model.manifest import InputSpec, TextSpec
from attnserve_server.model.tokenizer import TextTokenizer

Ranges = Mapping[str, Array]
"""The greatest |x| of each channel, (K,), by the name of the value."""

HEADROOM = 1.25
"""The range that rounding covers, over the calibrated range; numbers beyond it are clipped."""
SHARE = 0.65
"""The exponent of eq. 4, from 0.5 to 1: how much of the error the weights take. MiniLM is most exact at this."""
_LEAST = 1e-5
_EVERY = 3
"""One sentence in so many calibrates; the others are new to the model when the quality check measures on all."""


@dataclass(frozen=True, slots=True)
class Normalization:
    """A LayerNormalization with constant gain and offset, (K,) each."""

    node: ir.Node
    gain: npt.NDArray[np.float32]
    offset: npt.NDArray[np.float32]


def ranges_of(
    proto: onnx.ModelProto, inputs: Sequence[InputSpec], text: TextSpec | None, tokenizer: Path | None, work: Path
) -> Ranges:
    """Run a model on sentences, and return the range of every value that `normalized_values` lists.

    Args:
        proto: the source, in float32.
        inputs: its inputs.
        text: how text becomes inputs; without it there is no calibration, because random inputs reach other ranges than
            real ones.
        tokenizer: its tokenizer.json.
        work: a folder for a file.

    Returns:
        The ranges; empty where no value can be calibrated, or the graph does not run on text.

    Raises:
        TokenizerInvalid: the file is no usable tokenizer.json.
    """
    if text is None or tokenizer is None:
        return {}
    sequences = as_inputs(sentences()[::_EVERY], inputs, text, TextTokenizer.load(tokenizer, text.axis))
    model = ir.from_proto(proto)
    values = normalized_values(model.graph)
    if not sequences or not values:
        return {}
    model.graph.outputs.extend(value for value in values if not value.is_graph_output())
    save(model, work / "calibration.onnx")
    names = [str(value.name) for value in values]
    ranges: dict[str, Array] = {}
    try:
        runner = GraphRunner(work / "calibration.onnx")
        for inputs_of_one in sequences:
            found = runner.run({name: array[None] for name, array in inputs_of_one.items()}, names)
            for name, array in found.items():
                reach = np.abs(array).reshape(-1, array.shape[-1]).max(axis=0)
                ranges[name] = np.maximum(ranges[name], reach) if name in ranges else reach
    except BuildRefused:
        return {}
    return {name: reach for name, reach in ranges.items() if np.isfinite(reach).all()}


def normalized_values(graph: ir.Graph) -> list[ir.Value]:
    """Return the values that a LayerNormalization gives and a MatMul with a constant weight matrix takes."""
    found: dict[ir.Value, None] = {}
    for node in graph:
        if node.op_type == "MatMul" and node.inputs[0] is not None and node.inputs[1] is not None:
            source, weights = node.inputs[0], node.inputs[1].const_value
            if weights is not None and len(weights.shape) == 2 and normalization_of(source) is not None:
                found[source] = None
    return list(found)


def normalization_of(value: ir.Value) -> Normalization | None:
    """Return the LayerNormalization that gives a value; None unless it is one over the last axis with constants."""
    node = value.producer()
    if node is None or node.op_type != "LayerNormalization" or node.outputs[0] is not value:
        return None
    constants = [operand.const_value for operand in node.inputs[1:] if operand is not None]
    if not constants or any(tensor is None or len(tensor.shape) != 1 for tensor in constants):
        return None
    axis = node.attributes.get_int("axis", -1)
    if axis != -1 and (value.shape is None or axis != len(value.shape) - 1):
        return None
    gain, *offset = (tensor.numpy() for tensor in constants if tensor is not None)
    return Normalization(node, gain, offset[0] if offset else np.zeros_like(gain))


def factors_of(reach: Array, weights: Sequence[Array]) -> npt.NDArray[np.float32]:
    """Return the factor of each channel, float32 (K,), so that x / factor lies within 127 levels.

    Args:
        reach: the greatest |x| of each channel, (K,).
        weights: of every MatMul that takes x, (K, N) each; at least one.
    """
    covered = np.maximum(HEADROOM * reach.astype(np.float64), _LEAST)
    heaviest = np.maximum(np.maximum.reduce([np.abs(own).max(axis=1) for own in weights]), _LEAST)
    shared = covered**SHARE / heaviest ** (1 - SHARE)
    factors: npt.NDArray[np.float32] = (shared * (covered / shared).max() / 127).astype(np.float32)
    return factors
