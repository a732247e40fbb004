"""Bringing a model: export, find sites, add taps, check. Torch and the graph libraries live here only."""
