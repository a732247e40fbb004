"""ONNX files from any exporter, from the file to answers on the wire, against NumPy in float64.

`Foreign` makes a graph of one `Attention` by its axes, masks and heads, and its answer in float64. All are converted
once for the module, and served by one process.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import numpy as np
import pytest
from attnserve_client import AttentionSelection, Client, InvalidRequest
from foreign_graphs import Foreign, scorer, tabular, words
from onnx_files import saved
from serving import command, serve

CASES = {
    "masked": Foreign(mask="bool"),
    "unmasked": Foreign(),
    "crossed": Foreign(target="target_seq", source="source_seq", cross=True, mask="bool"),
    "grouped": Foreign(kv_heads=2, attributes={"is_causal": 1}, opset=24),
    "half": Foreign(mask="bool", dtype=np.float16),
    "capped": Foreign(mask="float", attributes={"softcap": 2.0, "scale": 0.7}),
    "inverted": Foreign(mask="inverted", projected=False),
    "broadcast": Foreign(mask="broadcast"),
    "fixed": Foreign(target=16, mask="bool"),
    "patches": Foreign(target="text", source=10, cross=True),
    "rigid": Foreign(target=8, source=10, cross=True, batch=1),
    "nameless": Foreign(target=None, batch=None),
    "inferred": Foreign(target="unk__7", batch="unk__6"),
}
LENGTHS = ((3, 9), (12, 2), (7, 7), (12, 5))
"""Of queries and keys; two sequences have one length."""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a server with all cases; the first is converted by the command, the others by its function."""
    folder = tmp_path_factory.mktemp("foreign")
    # Imported here because it imports the runtime, which the client's tests do not need.
    from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle  # noqa: PLC0415

    files = {name: case.model() for name, case in CASES.items()} | {"tabular": tabular(), "scorer": scorer()}
    for at, (name, model) in enumerate(files.items()):
        file = saved(model, folder / f"{name}.onnx")
        if at:
            prepare_bundle(PrepareRequest(file=file, name=name, repository=folder / "models"))
            continue
        line = [command("attnserve-server"), "prepare", str(file), "--name", name]
        line += ["--repository", str(folder / "models")]
        done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
    with serve(folder / "models", folder) as server, Client(server.target) as client:
        yield client


def feeds_of(case: Foreign) -> list[dict[str, np.ndarray]]:
    """A sequence for each pair of lengths; fixed ones stay as they are."""
    each = [
        case.feeds(
            case.target if isinstance(case.target, int) else queries,
            case.source if isinstance(case.source, int) else keys,
            seed,
        )
        for seed, (queries, keys) in enumerate(LENGTHS)
    ]
    return each[:1] if case.batch == 1 else each


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_weights_equal_the_definition(client: Client, name: str) -> None:
    case = CASES[name]
    # float32 sums in another order; float16 keeps 11 bits of values up to 10.
    output_tolerance, weight_tolerance = (1e-2, 1e-2) if case.dtype is np.float16 else (1e-4, 1e-5)
    each = feeds_of(case)
    for feeds, result in zip(each, client.infer(name, each, attention=True), strict=True):
        output, weights = case.reference(feeds)
        np.testing.assert_allclose(result.outputs["attended"], output, atol=output_tolerance, rtol=0)
        (map_,) = result.attention
        np.testing.assert_allclose(map_.weights, weights, atol=weight_tolerance, rtol=0)


@pytest.mark.parametrize("name", ["masked", "inverted", "broadcast", "crossed", "grouped", "half", "fixed", "patches"])
def test_mixed_lengths_share_a_run_if_padding_is_proved_harmless(client: Client, name: str) -> None:
    assert {result.run.batch_size for result in client.infer(name, feeds_of(CASES[name]))} == {len(LENGTHS)}


# The mask of "capped" is a matrix of queries and keys: one that hides anything keeps its sequence from being padded.
@pytest.mark.parametrize("name", ["unmasked", "nameless", "capped"])
def test_only_equal_lengths_share_a_run_if_padding_changes_answers(client: Client, name: str) -> None:
    assert [result.run.batch_size for result in client.infer(name, feeds_of(CASES[name]))] == [1, 2, 1, 2]


