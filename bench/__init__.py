"""Benchmarks, as ratios within one run. `make bench` runs `bench.run`; docs/reference/benchmarks.md records all."""
