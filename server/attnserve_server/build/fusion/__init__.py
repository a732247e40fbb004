"""Fuse, then tap, where it pays: plain attention is rewritten to one operator if that is faster and answers alike."""

from attnserve_server.build.fusion.decide import Rewritten, fused

__all__ = ["Rewritten", "fused"]
