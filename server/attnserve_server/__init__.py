"""The attnserve server of ONNX models, over gRPC. ARCHITECTURE.md draws its packages, called rooms, and their order."""

import os

# From 1.32 on, onnxruntime sends telemetry unless this is set before it is loaded. Set the variable to 0 to allow it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# gRPC otherwise writes a line to standard error for each failed TLS handshake, so that anyone could fill the log
# (findings/grpc_logs_each_failed_handshake.sh).
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

__version__: str
"""Version of the installed distribution; `unknown` in a source tree that is not installed."""


def __getattr__(name: str) -> str:
    # On first use, because the container's health probe imports this package every few seconds.
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import metadata  # noqa: PLC0415 - as above

    try:
        found = metadata.version("attnserve")
    except metadata.PackageNotFoundError:
        found = "unknown"
    globals()[name] = found
    return found
