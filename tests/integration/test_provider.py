"""A server that must have a GPU refuses to start without one.

Skipped where onnxruntime has the CUDA provider. Needs `minilm_repository`, a bundle of MiniLM.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from serving import command


def test_required_provider_that_is_absent_refuses_to_start(minilm_repository: Path) -> None:
    import onnxruntime  # noqa: PLC0415 - the providers of this machine are needed

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has the CUDA provider; tests/gpu covers it")
    line = [command("attnserve-server"), "serve", "--repository", str(minilm_repository)]
    line += ["--grpc-port", "0", "--http-port", "0", "--require-provider", "CUDAExecutionProvider"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert "CUDAExecutionProvider" in output
    assert "Traceback" not in output
