"""The bare runtime: MiniLM's graph in a repository, and its cost without a server, tapped and untapped.

A tap is a graph's output with the attention weights of one place that computes attention; an input of batch rows turns
it on. `minilm_of` raises SystemExit with a message if there is no such graph. onnxruntime's exceptions pass unchanged,
except in `cpu_seconds_of_two_threads`, whose threads print theirs and end.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

Array = npt.NDArray[Any]

ITEMS_PREFIX = "attention_items."
TAP_PREFIXES = ("attention.", "attention_scores.", "attention_mean.")
"""Starts of the names of a tap's outputs: weights, scores, and means over heads."""


def minilm_of(repository: Path) -> Path:
    """Return the graph of the newest version of the bundle `minilm`.

    Raises:
        SystemExit: The repository has no such bundle. The message has the remedy.
    """
    found = [path for path in repository.glob("minilm/*/model.onnx") if path.parent.name.isdecimal()]
    if not found:
        raise SystemExit(f"{repository} has no bundle of minilm; `make demo` writes one to .demo/models")
    return max(found, key=lambda path: int(path.parent.name))


def untapped(model_path: Path) -> bytes:
    """Return the bundle's graph without tap inputs, tap outputs and the nodes that only they need."""
    model = onnx.load(model_path)
    graph = model.graph
    outputs = [value for value in graph.output if not value.name.startswith(TAP_PREFIXES)]
    needed = {value.name for value in outputs}
    kept = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input)
    inputs = [value for value in graph.input if not value.name.startswith(ITEMS_PREFIX)]
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    for field, values in (("node", kept[::-1]), ("input", inputs), ("output", outputs), ("initializer", weights)):
        graph.ClearField(field)
        getattr(graph, field).extend(values)
    return model.SerializeToString()


class BareSession:
    """One session of one thread, fed batches of ids."""

    def __init__(self, model: bytes | str) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        # The runtime at its best: this fusion slows MiniLM down on the CPU, and the server leaves it out too.
        options.add_session_config_entry("optimization.disable_specified_optimizers", "SkipLayerNormFusion")
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        names = [value.name for value in self._session.get_inputs()]
        self._items = {name: np.empty(0, np.int64) for name in names if name.startswith(ITEMS_PREFIX)}
        self._types = "token_type_ids" in names
        self._fetches = [value.name for value in self._session.get_outputs() if not value.name.startswith(TAP_PREFIXES)]

    def run(self, ids: Array) -> None:
        """Run one batch (B, T); 0 is padding."""
        self._session.run(self._fetches, self._feeds(ids))

    def run_asked(self, ids: Array) -> None:
        """Run one batch with the weights of every site and row."""
        rows = np.arange(len(ids), dtype=np.int64)
        self._session.run(None, {**self._feeds(ids), **dict.fromkeys(self._items, rows)})

    def hidden(self, ids: Array) -> Array:
        """Return hidden states (B, T, 384) of one batch."""
        (found,) = self._session.run(["last_hidden_state"], self._feeds(ids))
        return np.asarray(found)

    def _feeds(self, ids: Array) -> dict[str, Array]:
        feeds = {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int64), **self._items}
        if self._types:
            feeds["token_type_ids"] = np.zeros_like(ids)
        return feeds

    def cpu_seconds(self, batches: list[Array]) -> float:
        """Return the CPU time of one thread that runs all batches."""
        started = time.thread_time()
        for batch in batches:
            self.run(batch)
        return time.thread_time() - started

    def cpu_seconds_of_two_threads(self, batches: list[Array]) -> tuple[float, float]:
        """Return CPU and wall time of the process while two threads share the batches."""
        halves = (batches[::2], batches[1::2])
        threads = [threading.Thread(target=lambda half=half: [self.run(batch) for batch in half]) for half in halves]
        cpu, wall = time.process_time(), time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.process_time() - cpu, time.perf_counter() - wall
