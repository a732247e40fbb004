"""Whether this processor adds products of unsigned by signed bytes without saturating, as eight-bit models need it.

Without VNNI, x86 adds them in 16 bits, which saturate. The runtime can then turn signed weights into unsigned ones and
multiply exactly; with VNNI it would do so for nothing, and take more than twice as long (MiniLM, 8 x 40 tokens).
So we look what comes out, which tells of any processor.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import numpy as np
import onnxruntime as ort

# y = MatMulInteger(x, w): x (m, k) uint8, w (k, n) int8, y (m, n) int32; opset 17. As onnx.helper writes it.
_PRODUCT: Final = (
    b'\x08\x08:a\n\x18\n\x01x\n\x01w\x12\x01y"\rMatMulInteger\x12\x00Z\x15\n\x01x\x12\x10\n\x0e\x08\x02\x12\n\n\x03\x12'
    b"\x01m\n\x03\x12\x01kZ\x15\n\x01w\x12\x10\n\x0e\x08\x03\x12\n\n\x03\x12\x01k\n\x03\x12\x01nb\x15\n\x01y\x12\x10\n"
    b"\x0e\x08\x06\x12\n\n\x03\x12\x01m\n\x03\x12\x01nB\x04\n\x00\x10\x11"
)
_ROWS: Final = (1, 8)
"""Of x: one row alone may go another way than several."""
_DEPTH, _COLUMNS = 64, 32


@cache
def multiplies_bytes_exactly() -> bool:
    """Whether products of bytes come out right as they are, the greatest added to the greatest."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(_PRODUCT, sess_options=options, providers=["CPUExecutionProvider"])
    weights = np.full((_DEPTH, _COLUMNS), 127, np.int8)

    def product(rows: int) -> Any:
        return session.run(None, {"x": np.full((rows, _DEPTH), 255, np.uint8), "w": weights})[0]

    return all((product(rows) == _DEPTH * 255 * 127).all() for rows in _ROWS)
