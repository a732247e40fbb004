"""Texts about batching: the effect of a certificate under a policy, its cause and its remedy.

A certificate states whether padding or batch neighbours can change an answer; the policy states which verdicts suffice
to share a run. Certificates are made by hand, and nothing runs or raises.
"""

from __future__ import annotations

import numpy as np
import pytest
from attnserve_server.model.batching import Ruling, cautions, rulings
from attnserve_server.model.certificate import BATCHING, Certificate, Clause, MaskNeed, PathStep, Verdict
from attnserve_server.model.manifest import AxisSpec, Manifest
from made_by_hand import SURVIVED, certificate, proved
from tiny_bundle import tiny_manifest

STEP = PathStep(node="/mean", operator="ReduceMean", words="averages over all positions")
SURVIVOR = Clause(axis="seq", verdict=Verdict.UNKNOWN, reason="it is not known", path=(STEP,), attack=SURVIVED)
FINITE = SURVIVOR.model_copy(update={"finite_mask": True, "reason": "finite mask, unbounded scores"})


def made_of(clause: Clause) -> Certificate:
    """A certificate with this clause for the axis `seq`, and a proved batch."""
    return certificate(clauses=(clause,), batch=Verdict.PROVED)


def with_clause(clause: Clause, **fields: object) -> Manifest:
    """The tiny model with this certificate."""
    return tiny_manifest().model_copy(update={"certificate": made_of(clause), **fields})


def test_proved_model_has_no_cautions() -> None:
    manifest = tiny_manifest()
    assert all(cautions(manifest.certificate, policy) == () for policy in BATCHING)
    assert rulings(manifest, "proved") == (
        Ruling("batch", allowed=True, status="proved", reason=""),
        Ruling("seq", allowed=True, status="proved", reason=""),
    )
    assert [ruling.allowed for ruling in rulings(manifest, "off")] == [False, False]


def test_derived_axis_has_the_ruling_of_its_source_and_a_fixed_one_has_none() -> None:
    axes = (
        *tiny_manifest().axes,
        AxisSpec(symbol="half", max_length=16, paddable=True, derived={"source": "seq", "stride": 2}),
        AxisSpec(symbol="patches", max_length=49, paddable=False, fixed=True),
    )
    found = rulings(with_clause(SURVIVOR, axes=axes), "tested")
    assert [(ruling.axis, ruling.status) for ruling in found] == [
        ("batch", "proved"), ("seq", "tested"), ("half", "tested"),
    ]  # fmt: skip


def test_unknown_axis_is_named_with_its_cause_its_node_and_the_policy_that_accepts_it() -> None:
    (caution,) = cautions(made_of(SURVIVOR), "proved")
    assert (caution.axis, caution.status) == ("seq", "unknown")
    assert caution.effect == "only sequences of one length along 'seq' share a batch"
    assert caution.cause == "it is not known, at ReduceMean '/mean'"
    assert "inspect --batching" in caution.remedy
    assert "--batching tested" in caution.remedy
    assert str(caution).startswith("only sequences of one length along 'seq' share a batch (unknown): it is not known")
    assert cautions(made_of(SURVIVOR), "tested") == ()
    assert cautions(made_of(SURVIVOR), "off") == ()


def test_node_in_the_reason_is_not_repeated() -> None:
    named = SURVIVOR.model_copy(update={"reason": "/mean averages over all positions"})
    (caution,) = cautions(made_of(named), "proved")
    assert caution.cause == "/mean averages over all positions"


@pytest.mark.parametrize("policy", ["proved", "tested"])
def test_axis_that_is_padded_with_a_finite_mask_is_stated(policy: str) -> None:
    (caution,) = cautions(made_of(FINITE), policy)  # type: ignore[arg-type]
    assert caution.status == "tested"
    assert caution.effect == "axis 'seq' is padded without a proof: 20 probes did not change an answer"
    assert "finite mask, unbounded scores" in caution.cause
    assert "--batching off" in caution.remedy


def test_remedy_of_dynamic_quantization_is_per_row_scales() -> None:
    step = PathStep(node="q", operator="DynamicQuantizeLinear", words="one scale for all rows")
    clause = Clause(axis="batch", verdict=Verdict.REFUTED, reason="one scale for all rows", path=(step,))
    made = certificate(clauses=(clause,), seq=Verdict.PROVED)
    (caution,) = cautions(made, "tested")
    assert caution.effect == "every sequence runs alone"
    assert caution.cause == "one scale for all rows, at DynamicQuantizeLinear 'q'"
    assert "prepare --requantize per-row" in caution.remedy
    assert cautions(made, "proved", alone=True) == (), "it runs alone by its own bound"


def test_probe_that_changed_an_answer_is_named_and_no_policy_accepts_it() -> None:
    broken = SURVIVOR.model_copy(update={"attack": SURVIVED.model_copy(update={"broke": "lengths 3 and 9"})})
    for policy in ("proved", "tested"):
        (caution,) = cautions(made_of(broken), policy)  # type: ignore[arg-type]
        assert caution.status == "refuted"
        assert "an answer changed with lengths 3 and 9" in caution.cause
        assert "--batching tested" not in caution.remedy


def test_remedy_without_a_certificate_is_check_certify() -> None:
    old = tiny_manifest().model_copy(update={"format": 1, "certificate": None})
    (caution,) = cautions(None, "proved")
    assert "format 1" in caution.cause
    assert "check BUNDLE --certify" in caution.remedy
    assert [(ruling.allowed, ruling.status) for ruling in rulings(old, "tested")] == [
        (True, "unknown"), (False, "unknown"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("need", "allowed_value", "values", "met"),
    [
        ("some", None, [0, 1, 0], True),
        ("some", None, [0, 0, 0], False),
        ("some", None, [[1, 0], [0, 1]], True),
        ("some", None, [[1, 1], [0, 0]], False),
        ("all", None, [1, 1], True),
        ("all", None, [1, 0], False),
        ("some", 1.0, [1, 0], True),
        ("some", 1.0, [2, 0], False),
        ("all", 1.0, [1, 2], False),
        ("some", None, [], False),
    ],
)
def test_mask_need_is_met(need: str, allowed_value: float | None, values: list, met: bool) -> None:
    for dtype in (np.int64, np.float32):
        assert MaskNeed(input="m", need=need, allowed_value=allowed_value).met_by(np.array(values, dtype), 0) is met


def test_mask_need_compares_with_the_padding_of_its_input() -> None:
    need = MaskNeed(input="bias", need="some")
    lowest = -float("inf")
    assert need.met_by(np.array([0, lowest], np.float32), lowest)
    assert not need.met_by(np.array([lowest, lowest], np.float32), lowest)
    assert MaskNeed(input="m", need="all").met_by(np.array([True, True]), 0)


def test_proved_certificate_is_proved_under_its_own_name() -> None:
    assert [clause.axis for clause in proved("seq", "patch").clauses] == ["batch", "seq", "patch"]
