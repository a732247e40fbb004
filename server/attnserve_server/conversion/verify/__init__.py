"""Verifies a tapped graph: its answers, its batching certificate, its limits and its golden answers."""
