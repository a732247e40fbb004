"""Conversion of ONNX files: the manifest of the bundle, the warnings, and the files that are refused.

A bundle is the folder of one converted model, and the manifest its description. `prepared` converts a graph and
verifies the bundle; `warnings_of` returns what the conversion prints. A file that cannot be converted raises
BuildRefused, and one that fails the check raises CheckFailed; neither leaves a bundle.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from attention_graphs import Case
from attnserve_server.conversion.assemble import Assembled
from attnserve_server.conversion.base.errors import BuildRefused, CheckFailed
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.model.holding import verify
from attnserve_server.model.manifest import AxisSpec, InputRole
from attnserve_server.model.repository import Bundle, Repository
from attnserve_server.model.tokenizer import TokenizerInvalid
from foreign_graphs import Foreign
from onnx import helper
from onnx_files import HEADS, VOCABULARY, WIDTH, encoder, saved
from rich.console import Console
from tokenizers import Tokenizer, models


def prepared(model: onnx.ModelProto, folder: Path, **changes: Any) -> Bundle:
    file = saved(model, folder / "ranker.onnx")
    bundle = prepare_bundle(PrepareRequest(file=file, name="ranker", repository=folder / "models", **changes))
    verify(Repository(folder / "models").bundle("ranker"))
    return bundle


def warnings_of(model: onnx.ModelProto, folder: Path, **changes: Any) -> str:
    console = Console(record=True, width=200, quiet=False, file=(folder / "console").open("w", encoding="utf-8"))
    file = saved(model, folder / "ranker.onnx")
    with console.file:
        prepare_bundle(
            PrepareRequest(file=file, name="ranker", repository=folder / "models", **changes), Steps(console)
        )
    return console.export_text()


def test_manifest_of_an_encoder_has_its_sites_inputs_and_outputs(tmp_path: Path) -> None:
    manifest = prepared(encoder(), tmp_path).manifest
    (site,) = manifest.sites
    assert (site.name, site.kind, site.form, site.heads, site.head_dim) == ("block.0.attention", "self", "dense", 4, 4)
    assert (site.query_axis, site.key_axis, site.operator) == ("seq", "seq", "ai.onnx.Attention-23")
    assert [(spec.name, spec.role, spec.fill) for spec in manifest.inputs] == [
        ("input_ids", InputRole.TOKEN_IDS, None),
        ("attention_mask", InputRole.ATTENTION_MASK, 1),
    ]
    assert [(spec.name, spec.dtype, spec.shape) for spec in manifest.outputs] == [("hidden", "float32", ("seq", WIDTH))]
    assert manifest.vocabulary_size == VOCABULARY
    assert (manifest.precision, manifest.provenance.exporter, manifest.provenance.opset) == ("fp32", "hand 1", 23)
    assert manifest.provenance.source == "ranker.onnx"
    assert manifest.check.weight_max_abs_error < 1e-6
    assert manifest.format == 2
    assert [clause.axis for clause in manifest.certificate.clauses] == ["batch", "seq"]


def test_greatest_length_is_found_by_runs(tmp_path: Path) -> None:
    assert prepared(encoder(positions=40), tmp_path).manifest.axes == (
        AxisSpec(symbol="seq", max_length=40, paddable=True, bound="the graph runs no more"),
    )


def test_greatest_length_is_at_most_max_length(tmp_path: Path) -> None:
    assert prepared(encoder(positions=40), tmp_path, max_length=33).manifest.axis("seq").max_length == 33


def test_graph_without_a_mask_is_not_paddable(tmp_path: Path) -> None:
    manifest = prepared(encoder(masked=False), tmp_path).manifest
    assert not manifest.axis("seq").paddable
    assert len(set(manifest.check.lengths)) == 1


def test_nameless_axes_of_token_inputs_become_one_axis(tmp_path: Path) -> None:
    manifest = prepared(encoder(batch=None, length=None), tmp_path).manifest
    assert [spec.shape for spec in manifest.inputs] == [("seq",), ("seq",)]
    assert manifest.sites[0].query_axis == "seq"


def test_graph_without_attention_is_converted_with_a_warning(tmp_path: Path) -> None:
    said = warnings_of(encoder(attend=False, masked=False), tmp_path)
    assert "has no attention that can be recognised: it is served without weights" in said
    assert Repository(tmp_path / "models").bundle("ranker").manifest.sites == ()


def test_batch_axis_fixed_at_one_limits_batches_to_one(tmp_path: Path) -> None:
    model = encoder(batch=1)
    assert "every sequence runs alone" in warnings_of(model, tmp_path)
    assert Repository(tmp_path / "models").bundle("ranker").manifest.max_batch_size == 1


def test_axes_of_cross_attention_are_padded_independently(tmp_path: Path) -> None:
    manifest = prepared(Case().model(), tmp_path).manifest
    (site,) = manifest.sites
    assert (site.name, site.kind, site.query_axis, site.key_axis) == ("attention_0", "cross", "query_len", "key_len")
    # No mask hides padded keys, so they would change every row. Padded queries change no other row.
    assert {axis.symbol: axis.paddable for axis in manifest.axes} == {"query_len": True, "key_len": False}


def test_causal_cross_attention_is_not_paddable_along_its_keys(tmp_path: Path) -> None:
    # With more queries than keys, the last queries attend to padding; the first ones do not.
    manifest = prepared(Case(attributes={"is_causal": 1}).model(), tmp_path).manifest
    assert not manifest.axis("key_len").paddable


def test_float16_model_is_checked_with_wider_tolerances(tmp_path: Path) -> None:
    model = Case(dtype=np.float16, kv_heads=2).model()
    weights = helper.make_tensor("unused", onnx.TensorProto.FLOAT16, [4], np.ones(4, np.float16))
    model.graph.initializer.append(weights)
    manifest = prepared(model, tmp_path).manifest
    assert manifest.precision == "fp16"
    assert manifest.check.weight_tolerance > 1e-4
    assert manifest.check.weight_max_abs_error > 0


def test_tokenizer_adds_text_and_the_padding_id(tmp_path: Path) -> None:
    tokenizer = tmp_path / "vocabulary.json"
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "[PAD]": 7}, unk_token="[UNK]"))
    words.add_special_tokens(["[PAD]"])
    words.save(str(tokenizer))
    bundle = prepared(encoder(), tmp_path, tokenizer=tokenizer)
    assert bundle.manifest.text is not None
    assert (bundle.manifest.text.axis, bundle.manifest.text.max_tokens) == ("seq", 40)
    assert bundle.manifest.input("input_ids").padding == 7
    assert bundle.tokenizer_path is not None
    assert bundle.tokenizer_path.read_bytes() == tokenizer.read_bytes()


def test_input_that_text_cannot_fill_causes_a_warning(tmp_path: Path) -> None:
    tokenizer = tmp_path / "vocabulary.json"
    Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]")).save(str(tokenizer))
    model = encoder()
    model.graph.input.append(helper.make_tensor_value_info("gain", onnx.TensorProto.FLOAT, ["batch", 1, 1]))
    model.graph.node[-1].output[:] = ["plain"]
    model.graph.node.append(helper.make_node("Mul", ["plain", "gain"], ["hidden"]))
    said = warnings_of(model, tmp_path, tokenizer=tokenizer)
    assert "text does not fill input 'gain': clients must send tensors" in said


def test_outputs_of_the_bundle_are_bit_identical_to_the_file(tmp_path: Path) -> None:
    bundle = prepared(encoder(), tmp_path)
    ids = np.arange(14).reshape(2, 7)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    source = GraphRunner(tmp_path / "ranker.onnx").run(feeds, ["hidden"])["hidden"]
    tapped = GraphRunner(bundle.model_path).run(feeds, ["hidden", "attention.block.0.attention"])
    np.testing.assert_array_equal(tapped["hidden"], source)
    assert tapped["attention.block.0.attention"].shape == (2, HEADS, 7, 7)


@pytest.mark.parametrize(("dtype", "factor"), [(np.float32, 1000), (np.float16, 100)])
def test_rounding_of_large_values_passes_the_check(dtype: type, factor: int, tmp_path: Path) -> None:
    # Rounding is relative: float32 keeps 7 digits of any number.
    model = Foreign(mask="bool", dtype=dtype).model()
    (values,) = (tensor for tensor in model.graph.initializer if tensor.name == "wv")
    values.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(values) * dtype(factor), "wv"))
    manifest = prepared(model, tmp_path).manifest
    assert manifest.axis("frames").paddable
    assert manifest.check.weight_max_abs_error < manifest.check.weight_tolerance


def test_rows_that_change_each_other_run_alone(tmp_path: Path) -> None:
    model = encoder()
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0]), "rows"))
    model.graph.node.append(helper.make_node("ReduceMean", ["hidden", "rows"], ["mean"]))
    model.graph.node.append(helper.make_node("Sub", ["hidden", "mean"], ["centred"]))
    model.graph.output.append(helper.make_tensor_value_info("centred", onnx.TensorProto.FLOAT, ["batch", "seq", WIDTH]))
    assert "every sequence runs alone (refuted)" in warnings_of(model, tmp_path)
    manifest = Repository(tmp_path / "models").bundle("ranker").manifest
    assert manifest.max_batch_size == 32, "a request may hold as many"
    assert manifest.under("tested").max_batch_size == 1


def test_output_that_follows_no_input_axis_is_left_out(tmp_path: Path) -> None:
    model = encoder()
    model.graph.node.append(helper.make_node("ReduceSum", ["hidden"], ["total"], keepdims=0))
    model.graph.node.append(helper.make_node("Concat", ["hidden", "hidden"], ["twice"], axis=1))
    model.graph.output.append(helper.make_tensor_value_info("total", onnx.TensorProto.FLOAT, []))
    model.graph.output.append(helper.make_tensor_value_info("twice", onnx.TensorProto.FLOAT, [None, None, None]))
    said = warnings_of(model, tmp_path)
    assert "'total' is left out: its first axis is not the batch" in said
    assert "'twice' is left out: an axis of it follows no axis of the inputs" in said
    assert [spec.name for spec in Repository(tmp_path / "models").bundle("ranker").manifest.outputs] == ["hidden"]


def test_fixed_axis_of_a_site_gets_a_symbol_and_its_one_length(tmp_path: Path) -> None:
    model = Case().model()
    for value in (*model.graph.input[1:],):
        value.type.tensor_type.shape.dim[2].dim_value = 5
    manifest = prepared(model, tmp_path).manifest
    (site,) = manifest.sites
    assert (site.query_axis, site.key_axis, site.kind) == ("query_len", "fixed_5", "cross")
    assert manifest.axes[-1] == AxisSpec(symbol="fixed_5", max_length=5, paddable=False, fixed=True)
    assert manifest.fixed_lengths == {"fixed_5": 5}
    assert manifest.input("key").shape == (4, 5, 8)


def test_symbol_of_a_fixed_axis_is_unique(tmp_path: Path) -> None:
    model = Case().model()
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "fixed_5"
    for value in (*model.graph.input[1:],):
        value.type.tensor_type.shape.dim[2].dim_value = 5
    manifest = prepared(model, tmp_path).manifest
    assert [(axis.symbol, axis.fixed) for axis in manifest.axes] == [("fixed_5", False), ("fixed_5_", True)]


def test_site_along_an_unknown_axis_is_listed_without_weights(tmp_path: Path) -> None:
    model = Case().model()
    (attend,) = model.graph.node
    twice = [helper.make_node("Concat", [name, name], [f"{name}_2"], axis=2) for name in ("key", "value")]
    attend.input[1:] = ["key_2", "value_2"]
    del model.graph.node[:]
    model.graph.node.extend([*twice, attend])
    (site,) = prepared(model, tmp_path).manifest.sites
    assert not site.available
    assert site.unavailable_reason == "its key axis follows no axis of an input, and is not fixed"
    assert site.items_input is None


def test_mask_whose_true_hides_keys_is_padded_with_true(tmp_path: Path) -> None:
    manifest = prepared(Foreign(mask="inverted", projected=False).model(), tmp_path).manifest
    mask = manifest.input("key_mask")
    assert (mask.role, mask.inverted, mask.padding, mask.fill) == (InputRole.ATTENTION_MASK, True, 1, 0)
    assert manifest.axis("frames").paddable
    assert manifest.sites[0].kind == "self"


def test_site_whose_first_axis_is_not_the_batch_is_listed_without_weights(tmp_path: Path) -> None:
    model = Case().model()
    doubled = [helper.make_node("Concat", [name, name], [f"{name}_2"], axis=0) for name in ("query", "key", "value")]
    (attend,) = model.graph.node
    attend.input[:] = ["query_2", "key_2", "value_2"]
    attend.output[:] = ["both"]
    constants = {"start": [0], "one": [1]}
    for name, numbers in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(numbers), name))
    first = [helper.make_node("Shape", ["query"], ["rows"], start=0, end=1)]
    first.append(helper.make_node("Slice", ["both", "start", "rows"], ["output"]))
    nodes = [*doubled, attend, *first]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    (site,) = prepared(model, tmp_path).manifest.sites
    assert site.unavailable_reason == "its first axis is not the batch"


def test_converted_graph_is_refused(tmp_path: Path) -> None:
    bundle = prepared(encoder(), tmp_path)
    with pytest.raises(BuildRefused, match="converted already"):
        prepare_bundle(PrepareRequest(file=bundle.model_path, name="again", repository=tmp_path / "models"))


def test_external_data_is_stored_in_the_bundle(tmp_path: Path) -> None:
    file = tmp_path / "big" / "ranker.onnx"
    file.parent.mkdir()
    onnx.save(encoder(), file, save_as_external_data=True, location="ranker.data", size_threshold=0)
    bundle = prepare_bundle(PrepareRequest(file=file, name="ranker", repository=tmp_path / "models"))
    assert sorted(entry.name for entry in bundle.path.iterdir()) == ["golden.npz", "manifest.json", "model.onnx"]
    (file.parent / "ranker.data").unlink()
    GraphRunner(bundle.model_path)


def test_file_that_is_not_a_tokenizer_is_refused(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}", encoding="utf-8")
    with pytest.raises(TokenizerInvalid):
        prepared(encoder(), tmp_path, tokenizer=tokenizer)
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("way", ["climbing", "absolute", "link", "missing", "cut short"])
def test_external_data_outside_the_folder_is_refused(way: str, tmp_path: Path) -> None:
    file = tmp_path / "models-in" / "ranker.onnx"
    file.parent.mkdir()
    onnx.save(encoder(), file, save_as_external_data=True, location="ranker.data", size_threshold=0)
    data = file.parent / "ranker.data"
    places = {"climbing": "../ranker.data", "absolute": str(tmp_path / "ranker.data")}
    if way in {"climbing", "absolute", "link"}:
        data.rename(tmp_path / "ranker.data")
    if way == "link":
        data.symlink_to(tmp_path / "ranker.data")
    elif way == "missing":
        data.unlink()
    elif way == "cut short":
        data.write_bytes(data.read_bytes()[:40])
    else:
        model = onnx.load(file, load_external_data=False)
        for tensor in model.graph.initializer:
            tensor.external_data[0].value = places[way]
        file.write_bytes(model.SerializeToString())
    with pytest.raises(BuildRefused, match="external data") as refusal:
        prepare_bundle(PrepareRequest(file=file, name="ranker", repository=tmp_path / "models"))
    assert str(tmp_path) not in str(refusal.value)
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("place", ["onnx", "."])
def test_external_data_is_read_through_the_links_of_a_cache(place: str, tmp_path: Path) -> None:
    # As hub caches store a revision: links to blobs that are named by their digests.
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0a1b" / place
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    onnx.save(encoder(), snapshot / "model.onnx", save_as_external_data=True, location="model.data", size_threshold=0)
    for number, name in enumerate(("model.onnx", "model.data")):
        (snapshot / name).rename(blobs / f"blob{number}")
        (snapshot / name).symlink_to(blobs / f"blob{number}")
    request = PrepareRequest(file=snapshot / "model.onnx", name="linked", repository=tmp_path / "models")
    assert prepare_bundle(request).manifest.sites[0].available


@pytest.mark.parametrize("linked", [True, False])
def test_external_data_that_is_linked_out_of_the_cache_is_refused_with_the_remedy(linked: bool, tmp_path: Path) -> None:
    blobs, snapshot, outside = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0a1b", tmp_path / "secret"
    for folder in (blobs, snapshot, outside):
        folder.mkdir(parents=True)
    file, data = snapshot / "model.onnx", snapshot / "model.data"
    onnx.save(encoder(), file, save_as_external_data=True, location="model.data", size_threshold=0)
    data.rename(outside / "data")
    data.symlink_to(outside / "data")
    if linked:
        file.rename(blobs / "blob")
        file.symlink_to(blobs / "blob")
    with pytest.raises(BuildRefused, match="copy the data itself beside the model"):
        prepare_bundle(PrepareRequest(file=file, name="linked", repository=tmp_path / "models"))


def test_external_data_in_a_folder_that_is_linked_out_of_the_model_s_folder_is_refused(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()
    file = inside / "model.onnx"
    onnx.save(encoder(), file, save_as_external_data=True, location="model.data", size_threshold=0)
    (inside / "model.data").rename(outside / "model.data")
    (inside / "weights").symlink_to(outside)
    model = onnx.load(file, load_external_data=False)
    for tensor in model.graph.initializer:
        tensor.external_data[0].value = "weights/model.data"
    file.write_bytes(model.SerializeToString())
    with pytest.raises(BuildRefused, match="copy the data itself beside the model"):
        prepare_bundle(PrepareRequest(file=file, name="linked", repository=tmp_path / "models"))


def test_wrong_weights_fail_the_check_and_no_bundle_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Assembled, "product_errors", lambda *arguments: {"attention_0": 0.5})
    with pytest.raises(CheckFailed, match=r"attention weights differ .* by 0\.5.*no bundle was written"):
        prepared(encoder(), tmp_path)
    assert not (tmp_path / "models").exists()


def cut(model: onnx.ModelProto) -> bytes:
    return model.SerializeToString()[:-100]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"hello, this is no model", "not an ONNX file"),
        (b"\x08\x0a\x12\x04hand", "it has no graph"),
        (cut(encoder()), "cut short|not a valid"),
    ],
    ids=["empty", "text", "no graph", "cut short"],
)
def test_file_that_is_not_a_model_is_refused_in_one_sentence(content: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "ranker.onnx"
    file.write_bytes(content)
    with pytest.raises(BuildRefused, match=words) as refusal:
        prepare_bundle(PrepareRequest(file=file, name="ranker", repository=tmp_path / "models"))
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "models").exists()


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildRefused, match="no such file"):
        prepare_bundle(PrepareRequest(file=tmp_path / "x.onnx", name="ranker", repository=tmp_path / "models"))


@pytest.mark.parametrize("way", ["cannot load", "does not run"])
def test_error_of_the_runtime_is_reported_without_paths(way: str, tmp_path: Path) -> None:
    model = encoder() if way == "cannot load" else encoder(positions=3)
    if way == "cannot load":
        model.graph.node[-1].domain = "com.microsoft"
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    with pytest.raises(BuildRefused, match=way) as refusal:
        prepared(model, tmp_path)
    assert not re.search(r"::|\.cc|\.h:|/(?!op$)", str(refusal.value))


def test_fixed_batch_of_more_than_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildRefused, match="fixed at 8: export the model with a dynamic first axis"):
        prepared(encoder(batch=8), tmp_path)


def test_axes_that_a_node_forces_to_be_equal_share_a_symbol_with_the_reason_in_the_manifest(tmp_path: Path) -> None:
    model = encoder()
    first = model.graph.input[0].type.tensor_type.shape.dim[1].dim_param
    model.graph.input[1].type.tensor_type.shape.dim[1].dim_param = "mask_len"
    manifest = prepared(model, tmp_path).manifest
    assert {spec.shape for spec in manifest.inputs} == {(first,)}
    assert manifest.provenance.solved[0].startswith(f"axes 'mask_len' and {first!r} are equal, because of ")


def test_tokenizer_for_a_graph_without_token_ids_is_refused(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}", encoding="utf-8")
    with pytest.raises(BuildRefused, match="no input of token ids, such as input_ids"):
        prepared(Case().model(), tmp_path, tokenizer=tokenizer)


def test_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("[1", encoding="utf-8")
    with pytest.raises(BuildRefused, match=r"tokenizer\.json is no tokenizer"):
        prepared(encoder(), tmp_path, tokenizer=tokenizer)
