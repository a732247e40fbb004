"""Learns by running what a graph does not say: axes, layouts, windows, patches, padding."""
