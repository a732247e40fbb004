"""What an attack spends, on which clauses, and which sequences and weights it compares.

An attack runs a graph on batches that try to change a sequence's answer, and so break a clause of its certificate.
`attacked` returns the clauses after it, and `broken` the axes that it broke. A batch that fails to run counts as
broken; an attack without enough time is not complete.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path

import batch_graphs as graphs
import numpy as np
import onnx
import pytest
from attacked import SOME, attacked, broken, proof_of, target_of
from attnserve_server.conversion.inputs.vocabulary import extreme_ids_of
from attnserve_server.conversion.proof.answers import Answers
from attnserve_server.conversion.proof.attack import _aim, attack
from attnserve_server.conversion.proof.contents import Author, Draft
from attnserve_server.model.bands import SlidingBand
from attnserve_server.model.certificate import MaskNeed, Verdict
from attnserve_server.model.equality import Equality
from attnserve_server.model.manifest import SiteSpec

pytestmark = pytest.mark.slow

WIDTH = graphs.WIDTH


class Clock:
    """A clock that advances by `step` seconds at each reading."""

    def __init__(self, step: float) -> None:
        self._times = count(0.0, step)

    def now(self) -> float:
        return next(self._times)


def site(**changes: object) -> SiteSpec:
    spec = SiteSpec(
        name="s",
        layer=0,
        kind="self",
        form="dense",
        operator="Softmax",
        heads=1,
        kv_heads=1,
        head_dim=4,
        query_axis="t",
        key_axis="t",
        items_input="attention_items.s",
        weights_output="attention.s",
    )
    return spec.model_copy(update=changes)


def with_weights(nodes: str, columns: str) -> onnx.ModelProto:
    """Return a graph with y = x, which is safe, and the weights of one site."""
    inputs, outputs = f"float[b, t, {WIDTH}] x", f"float[b, t, {WIDTH}] y, float[b, 1, t, {columns}] weights"
    constants: dict[str, graphs.Array | float] = {"axis_1": np.array([1]), "two": np.array([2]), "zero": np.array(0)}
    constants |= {"one": np.array(1), "nothing": 0.0, "third": 1 / 3, "seven": 7.0}
    proto = graphs.graph(f"g ({inputs}) => ({outputs}) {{ y = Identity(x) {nodes} }}", **constants)
    # The text form of a graph has no names with dots.
    proto.graph.output[1].name = "attention.s"
    proto.graph.node[-1].output[0] = "attention.s"
    return proto


@pytest.mark.parametrize("batch", [Verdict.PROVED, Verdict.REFUTED])
def test_proved_clauses_get_at_most_twenty_probes(batch: Verdict, tmp_path: Path) -> None:
    """Where the batch is refuted, rows are padded one at a time, which makes more probes of the same rows."""
    options = {"masks": (SOME,), "thresholds": (8, 20, 40, 50), "batch": batch}
    clauses = attacked(graphs.masked_attention(), tmp_path, Verdict.PROVED, **options)
    reports = [clause.attack for clause in clauses.values() if clause.verdict is Verdict.PROVED]
    assert all(report is not None and report.survived and 6 <= report.probes <= 20 for report in reports)


@pytest.mark.parametrize(
    ("proto", "axis"), [(graphs.softmax_over_all_axes(), "t"), (graphs.dynamically_quantized(), "batch")]
)
def test_wrong_proof_is_broken_and_no_policy_uses_it(proto: onnx.ModelProto, axis: str, tmp_path: Path) -> None:
    clauses = attacked(proto, tmp_path, Verdict.PROVED)
    assert broken(clauses) == {axis}
    assert not clauses[axis].allows("proved")


def test_refuted_clauses_are_not_attacked(tmp_path: Path) -> None:
    clauses = attacked(graphs.masked_attention(), tmp_path, masks=(SOME,), batch=Verdict.REFUTED)
    assert clauses["batch"].attack is None
    report = clauses["t"].attack
    assert report is not None
    assert report.survived


def test_padding_is_attacked_one_row_at_a_time_where_rows_never_share_a_run(tmp_path: Path) -> None:
    clauses = attacked(graphs.small_mean(), tmp_path, most=1)
    assert clauses["batch"].attack is None
    assert broken(clauses) == {"t"}


def test_differences_caused_by_neighbours_are_not_attributed_to_padding(tmp_path: Path) -> None:
    """Rows of one run share a scale, which refutes the batch; padding with zeros alone changes nothing."""
    clauses = attacked(graphs.dynamically_quantized(), tmp_path)
    report = clauses["t"].attack
    assert report is not None
    assert report.probes > 10
    assert broken(clauses) == {"batch"}


def test_empty_masks_are_padded_only_where_the_server_pads_them(tmp_path: Path) -> None:
    """With a finite filler, a mask that hides everything spreads over the padding too."""
    proto = graphs.masked_attention(float(np.finfo(np.float32).min))
    assert broken(attacked(proto, tmp_path)) == {"t"}
    assert broken(attacked(proto, tmp_path, masks=(SOME,))) == set()


def test_masks_of_other_values_are_padded_only_where_the_server_pads_them(tmp_path: Path) -> None:
    author = Author(target_of(graphs.masked_attention(), tmp_path).sampler, (SOME,))
    one, none = {"attention_mask": np.array([0, 1])}, {"attention_mask": np.array([0, 0])}
    assert author.may_pad(one)
    assert not author.may_pad(none)
    every = replace(author, masks=(MaskNeed(input="attention_mask", need="all", allowed_value=1),))
    assert not every.may_pad(one)
    assert every.may_pad({"attention_mask": np.array([1, 1])})
    assert not every.may_pad({"attention_mask": np.array([1, 2])})


def test_a_difference_in_weights_alone_breaks_a_clause(tmp_path: Path) -> None:
    scores = "xt = Transpose<perm=[0,2,1]>(x) s = MatMul(x, xt) p = Softmax<axis=-1>(s) weights = Unsqueeze(p, axis_1)"
    clauses = attacked(with_weights(scores, "t"), tmp_path, sites=[site()])
    report = clauses["t"].attack
    assert broken(clauses) == {"t"}
    assert report is not None
    assert "the weights of site s differ" in report.broke


def test_columns_of_a_band_without_a_key_are_not_compared(tmp_path: Path) -> None:
    """The column of the next key holds 7 at the last position, which has none: that of the sequence, or of padding."""
    nodes = (
        "length = Shape<start=1, end=2>(x) last = Squeeze(length) at = Range(zero, last, one) next = Add(at, one) "
        "within_1 = Less(next, last) column = Where(within_1, third, seven) row = Unsqueeze(column, axis_1) "
        "first = ReduceSum<keepdims=1>(x, two) empty = Mul(first, nothing) plain = Add(empty, third) "
        "next_key = Add(empty, row) all = Concat<axis=-1>(plain, plain, next_key) weights = Unsqueeze(all, axis_1)"
    )
    proto = with_weights(nodes, "3")
    banded = site(form="windowed", band=SlidingBand(before=1, after=1))
    assert broken(attacked(proto, tmp_path, sites=[banded])) == set()
    wider = site(form="windowed", band=SlidingBand(before=2, after=0))
    assert broken(attacked(proto, tmp_path, sites=[wider])) == {"t"}


def test_sentence_names_lengths_contents_output_and_difference(tmp_path: Path) -> None:
    report = attacked(graphs.small_mean(), tmp_path)["t"].attack
    assert report is not None
    assert report.broke.startswith("a sequence with t 3 (")
    assert "), padded to t 16: output 'y' differs by " in report.broke
    assert report.broke.endswith(" times the allowed difference")
    report = attacked(graphs.dynamically_quantized(), tmp_path)["batch"].attack
    assert report is not None
    assert ", beside a sequence with t 4 (" in report.broke


def test_batch_that_fails_to_run_breaks_the_batch_clause(tmp_path: Path) -> None:
    """The graph takes three rows at most."""
    nodes = "rows = Shape<start=0, end=1>(x) at = Gather(table, rows) more = Mul(x, at) y = Identity(more)"
    proto = graphs.on_floats(nodes, table=np.ones(4, np.float32))
    report = attacked(proto, tmp_path)["batch"].attack
    assert report is not None
    assert "the model does not run" in report.broke


def test_attack_without_time_for_its_core_is_not_complete(tmp_path: Path) -> None:
    target = target_of(graphs.pointwise(), tmp_path)
    clauses = attack(target, proof_of(target), Equality("fp32"), seconds=20, clock=Clock(0.5))
    reports = [clause.attack for clause in clauses]
    assert all(report is not None and not report.complete and not report.survived for report in reports)
    assert not any(clause.allows("tested") for clause in clauses)


def test_zero_seconds_try_nothing(tmp_path: Path) -> None:
    target = target_of(graphs.pointwise(), tmp_path)
    clauses = attack(target, proof_of(target), Equality("fp32"), seconds=0)
    assert all(clause.attack is not None and clause.attack.probes == 0 for clause in clauses)
    assert not any(clause.allows("tested") for clause in clauses)


def test_attack_is_deterministic_and_reports_its_progress(tmp_path: Path) -> None:
    target, seen = target_of(graphs.masked_mean(), tmp_path, longest=20), []
    runs = [
        attack(target, proof_of(target, masks=(SOME,)), Equality("fp32"), seconds=30, report=seen.append)
        for _ in range(2)
    ]
    first, second = ([clause.attack for clause in clauses] for clauses in runs)
    assert [(one.probes, one.worst) for one in first if one] == [(one.probes, one.worst) for one in second if one]
    assert any(words.startswith("attacking t: 3 of ") for words in seen)


def test_mixtures_and_extreme_ids_are_drawn_for_inputs_that_have_them(tmp_path: Path) -> None:
    proto = graphs.text_with_derived_mask()
    target = target_of(proto, tmp_path)
    extremes = extreme_ids_of(proto.graph, "input_ids")
    author = Author(target.sampler, extreme_ids={"input_ids": extremes})
    assert "nothing but ones" not in author.contents
    content = next(each for each in author.contents if "embeddings" in each)
    drawn = author.sequence(Draft((("t", 9),), content))["input_ids"]
    assert set(drawn.tolist()) <= set(extremes)
    assert drawn.dtype == np.int64


def test_lengths_beyond_the_memory_of_a_run_are_not_tried(tmp_path: Path) -> None:
    """Eight heads are assumed where no site is known: 2 GiB hold their scores over some thousand positions."""
    target = target_of(graphs.pointwise(), tmp_path, longest=1 << 20)
    longest = _aim(Answers(target, (), Clock(0)), proof_of(target)).longest["t"]
    assert 2048 <= longest <= 8192
