"""The reason why tests that need a GPU cannot run on this machine.

Importing it runs `nvidia-smi`, where there is one, and reads onnxruntime's providers where that lists a GPU.
"""

from __future__ import annotations

import shutil
import subprocess


def _why_not() -> str:
    if shutil.which("nvidia-smi") is None:
        return "no NVIDIA GPU here: nvidia-smi is not installed"
    if subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).stdout.strip() == b"":
        return "no NVIDIA GPU here: nvidia-smi lists none"
    import onnxruntime  # noqa: PLC0415 - imported only where there is a GPU

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "a GPU, but no CUDA provider: pip uninstall onnxruntime; pip install 'attnserve[server-gpu]'"
    return ""


WHY_NOT = _why_not()
"""Reason with the remedy; empty where the tests can run."""
