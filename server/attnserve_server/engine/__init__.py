"""Collation, the runtime session and its executor. Only its module `session` imports onnxruntime."""
