"""Runs a graph on chosen inputs: the sequences (`feeds`), the session (`runtime`) and the axes found (`axes`)."""
