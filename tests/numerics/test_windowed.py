"""Windowed attention: found, its columns read from the graph, and its band equal to the definition.

A band has a column for each key of a query's window. `Windowed` makes a graph of one layer, and its weights in float64.
The zoo is the project's own set of torch models. Needs torch and transformers, for the zoo's own model and for Swin.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import pytest
import torch
from attnserve_server.attention.bands import band_keys, lay_out
from attnserve_server.conversion.assemble import Assembled, assemble
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.convert import ExportRequest, PrepareRequest, export_bundle, prepare_bundle
from attnserve_server.conversion.graphs.reading import checked
from attnserve_server.conversion.inputs.signature import signature_of
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.sources.source import ZooOptions
from attnserve_server.conversion.sources.torch_source import load_model
from attnserve_server.conversion.sources.zoo.sparse import SlidingWindowAttention
from attnserve_server.domain.values import PreparedSequence
from attnserve_server.engine.collation import collate, weights_of
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.engine.warmup import selection_of_all
from attnserve_server.model.bands import BlockBand, SlidingBand
from attnserve_server.model.repository import MODEL_FILE, Bundle
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import SwinConfig, SwinModel
from windowed_graphs import Array, Windowed

# float32 sums in another order.
TOLERANCE = 1e-5
LENGTHS = (13, 1, 4, 9, 26)


def assembled(model: onnx.ModelProto, folder: Path) -> Assembled:
    proto = checked(model, "case")
    return assemble(proto, Sampler(signature_of(proto.graph)), folder, Steps.silent())


def assert_band_is_the_definition(case: Windowed, band: SlidingBand | BlockBand) -> None:
    with TemporaryDirectory() as folder:
        done = assembled(case.model(), Path(folder))
        (site,) = done.sites
        assert not site.unavailable_reason
        assert (site.form, site.band, site.heads) == ("windowed", band, 2)
        assert (site.query_axis, site.key_axis) == ("seq", "seq")
        assert site.kind == ("self" if np.triu(case.allowed(9), 1).any() else "causal")
        session = RuntimeSession.load(done.model_path, provider="CPUExecutionProvider", intra_op_threads=1)
    feeds = case.feeds(*LENGTHS)
    expected = case.reference(feeds)
    for items in ([0, 1, 2, 3, 4], [3, 0], []):
        (weights,) = session.run({**feeds, site.items_input: np.array(items, np.int64)}, [site.weights_output])
        assert weights.shape == (len(items), 2, max(LENGTHS), band.width)
        for found, row in zip(weights, items, strict=True):
            own = LENGTHS[row]
            columns = band_keys(band, own, own)
            np.testing.assert_allclose(found[:, :own][:, columns < 0], 0, atol=TOLERANCE)
            laid_out = lay_out(found[:, :own], columns, own)
            np.testing.assert_allclose(laid_out, expected[row][:, :own, :own], rtol=0, atol=TOLERANCE)


CASES = [
    (Windowed(), BlockBand(block=4, before=1, after=1)),
    (Windowed(opset=11), BlockBand(block=4, before=1, after=1)),
    (Windowed(before=2, after=0, causal=True), BlockBand(block=4, before=2, after=0)),
    (Windowed(block=3, global_keys=2), BlockBand(block=3, before=1, after=1, global_keys=2)),
    (Windowed("gathered", before=3, after=2), SlidingBand(before=3, after=2)),
    (Windowed("gathered", before=4, after=4, global_keys=1, opset=13), SlidingBand(before=4, after=4, global_keys=1)),
    (Windowed("gathered", before=5, after=0, opset=11), SlidingBand(before=5, after=0)),
]


@pytest.mark.parametrize(("case", "band"), CASES, ids=map(str, range(len(CASES))))
def test_band_that_is_read_from_the_graph_equals_the_definition(case: Windowed, band: SlidingBand | BlockBand) -> None:
    assert_band_is_the_definition(case, band)


@settings(max_examples=6)
@given(block=st.integers(2, 6), before=st.integers(0, 2), after=st.integers(0, 2), opset=st.sampled_from([11, 18, 23]))
def test_blocks_of_any_size(block: int, before: int, after: int, opset: int) -> None:
    if before + after == 0:
        after = 1  # other tests cover windows that share no keys
    case = Windowed(block=block, before=before, after=after, opset=opset)
    assert_band_is_the_definition(case, BlockBand(block=block, before=before, after=after))


@settings(max_examples=6)
@given(
    before=st.integers(1, 6), after=st.integers(0, 6), global_keys=st.integers(0, 2), opset=st.sampled_from([12, 17])
)
def test_windows_around_each_query_of_any_size(before: int, after: int, global_keys: int, opset: int) -> None:
    case = Windowed("gathered", before=before, after=after, global_keys=global_keys, opset=opset)
    assert_band_is_the_definition(case, SlidingBand(before=before, after=after, global_keys=global_keys))


@pytest.mark.parametrize(
    ("tangle", "reason"),
    [
        ("sums", "nothing that its key comes from is a sequence"),
        ("backwards", "its queries change places, and their number is not fixed"),
        ("skips", "the keys of its columns follow no known pattern"),
    ],
)
def test_windows_that_cannot_be_followed_are_listed_with_the_reason(tangle: str, reason: str, tmp_path: Path) -> None:
    done = assembled(Windowed(tangle=tangle).model(), tmp_path)
    (site,) = done.sites
    assert not site.available
    assert site.form == "windowed"
    assert site.unavailable_reason == f"which keys its windows hold is not known: {reason}"


ZOO = ZooOptions(size="tiny", layers=2, seed=5)


@pytest.fixture(scope="module")
def zoo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("zoo")
    # The faster of the two exporters; tests/coverage converts this model with both.
    request = ExportRequest(
        source="zoo:sliding-window", name="windowed", repository=folder, zoo_options=ZOO, exporter="torchscript"
    )
    return export_bundle(request)


def sequences_of(bundle: Bundle, *lengths: int) -> list[PreparedSequence]:
    """Return sequences that select every weight of every site."""
    random = np.random.default_rng(2)
    everything = selection_of_all(bundle.manifest)
    return [
        PreparedSequence(
            {"input_ids": random.integers(3, 259, length), "attention_mask": np.ones(length, np.int64)},
            {"seq": length, **bundle.manifest.fixed_lengths},
            ("last_hidden_state",),
            everything,
        )
        for length in lengths
    ]


def weights_by_layer(bundle: Bundle, sequences: list[PreparedSequence]) -> list[dict[int, Array]]:
    session = RuntimeSession.load(bundle.path / MODEL_FILE, provider="CPUExecutionProvider", intra_op_threads=1)
    # The proof does not follow blocks of windows, so unequal lengths share a batch by the attack's result alone.
    manifest = bundle.manifest.under("tested")
    batch = collate(sequences, manifest)
    fetched = dict(zip(batch.fetches, session.run(batch.feeds, batch.fetches), strict=True))
    return [weights_of(batch, fetched, row, each, manifest) for row, each in enumerate(sequences)]


def softmax(scores: Array, seen: Array) -> Array:
    """Softmax over the keys that are not masked, in float64; 0 in rows without one."""
    exponentials = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    return exponentials / np.maximum(exponentials.sum(-1, keepdims=True), 1e-300)


def zoo_definition(ids: Array, window: int, global_tokens: int) -> list[tuple[Array, Array]]:
    """Band over all keys (H, T, T) and rows of the global tokens (H, G, T) of each layer, in float64.

    Dense attention with the window as a mask: Beltagy et al. 2020, section 3.1; Vaswani et al. 2017, eq. 1.
    """
    source = load_model("zoo:sliding-window", zoo_options=ZOO)
    own = {name: tensor.numpy().astype(np.float64) for name, tensor in source.module.state_dict().items()}
    angles = np.arange(len(ids))[:, None] * own["embedding.frequencies"]
    hidden = own["embedding.table.weight"][ids] + np.concatenate([np.sin(angles), np.cos(angles)], -1)
    place = np.arange(len(ids))
    near = abs(place[:, None] - place[None, :]) <= window
    seen = (near | (place < global_tokens)[None, :]) & (place >= global_tokens)[:, None]
    found = []
    for layer in range(2):
        at = f"layers.{layer}"

        def linear(name: str, value: Array, at: str = at) -> Array:
            return value @ own[f"{at}.{name}.weight"].T + own[f"{at}.{name}.bias"]

        def normal(name: str, value: Array, at: str = at) -> Array:
            centred = value - value.mean(-1, keepdims=True)
            scale = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
            return centred / scale * own[f"{at}.{name}.weight"] + own[f"{at}.{name}.bias"]

        query, key, value = (
            linear(f"attention.{part}", hidden).reshape(len(ids), 4, -1).transpose(1, 0, 2)
            for part in ("query", "key", "value")
        )
        scores = query @ key.transpose(0, 2, 1) / query.shape[-1] ** 0.5
        band, everything = softmax(scores, seen), softmax(scores[:, :global_tokens], np.True_)
        found.append((band, everything))
        whole = band.copy()
        whole[:, : everything.shape[1]] = everything
        attended = (whole @ value).transpose(1, 0, 2).reshape(len(ids), -1)
        hidden = normal("attention_norm", hidden + linear("attention.output", attended))
        inner = linear("feed_forward.0", hidden)
        inner = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
        hidden = normal("feed_forward_norm", hidden + linear("feed_forward.2", inner))
    return found


def test_the_zoos_sliding_window_answers_with_its_band_and_equals_dense_attention_under_a_mask(
    zoo_bundle: Bundle,
) -> None:
    sites = zoo_bundle.manifest.sites
    band = BlockBand(block=8, before=1, after=1, global_keys=1)
    assert [site.form for site in sites] == ["dense", "windowed"] * 2
    assert [site.band for site in sites] == [None, band] * 2
    sequences = sequences_of(zoo_bundle, 1, 8, 41, 17)
    for each, weights in zip(sequences, weights_by_layer(zoo_bundle, sequences), strict=True):
        ids = each.tensors["input_ids"]
        columns = band_keys(band, len(ids), len(ids))
        for layer, (expected, everything) in enumerate(zoo_definition(ids, window=8, global_tokens=1)):
            assert weights[2 * layer + 1].shape == (4, len(ids), 25)
            laid_out = lay_out(weights[2 * layer + 1], columns, len(ids))
            np.testing.assert_allclose(laid_out, expected, rtol=0, atol=TOLERANCE)
            np.testing.assert_allclose(weights[2 * layer], everything, rtol=0, atol=TOLERANCE)


def test_global_tokens_are_not_more_than_the_window() -> None:
    with pytest.raises(ValueError, match="9 global tokens are not from 1 to the window's 8"):
        SlidingWindowAttention(32, 4, window=8, global_tokens=9)


@pytest.fixture(scope="module", params=[2, 3], ids=["even windows", "padded windows"])
def swin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[SwinModel, Bundle]:
    """A tiny Swin over 8 x 8 patches, then 4 x 4, and its bundle from a file of the older exporter."""
    torch.manual_seed(0)
    config = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=request.param
    )
    config._attn_implementation = "eager"
    model = SwinModel(config).eval()
    folder = tmp_path_factory.mktemp("swin")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            LastHidden(model).eval(),
            (torch.randn(2, 3, 32, 32),),
            folder / "swin.onnx",
            dynamo=False,
            opset_version=17,
            input_names=["pixel_values"],
            output_names=["last_hidden_state"],
            dynamic_axes={"pixel_values": {0: "batch"}},
        )
    return model, prepare_bundle(PrepareRequest(file=folder / "swin.onnx", name="swin", repository=folder / "models"))


class LastHidden(torch.nn.Module):
    """Swin with one output."""

    def __init__(self, model: SwinModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.model(pixel_values).last_hidden_state
        return hidden


def test_shifted_windows_of_swin_name_the_patch_of_every_column(swin: tuple[SwinModel, Bundle]) -> None:
    model, bundle = swin
    window = model.config.window_size
    assert [site.form for site in bundle.manifest.sites] == ["windowed"] * 4
    assert [site.band.shift for site in bundle.manifest.sites] == [0, window // 2, 0, window // 2]
    images = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
    everything = selection_of_all(bundle.manifest)
    sequences = [
        PreparedSequence({"pixel_values": image}, bundle.manifest.fixed_lengths, (), everything) for image in images
    ]
    found = weights_by_layer(bundle, sequences)
    blocks = [block for layer in model.encoder.layers for block in layer.blocks]
    seen: list[Array] = []
    hooks = [
        block.attention.register_forward_hook(lambda _, __, output: seen.append(output[1].numpy())) for block in blocks
    ]
    with torch.inference_mode():
        model(torch.from_numpy(images), output_attentions=True)
    for hook in hooks:
        hook.remove()
    for site, eager in zip(bundle.manifest.sites, seen, strict=True):
        side = math.isqrt(bundle.manifest.fixed_lengths[site.query_axis])
        members = windows_of(side, window, site.band.shift)
        columns = band_keys(site.band, side * side, side * side)
        assert eager.shape[0] == 3 * len(members)
        own = eager.reshape(3, len(members), *eager.shape[1:])
        for number, patches in enumerate(members):
            for row, patch in enumerate(patches):
                if patch < 0:
                    continue
                np.testing.assert_array_equal(columns[patch], patches)
                for image in range(3):
                    np.testing.assert_allclose(
                        found[image][site.layer][:, patch], own[image, number, :, row], rtol=0, atol=TOLERANCE
                    )


def test_the_patches_of_every_stage_have_their_grid(swin: tuple[SwinModel, Bundle]) -> None:
    _, bundle = swin
    assert {axis.symbol: axis.grid for axis in bundle.manifest.axes} == {"fixed_64": (8, 8), "fixed_16": (4, 4)}


@pytest.mark.parametrize("swin", [2], indirect=True, ids=["even windows"])
def test_windows_are_followed_through_int8_matmuls(swin: tuple[SwinModel, Bundle], tmp_path: Path) -> None:
    _, bundle = swin
    file = bundle.path.parents[2] / "swin.onnx"
    reduced = prepare_bundle(PrepareRequest(file=file, name="swin", repository=tmp_path, precision="int8"))
    assert [site.band for site in reduced.manifest.sites] == [site.band for site in bundle.manifest.sites]
    assert reduced.manifest.precision == "int8"


def test_windows_are_followed_through_a_graph_of_float16(tmp_path: Path) -> None:
    case = Windowed(before=2, after=0)
    (tmp_path / "windowed.onnx").write_bytes(case.model().SerializeToString())
    request = PrepareRequest(
        file=tmp_path / "windowed.onnx", name="half", repository=tmp_path, max_length=64, precision="fp16"
    )
    (site,) = prepare_bundle(request).manifest.sites
    assert site.band == BlockBand(block=4, before=2, after=0)


def windows_of(side: int, window: int, shift: int) -> Array:
    """The patches of each window as Swin makes them: padded at the end, rolled, and cut; -1 for padding."""
    padded = -(-side // window) * window
    grid = np.full((padded, padded), -1)
    grid[:side, :side] = np.arange(side * side).reshape(side, side)
    rolled = np.roll(grid, (-shift, -shift), (0, 1))
    cut = rolled.reshape(padded // window, window, padded // window, window)
    return cut.transpose(0, 2, 1, 3).reshape(-1, window * window)
