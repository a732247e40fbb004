"""Makes the batching certificate of a tapped graph: the proof, and the attack on what it does not refute.

A certificate states, in a clause for the batch and one for each axis, whether neighbours or padding can change an
answer. A tapped graph returns attention weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx

from attnserve_server.conversion.assemble import Assembled
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.inputs.vocabulary import extreme_ids_of
from attnserve_server.conversion.learning.batch_axis import BATCH_FIRST, batch_on_axis_1, names_the_batch_first
from attnserve_server.conversion.proof import Proof, prove
from attnserve_server.conversion.proof.attack import DEFAULT_SECONDS, attack
from attnserve_server.conversion.proof.context import SOFTMAX_OVER_ROWS, SUM_OVER_ROWS
from attnserve_server.conversion.proof.noise import noise_of
from attnserve_server.conversion.proof.target import Target
from attnserve_server.conversion.verify.stability import instability, other_last_bits
from attnserve_server.model.batching import cautions
from attnserve_server.model.certificate import Batching, Certificate, Verdict
from attnserve_server.model.equality import Equality
from attnserve_server.model.manifest import BATCH, InputRole, SiteSpec

ATTACK_SECONDS = DEFAULT_SECONDS
"""The default limit of an attack."""
_OVER_ROWS = (SOFTMAX_OVER_ROWS, SUM_OVER_ROWS)
"""Reasons that a graph with its batch on the second axis has."""


@dataclass(frozen=True, slots=True)
class Certified:
    """A certificate, and the sites with the kinds that the proof establishes."""

    certificate: Certificate
    sites: tuple[SiteSpec, ...]


def certify(
    assembled: Assembled,
    max_lengths: Mapping[str, int],
    steps: Steps,
    *,
    batching: Batching,
    attack_seconds: float,
    max_batch_size: int,
) -> Certified:
    """Prove what padding and batch neighbours can change, and attack every clause that is not refuted.

    Args:
        assembled: the tapped graph, opened for checks.
        max_lengths: the greatest length of each axis symbol of its inputs.
        steps: receives the steps, and a warning for each clause that limits batching under the policy.
        batching: the policy of the warnings; the certificate holds for any.
        attack_seconds: the most that the whole attack may take.
        max_batch_size: rows of the largest batch that will be served.

    Raises:
        BuildRefused: the graph does not run.
    """
    proto = onnx.load(assembled.model_path)
    sampler = assembled.sampler
    proof = prove(
        proto,
        sampler.signature,
        assembled.outputs,
        assembled.sites,
        max_lengths=max_lengths,
        derived=assembled.derived_axes,
        precision=assembled.precision,
        vocabularies=sampler.vocabulary_sizes,
    )
    ids = {spec.name for spec in sampler.signature.inputs if spec.role is InputRole.TOKEN_IDS}
    target = Target(
        runner=assembled.checker,
        sampler=sampler,
        outputs=assembled.outputs,
        sites=assembled.sites,
        max_lengths=max_lengths,
        max_batch_size=max_batch_size,
        derived=assembled.derived_axes,
        extreme_ids={name: extreme_ids_of(proto.graph, name) for name in ids},
    )
    steps.note("attacking what is not refuted")
    with other_last_bits(proto) as moved:
        noise = noise_of(target, assembled.precision, moved)
    clauses = attack(target, proof, Equality(assembled.precision, noise), seconds=attack_seconds, report=steps.note)
    certificate = Certificate(clauses=clauses, masks=proof.masks, noise=noise)
    alone = sampler.signature.fixed_batch is not None
    for caution in cautions(certificate, batching, alone=alone):
        steps.warn(str(caution))
    if warning := instability(assembled, max_lengths):
        steps.warn(warning)
    return Certified(certificate, _with_kinds(assembled.sites, proof))


def refuse_swapped_axes(assembled: Assembled, certificate: Certificate, graph: onnx.GraphProto, steps: Steps) -> None:
    """Refuse a graph whose batch is its second axis, which attention over the rows shows.

    Args:
        assembled: the tapped graph of a file.
        certificate: of that graph.
        graph: the source.
        steps: receives a warning instead if the file names its first axis as a batch.

    Raises:
        BuildRefused: the batch is the second axis, or the graph does not run.
    """
    batch = certificate.clause(BATCH)
    if batch.status() != Verdict.REFUTED or not any(words in batch.reason for words in _OVER_ROWS):
        return
    swapped = batch_on_axis_1(
        assembled.source, assembled.sampler, assembled.outputs, assembled.sites, assembled.tolerances.neighbours
    )
    if not swapped:
        return
    problem = (
        f"the batch may be axis 1 of {', '.join(map(repr, swapped))}: rows along axis 0 change each other's "
        f"answers, and positions along axis 1 do not; {BATCH_FIRST}"
    )
    if not names_the_batch_first(graph, swapped):
        raise BuildRefused(problem)
    steps.warn(problem)


def _with_kinds(sites: tuple[SiteSpec, ...], proof: Proof) -> tuple[SiteSpec, ...]:
    """Return the sites; those whose queries provably attend to no later key are causal."""
    return tuple(
        site.model_copy(update={"kind": "causal"}) if site.name in proof.causal_sites else site for site in sites
    )
