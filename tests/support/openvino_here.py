"""Whether the OpenVINO plug-in serves on this machine, and why not. The plug-in lists Intel's processors only."""

from __future__ import annotations

import pytest
from attnserve_server.engine import openvino
from attnserve_server.engine.providers import ProviderUnavailable


def why_absent() -> str:
    """Return why no session can use the plug-in here; empty if one can."""
    try:
        openvino.device()
    except ProviderUnavailable as fault:
        return str(fault)
    return ""


def why_no_bf16() -> str:
    """Return why nothing can be computed in bfloat16 here; empty if it can."""
    absent = why_absent()
    return absent or ("" if openvino.computes_bf16() else "this processor has no AMX and no AVX512_BF16")


needs_openvino = pytest.mark.skipif(bool(why_absent()), reason=why_absent())
needs_bf16 = pytest.mark.skipif(bool(why_no_bf16()), reason=why_no_bf16())
