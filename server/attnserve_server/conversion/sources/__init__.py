"""Models that are exported: torch behind them, NumPy at their face. Torch is imported here only."""
