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

CPU: Final = "CPUExecutionProvider"
CUDA: Final = "CUDAExecutionProvider"
TENSORRT: Final = "TensorrtExecutionProvider"
AUTO: Final = "auto"

_PROVIDER_OPTIONS: Final[Mapping[str, Mapping[str, str]]] = {
    # TF32 keeps ten bits of a float32's mantissa: weights would differ from the model's by 1e-3.
    CUDA: {"use_tf32": "0"},
}
_SLOWER_FUSIONS: Final[Mapping[str, str]] = {
    # On the CPU the fused kernel takes longer than Add and LayerNormalization apart: MiniLM as a whole took 9 to 15 %
    # longer with it (batches 1 to 8, lengths 16 to 256, one core, onnxruntime 1.32).
    CPU: "SkipLayerNormFusion",
}
"""Rewritings that the runtime does better without, by provider."""
_FATAL_ONLY: Final = 4
"""The runtime's log level: each of its failures reaches us as an exception, so it need not write lines of its own."""


def runtime_version() -> str:
    """The runtime's name and version."""
    return f"onnxruntime {ort.__version__}"


class ProviderUnavailable(AttnserveError):
    """The execution provider that was asked for is not there, or does not load."""

    reason = "PROVIDER_UNAVAILABLE"

    def __init__(self, wanted: str, available: Sequence[str]) -> None:
        self.wanted, self.available = wanted, tuple(available)
        super().__init__(
            f"execution provider {wanted} is not available: the runtime offers {', '.join(self.available) or 'none'}"
        )


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

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self.provider: str = session.get_providers()[0]
        self.input_names: tuple[str, ...] = tuple(node.name for node in session.get_inputs())
        self.output_names: tuple[str, ...] = tuple(node.name for node in session.get_outputs())

    @classmethod
    def load(
        cls,
        model_path: Path,
        *,
        provider: str = AUTO,
        intra_op_threads: int = 1,
        required_provider: str | None = None,
        allow_spinning: bool = False,
    ) -> RuntimeSession:
        """Loads a model by its path; the runtime then resolves external data beside that file only.

        Args:
            model_path: the ONNX file.
            provider: an execution provider of onnxruntime, or `auto`: CUDA where it is offered and loads, else CPU.
            intra_op_threads: threads within one run, the caller's included; 1 or more.
            required_provider: refuse unless this provider is the one in use.
            allow_spinning: let idle threads of the pool burn their core for a moment instead of sleeping. It helps one
                instance that has the machine to itself and hurts as soon as instances share cores.

        Raises:
            ProviderUnavailable: a named or required provider is not offered or did not load.
            LoadFailed: the runtime refused the model.
        """
        available = ort.get_available_providers()
        chosen = _choose(provider, required_provider, available)
        options = _options(chosen, intra_op_threads, allow_spinning=allow_spinning)
        session = _open(model_path, options, chosen, available)
        if session is None and provider == AUTO and required_provider is None:
            chosen = CPU
            options = _options(chosen, intra_op_threads, allow_spinning=allow_spinning)
            session = _open(model_path, options, chosen, available)
        if session is None:
            raise ProviderUnavailable(chosen, [name for name in available if name != chosen])
        return cls(session)

    def run(self, feeds: Mapping[str, Array], fetches: Sequence[str], handle: RunHandle | None = None) -> list[Array]:
        """Runs the model once, on the calling thread; only what leads to `fetches` is computed.

        Args:
            feeds: an array for each input, (B, ...) as the graph declares it.
            fetches: names of wanted outputs.
            handle: stops the run from another thread.

        Returns:
            The outputs in the order of `fetches`, each in memory of its own.

        Raises:
            RunTerminated: the handle was used, before or during the run.
            RunFailed: the runtime failed; its exception is the cause.
        """
        if not fetches:
            return []  # the runtime would take an empty list for all outputs
        options = ort.RunOptions()
        options.only_execute_path_to_fetches = True
        options.log_severity_level = _FATAL_ONLY
        if handle is not None:
            handle._attach(options)  # noqa: SLF001 - handle and session are two halves of one thing
        try:
            outputs: list[Array] = self._session.run(list(fetches), dict(feeds), options)
        except Exception as error:
            if handle is not None and handle.terminated:
                raise RunTerminated from error
            raise RunFailed from error
        finally:
            if handle is not None:
                handle._detach()  # noqa: SLF001 - as above
        return outputs


def _choose(provider: str, required: str | None, available: Sequence[str]) -> str:
    """The provider to try first. A provider that is not offered is refused before anything is loaded."""
    wanted = required if provider == AUTO else provider
    if required is not None and wanted != required:
        raise ProviderUnavailable(required, [str(wanted)])
    if wanted is None:
        return CUDA if CUDA in available else CPU
    if wanted not in available:
        raise ProviderUnavailable(wanted, available)
    return wanted


def _options(provider: str, intra_op_threads: int, *, allow_spinning: bool) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = intra_op_threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # Memory patterns are kept for each combination of input shapes ever seen: with free shapes that is a leak.
    options.enable_mem_pattern = False
    options.log_severity_level = _FATAL_ONLY
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if allow_spinning else "0")
    if provider in _SLOWER_FUSIONS:
        options.add_session_config_entry("optimization.disable_specified_optimizers", _SLOWER_FUSIONS[provider])
    return options


def _open(
    path: Path, options: ort.SessionOptions, chosen: str, available: Sequence[str]
) -> ort.InferenceSession | None:
    """A session that really uses `chosen`, or None where it cannot be had. Raises LoadFailed for a refused model."""
    chain = [chosen, *((CUDA,) if chosen == TENSORRT and CUDA in available else ()), *((CPU,) if chosen != CPU else ())]
    if CUDA in chain and hasattr(ort, "preload_dlls"):
        # Finds CUDA's libraries where pip puts them. It prints what it misses; the session's providers tell us instead.
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()
    providers: list[Any] = [(name, dict(_PROVIDER_OPTIONS.get(name, {}))) for name in chain]
    try:
        # Fallback off: a run must never quietly move to another provider than the receipt names.
        session = ort.InferenceSession(str(path), sess_options=options, providers=providers, enable_fallback=0)
    except Exception as error:
        if chosen == CPU:
            raise LoadFailed from error
        return None
    return session if session.get_providers()[0] == chosen else None
