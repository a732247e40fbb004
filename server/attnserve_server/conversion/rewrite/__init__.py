"""Write nodes: fused attention and taps."""
