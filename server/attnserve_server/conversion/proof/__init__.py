"""Prove that a batch cannot change an answer (`prove`), and attack what is not refuted (`attack`).

`prove` interprets a tapped graph abstractly and runs nothing. `attack` runs the graph on batches that are likely to
change an answer.
"""

from attnserve_server.conversion.proof.prove import Proof, prove

__all__ = ["Proof", "prove"]
