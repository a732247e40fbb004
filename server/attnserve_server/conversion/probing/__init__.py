"""Run a graph on chosen inputs and read any value in it."""
