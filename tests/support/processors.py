"""Whether this processor multiplies eight-bit numbers exactly."""

from __future__ import annotations

import platform
from pathlib import Path


def _saturates() -> bool:
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return False
    return not {"avx512_vnni", "avx_vnni"} & set(flags)


SATURATES = _saturates()
"""Without VNNI, onnxruntime's products of unsigned by signed bytes go through sums of 16 bits, which saturate."""
WHY = "without VNNI the runtime's own eight-bit products saturate, so that its operator is not what it is defined to be"
