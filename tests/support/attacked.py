"""Open small graphs and attack them: the search for a sequence whose answer padding or its batch neighbours change.

The attack tests what the proof of batching left open. Here the proof is made by hand, with any verdict. A graph that
the server cannot run raises BuildRefused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from attnserve_server.conversion.graphs.reading import precision_of
from attnserve_server.conversion.inputs.signature import signature_of
from attnserve_server.conversion.inputs.vocabulary import extreme_ids_of
from attnserve_server.conversion.probing.axes import probe_axes
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.conversion.proof.attack import attack
from attnserve_server.conversion.proof.prove import Proof
from attnserve_server.conversion.proof.target import Target
from attnserve_server.model.certificate import Clause, MaskNeed, Verdict
from attnserve_server.model.equality import Equality
from attnserve_server.model.manifest import InputRole, OutputSpec, SiteSpec

LONGEST, MOST = 96, 8
SOME = MaskNeed(input="attention_mask", need="some")


def target_of(
    proto: onnx.ModelProto,
    folder: Path,
    *,
    longest: int = LONGEST,
    most: int = MOST,
    sites: Sequence[SiteSpec] = (),
) -> Target:
    """A graph whose output is `y`, opened to be attacked; its file is written into `folder`."""
    path = folder / "model.onnx"
    onnx.save(proto, path)
    signature = signature_of(proto.graph)
    sampler, runner = Sampler(signature), GraphRunner(path)
    extents = probe_axes(runner, sampler, ["y"], {}).outputs["y"]
    outputs = [OutputSpec(name="y", dtype="float32", shape=tuple(extent for extent in extents if extent is not None))]
    ids = [spec.name for spec in signature.inputs if spec.role is InputRole.TOKEN_IDS]
    extremes = {name: extreme_ids_of(proto.graph, name) for name in ids}
    max_lengths = dict.fromkeys(signature.symbols, longest)
    return Target(runner, sampler, outputs, sites, max_lengths, most, extreme_ids=extremes)


def proof_of(
    target: Target,
    verdict: Verdict = Verdict.UNKNOWN,
    *,
    masks: tuple[MaskNeed, ...] = (),
    thresholds: tuple[int, ...] = (),
    **verdicts: Verdict,
) -> Proof:
    """A proof with the same verdict for the batch and every axis, but for those that are named.

    An axis that the graph does not have is ignored. `masks` and `thresholds` are those of the proof.
    """
    axes = ("batch", *target.sampler.signature.symbols)
    clauses = tuple(Clause(axis=axis, verdict=verdicts.get(axis, verdict)) for axis in axes)
    return Proof(clauses, masks, thresholds=thresholds)


def attacked(
    proto: onnx.ModelProto,
    folder: Path,
    verdict: Verdict = Verdict.UNKNOWN,
    *,
    longest: int = LONGEST,
    most: int = MOST,
    sites: Sequence[SiteSpec] = (),
    **proved: Any,
) -> dict[str, Clause]:
    """Attack a graph for up to 20 seconds, and return the clauses by axis. `proved`: arguments of `proof_of`."""
    target = target_of(proto, folder, longest=longest, most=most, sites=sites)
    proof = proof_of(target, verdict, **proved)
    return {clause.axis: clause for clause in attack(target, proof, Equality(precision_of(proto)), seconds=20)}


def broken(clauses: dict[str, Clause]) -> set[str]:
    """The axes that the attack broke; each has an error above 1 and a sentence."""
    axes = set()
    for axis, clause in clauses.items():
        if clause.attack is not None and clause.attack.broke:
            assert clause.attack.worst > 1
            axes.add(axis)
    return axes
