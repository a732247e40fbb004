"""Two sessions of one model on a CPU that share its weights: one thread a run for load, all cores for a run alone.

The runtime packs weights for its kernels, by default into each session's private memory. Here, one session writes the
graph with packed weights to a temporary folder, and both others map that file, so that its pages are in memory once.
The folder is removed at once; the mapping keeps the data until the sessions end. MiniLM in float32, in private memory:
116 MB for one session and 208 for two, against 28 for two that share 132 MB of the file's pages (onnxruntime 1.32).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import onnxruntime as ort

from attnserve_server.domain.machine import return_freed_memory
from attnserve_server.engine.providers import CPU
from attnserve_server.engine.session import LoadFailed, RuntimeSession
from attnserve_server.engine.session_options import EVERY_OPTIMIZER, LEFT_OUT, int8_fallbacks, session_options

_GRAPH: Final = "model.onnx"
_WEIGHTS: Final = "weights.bin"
_FREE_SHARE: Final = 0.5
"""Most of the free space of the temporary folder that the weights may take."""


def load_shared(
    model_path: Path, *, left_out: Sequence[str] | None, intra_op_threads: int, wide_threads: int
) -> tuple[RuntimeSession, RuntimeSession]:
    """Load a model twice on a CPU, with one copy of its weights.

    Args:
        model_path: the ONNX file. Its external data is read from its folder.
        left_out: names of graph optimizers to disable; None: `LEFT_OUT`.
        intra_op_threads: threads of the first session's runs.
        wide_threads: threads of the second one's, which spin while a run is in progress and sleep after it.

    Returns:
        The narrow and the wide session.

    Raises:
        LoadFailed: the runtime could not load the model, or write it.
        OSError: the temporary folder cannot be written, or has too little space.
    """
    with tempfile.TemporaryDirectory(prefix="attnserve-weights-") as name:
        folder = Path(name)
        bytes_needed = sum(file.stat().st_size for file in model_path.parent.iterdir() if file.is_file())
        if bytes_needed > _FREE_SHARE * shutil.disk_usage(folder).free:
            raise OSError(f"{bytes_needed} bytes of weights exceed half of the free space of the temporary folder")
        try:
            _write(model_path, folder / _GRAPH, LEFT_OUT if left_out is None else left_out)
            narrow = _opened(folder / _GRAPH, intra_op_threads, spin=False)
            wide = _opened(folder / _GRAPH, wide_threads, spin=True)
        except Exception as error:
            raise LoadFailed from error
    return_freed_memory()
    return narrow, wide


def _write(model_path: Path, target: Path, left_out: Sequence[str]) -> None:
    """Write the graph as the runtime optimizes it for this processor, with packed weights in a file beside it."""
    options = session_options(1, left_out)
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", _WEIGHTS)
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    fallbacks = int8_fallbacks(options)
    while True:
        try:
            ort.InferenceSession(str(model_path), sess_options=options, providers=[CPU], enable_fallback=0)
        except Exception:
            if next(fallbacks, _GRAPH) == _GRAPH:
                raise
        else:
            return


def _opened(path: Path, threads: int, *, spin: bool) -> RuntimeSession:
    options = session_options(threads, EVERY_OPTIMIZER, spin=spin)
    session = ort.InferenceSession(str(path), sess_options=options, providers=[CPU], enable_fallback=0)
    return RuntimeSession(session)
