"""Bare runtimes: MiniLM over batches in a separate process without a server, which `apps/bare_app.py` measures.

`measured` raises `DidNotStart` with the reason where a runtime does not run, and OSError where its program is missing.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.peers.install import APPS, Peer, last_line
from bench.peers.servers import DidNotStart

Array = npt.NDArray[Any]
TIMEOUT_S = 180.0


@dataclass(frozen=True, slots=True)
class Ran:
    """One run of all batches: wall and processor time in seconds, memory in MiB, and answers of the first batches."""

    wall_s: float
    cpu_s: float
    memory_mb: float
    answers: list[Array]


def measured(peer: Peer, precision: str, model: Path, batches: Path) -> Ran:
    """Run the batches (an .npz file of ids) on a runtime with two threads.

    Raises:
        DidNotStart: It ended with an error, took too long, or the processor lacks the precision.
    """
    answers = batches.with_name("answers.npz")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))},
        "PEER_FORM": f"openvino-{precision}" if peer.package else "onnxruntime",
        "PEER_MODEL": str(model),
        "PEER_BATCHES": str(batches),
        "PEER_ANSWERS": str(answers),
        "PYTHONDONTWRITEBYTECODE": "1",
        "ORT_DISABLE_TELEMETRY": "1",
    }
    line = [str(peer.python), str(APPS / peer.app)]
    try:
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise DidNotStart(f"not done within {TIMEOUT_S:g} s") from error
    if done.returncode:
        raise DidNotStart(last_line(done.stderr))
    figures = json.loads(done.stdout)
    if "why_not" in figures:
        raise DidNotStart(figures["why_not"])
    with np.load(answers) as found:
        return Ran(figures["wall_s"], figures["cpu_s"], figures["memory_mb"], [found[name] for name in found.files])
