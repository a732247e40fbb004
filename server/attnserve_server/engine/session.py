"""The runtime session: loading a model, running it, and stopping a run. The only module that imports onnxruntime."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Final

import onnxruntime as ort

from attnserve_server.domain.errors import AttnserveError
from attnserve_server.domain.values import Array
from attnserve_server.engine.binding import PinnedOutputs
from attnserve_server.engine.cuda_graphs import GraphPlan, RecordedRuns, run_as_ever
from attnserve_server.engine.exactness import multiplies_bytes_exactly
from attnserve_server.engine.providers import (
    AUTO,
    CPU,
    CUDA,
    GPU_PROVIDERS,
    TENSORRT,
    ProviderChoice,
    ProviderUnavailable,
)

__all__ = [
    "AUTO",
    "CPU",
    "CUDA",
    "LEFT_OUT",
    "TENSORRT",
    "LoadFailed",
    "ProviderUnavailable",
    "RunFailed",
    "RunHandle",
    "RunTerminated",
    "RuntimeSession",
    "runtime_version",
    "write_optimised",
]

LEFT_OUT: Final = ("SkipLayerNormFusion",)
"""Rewritings that the runtime does better without on a CPU, unless a bundle knows better: the fused kernel takes longer
than Add and LayerNormalization apart. MiniLM as a whole took 4 to 15 % longer with it (batches 1 to 8, lengths 16 to
256, one core, onnxruntime 1.32)."""
_LEFT_OUT_ON_GPU: Final = ("BiasSoftmaxFusion",)
"""Rewritings that may not be on a GPU. The kernel that adds a mask and takes the softmax at once divides by the number
of its rows: a tap for which nobody asks has none, and the process ends by SIGFPE (onnxruntime 1.31, H200)."""
_EXACT_BYTES: Final = "session.x64quantprecision"
"""Has the runtime turn signed weights of products into unsigned ones, which it multiplies exactly on any processor."""
_FATAL_ONLY: Final = 4
"""The runtime's log level: each of its failures reaches us as an exception, so it need not write lines of its own."""


def runtime_version() -> str:
    """The runtime's name and version."""
    return f"onnxruntime {ort.__version__}"


class LoadFailed(AttnserveError):
    """The runtime refused the model. The runtime's own words are the exception's cause, for the log alone."""

    reason = "LOAD_FAILED"

    def __init__(self) -> None:
        super().__init__("the runtime could not load the model")


class RunFailed(AttnserveError):
    """A run failed. The runtime's own words, which may hold paths, are the exception's cause, for the log alone."""

    reason = "RUN_FAILED"

    def __init__(self) -> None:
        super().__init__("the run failed")


class RunTerminated(AttnserveError):
    """A run was stopped through its handle."""

    reason = "RUN_TERMINATED"

    def __init__(self) -> None:
        super().__init__("the run was terminated")


class RunHandle:
    """Stops a run from another thread. A handle belongs to one batch, which may take several runs one after another."""

    def __init__(self) -> None:
        self._lock = Lock()
        # Any thread, under the lock.
        self._terminated = False
        self._options: ort.RunOptions | None = None

    @property
    def terminated(self) -> bool:
        """Whether `terminate` was called."""
        with self._lock:
            return self._terminated

    def terminate(self) -> None:
        """Stops the run under way at its next node, and keeps runs that come after from starting. Any thread."""
        with self._lock:
            self._terminated = True
            if self._options is not None:
                self._options.terminate = True

    def _attach(self, options: ort.RunOptions) -> None:
        with self._lock:
            if self._terminated:
                raise RunTerminated
            self._options = options

    def _detach(self) -> None:
        with self._lock:
            self._options = None


