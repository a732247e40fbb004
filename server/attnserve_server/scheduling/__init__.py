"""Admission, queue, batching policy and the loop that carries them out. Nothing here knows the wire or the runtime."""
