"""The zoo: bundles against the definitions of their attention in float64, with and without padding.

Covers every model but `sliding-window`: its weights are bands, which `test_windowed.py` compares with their definition.

The zoo is the project's own set of torch models, one for each kind of attention. Needs torch. A bundle is the folder of
one converted model.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
from attnserve_server.cli._app import app
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.convert import ExportRequest, export_bundle
from attnserve_server.conversion.sources.source import ZooOptions
from attnserve_server.conversion.sources.torch_source import load_model
from attnserve_server.conversion.sources.zoo import model as zoo
from attnserve_server.domain.values import PreparedSequence
from attnserve_server.engine.collation import collate, outputs_of, weights_of
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.engine.warmup import selection_of_all
from attnserve_server.model.manifest import InputRole, Manifest
from attnserve_server.model.repository import MODEL_FILE, Bundle
from typer.testing import CliRunner
from zoo_bundles import HEADS, NAMES, TINY, Array, Definition

# float32 throughout: sums of 32 products, and of up to 17 exponentials.
TOLERANCE = 1e-5
LENGTHS = (1, 9, 4, 17)
SOURCES = (6, 1, 13, 3)
KINDS = {
    "self": [("self", "dense", "seq", "seq")],
    "causal": [("causal", "dense", "seq", "seq")],
    "cross": [
        ("self", "dense", "source_seq", "source_seq"),
        ("causal", "dense", "seq", "seq"),
        ("cross", "dense", "seq", "source_seq"),
    ],
    "top-k": [("self", "dense", "seq", "seq")],
    "linear": [("self", "linear", "seq", "seq")],
    "multi-scale": [
        ("self", "dense", "seq", "seq"),
        ("self", "dense", "seq", "seq_by_2"),
        ("self", "dense", "seq", "seq_by_4"),
    ],
    "cross-modal": [("self", "dense", "seq", "seq"), ("cross", "dense", "seq", "fixed_16")],
}


def sequences_of(manifest: Manifest) -> list[PreparedSequence]:
    """Sequences of mixed lengths along each axis, with every output and every site selected."""
    rng = np.random.default_rng(1)
    made = []
    for length, source in zip(LENGTHS, SOURCES, strict=True):
        lengths = {"seq": length, "source_seq": source}
        tensors: dict[str, Array] = {}
        for spec in manifest.inputs:
            shape = [lengths[extent] if isinstance(extent, str) else extent for extent in spec.shape]
            if spec.role is InputRole.TOKEN_IDS:
                tensors[spec.name] = rng.integers(3, 259, shape)
            elif spec.role is InputRole.ATTENTION_MASK:
                tensors[spec.name] = np.ones(shape, np.int64)
            else:
                tensors[spec.name] = rng.normal(size=shape).astype(np.float32)
        given = {axis.symbol: lengths[axis.symbol] for axis in manifest.axes if axis.symbol in lengths}
        outputs = tuple(spec.name for spec in manifest.outputs)
        made.append(PreparedSequence(tensors, {**given, **manifest.fixed_lengths}, outputs, selection_of_all(manifest)))
    return made


def run(
    session: RuntimeSession, manifest: Manifest, sequences: list[PreparedSequence]
) -> list[tuple[dict[int, Array], dict[str, Array]]]:
    """Run one batch, and return each sequence's weights by layer and outputs by name."""
    batch = collate(sequences, manifest)
    fetched = dict(zip(batch.fetches, session.run(batch.feeds, batch.fetches), strict=True))
    return [
        (weights_of(batch, fetched, row, one, manifest), outputs_of(batch, fetched, row, one, manifest))
        for row, one in enumerate(sequences)
    ]


