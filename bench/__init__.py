"""Our numbers, as ratios within one run. `make bench` runs them; docs/reference/benchmarks.md records them."""
