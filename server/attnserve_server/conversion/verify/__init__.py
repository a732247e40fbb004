"""Verify a tapped graph: its batching certificate, its limits, its source and its golden answers."""