def test_selections_of_cross_attention_apply_to_both_axes(client: Client) -> None:
    case = CASES["crossed"]
    feeds = case.feeds(7, 4)
    _, weights = case.reference(feeds)

    def selected(selection: AttentionSelection) -> np.ndarray:
        (map_,) = client.infer("crossed", feeds, attention=selection).attention
        assert (map_.query_axis, map_.key_axis, map_.kind) == ("target_seq", "source_seq", "cross")
        return map_.weights

    # Weights are float32; a mean of four of them is within their own rounding.
    np.testing.assert_allclose(selected(AttentionSelection(queries=[-1, 2])), weights[:, [6, 2]], atol=1e-5)
    np.testing.assert_allclose(
        selected(AttentionSelection(head_reduction="mean")), weights.mean(0, keepdims=True), atol=1e-5
    )
    np.testing.assert_allclose(selected(AttentionSelection(layer_reduction="mean")), weights, atol=1e-5)
    with pytest.raises(InvalidRequest, match="rollout needs sites that attend within one sequence"):
        selected(AttentionSelection(layer_reduction="rollout"))
    with pytest.raises(InvalidRequest, match="query 7 is out of range"):
        selected(AttentionSelection(queries=[7]))


def test_rows_without_any_axis_share_a_run(client: Client) -> None:
    rows = [{"row": np.full(8, number, np.float32)} for number in range(8)]
    results = client.infer("tabular", rows)
    assert {result.run.batch_size for result in results} == {8}
    assert [result.outputs["score"].tolist() for result in results] == [8.0 * number for number in range(8)]


def test_scalars_bools_and_int32_ids_are_served(client: Client) -> None:
    each = [
        {
            "input_ids": np.arange(1, length + 1, dtype=np.int32),
            "keep": np.arange(length) != 1,
            "temperature": np.float32(temperature),
        }
        for length, temperature in ((3, 0.5), (6, 2.0))
    ]
    table = words().astype(np.float64)
    for feeds, result in zip(each, client.infer("scorer", each, attention=True), strict=True):
        keep = feeds["keep"]
        embedded = table[feeds["input_ids"]] * float(feeds["temperature"]) * 1.5
        heads = embedded.reshape(-1, 4, 4).transpose(1, 0, 2)
        exponents = np.exp(heads @ heads.transpose(0, 2, 1) / 2) * keep
        weights = exponents / exponents.sum(-1, keepdims=True)
        pooled = ((weights @ heads).transpose(1, 0, 2).reshape(-1, 16) * keep[:, None]).sum(0)
        assert result.run.batch_size == 2
        assert result.outputs["label"] == pooled.argmax()
        assert result.outputs["score"].shape == ()
        # float32 sums of up to 96 numbers of magnitude 10.
        np.testing.assert_allclose(result.outputs["pooled"], pooled, atol=1e-4)
        np.testing.assert_allclose(result.outputs["score"], pooled.sum(), atol=1e-3)
        np.testing.assert_allclose(result.attention[0].weights, weights, atol=1e-5)
    with pytest.raises(InvalidRequest, match="input 'temperature' is missing"):
        client.infer("scorer", {name: each[0][name] for name in ("input_ids", "keep")})
    with pytest.raises(InvalidRequest, match="element 0 is 50; values of input 'input_ids' must be from 0 to 49"):
        client.infer("scorer", each[0] | {"input_ids": np.array([50, 1, 1], np.int32)})


def test_fixed_lengths_are_described_and_enforced(client: Client) -> None:
    (site,) = client.model("patches").sites
    assert (site.query_axis, site.key_axis) == ("text", "fixed_10")
    axes = {axis.symbol: (axis.max_length, axis.paddable) for axis in client.model("patches").axes}
    assert axes == {"text": (2048, True), "fixed_10": (10, False)}
    with pytest.raises(InvalidRequest, match="length 9, but the model takes 10"):
        client.infer("patches", CASES["patches"].feeds(3, 9))
