"""What a bundle's certificate says, and how a reader follows it: verdicts, paths, targets, mask needs, attacks."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from rich.console import Console

from attnserve_server.model.batching import Ruling, rulings
from attnserve_server.model.certificate import BATCHING, AttackReport, Clause, MaskNeed, PathStep, Verdict
from attnserve_server.model.manifest import BATCH, Manifest

NO_CERTIFICATE = (
    "no certificate (format 1): only sequences of equal lengths share a batch; "
    "`attnserve-server check BUNDLE --certify` writes a version with one"
)


class ClauseDescription(BaseModel):
    """What is known of the batch, or of one axis. `under`: what each policy makes of it."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")
    axis: str
    verdict: Verdict
    status: str
    reason: str
    under: dict[str, bool]
    path: tuple[PathStep, ...] = ()
    targets: dict[str, Verdict] = {}
    finite_mask: bool = False
    attack: AttackReport | None = None


class BatchingDescription(BaseModel):
    """The certificate of a bundle. Without one, `format` is 1 and the rest is empty."""

    model_config = ConfigDict(frozen=True)
    format: int
    clauses: tuple[ClauseDescription, ...] = ()
    masks: tuple[MaskNeed, ...] = ()
    noise: dict[str, float] = {}


def batching_of(manifest: Manifest) -> BatchingDescription:
    """The part of a description that is about batching."""
    certificate = manifest.certificate
    if certificate is None:
        return BatchingDescription(format=manifest.format)
    ruled = {policy: {ruling.axis: ruling for ruling in rulings(manifest, policy)} for policy in BATCHING}
    return BatchingDescription(
        format=manifest.format,
        clauses=tuple(
            _clause(clause, {policy: found[clause.axis] for policy, found in ruled.items()})
            for clause in certificate.clauses
        ),
        masks=certificate.masks,
        noise=certificate.noise,
    )


def _clause(clause: Clause, ruled: dict[str, Ruling]) -> ClauseDescription:
    shared = clause.model_dump(include={"axis", "verdict", "path", "targets", "finite_mask", "attack"})
    return ClauseDescription(
        **shared,
        status=ruled["proved"].status,
        reason=ruled["proved"].reason,
        under={policy: ruling.allowed for policy, ruling in ruled.items()},
    )


def show_batching(name: str, described: BatchingDescription, console: Console) -> None:
    """Print what is known, clause after clause."""

    def line(words: str) -> None:
        console.print(words, highlight=False, markup=False, soft_wrap=True)

    line(name)
    if not described.clauses:
        line(NO_CERTIFICATE)
        return
    for clause in described.clauses:
        for words in _lines(clause):
            line(words)
    for need in described.masks:
        line(_need(need))
    if described.noise:
        worst = max(described.noise, key=lambda target: described.noise[target])
        line(f"noise among batch shapes, identical neighbours: at most {described.noise[worst]:.2g}, at {worst}")


def _lines(clause: ClauseDescription) -> list[str]:
    """One clause: its verdict and reason, and behind them, set in, how it comes to them."""
    allowed = [policy for policy, holds in clause.under.items() if holds]
    effect = ("rows share runs" if clause.axis == BATCH else "padded") + (
        f" under {' and '.join(allowed)}" if allowed else " under no policy"
    )
    title = "batch neighbours" if clause.axis == BATCH else f"padding along {clause.axis}"
    verdict = clause.status if clause.status == clause.verdict else f"{clause.status} (verdict {clause.verdict})"
    lines = [f"{title}: {verdict}, {effect}"]
    lines += [f"  why: {clause.reason}"] if clause.reason else []
    if clause.path:
        start = "the neighbour's row" if clause.axis == BATCH else "the padded position"
        lines.append(f"  path from {start}:")
        lines += [f"    {step.node} ({step.operator}): {step.words}" for step in clause.path]
    lines += [f"  {target}: {found}" for target, found in clause.targets.items()]
    if clause.attack is not None:
        lines.append(f"  attack: {_attack(clause.attack)}")
    return lines


def _attack(attack: AttackReport) -> str:
    said = f"{attack.probes} probes in {attack.seconds:.1f} s, worst {attack.worst:.2g} of what counts as equal"
    return f"{said}; changed an answer with {attack.broke}" if attack.broke else said


def _need(need: MaskNeed) -> str:
    """What a sequence must meet to be padded."""
    value = "" if need.allowed_value is None else f" equal to {need.allowed_value:g}"
    which = f"every position of {need.input}" if need.need == "all" else f"a position in each row of {need.input}"
    return f"padded only with {which} allowed{value}; other sequences run with equal lengths"
