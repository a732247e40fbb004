"""The proof that a batch cannot change an answer, which follows a tapped graph (`prove`), and the attack on it.

The proof runs nothing. The attack (`attack`) runs the graph on batches that should break what is not refuted.
"""

from attnserve_server.conversion.proof.prove import Proof, prove

__all__ = ["Proof", "prove"]
