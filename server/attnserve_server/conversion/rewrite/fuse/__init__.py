"""Rewrite plain attention to one fused operator."""
