"""The runtime session: load a model, run it, and stop a run.

Only this module, `session_options`, `gpu` and `openvino` import onnxruntime. Errors carry no text of the runtime, which
may hold paths; it is the cause of the exception, for the log.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import onnxruntime as ort

from attnserve_server.domain.errors import AttnserveError
from attnserve_server.domain.values import Array
from attnserve_server.engine import openvino
from attnserve_server.engine.gpu import PinnedOutputs, RecordedRuns, not_recorded
from attnserve_server.engine.providers import (
    AUTO,
    CPU,
    CUDA,
    GPU_PROVIDERS,
    OPENVINO,
    TENSORRT,
    PrecisionUnavailable,
    ProviderChoice,
    ProviderUnavailable,
    named,
)
from attnserve_server.engine.session_options import (
    EVERY_OPTIMIZER,
    FATAL_ONLY,
    LEFT_OUT,
    LEFT_OUT_ON_GPU,
    int8_fallbacks,
    runtime_version,
    session_options,
)
from attnserve_server.engine.shapes import ShapePlan

__all__ = [
    "AUTO",
    "CPU",
    "CUDA",
    "EVERY_OPTIMIZER",
    "LEFT_OUT",
    "OPENVINO",
    "TENSORRT",
    "LoadFailed",
    "PrecisionUnavailable",
    "ProviderUnavailable",
    "RunFailed",
    "RunHandle",
    "RunTerminated",
    "RuntimeSession",
    "runtime_version",
    "write_optimised",
]


class LoadFailed(AttnserveError):
    """The runtime could not load the model. The cause holds the runtime's message."""

    reason = "LOAD_FAILED"

    def __init__(self) -> None:
        super().__init__("the runtime could not load the model")


class RunFailed(AttnserveError):
    """A run failed. The cause holds the runtime's message."""

    reason = "RUN_FAILED"

    def __init__(self) -> None:
        super().__init__("the run failed")


class RunTerminated(AttnserveError):
    """A run was stopped through its handle."""

    reason = "RUN_TERMINATED"

    def __init__(self) -> None:
        super().__init__("the run was terminated")


