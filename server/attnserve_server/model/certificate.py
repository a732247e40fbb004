"""The batching certificate: for the batch and each axis, whether batch neighbours or padding can change an answer.

A clause is the verdict for the batch, or for one axis. A tap is the nodes of the graph that return attention weights. A
value that does not fit its field raises pydantic's ValidationError, and `Certificate.clause` KeyError.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field

from attnserve_server.model.frozen import Frozen

Batching = Literal["proved", "tested", "off"]
"""Policies of batching: the values of `--batching`."""
BATCHING: tuple[Batching, ...] = ("proved", "tested", "off")


class Verdict(StrEnum):
    """Whether the rest of the batch, or padding, can change an answer."""

    PROVED = "proved"
    """It cannot: the proof covers every node on every path."""
    REFUTED = "refuted"
    """It can: a node mixes a sequence's own positions with others."""
    UNKNOWN = "unknown"
    """The proof does not cover the graph."""


class PathStep(Frozen):
    """One node on the path from padding, or from another row of the batch, to an output."""

    node: str
    operator: str
    words: str
    """What the node does to the value."""


class AttackReport(Frozen):
    """Result of runs that tried to change an answer by padding, or by the rest of a batch.

    Args:
        probes: number of probes that ran.
        seconds: time that they took.
        worst: greatest difference divided by the allowed one (`model.equality`); above 1, a probe changed an answer.
        broke: describes the probe that changed an answer; empty if none did.
        complete: whether all probes of the first priority ran; false if time or memory did not suffice.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    probes: Annotated[int, Field(ge=0)]
    seconds: Annotated[float, Field(ge=0)]
    worst: float
    broke: str = ""
    complete: bool = True

    @property
    def survived(self) -> bool:
        """Whether no probe changed an answer, and all probes of the first priority ran."""
        return self.probes > 0 and self.complete and not self.broke


class Clause(Frozen):
    """The verdict on one axis: `batch`, or the symbol of a dynamic axis."""

    axis: str
    verdict: Verdict
    reason: str = ""
    """Why it is not proved; empty if it is."""
    path: tuple[PathStep, ...] = ()
    """From the padding (or the neighbour's row) to the first output that it reaches; empty if proved."""
    targets: dict[str, Verdict] = Field(default_factory=dict)
    """The verdict for each output and, as `attention.<site>`, for each tap."""
    finite_mask: bool = False
    """Whether the only open question is a finite mask that is added to scores without a proved bound."""
    attack: AttackReport | None = None
    """None: no attack ran, because the verdict is `refuted` or there was nothing to attack."""

    def allows(self, batching: Batching) -> bool:
        """Whether sequences may be padded along this axis (for `batch`: share a run) under a policy."""
        if batching == "off" or self.verdict is Verdict.REFUTED:
            return False
        if self.attack is not None and self.attack.broke:
            return False
        if self.verdict is Verdict.PROVED:
            return True
        survived = self.attack is not None and self.attack.survived
        return survived and (batching == "tested" or self.finite_mask)

    def status(self, batching: Batching = "proved") -> str:
        """Return `proved`, `tested`, `refuted` or `unknown`, the status under a policy."""
        if self.verdict is Verdict.UNKNOWN and self.allows(batching):
            return "tested"
        broken = self.attack is not None and bool(self.attack.broke)
        return "refuted" if broken else str(self.verdict)


class MaskNeed(Frozen):
    """What the proof assumes of one mask input. A sequence that violates it is not padded.

    A position is visible if the input's value there differs from the input's padding value.

    Args:
        input: name of the input.
        need: `some`: at least one position is visible. `all`: every position is, because a causal mask or a window
            could otherwise leave a query without a key.
        allowed_value: the value of all visible positions; None: any.
    """

    input: str
    need: Literal["some", "all"]
    allowed_value: float | None = None

    def met_by(self, values: npt.NDArray[Any], padding: float) -> bool:
        """Whether one sequence's input satisfies the assumption.

        Args:
            values: the input, without the batch axis, (S,) or (..., S); `some` applies to each row.
            padding: the value that hides a position.
        """
        if not values.size:
            return False
        hidden = values == values.dtype.type(padding)
        if values.dtype.kind == "f" and padding < 0:
            hidden = hidden | np.isneginf(values)  # in an additive mask, minus infinity hides too
        known = True
        if self.allowed_value is not None:
            allowed = values == values.dtype.type(self.allowed_value)
            if allowed.all():  # the common case
                return self.allowed_value != padding
            known = bool((allowed | hidden).all())
        if self.need == "all":
            return known and not hidden.any()
        return known and not hidden.all(axis=-1 if values.ndim else None).any()


class Certificate(Frozen):
    """The verdicts for one model: a clause for the batch, then one for each dynamic axis."""

    clauses: tuple[Clause, ...]
    masks: tuple[MaskNeed, ...] = ()
    noise: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """How far a sequence's answers differ between batch shapes and rows with identical neighbours, by output and
    `attention.<site>`: of outputs divided by the greatest value, of weights absolute."""

    def clause(self, axis: str) -> Clause:
        """Return the clause of `batch` or of an axis. Raise KeyError if there is none."""
        return {clause.axis: clause for clause in self.clauses}[axis]