def opened(bundle: Bundle) -> RuntimeSession:
    return RuntimeSession.load(bundle.path / MODEL_FILE, provider="CPUExecutionProvider", intra_op_threads=1)


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_a_padded_batch_equal_the_definition(name: str, zoo_bundles: dict[str, Bundle]) -> None:
    manifest = zoo_bundles[name].manifest
    module = zoo.zoo_model(name, TINY).module
    definition = Definition(name, {key: tensor.numpy() for key, tensor in module.state_dict().items()})
    sequences = sequences_of(manifest)
    for one, (weights, _) in zip(sequences, run(opened(zoo_bundles[name]), manifest, sequences), strict=True):
        expected = definition.weights(one.tensors)
        assert list(expected) == [site.name for site in manifest.sites]
        for site in manifest.sites:
            np.testing.assert_allclose(weights[site.layer], expected[site.name], atol=TOLERANCE, rtol=0)
            np.testing.assert_allclose(weights[site.layer].sum(-1), 1, atol=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_batch_neighbours_and_padding_change_nothing(name: str, zoo_bundles: dict[str, Bundle]) -> None:
    manifest = zoo_bundles[name].manifest
    assert all(axis.paddable or axis.fixed for axis in manifest.axes)
    session, sequences = opened(zoo_bundles[name]), sequences_of(manifest)
    together = run(session, manifest, sequences)
    for one, (weights, outputs) in zip(sequences, together, strict=True):
        ((own_weights, own_outputs),) = run(session, manifest, [one])
        for layer, own in own_weights.items():
            np.testing.assert_allclose(weights[layer], own, atol=TOLERANCE, rtol=0)
        for output, own in own_outputs.items():
            # LayerNorm scales hidden states, and so their rounding, to about 1.
            np.testing.assert_allclose(outputs[output], own, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_manifest_has_the_kind_form_and_axes_of_each_site(name: str, zoo_bundles: dict[str, Bundle]) -> None:
    sites = zoo_bundles[name].manifest.sites
    assert [(site.kind, site.form, site.query_axis, site.key_axis) for site in sites] == KINDS[name]
    assert all(site.available for site in sites)


def test_top_k_keeps_k_keys_of_each_query(zoo_bundles: dict[str, Bundle]) -> None:
    bundle = zoo_bundles["top-k"]
    longest = sequences_of(bundle.manifest)[-1:]
    (((weights,), _),) = [(list(found.values()), 0) for found, _ in run(opened(bundle), bundle.manifest, longest)]
    assert set((weights > 0).sum(-1).flat) == {8}


def test_key_axes_of_scales_are_derived_from_the_tokens(zoo_bundles: dict[str, Bundle]) -> None:
    manifest = zoo_bundles["multi-scale"].manifest
    forms = {axis.symbol: axis.derived for axis in manifest.axes if axis.derived}
    assert {symbol: (form.source, form.stride, form.offset) for symbol, form in forms.items()} == {
        "seq_by_2": ("seq", 2, 1),
        "seq_by_4": ("seq", 4, 3),
    }
    assert manifest.with_derived({"seq": 9}) == {"seq": 9, "seq_by_2": 5, "seq_by_4": 3}


def test_patches_of_an_image_have_a_grid(zoo_bundles: dict[str, Bundle]) -> None:
    assert zoo_bundles["cross-modal"].manifest.axis("fixed_16").grid == (4, 4)


@pytest.mark.parametrize("name", NAMES)
def test_reference_of_the_source_equals_its_bundle(name: str, zoo_bundles: dict[str, Bundle]) -> None:
    source = zoo.zoo_model(name, TINY)
    manifest = zoo_bundles[name].manifest
    sequences = sequences_of(manifest)
    for one, (weights, outputs) in zip(sequences, run(opened(zoo_bundles[name]), manifest, sequences), strict=True):
        reference = source.reference({key: array[None] for key, array in one.tensors.items()})
        for site, own in zip(reference.weights, weights.values(), strict=True):
            assert site is not None
            np.testing.assert_allclose(site[0], own, atol=TOLERANCE, rtol=0)
        for output, own in outputs.items():
            np.testing.assert_allclose(reference.outputs[output][0], own, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["linear", "multi-scale"])
def test_torchscript_exports_the_same_sites(name: str, zoo_bundles: dict[str, Bundle], tmp_path: Path) -> None:
    request = ExportRequest(
        source=f"zoo:{name}", name=name, repository=tmp_path, zoo_options=TINY, exporter="torchscript"
    )
    manifest = export_bundle(request).manifest
    assert manifest.check.weight_max_abs_error < TOLERANCE
    found = [(site.kind, site.form, site.query_axis, site.key_axis, site.available) for site in manifest.sites]
    assert found == [(*each, True) for each in KINDS[name]]


def test_seed_determines_the_weights() -> None:
    one, same, other = (zoo.zoo_model("self", ZooOptions(size="tiny", seed=seed)) for seed in (1, 1, 2))
    assert one.sha256 == same.sha256 != other.sha256


def test_source_in_the_provenance_builds_the_same_model(zoo_bundles: dict[str, Bundle]) -> None:
    provenance = zoo_bundles["linear"].manifest.provenance
    assert provenance.source == "zoo:linear?size=tiny&layers=1&seed=5"
    assert load_model(provenance.source).sha256 == provenance.source_sha256
    assert zoo.zoo_model("self").name == "zoo:self"


def test_command_exports_a_model_and_lists_all_for_an_unknown_name(tmp_path: Path) -> None:
    line = ["export", "--name", "made", "--repository", str(tmp_path), "--size", "tiny", "--layers", "1"]
    listed = CliRunner().invoke(app, [*line, "zoo:"])
    assert listed.exit_code == 2
    assert "causal, cross, cross-modal, linear, multi-scale, self, sliding-window, top-k" in listed.output
    made = CliRunner().invoke(app, [*line, "zoo:linear", "--seed", "3", "--exporter", "torchscript"])
    assert made.exit_code == 0, made.output
    assert "made/1: 1 of 1 attention sites, fp32" in made.output
    checked = CliRunner().invoke(
        app, ["check", str(tmp_path / "made" / "1"), "--against", "zoo:linear?size=tiny&layers=1&seed=3"]
    )
    assert checked.exit_code == 0, checked.output


def test_parts_of_a_size_can_be_overridden() -> None:
    module = zoo.zoo_model("causal", ZooOptions(size="tiny", layers=3, width=24)).module
    shapes = {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}
    assert shapes["layers.2.attention.query.weight"] == (24, 24)
    assert "layers.3.attention.query.weight" not in shapes
    assert {attention.heads for attention in module.modules() if hasattr(attention, "heads")} == {HEADS}


def test_expected_digest_is_refused_for_the_zoo() -> None:
    with pytest.raises(BuildRefused, match="generated during export: remove --normalize and --expect-sha256"):
        load_model("zoo:self", expect_sha256="0" * 64)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (
            "zoo:",
            ZooOptions(),
            "zoo: lacks the name of a model; it has causal, cross, cross-modal, linear, multi-scale, self",
        ),
        ("zoo:dense", ZooOptions(), "the zoo has no model 'dense'"),
        ("zoo:self", ZooOptions(size="vast"), "size 'vast' is unknown; use one of tiny, small, base"),
        (
            "zoo:self?colour=red",
            ZooOptions(),
            "'colour=red' are not options of the zoo; use size, layers, heads, width, seed",
        ),
        ("zoo:self?seed", ZooOptions(), "'seed' are not options of the zoo"),
        ("zoo:self", ZooOptions(size="tiny", heads=5), "width 32 must be even and a multiple of the 5 heads"),
        ("zoo:multi-scale", ZooOptions(size="tiny", heads=2), "2 heads are fewer than the 3 strides"),
        (
            "package:nothing",
            ZooOptions(seed=1),
            "--size, --layers, .* apply to models of the zoo only",
        ),
    ],
)
def test_unknown_names_and_sizes_are_refused(source: str, options: ZooOptions, message: str) -> None:
    with pytest.raises(BuildRefused, match=message):
        load_model(source, zoo_options=options)


def test_every_model_documents_its_cost_and_its_source() -> None:
    for builder in zoo.BUILDERS.values():
        parts = [*builder(zoo.SIZES["tiny"]).modules()]
        own = {type(part) for part in parts if isinstance(part, zoo.ZooAttention | zoo.EncoderDecoder)}
        own |= {type(part) for part in parts if isinstance(part, zoo.CrossModalEncoder)}
        assert own
        for part in own:
            words = " ".join(f"{part.__doc__} {sys.modules[part.__module__].__doc__}".split())
            assert all(word in words for word in ("Source: ", " et al. ", "time ", "memory ", "O(")), part


def test_lengths_are_mixed_on_both_axes() -> None:
    assert any(length > source for length, source in zip(LENGTHS, SOURCES, strict=True))
    assert all(one != other for one, other in itertools.pairwise(LENGTHS))
