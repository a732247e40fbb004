"""Fuse, then tap, where it pays: plain attention is rewritten to one operator if that is faster and answers alike."""

from attnserve_server.build.fusion.decide import assemble_fused

__all__ = ["assemble_fused"]
