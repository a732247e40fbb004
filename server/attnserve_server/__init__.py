"""The attnserve server. Rooms and their order are drawn in ARCHITECTURE.md."""

import os

# From 1.32 on, onnxruntime reports to its makers unless this is set before it is loaded. What a server runs is its
# operator's affair; who wants the reports sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
