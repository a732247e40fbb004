"""The batching certificate: what was proved, refuted or left open about sharing a batch, and what follows from it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field

from attnserve_server.model.frozen import Frozen

Batching = Literal["proved", "tested", "off"]
"""How much an operator asks for before sequences share a batch; the values of `--batching`."""
BATCHING: tuple[Batching, ...] = ("proved", "tested", "off")


class Verdict(StrEnum):
    """What is known of one question: whether the rest of a batch, or padding, can change an answer."""

    PROVED = "proved"
    """It cannot: every node on every path was followed."""
    REFUTED = "refuted"
    """It can: a node is known that mixes a sequence's own positions with others."""
    UNKNOWN = "unknown"
    """The proof does not reach so far."""


class PathStep(Frozen):
    """One node on the way from padding, or from another row of the batch, to an output."""

    node: str
    operator: str
    words: str
    """What happens to the value there, in plain words."""


class AttackReport(Frozen):
    """What came of trying to change an answer by padding, or by the rest of a batch.

    `worst` is the greatest difference that was seen, in parts of what counts as equal; above 1 the attack succeeded,
    and `broke` describes the probe that did it.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    probes: Annotated[int, Field(ge=0)]
    seconds: Annotated[float, Field(ge=0)]
    worst: float
    broke: str = ""
    complete: bool = True
    """Whether the probes that matter most were all tried; not where time or memory did not suffice for them."""

    @property
    def survived(self) -> bool:
        """Whether no probe changed an answer, and those that matter most were tried."""
        return self.probes > 0 and self.complete and not self.broke


class Clause(Frozen):
    """The verdict on one axis: `batch`, or the symbol of an axis that could be padded."""

    axis: str
    verdict: Verdict
    reason: str = ""
    """Why, in plain words; empty where proved."""
    path: tuple[PathStep, ...] = ()
    """From the padded position (or the neighbour's row) to the first output that it reaches; empty where proved."""
    targets: dict[str, Verdict] = Field(default_factory=dict)
    """The verdict for each output and, as `attention.<site>`, for each tap."""
    finite_mask: bool = False
    """Whether the one open question is a finite mask added to scores that have no proved bound."""
    attack: AttackReport | None = None
    """None: not attacked, because it is refuted, or because there was nothing to attack."""

    def allows(self, batching: Batching) -> bool:
        """Whether sequences may be padded along this axis (for `batch`: joined) under a policy."""
        if batching == "off" or self.verdict is Verdict.REFUTED:
            return False
        if self.attack is not None and self.attack.broke:
            return False
        if self.verdict is Verdict.PROVED:
            return True
        survived = self.attack is not None and self.attack.survived
        return survived and (batching == "tested" or self.finite_mask)

    def status(self, batching: Batching = "proved") -> str:
        """`proved`, `tested`, `refuted` or `unknown`: how the policy sees it."""
        if self.verdict is Verdict.UNKNOWN and self.allows(batching):
            return "tested"
        broken = self.attack is not None and bool(self.attack.broke)
        return "refuted" if broken else str(self.verdict)


class MaskNeed(Frozen):
    """What the proof takes for granted of one input that hides positions; a sequence without it is not padded.

    A position is allowed where the input's value differs from its padding value. `some`: at least one position is
    allowed. `all`: every position is, since a causal frontier or a window could otherwise leave a query without any
    key.
    `allowed_value`: the one value that allowed positions have; None: any.
    """

    input: str
    need: Literal["some", "all"]
    allowed_value: float | None = None

    def met_by(self, values: npt.NDArray[Any], padding: float) -> bool:
        """Whether one sequence's input is as the proof takes it to be.

        Args:
            values: the input, without the batch axis, (S,) or (..., S); `some` is needed of each row.
            padding: the value that hides a position.
        """
        if not values.size:
            return False
        hidden = values == values.dtype.type(padding)
        if values.dtype.kind == "f" and padding < 0:
            hidden = hidden | np.isneginf(values)  # in a mask that is added, minus infinity hides as well
        known = True
        if self.allowed_value is not None:
            allowed = values == values.dtype.type(self.allowed_value)
            if allowed.all():  # as most masks are
                return self.allowed_value != padding
            known = bool((allowed | hidden).all())
        if self.need == "all":
            return known and not hidden.any()
        return known and not hidden.all(axis=-1 if values.ndim else None).any()


class Certificate(Frozen):
    """What is known about batching one model: a clause for the batch, then one for each dynamic axis."""

    clauses: tuple[Clause, ...]
    masks: tuple[MaskNeed, ...] = ()
    noise: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """How far a sequence's own outputs and weights differ among batch shapes and places with identical neighbours, by
    output and `attention.<site>`: of outputs in parts of the greatest value, of weights as it is."""

    def clause(self, axis: str) -> Clause:
        """The clause of `batch` or of an axis. Raises KeyError if there is none."""
        return {clause.axis: clause for clause in self.clauses}[axis]
