"""Learns by running what a graph does not state: its inputs' true axes, layouts of weights, windows and patch grids."""