class RuntimeSession:
    """One loaded model: one copy of the weights, which any number of threads may run at once."""

    def __init__(self, session: ort.InferenceSession, device_id: int = 0, graphs: GraphPlan | None = None) -> None:
        self._session = session
        self.provider: str = session.get_providers()[0]
        self._bound = PinnedOutputs(session, device_id) if self.provider in GPU_PROVIDERS else None
        self._recorded = RecordedRuns(session, device_id, graphs) if graphs is not None and self._bound else None
        self.fills_up: bool = self._recorded is not None
        """Whether outputs may have more rows and positions than the feeds: those of a recorded shape."""
        self.input_names: tuple[str, ...] = tuple(node.name for node in session.get_inputs())
        self.output_names: tuple[str, ...] = tuple(node.name for node in session.get_outputs())

    @classmethod
    def load(
        cls,
        model_path: Path,
        *,
        provider: str = AUTO,
        required_provider: str | None = None,
        device_id: int = 0,
        provider_options: Mapping[str, Mapping[str, str]] | None = None,
        graphs: GraphPlan | None = None,
        left_out: Sequence[str] | None = None,
        intra_op_threads: int = 1,
    ) -> RuntimeSession:
        """Loads a model by its path; the runtime then resolves external data beside that file only.

        Args:
            model_path: the ONNX file.
            provider: an execution provider of onnxruntime, or `auto`: CUDA where it is offered and loads, else CPU.
            required_provider: refuse unless this provider is the one in use.
            device_id: which of the visible GPUs.
            provider_options: by provider, over our own.
            graphs: what to record as CUDA graphs; None: nothing.
            left_out: names of the runtime's rewritings that are left out on a CPU; None: `LEFT_OUT`.
            intra_op_threads: threads within one run, the caller's included; 1 or more.

        Raises:
            ProviderUnavailable: a named or required provider is not offered or did not load.
            LoadFailed: the runtime refused the model.
        """
        choice = ProviderChoice(
            provider, required_provider, device_id, provider_options or {}, cuda_graphs=graphs is not None
        )
        available = ort.get_available_providers()
        first = choice.first(available)
        for name in dict.fromkeys((first, *((CPU,) if choice.may_fall_back else ()))):
            options = _options(intra_op_threads)
            on_cpu = LEFT_OUT if left_out is None else left_out
            _leave_out(options, on_cpu if name == CPU else _LEFT_OUT_ON_GPU)
            session = _open(model_path, options, choice.chain(name, available))
            if session is not None:
                return cls(session, device_id, graphs)
        raise ProviderUnavailable(first, [name for name in available if name != first])

    def run(
        self,
        feeds: Mapping[str, Array],
        fetches: Sequence[str],
        handle: RunHandle | None = None,
        *,
        exact_shape: bool = False,
    ) -> list[Array]:
        """Runs the model once, on the calling thread.

        Every node runs, whatever is fetched: `RunOptions.only_execute_path_to_fetches` leaves none out (onnxruntime
        1.32). Taps for which nobody asks run over no rows.

        Args:
            feeds: an array for each input, (B, ...) as the graph declares it.
            fetches: names of wanted outputs.
            handle: stops the run from another thread.
            exact_shape: do not pad the run up to a recorded shape.

        Returns:
            The outputs in the order of `fetches`, each in memory of its own.

        Raises:
            RunTerminated: the handle was used, before or during the run.
            RunFailed: the runtime failed; its exception is the cause.
        """
        if not fetches:
            return []  # the runtime would take an empty list for all outputs
        options = ort.RunOptions()
        options.log_severity_level = _FATAL_ONLY
        if handle is not None:
            handle._attach(options)  # noqa: SLF001 - handle and session are two halves of one thing
        try:
            if self._bound is not None:
                return self._run_bound(self._bound, feeds, fetches, options, exact_shape=exact_shape)
            outputs: list[Array] = self._session.run(list(fetches), dict(feeds), options)
        except Exception as error:
            if handle is not None and handle.terminated:
                raise RunTerminated from error
            raise RunFailed from error
        finally:
            if handle is not None:
                handle._detach()  # noqa: SLF001 - as above
        return outputs

    def _run_bound(
        self,
        bound: PinnedOutputs,
        feeds: Mapping[str, Array],
        fetches: Sequence[str],
        options: ort.RunOptions,
        *,
        exact_shape: bool,
    ) -> list[Array]:
        recorded = self._recorded
        if recorded is None:
            return bound.run(feeds, fetches, options)
        with recorded.turn:
            shape = None if exact_shape else recorded.covers(feeds, fetches)
            if shape is not None:
                return recorded.run(feeds, fetches, shape)
            return bound.run(feeds, fetches, run_as_ever(options))


def _options(intra_op_threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = intra_op_threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # Memory patterns are kept for each combination of input shapes ever seen: with free shapes that is a leak.
    options.enable_mem_pattern = False
    options.log_severity_level = _FATAL_ONLY
    # A pool's idle threads sleep: spinning takes cores from the other instances and from the event loop.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not multiplies_bytes_exactly():
        options.add_session_config_entry(_EXACT_BYTES, "1")
    return options


def _leave_out(options: ort.SessionOptions, names: Sequence[str]) -> None:
    if names:
        options.add_session_config_entry("optimization.disable_specified_optimizers", ";".join(names))


def write_optimised(model_path: Path, target: Path) -> None:
    """Writes a graph as the runtime rewrites it for a CPU, as far as that holds on every CPU.

    Raises:
        LoadFailed: the runtime refused the model, or to write it.
    """
    options = _options(1)
    _leave_out(options, LEFT_OUT)
    # One level more would lay weights out for this very processor.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    try:
        ort.InferenceSession(str(model_path), sess_options=options, providers=[CPU])
    except Exception as error:
        raise LoadFailed from error


def _open(
    path: Path, options: ort.SessionOptions, chain: list[tuple[str, dict[str, str]]]
) -> ort.InferenceSession | None:
    """A session that really uses the first of a chain, or None where it cannot be had.

    Raises:
        LoadFailed: the runtime refused the model.
    """
    chosen = chain[0][0]
    if chosen in GPU_PROVIDERS and hasattr(ort, "preload_dlls"):
        # Finds CUDA's libraries where pip puts them. It prints what it misses; the session's providers tell us instead.
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()
    providers: list[Any] = list(chain)

    def opened() -> ort.InferenceSession:
        # Fallback off: a run must never quietly move to another provider than the receipt names.
        return ort.InferenceSession(str(path), sess_options=options, providers=providers, enable_fallback=0)

    try:
        session = opened()
    except Exception as error:
        if chosen != CPU:
            return None
        if multiplies_bytes_exactly():
            raise LoadFailed from error
        # The runtime fails to make weights unsigned that several nodes share (1.32). Golden answers refuse such a model
        # where the saturating products that remain make it answer otherwise.
        options.add_session_config_entry(_EXACT_BYTES, "0")
        try:
            session = opened()
        except Exception:  # noqa: BLE001 - the first reason is the one to tell
            raise LoadFailed from error
    return session if session.get_providers()[0] == chosen else None
