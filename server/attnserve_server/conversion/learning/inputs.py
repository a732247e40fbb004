"""Corrects a graph's declared inputs by running it.

    with_free_length  a fixed text length becomes dynamic where the graph does not depend on it
    with_needed_keys  an added mask is marked where a row that hides every key makes the model answer NaN

Each returns what it was given where the graph needs no correction, or none is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.tolerances import Tolerances, max_abs
from attnserve_server.conversion.graphs.reading import checked, precision_of, save
from attnserve_server.conversion.inputs.roles import is_position
from attnserve_server.conversion.inputs.signature import SEQUENCE, Signature, signature_of
from attnserve_server.conversion.learning.polarity import with_polarity
from attnserve_server.conversion.probing.feeds import Sampler, probe_lengths
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.domain.values import Array
from attnserve_server.model.manifest import InputRole, InputSpec

_TRIED = (3, 7)
"""Text lengths that are compared, beside the declared one."""


def with_free_length(proto: onnx.ModelProto, signature: Signature, work: Path) -> tuple[onnx.ModelProto, int] | None:
    """Make a fixed text length dynamic where the graph does not depend on it.

    Many graphs compute everything that depends on the length, and only declare it fixed. The dynamic graph is accepted
    if it answers short texts as the file answers them when they are padded to the declared length and masked.

    Args:
        proto: the graph.
        signature: of the graph.
        work: a folder for files.

    Returns:
        The graph with a dynamic length and the length that it declared; None where the length is dynamic already, or
        the graph depends on it, or no mask marks the padding.
    """
    ids = [spec for spec in signature.inputs if spec.role is InputRole.TOKEN_IDS]
    masks = [spec.shape for spec in signature.inputs if spec.role is InputRole.ATTENTION_MASK]
    if len(ids) != 1 or not isinstance(ids[0].shape[0], int) or ids[0].shape not in masks:
        return None
    length = ids[0].shape[0]
    along = {
        spec.name
        for spec in signature.inputs
        if spec.shape == (length,) and (spec.role is not InputRole.DATA or is_position(spec.name))
    }
    try:
        freed = checked(_freed(proto, along, length), "the file")
        same = _answers_alike(proto, freed, int(ids[0].padding), length, work)
    except BuildRefused:
        return None
    return (freed, length) if same else None


def _freed(proto: onnx.ModelProto, inputs: set[str], length: int) -> onnx.ModelProto:
    """Copy the graph with a dynamic second axis of the inputs, and without declarations of the length elsewhere."""
    freed = onnx.ModelProto()
    freed.CopyFrom(proto)
    del freed.graph.value_info[:]
    for value in freed.graph.input:
        if value.name in inputs:
            value.type.tensor_type.shape.dim[1].dim_param = SEQUENCE
    for value in freed.graph.output:
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_value == length:
                axis.Clear()
    return freed


def _answers_alike(proto: onnx.ModelProto, freed: onnx.ModelProto, padding_id: int, length: int, work: Path) -> bool:
    """Whether the freed graph answers short texts as the file answers them padded, once these answers are cropped."""
    paths = work / "fixed.onnx", work / "freed.onnx"
    for path, graph in zip(paths, (proto, freed), strict=True):
        save(ir.from_proto(graph), path)
    fixed, free = (GraphRunner(path) for path in paths)
    sampler = Sampler(with_polarity(freed, signature_of(freed.graph, padding_id), work))
    tolerance = Tolerances.of(precision_of(proto)).neighbours
    for own in (*(tried for tried in _TRIED if tried < length), length):
        sequence = sampler.sequence({SEQUENCE: own})
        expected = fixed.run(sampler.batch([sequence], {SEQUENCE: length}), fixed.output_names)
        found = free.run(sampler.batch([sequence], {SEQUENCE: own}), free.output_names)
        if any(_relative_error(found[name], expected[name]) > tolerance for name in found):
            return False
    return True


def _relative_error(found: Array, expected: Array) -> float:
    """Compare with the part of `expected` that has the shape of `found`; relative to its greatest value, if above 1."""
    if found.ndim != expected.ndim or any(one > other for one, other in zip(found.shape, expected.shape, strict=True)):
        return float("inf")
    cropped = expected[tuple(slice(size) for size in found.shape)]
    wide = np.abs(np.nan_to_num(cropped.astype(np.float64), posinf=0.0, neginf=0.0))
    return max_abs(found, cropped) / max(1.0, float(wide.max(initial=0.0)))


def with_needed_keys(runner: GraphRunner, sampler: Sampler, outputs: Sequence[str]) -> tuple[InputSpec, ...]:
    """Mark the added masks that must leave each query a key, because the model answers NaN without any.

    Args:
        runner: the graph.
        sampler: draws sequences for it.
        outputs: names of the outputs that are searched for NaN.

    Returns:
        The sampler's inputs; `needs_key` is set on such masks.
    """
    lengths, _ = probe_lengths(sampler.signature.symbols)
    sequence = sampler.sequence(lengths)

    def needs(spec: InputSpec) -> bool:
        hidden = {**sequence, spec.name: np.full_like(sequence[spec.name], -np.inf)}
        try:
            found = runner.run(sampler.batch([hidden], lengths), outputs, tap=False)
        except BuildRefused:
            return False
        return any(_has_nan(array) for array in found.values())

    return tuple(
        spec.model_copy(update={"needs_key": True}) if spec.additive_mask and needs(spec) else spec
        for spec in sampler.signature.inputs
    )


def _has_nan(array: Array) -> bool:
    return array.dtype.kind == "f" and bool(np.isnan(array).any())
