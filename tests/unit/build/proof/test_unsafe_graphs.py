"""Graphs whose answers depend on padding in ways that are easily missed: none may be proved. Runs show why."""

from __future__ import annotations

import pytest
from proof_cases import PROVED, REFUTED, Case
from proof_runs import Runs
from proof_tables import unsafe_numbers, unsafe_places

UNSAFE = [*unsafe_numbers.UNSAFE, *unsafe_places.UNSAFE]
OPEN = frozenset(
    {
        "acos outside of -1 to 1 is NaN",
        "a remainder of a division by 0 is NaN",
        "exp of a constant overflows float32",
        "a cast to float16 makes -infinity of a low number",
        "whole numbers are divided without a rest",
        "CastLike to whole numbers cuts fractions off",
        "a cast to int8 keeps the lowest byte alone",
        "unsigned numbers wrap around below 0",
        "the alpha of Elu takes it below -1",
        "RandomNormalLike of a constant is folded into one",
        "RandomUniformLike of a constant is folded into one",
        "Bernoulli of a constant is folded into one",
        "Dropout in training mode drops at random",
        "BatchNormalization in training mode takes statistics of the batch",
        "the places that MaxPool gives count through the whole tensor",
        "a place one before that of the greatest may be -1, the last padded position",
        "a loop carries the padded length",
        "one branch of an If gives the padded length",
        "places from the end, taken at the place of the greatest",
        "places from the end, cut along another axis",
        "places from the end, joined into columns and transposed",
        "an axis is filled up with the padded length",
        "OneHot marks with the padded length",
        "a normalisation is scaled by the padded length",
        "the end is cut off by a negative pad",
        "EyeLike above the diagonal has ones behind the sequence",
        "QLinearConv fills the ends with its zero point, not with zeros",
        "the alpha of LeakyRelu widens what it gives",
        "the gamma of Selu widens what it gives",
        "RNN gives more than 1 by another activation",
        "GRU gives more than 1 from the state that it begins with",
        "QuantizeLinear to int16 gives more than a byte",
        "BatchNormalization is scaled by the padded length",
        "SkipLayerNormalization is scaled by the padded length",
        "MatMulNBits is scaled by the padded length",
        "a float mask of ones and zeros is added to scores, and hides nothing",
        "the frontier of onnxruntime's kernel moves with the number of queries",
    }
)
"""Those that the proof still calls safe: a rule that is mended takes its case out of here."""


@pytest.mark.parametrize("case", UNSAFE, ids=lambda case: case.name)
def test_a_run_shows_that_the_graph_is_not_safe(case: Case) -> None:
    runs = Runs(case, case.proof())
    assert runs.worst("seq") > 1
    if case.batch is REFUTED:
        assert runs.worst("batch") > 1


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=case.name,
            marks=[pytest.mark.xfail(strict=True, reason="proved, and unsafe")] if case.name in OPEN else [],
        )
        for case in UNSAFE
    ],
)
def test_what_a_run_shows_to_be_unsafe_is_not_proved(case: Case) -> None:
    verdicts = {clause.axis: clause.verdict for clause in case.proof().clauses}
    assert verdicts["seq"] is not PROVED
    if case.batch is REFUTED:
        assert verdicts["batch"] is not PROVED
