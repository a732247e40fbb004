"""The proof that a batch cannot change an answer: an abstract interpretation of a tapped graph. Runs nothing."""

from attnserve_server.build.proof.prove import Proof, prove

__all__ = ["Proof", "prove"]
