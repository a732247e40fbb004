"""onnxruntime's telemetry is off, unless the operator turns it on.

The variable is ORT_DISABLE_TELEMETRY. Another process imports the module that imports onnxruntime, and prints it.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

READ = (
    "import attnserve_server.engine.session, ctypes;"
    "getenv = ctypes.CDLL(None).getenv; getenv.restype = ctypes.c_char_p;"
    "print(getenv(b'ORT_DISABLE_TELEMETRY').decode())"
)


@pytest.mark.parametrize(
    ("given", "expected"), [({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0")], ids=["unset", "set"]
)
def test_telemetry_is_off_unless_the_operator_turns_it_on(given: dict[str, str], expected: str) -> None:
    """The variable is read with getenv, as onnxruntime does, because os.environ is a copy."""
    rest = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run([sys.executable, "-c", READ], capture_output=True, text=True, env=rest | given, check=True)
    assert done.stdout.strip() == expected