class RunHandle:
    """Stops a run from another thread. A handle belongs to one batch, which may take several runs in sequence."""

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
        """Stop the current run at its next node, and refuse later runs with this handle. Any thread."""
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
    """One loaded model: one copy of the weights. Any number of threads may run it concurrently."""

    def __init__(
        self,
        session: ort.InferenceSession,
        device_id: int = 0,
        graphs: ShapePlan | None = None,
        *,
        precision: str = "",
    ) -> None:
        self._session = session
        self.provider: str = session.get_providers()[0]
        self.precision = precision
        """The precision that serves where it is not that of the bundle: `openvino.ROUNDED`; else empty."""
        self._bound = PinnedOutputs(session, device_id) if self.provider in GPU_PROVIDERS else None
        self._recorded = RecordedRuns(session, device_id, graphs) if graphs is not None and self._bound else None
        self.buckets: ShapePlan | None = None
        """Shapes that runs are padded to. Set once, at warm-up, before the session serves."""
        self.input_names: tuple[str, ...] = tuple(node.name for node in session.get_inputs())
        self.output_names: tuple[str, ...] = tuple(node.name for node in session.get_outputs())

    @property
    def fills_up(self) -> bool:
        """Whether outputs may have more rows and positions than the feeds, because a shape of a plan is larger."""
        return self._recorded is not None or self.buckets is not None

    def close(self) -> None:
        """Free the runtime's session and its weights now, before Python collects cycles. It cannot run after that."""
        vars(self).pop("_session", None)  # a run in progress keeps it until it ends
        self._bound = self._recorded = None

    def nodes_by_provider(self) -> dict[str, dict[str, int]]:
        """Return the number of nodes of each operator by provider; empty for sessions that do not record this."""
        return openvino.nodes_by_provider(self._session) if self.provider == OPENVINO else {}

    @classmethod
    def load(
        cls,
        model_path: Path,
        *,
        provider: str = AUTO,
        required_provider: str | None = None,
        device_id: int = 0,
        provider_options: Mapping[str, Mapping[str, str]] | None = None,
        graphs: ShapePlan | None = None,
        left_out: Sequence[str] | None = None,
        intra_op_threads: int = 1,
    ) -> RuntimeSession:
        """Load a model by its path. The runtime reads external data from the folder of that file only.

        A model loaded from bytes takes it from the working directory: findings/bytes_take_external_data_from_cwd.sh.

        Args:
            model_path: the ONNX file.
            provider: an execution provider of onnxruntime, one of `ALIASES`, or `auto`: CUDA if the runtime offers it
                and it loads, else CPU.
            required_provider: raise unless this provider is in use; None: any.
            device_id: index among the visible GPUs.
            provider_options: options by provider; they override the defaults of `engine.providers`. For OpenVINO:
                properties of its CPU device, over those of `engine.openvino`.
            graphs: what to record as CUDA graphs; None: nothing.
            left_out: names of graph optimizers to disable on a CPU; None: `LEFT_OUT`.
            intra_op_threads: threads within one run, the calling thread included; 1 or more.

        Raises:
            ProviderUnavailable: a named or required provider is not offered, or did not load.
            PrecisionUnavailable: the options require a precision that the processor lacks.
            LoadFailed: the runtime could not load the model.
        """
        required = None if required_provider is None else named(required_provider)
        choice = ProviderChoice(
            named(provider), required, device_id, provider_options or {}, cuda_graphs=graphs is not None
        )
        available = ort.get_available_providers()
        if OPENVINO in (choice.provider, choice.required) and openvino.device():
            available.append(OPENVINO)
        first = choice.first(available)
        on_cpu = LEFT_OUT if left_out is None else left_out
        if first == OPENVINO:
            properties = choice.options.get(OPENVINO, {})
            found = _on_openvino(model_path, session_options(intra_op_threads, on_cpu), properties)
            return cls(found, precision=openvino.precision_of(properties))
        for name in dict.fromkeys((first, *((CPU,) if choice.may_fall_back else ()))):
            options = session_options(intra_op_threads, on_cpu if name == CPU else LEFT_OUT_ON_GPU)
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
        shrinks: bool = False,
    ) -> list[Array]:
        """Run the model once, on the calling thread.

        Every node runs, fetched or not: `RunOptions.only_execute_path_to_fetches` skips none (onnxruntime 1.32;
        findings/only_execute_path_to_fetches.sh).
        A tap without items runs over zero rows.

        Args:
            feeds: an array for each input, (B, ...) as the graph declares it.
            fetches: names of the outputs to return.
            handle: stops the run from another thread.
            exact_shape: do not pad the run to a shape of a plan.
            shrinks: free what the arena on the CPU does not use afterwards, which takes as long as several runs.

        Returns:
            The outputs in the order of `fetches`, each in its own memory.

        Raises:
            RunTerminated: `handle.terminate()` was called before or during the run.
            RunFailed: the runtime failed.
        """
        if not fetches:
            return []  # the runtime returns all outputs for an empty list: findings/empty_fetch_list.sh
        options = ort.RunOptions()
        options.log_severity_level = FATAL_ONLY
        if shrinks:
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        if handle is not None:
            handle._attach(options)  # noqa: SLF001 - handle and session are two halves of one thing
        try:
            if self._bound is not None:
                return self._run_bound(self._bound, feeds, fetches, options, exact_shape=exact_shape)
            if self.buckets is not None and not exact_shape:
                feeds = self.buckets.padded(feeds)
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
            return bound.run(feeds, fetches, not_recorded(options))


def write_optimised(model_path: Path, target: Path) -> None:
    """Write the graph as the runtime optimizes it for any CPU.

    Args:
        model_path: the ONNX file.
        target: where to write the optimized graph.

    Raises:
        LoadFailed: the runtime could not load the model, or could not write the file.
    """
    options = session_options(1, LEFT_OUT)
    # The next level would choose weight layouts for this processor alone.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    try:
        ort.InferenceSession(str(model_path), sess_options=options, providers=[CPU])
    except Exception as error:
        raise LoadFailed from error


def _on_openvino(path: Path, options: ort.SessionOptions, properties: Mapping[str, str]) -> ort.InferenceSession:
    """Return a session of the OpenVINO plug-in. Raises as `RuntimeSession.load`."""
    try:
        return openvino.opened(path, options, properties)
    except (ProviderUnavailable, PrecisionUnavailable):
        raise
    except Exception as error:
        raise LoadFailed from error


def _open(
    path: Path, options: ort.SessionOptions, chain: list[tuple[str, dict[str, str]]]
) -> ort.InferenceSession | None:
    """Return a session that uses the first provider of the chain, or None if that provider does not load.

    Raises:
        LoadFailed: the runtime could not load the model on a CPU.
    """
    chosen = chain[0][0]
    if chosen in GPU_PROVIDERS and hasattr(ort, "preload_dlls"):
        # It loads CUDA's libraries from where pip installs them, and prints those that it misses. The session's list of
        # providers shows whether that matters.
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()
    providers: list[Any] = list(chain)

    def opened() -> ort.InferenceSession:
        # No fallback: a run must not move to another provider than the server reports.
        return ort.InferenceSession(str(path), sess_options=options, providers=providers, enable_fallback=0)

    try:
        session = opened()
    except Exception as error:
        if chosen != CPU:
            return None
        # If products may then saturate, golden answers refuse a model whose answers change by that.
        for _ in int8_fallbacks(options):
            with contextlib.suppress(Exception):  # the first failure is the one to report
                return opened()
        raise LoadFailed from error
    return session if session.get_providers()[0] == chosen else None
