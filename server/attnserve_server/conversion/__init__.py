"""Convert a model to a bundle: export it, find its attention sites, add taps, and check the result."""
