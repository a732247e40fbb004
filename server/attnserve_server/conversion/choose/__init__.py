"""Choose between graphs that answer alike: fused or not, either exporter, rewritings. The fastest is kept."""
