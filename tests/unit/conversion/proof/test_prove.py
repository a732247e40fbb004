"""The parts of a proof beside its verdicts: reasons, paths, targets, mask needs, causal sites, thresholds.

The proof interprets a graph without running it. It has a clause for the batch and for each axis: whether it can change
an answer. `Case` holds a graph written as text, and its `proof` method proves it. What is not followed has the verdict
unknown; nothing raises. A site is a place in a graph that computes attention.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from attnserve_server.conversion.proof import prove
from attnserve_server.conversion.proof.context import SOFTMAX_OVER_ROWS
from attnserve_server.model.certificate import Clause, Verdict
from attnserve_server.model.manifest import BATCH, DerivedLength, OutputSpec
from proof_cases import MASK, PROVED, REFUTED, UNKNOWN, Case, X, graph

POOLED = "float[batch, 4] y"
SUM = "int64[1] over = {1}, int64[1] last = {-1}"
MEAN = Case("mean", graph("h = Exp(x) m = ReduceMean<keepdims = 0>(h, over) y = Neg(m)", outputs=POOLED, given=SUM))


def clause_of(case: Case, axis: str = "seq") -> Clause:
    return next(clause for clause in case.proof().clauses if clause.axis == axis)


def words(case: Case, axis: str = "seq") -> list[tuple[str, str]]:
    return [(step.node, step.operator) for step in clause_of(case, axis).path]


def test_there_is_a_clause_for_the_batch_and_then_for_each_symbol() -> None:
    case = Case(
        "two",
        graph(
            "y = Relu(x) w = Relu(z)",
            f"{X}, float[batch, frames, 4] z",
            "float[batch, seq, 4] y, float[batch, frames, 4] w",
        ),
    )
    assert [clause.axis for clause in case.proof().clauses] == [BATCH, "seq", "frames"]


def test_a_proved_clause_has_neither_a_reason_nor_a_path() -> None:
    clause = clause_of(Case("relu", graph("y = Relu(x)")))
    assert (clause.verdict, clause.reason, clause.path, clause.finite_mask) == (PROVED, "", (), False)
    assert clause.targets == {"y": PROVED}


def test_a_refuted_clause_names_the_node_and_its_operator() -> None:
    assert clause_of(MEAN).reason == "takes the mean over padded positions too (node m, ReduceMean)"


def test_the_path_leads_from_the_input_through_the_deciding_node_to_the_output() -> None:
    assert words(MEAN) == [("x", "input"), ("h", "Exp"), ("m", "ReduceMean"), ("y", "Neg"), ("y", "output")]
    steps = clause_of(MEAN).path
    assert steps[0].words == "padded positions enter"
    assert steps[2].words == "takes the mean over padded positions too"


def test_the_path_of_the_batch_begins_with_other_rows() -> None:
    case = Case("rows", graph("m = ReduceMean(x, first) y = Sub(x, m)", given="int64[1] first = {0}"))
    assert clause_of(case, BATCH).path[0].words == "the other rows of the batch enter"


def test_the_path_into_a_subgraph_names_the_node_inside() -> None:
    branch = (
        "r = Shape(x) k = Size(r) q = Greater(k, two) y = If(q)"
        " <then_branch = t () => (float[batch, 4] o1) { o1 = ReduceMean<keepdims = 0>(x, over) },"
        " else_branch = u () => (float[batch, 4] o2) { o2 = ReduceSum<keepdims = 0>(x, over) }>"
    )
    case = Case("inner", graph(branch, outputs=POOLED, given=f"{SUM}, int64 two = {{2}}"))
    clause = clause_of(case)
    assert clause.verdict is REFUTED
    assert ("o1", "ReduceMean") in words(case)


def test_a_long_path_is_shortened_around_the_deciding_node() -> None:
    before = " ".join(f"a{at + 1} = Tanh(a{at})" for at in range(20)).replace("a0)", "x)")
    behind = " ".join(f"b{at + 1} = Tanh(b{at})" for at in range(20))
    nodes = f"{before} e = Exp(a20) b0 = ReduceMean<keepdims = 0>(e, over) {behind} y = Neg(b20)"
    steps = clause_of(Case("long", graph(nodes, outputs=POOLED, given=SUM))).path
    assert len(steps) < 20
    assert "ReduceMean" in [step.operator for step in steps]
    assert (steps[0].operator, steps[-1].operator) == ("input", "output")


def test_each_output_has_its_own_verdict() -> None:
    case = Case(
        "two outputs",
        graph(
            "y = Relu(x) h = Exp(x) m = ReduceMean<keepdims = 0>(h, over)",
            outputs="float[batch, seq, 4] y, float[batch, 4] m",
            given=SUM,
        ),
    )
    assert clause_of(case).targets == {"y": PROVED, "m": REFUTED}
    assert clause_of(case).verdict is REFUTED


def test_an_output_missing_from_the_graph_is_unknown() -> None:
    case = Case("relu", graph("y = Relu(x)"))
    missing = OutputSpec(name="absent", dtype="float32", shape=("seq", 4))
    proof = prove(case.model, case.signature, [missing], [])
    assert {clause.verdict for clause in proof.clauses} == {UNKNOWN}
    assert "no output absent" in proof.clauses[0].reason


@pytest.mark.parametrize(
    ("shape", "reason"),
    [((4,), " are declared"), ((4, "seq"), "which is not declared"), (("seq", 4, 1), " are declared")],
)
def test_an_output_with_other_axes_than_declared_is_not_proved(shape: tuple[str | int, ...], reason: str) -> None:
    case = Case("relu", graph("y = Relu(x)"))
    proof = prove(case.model, case.signature, [OutputSpec(name="y", dtype="float32", shape=shape)], [])
    assert proof.clauses[1].verdict is UNKNOWN
    assert reason in proof.clauses[1].reason


def test_an_output_whose_first_axis_is_not_the_batch_is_not_proved() -> None:
    case = Case("turned", graph("y = Transpose<perm = [1, 0, 2]>(x)", outputs="float[batch, rows, 4] y"))
    assert clause_of(case, BATCH).verdict is UNKNOWN
    assert "first axis is not the batch" in clause_of(case, BATCH).reason


def test_an_output_of_another_length_is_proved_where_its_form_is_right() -> None:
    case = Case(
        "short",
        graph("y = Conv(x, w)", "float[batch, 3, seq] x", "float[batch, 3, short] y", "float[3, 3, 3] w"),
        derived={"short": DerivedLength(source="seq", stride=1, offset=-2)},
    )
    assert clause_of(case).verdict is PROVED
    wrong = replace(case, derived={"short": DerivedLength(source="seq", stride=1, offset=-1)})
    assert clause_of(wrong).verdict is UNKNOWN


def test_the_batch_of_a_graph_for_one_row_is_proved() -> None:
    case = Case("one", graph("y = Softmax<axis = 0>(x)", "float[1, seq, 4] x", "float[1, seq, 4] y"))
    assert case.signature.fixed_batch == 1
    assert clause_of(case, BATCH).verdict is PROVED


def test_a_mask_must_allow_one_position_and_all_of_them_where_the_model_is_causal() -> None:
    keys = "b = Cast<to = 9>(attention_mask) k = Unsqueeze(b, middle) h = Unsqueeze(x, over)"
    keys += " t = Transpose<perm = [0, 1, 3, 2]>(h) raw = MatMul(h, t)"
    rest = "p = Softmax(s) o = MatMul(p, h) y = Squeeze(o, over)"
    numbers = f"{SUM}, int64[2] middle = {{1, 2}}, float low = {{-inf}}"
    plain = Case("plain", graph(f"{keys} s = Where(k, raw, low) {rest}", f"{X}, {MASK}", given=numbers))
    (need,) = plain.proof().masks
    assert (need.input, need.need, need.allowed_value) == ("attention_mask", "some", 1.0)
    triangle = (
        "n = Shape<start = 1, end = 2>(x) nn = Concat<axis = 0>(n, n) ones = ConstantOfShape<value = float[1] {1}>(nn)"
        " tri = Trilu<upper = 0>(ones) e = Cast<to = 9>(tri) both = And(e, k)"
    )
    causal = Case("causal", graph(f"{keys} {triangle} s = Where(both, raw, low) {rest}", f"{X}, {MASK}", given=numbers))
    assert [need.need for need in causal.proof().masks] == ["all"]


def test_a_refuted_clause_needs_nothing_of_masks() -> None:
    case = Case(
        "mean of what is masked",
        graph(
            "f = Cast<to = 1>(attention_mask) u = Unsqueeze(f, last) h = Mul(x, u) e = Exp(h)"
            " y = ReduceMean<keepdims = 0>(e, over)",
            f"{X}, {MASK}",
            POOLED,
            SUM,
        ),
    )
    assert clause_of(case).verdict is REFUTED
    assert case.proof().masks == ()


def test_thresholds_are_compared_lengths_and_widths_of_windows() -> None:
    case = Case(
        "branches at 16",
        graph(
            "n = Shape<start = 1, end = 2>(x) l = Squeeze(n) q = Greater(l, sixteen) y = If(q)"
            " <then_branch = t () => (float[batch, seq, 4] o1) { o1 = Neg(x) },"
            " else_branch = u () => (float[batch, seq, 4] o2) { o2 = Tanh(x) }>",
            given="int64 sixteen = {16}",
        ),
    )
    assert 16 in case.proof().thresholds
    window = Case(
        "pool",
        graph("y = MaxPool<kernel_shape = [7], pads = [6, 0]>(x)", "float[batch, 3, seq] x", "float[batch, 3, seq] y"),
    )
    assert 7 in window.proof().thresholds


def test_a_branch_that_no_length_reaches_is_not_interpreted() -> None:
    nodes = (
        "n = Shape<start = 1, end = 2>(x) l = Squeeze(n) q = Greater(l, many) y = If(q)"
        " <then_branch = t () => (float[batch, seq, 4] o1) { o1 = elsewhere.Odd(x) },"
        " else_branch = u () => (float[batch, seq, 4] o2) { o2 = Tanh(x) }>"
    )
    case = Case("longest", graph(nodes, given="int64 many = {16}"), longest=16)
    assert clause_of(case).verdict is PROVED
    assert clause_of(replace(case, longest=17)).verdict is not PROVED


def test_minus_65504_hides_in_float16_and_is_a_finite_mask_in_float32() -> None:
    nodes = (
        "g = Add(x, one) s = ReduceSum<keepdims = 0>(g, last) f = Cast<to = 1>(attention_mask) d = Sub(one, f)"
        " m = Mul(d, low) t = Add(s, m) y = Softmax<axis = 1>(t)"
    )
    given = f"{SUM}, float one = {{1}}, float low = {{-65504}}"
    case = Case("half", graph(nodes, f"{X}, {MASK}", "float[batch, seq] y", given), precision="fp16")
    assert clause_of(case).verdict is PROVED
    assert clause_of(replace(case, precision="fp32")).finite_mask


def test_unavailable_sites_have_no_verdict() -> None:
    case = Case("relu", graph("y = Relu(x)"))
    tapped = Case(
        "site",
        graph(
            "y = Relu(x) weights = Relu(w)",
            f"{X}, float[batch, 1, seq, seq] w",
            "float[batch, seq, 4] y, float[batch, 1, seq, seq] weights",
        ),
        weights="weights",
    )
    site = tapped.sites[0].model_copy(
        update={"weights_output": None, "items_input": None, "unavailable_reason": "none"}
    )
    proof = prove(case.model, case.signature, case.outputs, [site])
    assert [clause.verdict for clause in proof.clauses] == [PROVED, PROVED]
    assert set(tapped.proof().clauses[0].targets) == {"y", "weights"}


def test_a_graph_without_rules_is_unknown_and_raises_nothing() -> None:
    case = Case("odd", graph("y = elsewhere.Odd(x)"))
    assert {clause.verdict for clause in case.proof().clauses} == {Verdict.UNKNOWN}


def test_an_unknown_value_stays_unknown_in_later_nodes() -> None:
    nodes = "e = elsewhere.Odd(x) z = Mul(e, nought) m = ReduceMean<keepdims = 0>(z, over) y = Tanh(m)"
    case = Case("odd mean", graph(nodes, outputs=POOLED, given=f"{SUM}, float nought = {{0}}"))
    clause = clause_of(case)
    assert clause.verdict is UNKNOWN
    assert "elsewhere.Odd" in clause.reason


def test_attention_over_rows_has_the_reason_that_the_conversion_looks_for() -> None:
    nodes = "t = Transpose<perm = [1, 0, 2]>(x) p = Softmax<axis = 1>(t) y = Transpose<perm = [1, 0, 2]>(p)"
    case = Case("rows", graph(nodes))
    assert SOFTMAX_OVER_ROWS in clause_of(case, BATCH).reason
