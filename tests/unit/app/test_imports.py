"""What each process imports: the runtime takes tens of megabytes, so only the one that runs a model has it."""

from __future__ import annotations

import subprocess
import sys

import pytest

CASES = {
    "attnserve_server.processes.front": False,
    "attnserve_server.processes.supervisor": False,
    "attnserve_server.cli._app": False,
    "attnserve_server.processes.engine": True,
}


@pytest.mark.parametrize(("module", "needs_it"), CASES.items(), ids=CASES)
def test_only_a_process_that_runs_models_imports_the_runtime(module: str, needs_it: bool) -> None:
    program = f"import sys, {module}; print('onnxruntime' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"{needs_it}\n"
