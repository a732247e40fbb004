"""The OpenVINO plug-in provider: its device, its options, and sessions that use it.

The plug-in is a separate package beside the stock runtime (the extra `server-openvino`). It compiles the part of a
graph that it knows, and leaves the other nodes to the CPU provider without a message: `nodes_by_provider`.

Streams: a compiled graph runs as many requests at a time as it has streams; more wait. So that one session serves all
instances, it has a stream for each (onnxruntime-ep-openvino 1.8.1, two cores, MiniLM: a run of 1 x 8 tokens that begins
during one of 16 x 200 ends 0.02 s after it with one stream, and takes 0.04 s with two).

Precision: without a hint, the plug-in computes in bfloat16 where the processor can. The hint is always set, so that
nothing is rounded that the operator did not choose. A processor without bfloat16 ignores that hint without a message,
so it is refused here.
"""

from __future__ import annotations

import importlib
import json
import platform
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import onnxruntime as ort

from attnserve_server.engine.providers import CPU, OPENVINO, PrecisionUnavailable, ProviderUnavailable

PRECISION: Final = "INFERENCE_PRECISION_HINT"
THREADS: Final = "INFERENCE_NUM_THREADS"
STREAMS: Final = "NUM_STREAMS"
CACHE: Final = "CACHE_DIR"
ROUNDED: Final = "bf16-scores"
"""Precision of a session in bfloat16. The plug-in rounds the scores of attention too, in the taps as in the graph, and
has no option that exempts nodes. The runtime's assignment of nodes by name (`session.name_based_layer_assignment`) does
not keep taps on the CPU provider: the rule `cpu(...)` assigns them to the plug-in, which is a CPU too, and with
`CPUExecutionProvider(...)` the session does not load (onnxruntime 1.32, onnxruntime-ep-openvino 1.8.1)."""
_PACKAGE: Final = "onnxruntime_ep_openvino"
_LIBRARY: Final = "attnserve.openvino"
"""Name under which the runtime knows the plug-in's library. A name that ends in `.virtual` would offer absent NPUs."""
_RECORD: Final = "session.record_ep_graph_assignment_info"
_DEFAULTS: Final[Mapping[str, str]] = {
    PRECISION: "f32",
    STREAMS: "1",
    THREADS: "1",
    # Several models share the cores, and each would pin its threads to the same ones.
    "ENABLE_CPU_PINNING": "NO",
}


@cache
def _registered(library: str) -> Exception | None:
    """Register the plug-in's library with the runtime, once in a process. Return why that failed; None: it did not."""
    try:
        ort.register_execution_provider_library(_LIBRARY, library)
    except Exception as error:  # noqa: BLE001 - the runtime's errors have no common class
        return error
    return None


def device() -> Any:
    """Return the plug-in's device for the processor (an `OrtEpDevice`). The first call registers the library.

    Raises:
        ProviderUnavailable: the package is missing, does not load, or does not list this processor.
    """
    available = ort.get_available_providers()
    try:
        package = importlib.import_module(_PACKAGE)
    except ImportError:
        why = "its plug-in is not installed; run: pip install 'attnserve[server-openvino]' (Linux on x86-64)"
        raise ProviderUnavailable(OPENVINO, available, why) from None
    fault = _registered(package.get_library_path())
    if fault is not None:
        why = "its plug-in does not load with this version of onnxruntime; install the versions of constraints.txt"
        raise ProviderUnavailable(OPENVINO, available, why) from fault
    devices = ort.get_ep_devices()
    for each in devices:
        if each.ep_name == OPENVINO and each.ep_metadata.get("ov_device") == "CPU":
            return each
    vendor = next((each.device.vendor for each in devices if each.ep_name == CPU), "") or platform.machine()
    why = f"its plug-in lists Intel's processors only, and this one is of {vendor}; set --provider cpu"
    raise ProviderUnavailable(OPENVINO, available, why)


def computes_bf16() -> bool:
    """Whether the processor has instructions for bfloat16 (AMX or AVX512_BF16), as the plug-in reports.

    Raises:
        ProviderUnavailable: as `device`.
    """
    return "BF16" in str(device().ep_metadata.get("OPTIMIZATION_CAPABILITIES", "")).split()


def load_config(options: Mapping[str, str]) -> str:
    """Return the value of the provider's option `load_config`: JSON with the properties of the device.

    Args:
        options: OpenVINO's properties of the CPU by name; they override the defaults of this module.
    """
    return json.dumps({"CPU": {**_DEFAULTS, **options}})


def precision_of(options: Mapping[str, str]) -> str:
    """Return the precision of a session with these options where it is not that of the bundle, else an empty text."""
    return ROUNDED if options.get(PRECISION) == "bf16" else ""


def opened(path: Path, session_options: ort.SessionOptions, options: Mapping[str, str]) -> ort.InferenceSession:
    """Return a session that uses the plug-in, and the CPU provider for the nodes that the plug-in leaves.

    Args:
        path: the ONNX file.
        session_options: of the runtime; they are changed.
        options: as for `load_config`.

    Raises:
        ProviderUnavailable: as `device`.
        PrecisionUnavailable: the options require bfloat16, which the processor lacks.
        Exception: the runtime's own, if it cannot load the model.
    """
    found = device()
    if precision_of(options) and not computes_bf16():
        why = "this processor has no instructions for bfloat16 (AMX or AVX512_BF16); set --precision bundle"
        raise PrecisionUnavailable("bf16", why)
    session_options.add_session_config_entry(_RECORD, "1")
    session_options.add_provider_for_devices([found], {"load_config": load_config(options)})
    return ort.InferenceSession(str(path), sess_options=session_options, enable_fallback=0)


def nodes_by_provider(session: ort.InferenceSession) -> dict[str, dict[str, int]]:
    """Return the number of nodes of each operator by the provider that runs them, of a session from `opened`."""
    counts: dict[str, Counter[str]] = {}
    for subgraph in session.get_provider_graph_assignment_info():
        nodes = counts.setdefault(subgraph.ep_name, Counter())
        nodes.update(".".join(filter(None, (node.domain, node.op_type))) for node in subgraph.get_nodes())
    return {provider: dict(nodes.most_common()) for provider, nodes in counts.items()}
