"""Admission, queue, batching policy and the loop that carries them out. Imports neither the wire nor the runtime."""
