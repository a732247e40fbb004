"""Trace any torch module to an ONNX graph, with torch's dynamo exporter or its older TorchScript exporter."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import torch

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.finders.names import WRAPPER
from attnserve_server.conversion.rewrite.repair import repair
from attnserve_server.model.manifest import BATCH


@dataclass(frozen=True, slots=True)
class Traceable:
    """A module in evaluation mode, with the facts that a tracer needs.

    Attributes:
        module: takes its inputs by position and returns a tuple of outputs, (B, ...) each.
        inputs: an example of each input by name, with more than one row.
        shapes: axis symbols and fixed sizes of each input by name, without the batch axis.
        output_names: in the order of the outputs.
        max_lengths: the greatest length by axis symbol.
    """

    module: torch.nn.Module
    inputs: Mapping[str, torch.Tensor]
    shapes: Mapping[str, Sequence[str | int]]
    output_names: Sequence[str]
    max_lengths: Mapping[str, int]


def trace(traceable: Traceable, exporter: str, opset: int) -> onnx.ModelProto:
    """Trace a module to a graph with a dynamic batch and dynamic axes.

    Args:
        traceable: the module.
        exporter: `dynamo` or `torchscript`.
        opset: the operator set of the graph.

    Raises:
        BuildRefused: the exporter fails, or writes another opset. The message has the first line of the error.
    """
    exporters = {"dynamo": _dynamo, "torchscript": _torchscript}
    # The TorchScript exporter restores the mode of the module, and sets it for all its children:
    # findings/torch_export_resets_submodule_modes.sh.
    traceable.module.eval()
    with quiet(), torch.no_grad():
        try:
            proto = exporters[exporter](traceable, opset)
        except Exception as fault:  # noqa: BLE001 - the boundary to torch's exporters, which raise many types
            raise BuildRefused(f"torch's {exporter} exporter cannot export the model: {_words(fault)}") from None
    written = next((entry.version for entry in proto.opset_import if not entry.domain), 0)
    if written != opset:
        # Dynamo writes its own opset if the conversion to another one fails.
        raise BuildRefused(f"torch's {exporter} exporter wrote opset {written} for this model instead of {opset}")
    return proto


def _words(fault: BaseException) -> str:
    """Return the first line of the root cause; the exceptions that wrap it only report that the export failed."""
    while fault.__cause__ is not None:
        fault = fault.__cause__
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(fault))
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    return (lines[0] if lines else type(fault).__name__)[:300]


def _dynamo(traceable: Traceable, opset: int) -> onnx.ModelProto:
    batch = torch.export.Dim(BATCH, min=1)
    dims = {name: torch.export.Dim(name, min=1, max=length) for name, length in traceable.max_lengths.items()}
    program = torch.onnx.export(
        traceable.module,
        tuple(traceable.inputs.values()),
        dynamo=True,
        opset_version=opset,
        input_names=list(traceable.inputs),
        output_names=[f"{WRAPPER}.{name}" for name in traceable.output_names],
        # One entry for `*inputs`, with a shape for each input.
        dynamic_shapes=(
            tuple(
                {0: batch} | {axis: dims[symbol] for axis, symbol in _dynamic(traceable.shapes[name])}
                for name in traceable.inputs
            ),
        ),
        verbose=False,
    )
    assert program is not None
    _name_outputs(program.model.graph, traceable.output_names)
    # Dynamo shares one row of rotary angles among the batch.
    repair(program.model.graph)
    return program.model_proto


def _torchscript(traceable: Traceable, opset: int) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory(prefix="attnserve-torchscript-") as work, _unlogged():
        path = Path(work) / "traced.onnx"
        torch.onnx.export(
            traceable.module,
            tuple(traceable.inputs.values()),
            path,
            dynamo=False,
            opset_version=opset,
            input_names=list(traceable.inputs),
            output_names=[f"{WRAPPER}.{name}" for name in traceable.output_names],
            dynamic_axes={name: {0: BATCH} | dict(_dynamic(traceable.shapes[name])) for name in traceable.inputs},
        )
        model = ir.from_proto(onnx.load(path))
    _name_outputs(model.graph, traceable.output_names)
    return ir.to_proto(model)


def _dynamic(shape: Sequence[str | int]) -> list[tuple[int, str]]:
    return [(axis, symbol) for axis, symbol in enumerate(shape, start=1) if isinstance(symbol, str)]


def _name_outputs(graph: ir.Graph, names: Sequence[str]) -> None:
    """Name the outputs, and rename inner values with the same names.

    The dynamo exporter does not rename them: findings/torch_export_output_name_in_use.sh.
    """
    for node in graph.all_nodes():
        for value in node.outputs:
            if value.name in names:
                value.name = f"{value.name}.inner"
    for output, name in zip(graph.outputs, names, strict=True):
        output.name = name


class _Nowhere(io.StringIO):
    """Discards all output, and keeps the reference by which a live rich progress bar finds its own stream."""

    def __init__(self) -> None:
        super().__init__()
        self.rich_proxied_file = getattr(sys.stderr, "rich_proxied_file", sys.stderr)


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Stop the TorchScript exporter from printing a graph that it cannot export to the process's standard output.

    The exporter enables this log itself, so the log function is replaced for the duration of the context.
    """
    log = torch._C._jit_onnx_log  # noqa: SLF001 - the log has no public name
    torch._C._jit_onnx_log = lambda *_: None  # noqa: SLF001
    try:
        yield
    finally:
        torch._C._jit_onnx_log = log  # noqa: SLF001


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings and output of the libraries, none of which a user can act on."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    nowhere = _Nowhere()
    try:
        # The dynamo exporter prints the whole of a graph that it cannot export.
        with warnings.catch_warnings(), contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
