"""The runtime session: load a model, run it, and stop a run; and the thread on which an instance runs.

Only this module, `session_options` and `gpu` import onnxruntime. Errors carry no text of the runtime, which may hold
paths; it is the cause of the exception, for the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, TypeVar

import onnxruntime as ort

from attnserve_server.domain.errors import AttnserveError
from attnserve_server.domain.values import Array
from attnserve_server.engine.gpu import GraphPlan, PinnedOutputs, RecordedRuns, not_recorded
from attnserve_server.engine.providers import (
    AUTO,
    CPU,
    CUDA,
    GPU_PROVIDERS,
    TENSORRT,
    ProviderChoice,
    ProviderUnavailable,
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

__all__ = [
    "AUTO",
    "CPU",
    "CUDA",
    "EVERY_OPTIMIZER",
    "LEFT_OUT",
    "TENSORRT",
    "InstanceThread",
    "LoadFailed",
    "ProviderUnavailable",
    "RunFailed",
    "RunHandle",
    "RunTerminated",
    "RuntimeSession",
    "runtime_version",
    "write_optimised",
]

T = TypeVar("T")
_Call = tuple[asyncio.Future[Any], Callable[..., Any], tuple[Any, ...]]


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


class InstanceThread:
    """One thread that runs functions one after another, from `__init__` until `end`.

    Event loop only, except for the functions that it runs. A ThreadPoolExecutor of one thread does the same at a higher
    cost: a second future with its own lock and condition per call, twice per batch.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        # A daemon, because a run that never ends must not keep the process alive after shutdown.
        self._thread = Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def run(self, function: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
        """Queue a call and return the future of its result or exception. Cancelling the future stops nothing."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._calls.put((future, function, arguments))
        return future

    async def end(self) -> None:
        """End the thread after the queued calls."""
        self._calls.put(None)
        await asyncio.to_thread(self._thread.join)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function, arguments = call
            value: Any = None
            fault: BaseException | None = None
            try:
                value = function(*arguments)
            except BaseException as error:  # noqa: BLE001 - deliver any exception to the awaiting task
                fault = error
            try:
                self._loop.call_soon_threadsafe(_resolve, future, value, fault)
            except RuntimeError:
                return  # the loop is closed, so no task is waiting
            del call, future, function, arguments, value, fault  # free the batch before waiting for the next call


def _resolve(future: asyncio.Future[Any], value: object, fault: BaseException | None) -> None:
    if future.done():
        return  # cancelled
    if fault is None:
        future.set_result(value)
    else:
        future.set_exception(fault)


class RuntimeSession:
    """One loaded model: one copy of the weights. Any number of threads may run it concurrently."""

    def __init__(self, session: ort.InferenceSession, device_id: int = 0, graphs: GraphPlan | None = None) -> None:
        self._session = session
        self.provider: str = session.get_providers()[0]
        self._bound = PinnedOutputs(session, device_id) if self.provider in GPU_PROVIDERS else None
        self._recorded = RecordedRuns(session, device_id, graphs) if graphs is not None and self._bound else None
        self.fills_up: bool = self._recorded is not None
        """Whether outputs may have more rows and positions than the feeds, because a recorded shape is larger."""
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
        """Load a model by its path. The runtime reads external data from the folder of that file only.

        A model loaded from bytes takes it from the working directory: findings/bytes_take_external_data_from_cwd.sh.

        Args:
            model_path: the ONNX file.
            provider: an execution provider of onnxruntime, or `auto`: CUDA if the runtime offers it and it loads, else
                CPU.
            required_provider: raise unless this provider is in use; None: any.
            device_id: index among the visible GPUs.
            provider_options: options by provider; they override the defaults of `engine.providers`.
            graphs: what to record as CUDA graphs; None: nothing.
            left_out: names of graph optimizers to disable on a CPU; None: `LEFT_OUT`.
            intra_op_threads: threads within one run, the calling thread included; 1 or more.

        Raises:
            ProviderUnavailable: a named or required provider is not offered, or did not load.
            LoadFailed: the runtime could not load the model.
        """
        choice = ProviderChoice(
            provider, required_provider, device_id, provider_options or {}, cuda_graphs=graphs is not None
        )
        available = ort.get_available_providers()
        first = choice.first(available)
        for name in dict.fromkeys((first, *((CPU,) if choice.may_fall_back else ()))):
            on_cpu = LEFT_OUT if left_out is None else left_out
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
    ) -> list[Array]:
        """Run the model once, on the calling thread.

        Every node runs, fetched or not: `RunOptions.only_execute_path_to_fetches` skips none (onnxruntime 1.32;
        findings/only_execute_path_to_fetches.sh).
        A tap without items runs over zero rows.

        Args:
            feeds: an array for each input, (B, ...) as the graph declares it.
            fetches: names of the outputs to return.
            handle: stops the run from another thread.
            exact_shape: do not pad the run to a recorded shape.

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
