"""A bundle's certificate made again: beside the stored one for `check`, or in a new version for `check --certify`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from attnserve_server.conversion.check.findings import CertifiedVersion, Finding
from attnserve_server.model.certificate import Batching, Certificate, Clause
from attnserve_server.model.manifest import BATCH
from attnserve_server.model.repository import Bundle, Repository, write_bundle

_STRICT: tuple[Batching, ...] = ("proved", "tested")
"""The policies that read a certificate."""


def certificate_findings(stored: Certificate | None, fresh: Certificate) -> Iterator[Finding]:
    """One finding for the batch and for each axis: failed where the stored clause allows what the fresh one does not.

    Args:
        stored: of the bundle; None: it has none, or it is about to be replaced, so that it cannot be wrong.
        fresh: made just now from the bundle's graph.
    """
    for clause in fresh.clauses:
        before = clause if stored is None else stored.clause(clause.axis)
        lost = any(before.allows(policy) and not clause.allows(policy) for policy in _STRICT)
        detail = f"{clause.status()}: {clause.reason}" if clause.reason else clause.status()
        yield Finding(
            what="batch neighbours" if clause.axis == BATCH else f"padding along {clause.axis}",
            passed=False if lost else True if clause.allows("proved") else None,
            error=clause.attack.worst if clause.attack else None,
            allowed=1.0 if clause.attack else None,
            detail=f"the bundle has it as {before.status()}, but it is {detail}" if lost else detail,
        )


def write_certified(stored: Bundle, fresh: Certificate, root: Path, batching: Batching) -> CertifiedVersion:
    """Write the bundle with its fresh certificate as a new version, with the same graph, tokenizer and golden answers.

    Args:
        stored: as it lies in the repository, its files verified.
        fresh: made just now from the bundle's graph.
        root: of the repository.
        batching: the policy that the stored `paddable` of each axis is for.

    Raises:
        BundleInvalid: the disk refused.
    """
    old = stored.manifest
    version = Repository(root).free_version(old.name)
    made = old.model_copy(update={"format": 2, "version": version, "certificate": fresh})
    made = made.model_copy(update={"axes": made.under(batching).axes})
    written = write_bundle(root, made, {name: stored.path / name for name in old.files})
    changes = tuple(_change(old.certificate, clause) for clause in fresh.clauses)
    return CertifiedVersion(version=version, digest=written.manifest.digest, changes=changes)


def _change(before: Certificate | None, clause: Clause) -> str:
    what = "batch" if clause.axis == BATCH else f"padding along {clause.axis}"
    was = "no certificate" if before is None else before.clause(clause.axis).status()
    why = f" ({clause.reason})" if clause.reason else ""
    return f"{what}: {was} -> {clause.status()}{why}"
