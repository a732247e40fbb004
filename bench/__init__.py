"""Our numbers, as ratios within one run. `make bench` runs them; docs/benchmarks.md records them."""
