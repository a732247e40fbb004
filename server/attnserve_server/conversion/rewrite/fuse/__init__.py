"""Rewrite decomposed attention to fused operators."""
