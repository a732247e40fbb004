"""Options of a runtime session: threads, memory, disabled graph optimizers, and exact int8 products on every processor.

int8 products: x86 processors without VNNI add products of uint8 and int8 in 16 bits, which saturate
(findings/int8_saturates_without_vnni.sh). The runtime can convert int8 weights to uint8 and multiply exactly instead.
With VNNI the conversion changes nothing and takes more than twice the time (MiniLM, 8 x 40 tokens). Whether it is
needed is measured by one product, which works on any processor. The runtime cannot convert weights or zero points that
several nodes share (1.32; findings/x64quantprecision_shared_weights.sh), as files with QuantizeLinear and
DequantizeLinear have them: `int8_fallbacks`.

Arguments are not checked, and nothing here raises: a wrong name or number fails, if at all, when the session is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Final

import numpy as np
import onnxruntime as ort

from attnserve_server.engine.providers import CPU

LEFT_OUT: Final = ("SkipLayerNormFusion",)
"""Graph optimizers disabled on a CPU, unless the manifest lists others. The fused kernel takes longer than Add and
LayerNormalization apart: MiniLM takes 4 to 15 % longer with it (batches 1 to 8, lengths 16 to 256, one core,
onnxruntime 1.32)."""
EVERY_OPTIMIZER: Final = ("every optimizer",)
"""In place of names: the runtime runs each node as the file has it."""
LEFT_OUT_ON_GPU: Final = ("BiasSoftmaxFusion",)
"""Graph optimizers disabled on a GPU. With this fusion, a run ended the process by SIGFPE (onnxruntime 1.31, H200)."""
_EXACT_INT8: Final = "session.x64quantprecision"
"""Session option that converts int8 weights to uint8, which x86 multiplies exactly."""
_FLOAT_QDQ: Final = "session.disable_quant_qdq"
"""Session option that computes operators between DequantizeLinear and QuantizeLinear in floats, as the file states."""
FATAL_ONLY: Final = 4
"""Log level. Every failure of the runtime also raises an exception, so it need not log."""

_DEPTH, _COLUMNS = 64, 32
# y = MatMulInteger(x, w): x (m, 64) uint8, w (64, 32) int8, all 127, y (m, 32) int32. As onnx.helper writes it.
# The weights are constant, so that the runtime packs them as it packs those of models.
_PRODUCT: Final = (
    b'\x08\x08:\xd7\x10\n\x18\n\x01x\n\x01w\x12\x01y"\rMatMulInteger\x12\x00*\x8c\x10\x08@\x08 \x10\x03B\x01wJ\x80\x10'
    + _DEPTH * _COLUMNS * b"\x7f"
    + b"Z\x14\n\x01x\x12\x0f\n\r\x08\x02\x12\t\n\x03\x12\x01m\n\x02\x08@"
    + b"b\x14\n\x01y\x12\x0f\n\r\x08\x06\x12\t\n\x03\x12\x01m\n\x02\x08 B\x04\n\x00\x10\x11"
)
_ROWS: Final = (1, 8)
"""Values of m: one row may take another kernel than several."""


def runtime_version() -> str:
    """The runtime's name and version."""
    return f"onnxruntime {ort.__version__}"


def session_options(intra_op_threads: int, left_out: Sequence[str], *, spin: bool = False) -> ort.SessionOptions:
    """Return the options of a session.

    Args:
        intra_op_threads: threads within one run, the calling thread included; 1 or more.
        left_out: names of the graph optimizers to disable, or `EVERY_OPTIMIZER`.
        spin: whether the threads wait actively while a run is in progress; after it they sleep in any case.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = intra_op_threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # A memory pattern is kept for each combination of input shapes, which grows without bound for dynamic shapes.
    options.enable_mem_pattern = False
    options.log_severity_level = FATAL_ONLY
    # Threads that spin when nothing runs would take cores from other instances and from the event loop.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not multiplies_int8_exactly():
        options.add_session_config_entry(_EXACT_INT8, "1")
    if tuple(left_out) == EVERY_OPTIMIZER:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    elif left_out:
        options.add_session_config_entry("optimization.disable_specified_optimizers", ";".join(left_out))
    return options


def int8_fallbacks(options: ort.SessionOptions) -> Iterator[None]:
    """Change options step by step for a model that does not load with exact int8 products; yield after each step.

    First, MatMuls between dequantizers stay in floats, so that the runtime has no int8 weights of theirs to convert:
    they are exact, and slower. Last, int8 weights are not converted, and products of uint8 and int8 may saturate.
    Nothing is changed on a processor that multiplies int8 exactly.
    """
    if multiplies_int8_exactly():
        return
    options.add_session_config_entry(_FLOAT_QDQ, "1")
    yield
    options.add_session_config_entry(_EXACT_INT8, "0")
    yield


@cache
def multiplies_int8_exactly() -> bool:
    """Whether this processor adds products of uint8 and int8 without saturating, measured at the greatest values."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(_PRODUCT, sess_options=options, providers=[CPU])

    def product(rows: int) -> Any:
        return session.run(None, {"x": np.full((rows, _DEPTH), 255, np.uint8)})[0]

    return all((product(rows) == _DEPTH * 255 * 127).all() for rows in _ROWS)
