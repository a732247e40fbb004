"""The tables have a case for each operator with a rule, and their runs find an unsound rule.

A rule states what the proof of batching may conclude of one operator; a case is a tiny graph with its expected
verdicts. `PLANTED` replaces rules by a wrong one. An operator that has a rule and no case fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import onnx
import onnx_ir as ir
import pytest
from attnserve_server.conversion.proof.context import RULES, Context, Registered
from attnserve_server.conversion.proof.values import Standing, Value
from proof_cases import Case
from proof_runs import faults_of
from proof_tables import TABLES

CASES = [case for cases in TABLES.values() for case in cases]


def operators(graph: onnx.GraphProto) -> Iterator[tuple[str, str]]:
    for node in graph.node:
        yield node.domain, node.op_type
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from operators(attribute.g)


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def test_each_operator_that_has_a_rule_has_a_case() -> None:
    seen = {operator for case in CASES for operator in operators(case.model.graph)}
    assert set(RULES) - seen == set()


def test_names_of_cases_are_unique_within_their_table() -> None:
    for cases in TABLES.values():
        names = [case.name for case in cases]
        assert len(set(names)) == len(names)


def _keeps_standing(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value | list[Value]:
    """An unsound rule: the outputs of every operator have the standing of its first input."""
    found = ORIGINAL[node.domain, node.op_type].apply(ctx, node, inputs)
    values = found if isinstance(found, list) else [found]
    return [replace(value, standing=Standing.EQUAL, cause=None) for value in values]


ORIGINAL = dict(RULES)
PLANTED: list[tuple[tuple[str, str], str]] = [
    (("", "ReduceMean"), "ReduceMean over the sequence"),
    (("", "ReduceMean"), "ReduceMean over the batch"),
    (("", "Softmax"), "Softmax over positions without a mask"),
    (("", "CumSum"), "CumSum in reverse"),
    (("", "Conv"), "Conv over the end"),
    (("", "MatMul"), "MatMul over positions"),
    (("", "LSTM"), "the last state of LSTM"),
    (("", "Scan"), "Scan forward, with its last state read"),
    (("", "DynamicQuantizeLinear"), "DynamicQuantizeLinear"),
    (("", "Attention"), "Attention without a mask"),
    (("com.microsoft", "MultiHeadAttention"), "MultiHeadAttention without a mask"),
    (("", "RandomNormalLike"), "RandomNormalLike"),
]


@pytest.mark.parametrize(("operator", "name"), PLANTED, ids=[name for _, name in PLANTED])
def test_runs_find_a_rule_that_calls_every_output_equal(
    monkeypatch: pytest.MonkeyPatch, operator: tuple[str, str], name: str
) -> None:
    case = named(name)
    assert faults_of(case) == []
    rule: Callable[..., Value | list[Value]] = _keeps_standing
    monkeypatch.setitem(RULES, operator, Registered(rule, RULES[operator].shapes_only))
    assert any(fault.startswith("UNSOUND") for fault in faults_of(case)), faults_of(case)


def test_a_rule_that_proves_too_little_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def refutes(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
        value = inputs[0]
        return ctx.bad(Standing.DIFFERENT, "planted", value.layout if value is not None else None)

    case = named("Relu")
    monkeypatch.setitem(RULES, ("", "Relu"), Registered(refutes, False))
    faults = faults_of(case)
    assert any("is refuted, not proved" in fault for fault in faults)
    assert any("no run differs" in fault for fault in faults)
