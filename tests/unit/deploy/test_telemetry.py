"""The runtime reports to its makers by default; a server that is asked to does, and no other."""

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


@pytest.mark.parametrize(("given", "seen"), [({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0")], ids=["unset", "set"])
def test_runtime_s_reports_are_off_unless_the_operator_says_otherwise(given: dict[str, str], seen: str) -> None:
    """Read as the runtime's own code reads it, past Python's copy of the environment."""
    rest = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run([sys.executable, "-c", READ], capture_output=True, text=True, env=rest | given, check=True)
    assert done.stdout.strip() == seen
