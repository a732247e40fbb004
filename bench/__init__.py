"""Benchmarks, as ratios within one run. `make bench` runs the first; docs/reference/benchmarks.md records all."""
