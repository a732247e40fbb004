"""Certify: the batching certificate of a tapped graph, for `export`, `prepare` and `check` alike."""

from __future__ import annotations

import time
from collections.abc import Mapping

import onnx

from attnserve_server.build.assemble import Assembled
from attnserve_server.build.learning.probe import batch_error, padding_error
from attnserve_server.build.progress import Steps
from attnserve_server.build.proof import prove
from attnserve_server.model.batching import cautions
from attnserve_server.model.certificate import AttackReport, Batching, Certificate, Clause, Verdict
from attnserve_server.model.manifest import BATCH

ATTACK_SECONDS = 60.0
"""How long an attack on what is neither proved nor refuted may take, unless the person says otherwise."""


def certify(
    assembled: Assembled, max_lengths: Mapping[str, int], steps: Steps, *, batching: Batching, attack_seconds: float
) -> Certificate:
    """Prove what padding and batch neighbours can change, and try to break what the proof leaves open.

    Args:
        assembled: the tapped graph, opened for checks.
        max_lengths: the greatest length of each axis symbol of its inputs.
        steps: is told of what limits batching under the policy.
        batching: the policy that is reported on; the certificate holds for any.
        attack_seconds: the most that an attack may take, in all.

    Raises:
        BuildRefused: the graph does not run.
    """
    steps.begin("proving that batches are safe")
    proof = prove(
        onnx.load(assembled.model_path),
        assembled.sampler.signature,
        assembled.outputs,
        assembled.sites,
        max_lengths=max_lengths,
        derived=assembled.derived_axes,
        precision=assembled.precision,
    )
    clauses = tuple(_probed(clause, assembled, attack_seconds) for clause in proof.clauses)
    certificate = Certificate(clauses=clauses, masks=proof.masks)
    alone = assembled.sampler.signature.fixed_batch is not None
    for caution in cautions(certificate, batching, alone=alone):
        steps.warn(str(caution))
    return certificate


def _probed(clause: Clause, assembled: Assembled, attack_seconds: float) -> Clause:
    """What is unknown, with the report of a few probes in the place of an attack, and open to the default policy.

    The one place where these probes count: the attack and a proof that knows finite masks replace it.
    """
    fixed = assembled.sampler.signature.fixed_batch is not None
    if clause.verdict is not Verdict.UNKNOWN or (fixed and clause.axis == BATCH) or attack_seconds <= 0:
        return clause
    began = time.monotonic()
    runner, sampler, outputs = assembled.checker, assembled.sampler, assembled.outputs
    if clause.axis == BATCH:
        probes, what = 3, "three rows of one length"
        error = batch_error(runner, sampler, outputs, assembled.site_axes)
    else:
        probes, what = min(len(sampler.signature.symbols), 2), "three padded positions"
        error = padding_error(runner, sampler, clause.axis, outputs, assembled.site_axes, assembled.derived_axes)
    worst = error / assembled.tolerances.company
    attack = AttackReport(
        probes=probes,
        seconds=round(time.monotonic() - began, 3),
        worst=worst,
        broke="" if worst <= 1 else what,
    )
    return clause.model_copy(update={"attack": attack, "finite_mask": attack.survived})
