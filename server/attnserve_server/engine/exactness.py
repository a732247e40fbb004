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

_DEPTH, _COLUMNS = 64, 32
# y = MatMulInteger(x, w): x (m, 64) uint8, w (64, 32) int8, all 127, y (m, 32) int32. As onnx.helper writes it.
# The weights are constant, so that they are packed as those of models are.
_PRODUCT: Final = (
    b'\x08\x08:\xd7\x10\n\x18\n\x01x\n\x01w\x12\x01y"\rMatMulInteger\x12\x00*\x8c\x10\x08@\x08 \x10\x03B\x01wJ\x80\x10'
    + _DEPTH * _COLUMNS * b"\x7f"
    + b"Z\x14\n\x01x\x12\x0f\n\r\x08\x02\x12\t\n\x03\x12\x01m\n\x02\x08@"
    + b"b\x14\n\x01y\x12\x0f\n\r\x08\x06\x12\t\n\x03\x12\x01m\n\x02\x08 B\x04\n\x00\x10\x11"
)
_ROWS: Final = (1, 8)
"""Of x: one row alone may go another way than several."""


@cache
def multiplies_bytes_exactly() -> bool:
    """Whether products of bytes come out right as they are, the greatest added to the greatest."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(_PRODUCT, sess_options=options, providers=["CPUExecutionProvider"])

    def product(rows: int) -> Any:
        return session.run(None, {"x": np.full((rows, _DEPTH), 255, np.uint8)})[0]

    return all((product(rows) == _DEPTH * 255 * 127).all() for rows in _ROWS)
