"""A manifest whose parts disagree is refused with the reason; a valid one reads back as written.

A manifest describes one converted model: its inputs, outputs, axes, attention sites and certificate. `manifest` makes a
valid one with some fields changed; disagreement raises pydantic's ValidationError. A site is a place in a model that
computes attention.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from attnserve_server.model.certificate import BATCHING, Clause, MaskNeed, Verdict
from attnserve_server.model.manifest import (
    AxisSpec,
    CheckReport,
    DerivedLength,
    InputRole,
    InputSpec,
    Manifest,
    OutputSpec,
    Provenance,
    SiteSpec,
    TextSpec,
    is_model_name,
    is_model_version,
)
from made_by_hand import SURVIVED, certificate, proved
from pydantic import ValidationError

CHECK = CheckReport(
    against="eager",
    lengths=(3, 5),
    output_max_abs_error=1e-6,
    output_tolerance=1e-4,
    weight_max_abs_error=1e-7,
    weight_tolerance=1e-5,
    row_sum_max_abs_error=1e-7,
)


def ids(name="input_ids", role=InputRole.TOKEN_IDS, **fields):
    return InputSpec(name=name, dtype="int64", shape=("seq",), role=role, **fields)


def site(layer=0, name="", **fields):
    name = name or f"encoder.{layer}"
    tap = {"items_input": f"attention_items.{name}", "weights_output": f"attention.{name}"}
    defaults = {
        "name": name,
        "layer": layer,
        "kind": "self",
        "form": "dense",
        "operator": "Attention",
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "query_axis": "seq",
        "key_axis": "seq",
    }
    return SiteSpec(**(defaults | tap | fields))


def manifest(**fields):
    defaults = {
        "name": "minilm",
        "version": "1",
        "digest": "sha256:" + "0" * 64,
        "files": {"model.onnx": "0" * 64},
        "precision": "fp32",
        "max_batch_size": 8,
        "axes": (AxisSpec(symbol="seq", max_length=512, paddable=True),),
        "inputs": (ids(),),
        "outputs": (OutputSpec(name="last_hidden_state", dtype="float32", shape=("seq", 384)),),
        "sites": (site(0), site(1)),
        "vocabulary_size": 30522,
        "text": TextSpec(axis="seq", max_tokens=512),
        "provenance": Provenance(source="m", exporter="dynamo", opset=23, created="2026-01-01"),
        "check": CHECK,
    }
    facts = defaults | fields
    given = [axis.symbol for axis in facts["axes"] if axis.derived is None and not axis.fixed]
    return Manifest(**({"certificate": proved(*dict.fromkeys(given))} | facts))


def test_manifest_reads_back_as_written():
    bias = InputSpec(name="bias", dtype="float32", shape=("seq",), padding=-math.inf)
    written = manifest(inputs=(ids(), bias))
    assert Manifest.model_validate_json(written.model_dump_json()) == written
    assert written.input("bias").padding == -math.inf


def test_parts_are_found_by_name_and_role():
    found = manifest()
    assert found.axis("seq").max_length == 512
    assert found.output("last_hidden_state").shape == ("seq", 384)
    assert found.input_of_role(InputRole.TOKEN_IDS) == found.input("input_ids")
    assert found.input_of_role(InputRole.TOKEN_IDS, "seq") == found.input("input_ids")
    assert found.input_of_role(InputRole.TOKEN_IDS, "patch") is None
    assert found.input_of_role(InputRole.ATTENTION_MASK) is None
    with pytest.raises(KeyError):
        found.input("nowhere")


@pytest.mark.parametrize("name", ["minilm", "a", "A.b_c-9", "x" * 128])
def test_plain_names_are_model_names(name):
    assert is_model_name(name)
    assert manifest(name=name).name == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a\\b", "a\n", "a\x00", " a", ".hidden", "x" * 129, "é"]
)
def test_names_that_are_paths_or_hidden_are_refused(name):
    assert not is_model_name(name)
    with pytest.raises(ValidationError):
        manifest(name=name)


@pytest.mark.parametrize("version", ["", "0", "01", "-1", "1.0", "1\n", "latest", "1234567890", "１"])
def test_versions_are_positive_decimal_integers(version):
    assert not is_model_version(version)
    with pytest.raises(ValidationError):
        manifest(version=version)


@pytest.mark.parametrize("file", ["../model.onnx", "/model.onnx", "a/b", "", ".hidden", "a\n"])
def test_files_must_be_single_path_components(file):
    with pytest.raises(ValidationError, match="files"):
        manifest(files={file: "0" * 64})


def refused(match, **fields):
    with pytest.raises(ValidationError, match=match):
        manifest(**fields)


def test_axes_of_inputs_outputs_and_sites_must_be_declared():
    wild = OutputSpec(name="out", dtype="float32", shape=("patch",))
    refused(r"out: axis symbols \['patch'\] are not declared", outputs=(wild,))
    refused(r"site encoder\.0: axis symbols \['patch'\]", sites=(site(0, key_axis="patch"),))


def test_site_without_a_tap_may_have_undeclared_axes():
    gone = site(0, items_input=None, weights_output=None, unavailable_reason="no dynamic axis", key_axis="")
    assert not manifest(sites=(gone,)).sites[0].available


@pytest.mark.parametrize(
    "change", [{}, {"fixed": True, "paddable": False, "grid": (1, 2**22 + 1)}], ids=["free", "patches"]
)
def test_an_axis_whose_positions_are_held_is_bounded(change):
    with pytest.raises(ValidationError, match="axis seq: max_length 4194305 exceeds 4194304"):
        AxisSpec(**{"symbol": "seq", "max_length": 2**22 + 1, "paddable": True, **change})
    assert AxisSpec(symbol="seq", max_length=2**22, paddable=True)
    assert AxisSpec(
        symbol="x", max_length=2**30, paddable=True, derived=DerivedLength(source="seq", stride=2, offset=0)
    )


def test_batch_is_not_an_axis_of_a_sequence():
    batch = AxisSpec(symbol="batch", max_length=8, paddable=True)
    refused(r"axis names are used twice: \['batch'\]", axes=(*manifest().axes, batch))


def test_sites_must_be_in_the_order_of_their_layers():
    refused("in order of their layers", sites=(site(1), site(0)))


def test_repeated_names_are_refused():
    refused("site names are used twice", sites=(site(0, "a"), site(1, "a")))
    refused(r"input names are used twice: \['input_ids'\]", inputs=(ids(), ids(role=InputRole.DATA)))
    refused(r"role names are used twice: \['token_ids along seq'\]", inputs=(ids(), ids("more")))
    refused("output names are used twice", sites=(site(0, weights_output="last_hidden_state"),))
    refused("axis names are used twice", axes=manifest().axes * 2)


@pytest.mark.parametrize("missing", ["items_input", "weights_output"])
def test_tap_without_input_or_output_is_refused(missing):
    with pytest.raises(ValidationError, match="items_input and weights_output must be given together"):
        site(0, **{missing: None})


def test_mean_over_heads_needs_a_tap_and_its_own_name():
    assert site(0).outputs == ("attention.encoder.0",)
    joined = site(0, mean_output="attention_mean.0")
    assert joined.outputs == ("attention.encoder.0", "attention_mean.0")
    refused("output names are used twice", sites=(joined, site(1, mean_output="attention_mean.0")))
    gone = {"items_input": None, "weights_output": None, "unavailable_reason": "no dynamic axis"}
    with pytest.raises(ValidationError, match="a mean_output needs a weights_output"):
        site(0, **gone, mean_output="attention_mean.0")


def test_site_has_either_a_tap_or_a_reason():
    with pytest.raises(ValidationError, match="either a tap or an unavailable_reason"):
        site(0, items_input=None, weights_output=None)
    with pytest.raises(ValidationError, match="either a tap or an unavailable_reason"):
        site(0, unavailable_reason="but there it is")


def test_heads_must_be_a_multiple_of_key_heads():
    with pytest.raises(ValidationError, match="4 heads are not a multiple of 3 kv_heads"):
        site(0, kv_heads=3)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("uint8", -1),
        ("uint8", 256),
        ("int64", 0.5),
        ("int64", math.inf),
        ("bool", 2),
        ("float16", 1e5),
        ("int8", math.nan),
    ],
)
def test_padding_and_fill_must_fit_their_dtype(dtype, value):
    for field in ("padding", "fill"):
        with pytest.raises(ValidationError, match=f"x: {field} .* is not a {dtype}"):
            InputSpec(name="x", dtype=dtype, shape=(), **{field: value})


@pytest.mark.parametrize(
    ("dtype", "value"), [("uint8", 255), ("int64", -1), ("bool", 1), ("float16", -65504), ("float32", -math.inf)]
)
def test_values_at_the_edge_of_a_dtype_fit(dtype, value):
    assert InputSpec(name="x", dtype=dtype, shape=(), padding=value, fill=value).padding == value


def test_text_needs_token_ids_along_its_axis():
    refused("no input of role token_ids", inputs=(ids(role=InputRole.DATA),))
    refused("no input of role token_ids", text=TextSpec(axis="patch", max_tokens=5))
    refused("513 tokens exceed 512", text=TextSpec(axis="seq", max_tokens=513))


def test_check_report_with_nan_is_refused():
    with pytest.raises(ValidationError, match="finite"):
        CheckReport(**(CHECK.model_dump() | {"weight_max_abs_error": math.nan}))


def test_unknown_fields_are_refused():
    with pytest.raises(ValidationError, match="Extra inputs"):
        Manifest.model_validate(manifest().model_dump() | {"surprise": 1})


def test_fixed_axis_cannot_be_paddable():
    with pytest.raises(ValidationError, match="a fixed axis has one length"):
        AxisSpec(symbol="patches", max_length=49, paddable=True, fixed=True)


def test_fixed_lengths_are_those_of_fixed_axes():
    seq = AxisSpec(symbol="seq", max_length=512, paddable=True)
    patches = AxisSpec(symbol="patches", max_length=49, paddable=False, fixed=True)
    assert manifest(axes=(seq, patches)).fixed_lengths == {"patches": 49}


def patches(**fields):
    return AxisSpec(**({"symbol": "patches", "max_length": 50, "paddable": False, "fixed": True} | fields))


def test_patch_grid_and_leading_positions_must_make_the_whole_axis():
    assert patches(grid=(7, 7), leading=1).grid == (7, 7)
    for words, fields in {
        "0 leading positions and 7 x 7 patches do not make max_length 50": {"grid": (7, 7)},
        "a grid needs a fixed axis": {"grid": (7, 7), "leading": 1, "fixed": False},
        "leading is 1, but there is no grid": {"leading": 1},
    }.items():
        with pytest.raises(ValidationError, match=words):
            patches(**fields)


def test_each_axis_of_an_encoder_decoder_has_its_own_ids_mask_and_vocabulary():
    target = {"dtype": "int64", "shape": ("target",)}
    found = manifest(
        axes=(
            AxisSpec(symbol="seq", max_length=512, paddable=True),
            AxisSpec(symbol="target", max_length=64, paddable=True),
        ),
        inputs=(
            ids(),
            ids("mask", InputRole.ATTENTION_MASK),
            InputSpec(name="decoder_input_ids", role=InputRole.TOKEN_IDS, vocabulary_size=100, **target),
            InputSpec(name="decoder_mask", role=InputRole.ATTENTION_MASK, **target),
        ),
        text=TextSpec(axis="seq", max_tokens=512, pair_axis="target", pair_max_tokens=64, pair_start=2),
    )
    decoder = found.input_of_role(InputRole.TOKEN_IDS, "target")
    assert decoder == found.input("decoder_input_ids")
    assert [found.vocabulary_of(spec) for spec in (decoder, found.input("input_ids"))] == [100, 30522]
    assert found.text.axes == {"seq": 512, "target": 64}
    assert Manifest.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ("no input of role token_ids has the shape .target.", {"pair_axis": "target", "pair_max_tokens": 8}),
        ("pair_axis is seq, the first text's axis", {"pair_axis": "seq", "pair_max_tokens": 8}),
        ("must be given together", {"pair_axis": "target"}),
        ("must be given together", {"pair_max_tokens": 8}),
        ("pair_start needs a pair_axis", {"pair_start": 2}),
    ],
)
def test_second_text_needs_an_axis_with_token_ids(words, fields):
    with pytest.raises(ValidationError, match=words):
        manifest(text=TextSpec(axis="seq", max_tokens=512, **fields))


def halves(symbol="seq_by_2", source="seq", **fields):
    return AxisSpec(symbol=symbol, max_length=16, paddable=True, derived={"source": source, "stride": 2}, **fields)


def test_source_of_a_derived_axis_must_be_another_axis():
    assert manifest(axes=(*manifest().axes, halves())).with_derived({"seq": 5}) == {"seq": 5, "seq_by_2": 2}
    assert manifest(axes=(*manifest().axes, halves())).with_derived({}) == {}
    refused("its source frames must be another axis", axes=(*manifest().axes, halves(source="frames")))
    twice = halves("seq_by_4", "seq_by_2")
    refused("its source seq_by_2 must be another axis", axes=(*manifest().axes, halves(), twice))


def test_input_with_a_derived_axis_is_refused():
    refused(r"input frames: \['seq_by_2'\] are derived", axes=(*manifest().axes, halves()), inputs=(
        *manifest().inputs, InputSpec(name="frames", dtype="float32", shape=("seq_by_2",))
    ))  # fmt: skip


def test_fixed_axis_cannot_be_derived():
    with pytest.raises(ValidationError, match="one length, so it cannot be derived"):
        AxisSpec(symbol="x", max_length=4, paddable=False, fixed=True, derived={"source": "seq", "stride": 2})


def test_derived_axis_reads_back_as_written():
    written = manifest(axes=(*manifest().axes, halves()))
    assert type(written).model_validate_json(written.model_dump_json()) == written


UNKNOWN = Clause(axis="seq", verdict=Verdict.UNKNOWN, reason="an operator that is not known", attack=SURVIVED)


def test_format_2_has_a_certificate_and_format_1_has_none():
    assert manifest(format=1, certificate=None).certificate is None
    refused("format 2 must have a certificate", certificate=None)
    refused("and one of format 1 must not", format=1)


def test_certificate_must_have_one_clause_for_the_batch_and_each_input_axis():
    refused(r"\['batch'\] must have one clause for each of \['batch', 'seq'\]", certificate=proved())
    refused("must have one clause for each", certificate=proved("seq").model_copy(update={
        "clauses": proved("seq").clauses * 2
    }))  # fmt: skip
    refused(
        r"masks \['nowhere'\] are not inputs",
        certificate=proved("seq", masks=[MaskNeed(input="nowhere", need="some")]),
    )


def test_certificate_reads_back_as_written():
    broken = SURVIVED.model_copy(update={"worst": math.inf, "broke": "lengths 3 and 9"})
    clause = UNKNOWN.model_copy(update={"attack": broken})
    written = manifest(certificate=certificate(clauses=(clause,), batch=Verdict.PROVED))
    assert Manifest.model_validate_json(written.model_dump_json()) == written


def ruled(found, batching):
    """The padded axes and the maximum rows of a run under a policy, for which the manifest must be valid too."""
    effective = found.under(batching)
    assert Manifest.model_validate(effective.model_dump()) == effective
    assert effective.under(batching) == effective
    return {axis.symbol for axis in effective.axes if axis.paddable}, effective.max_batch_size


AXES = (
    AxisSpec(symbol="seq", max_length=512, paddable=True),
    AxisSpec(symbol="seq_by_2", max_length=256, paddable=True, derived={"source": "seq", "stride": 2}),
    AxisSpec(symbol="patches", max_length=49, paddable=False, fixed=True),
    AxisSpec(symbol="patches_by_2", max_length=24, paddable=True, derived={"source": "patches", "stride": 2}),
)


def test_proved_axes_and_those_derived_from_them_are_padded_unless_batching_is_off():
    found = manifest(axes=AXES)
    padded = {"seq", "seq_by_2"}
    assert [ruled(found, policy) for policy in BATCHING] == [(padded, 8), (padded, 8), (set(), 1)]


def test_axis_that_survived_the_attack_is_padded_under_tested():
    found = manifest(axes=AXES, certificate=certificate(clauses=(UNKNOWN,), batch=Verdict.PROVED))
    assert [ruled(found, policy) for policy in BATCHING] == [(set(), 8), ({"seq", "seq_by_2"}, 8), (set(), 1)]


def test_finite_mask_that_survived_the_attack_is_padded_by_default():
    finite = UNKNOWN.model_copy(update={"finite_mask": True})
    found = manifest(certificate=certificate(clauses=(finite,), batch=Verdict.PROVED))
    assert [ruled(found, policy) for policy in BATCHING] == [({"seq"}, 8), ({"seq"}, 8), (set(), 1)]


def test_rows_run_alone_if_the_batch_is_not_allowed():
    unknown = manifest(certificate=certificate(batch=Verdict.UNKNOWN, seq=Verdict.PROVED))
    refuted = manifest(certificate=certificate(batch=Verdict.REFUTED, seq=Verdict.REFUTED))
    assert [ruled(unknown, policy)[1] for policy in BATCHING] == [1, 1, 1]
    assert [ruled(refuted, policy) for policy in BATCHING] == [(set(), 1)] * 3


def test_format_1_is_batched_at_equal_lengths_only():
    found = manifest(format=1, certificate=None, axes=AXES)
    assert [ruled(found, policy) for policy in BATCHING] == [(set(), 8), (set(), 8), (set(), 1)]


def test_mask_that_violates_an_assumption_is_detected():
    mask = ids("mask", InputRole.ATTENTION_MASK)
    needs = [MaskNeed(input="mask", need="some"), MaskNeed(input="input_ids", need="all")]
    found = manifest(inputs=(ids(), mask), certificate=proved("seq", masks=needs))

    def breaks(mask, ids):
        return found.breaks_masks({"mask": np.array(mask), "input_ids": np.array(ids)})

    assert not breaks([0, 1], [5, 5])
    assert breaks([0, 0], [5, 5])
    assert breaks([1, 1], [5, 0])
    assert not manifest().breaks_masks({})
