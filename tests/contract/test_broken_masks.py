"""Sequences whose masks break a need of the certificate have the same answer in a batch as alone: they are not padded.

A certificate states what may share a run; a need is what it requires of a mask for that, such as one allowed key. The
graph adds (1 - mask) x -1e9 to its scores. A row without an allowed key then spreads over all keys evenly, and padding
would be among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from attnserve_client import AsyncClient, InferenceResult
from attnserve_server.app import Application
from attnserve_server.config import Settings
from attnserve_server.model.certificate import Clause, MaskNeed, Verdict
from attnserve_server.model.manifest import AxisSpec, InputRole, InputSpec, Manifest, OutputSpec, SiteSpec
from attnserve_server.model.repository import UNSEALED, write_bundle
from made_by_hand import CHECK, PROVENANCE, SURVIVED, certificate
from onnx import TensorProto, helper, numpy_helper

WIDTH, VOCABULARY = 4, 12
# A softmax over float32 scores, in batches of other shapes.
TOLERANCE = 1e-6
LONG = {"input_ids": np.arange(1, 9), "attention_mask": np.ones(8, np.int64)}


def graph(*, both_sides: bool) -> onnx.ModelProto:
    """One head of attention with a tap. `both_sides`: the mask is that of queries and keys, m (x) m."""
    node = helper.make_node
    nodes = [
        node("Gather", ["table", "input_ids"], ["x"]),
        node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["mask", "one"], ["keys"]),  # (B, 1, S)
        node("Unsqueeze", ["mask", "two"], ["queries"]),  # (B, S, 1)
        node("Mul", ["keys", "queries"], ["pairs"]),
        node("Sub", ["unit", "pairs" if both_sides else "keys"], ["hidden_keys"]),
        node("Mul", ["hidden_keys", "huge"], ["bias"]),
        node("Transpose", ["x"], ["turned"], perm=[0, 2, 1]),
        node("MatMul", ["x", "turned"], ["raw"]),
        node("Add", ["raw", "bias"], ["scores"]),
        node("Softmax", ["scores"], ["weights"], axis=-1),
        node("MatMul", ["weights", "x"], ["out"]),
        node("Gather", ["weights", "attention_items.site"], ["asked"]),
        node("Unsqueeze", ["asked", "one"], ["attention.site"]),
    ]
    constants = {
        "table": np.random.default_rng(4).normal(size=(VOCABULARY, WIDTH)).astype(np.float32),
        "one": np.array([1]),
        "two": np.array([2]),
        "unit": np.array(1, np.float32),
        "huge": np.array(-1e9, np.float32),
    }
    ids = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "seq"])
        for name in ("input_ids", "attention_mask")
    ]
    items = helper.make_tensor_value_info("attention_items.site", TensorProto.INT64, ["items"])
    outputs = [
        helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", "seq", WIDTH]),
        helper.make_tensor_value_info("attention.site", TensorProto.FLOAT, ["items", 1, "seq", "seq"]),
    ]
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    made = helper.make_graph(nodes, "masked", [*ids, items], outputs, initializers)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def manifest(name: str, masks: Sequence[MaskNeed]) -> Manifest:
    """A finite mask that survived the attack, as the proof reports for such a graph."""
    finite = Clause(
        axis="seq",
        verdict=Verdict.UNKNOWN,
        reason="finite mask, unbounded scores",
        finite_mask=True,
        attack=SURVIVED,
    )
    site = SiteSpec(
        name="site",
        layer=0,
        kind="self",
        form="dense",
        operator="Softmax",
        heads=1,
        kv_heads=1,
        head_dim=WIDTH,
        query_axis="seq",
        key_axis="seq",
        items_input="attention_items.site",
        weights_output="attention.site",
    )
    return Manifest(
        name=name,
        version="1",
        digest=UNSEALED,
        files={},
        precision="fp32",
        max_batch_size=8,
        axes=(AxisSpec(symbol="seq", max_length=32, paddable=True),),
        inputs=(
            InputSpec(name="input_ids", dtype="int64", shape=("seq",), role=InputRole.TOKEN_IDS),
            InputSpec(name="attention_mask", dtype="int64", shape=("seq",), role=InputRole.ATTENTION_MASK, fill=1),
        ),
        outputs=(OutputSpec(name="out", dtype="float32", shape=("seq", WIDTH)),),
        sites=(site,),
        vocabulary_size=VOCABULARY,
        provenance=PROVENANCE,
        check=CHECK,
        certificate=certificate(clauses=(finite,), masks=tuple(masks), batch=Verdict.PROVED),
    )


NEEDS = {
    # A row of keys needs one that is allowed; where queries are masked as well, each masked one has none.
    "keys": (MaskNeed(input="attention_mask", need="some", allowed_value=1),),
    "pairs": (MaskNeed(input="attention_mask", need="all", allowed_value=1),),
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both graphs, each with its needs and, as a control, without them."""
    folder = tmp_path_factory.mktemp("masks")
    for name, masks in NEEDS.items():
        file = folder / f"{name}.onnx"
        onnx.save(graph(both_sides=name == "pairs"), file)
        write_bundle(folder / "models", manifest(name, masks), {"model.onnx": file})
        write_bundle(folder / "models", manifest(f"{name}-control", ()), {"model.onnx": file})
    return folder / "models"


@pytest.fixture
async def client(repository: Path) -> Any:
    # One instance, and a run that costs as much as a million tokens: all that wait share one, if they may.
    settings = Settings(repository=repository, grpc_port=0, http_port=0, instances=1, run_overhead_tokens=1e6)
    application = Application(settings)
    await application.start()
    async with AsyncClient(f"127.0.0.1:{application.grpc_port}") as opened:
        yield opened
    await application.aclose()


async def beside_a_longer_one(client: AsyncClient, model: str, mask: Sequence[int]) -> tuple[InferenceResult, ...]:
    """A short sequence with this mask, in one request with a longer one; and the short one alone."""
    short = {"input_ids": np.arange(1, 1 + len(mask)), "attention_mask": np.array(mask)}
    (together, _) = await client.infer(model, [short, LONG], attention=True)
    return together, await client.infer(model, short, attention=True)


def assert_equal(one: InferenceResult, other: InferenceResult) -> None:
    np.testing.assert_allclose(one.outputs["out"], other.outputs["out"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(one.attention[0].weights, other.attention[0].weights, rtol=0, atol=TOLERANCE)


async def test_a_sequence_without_an_allowed_key_spreads_over_its_own_keys_only(client: AsyncClient) -> None:
    together, alone = await beside_a_longer_one(client, "keys", [0, 0, 0])
    np.testing.assert_allclose(together.attention[0].weights, np.full((1, 3, 3), 1 / 3), rtol=0, atol=TOLERANCE)
    assert_equal(together, alone)
    assert together.run.batch_size == 1


async def test_a_masked_query_spreads_over_its_own_keys_only(client: AsyncClient) -> None:
    together, alone = await beside_a_longer_one(client, "pairs", [1, 0, 1, 1])
    np.testing.assert_allclose(together.attention[0].weights[0, 1], np.full(4, 1 / 4), rtol=0, atol=TOLERANCE)
    assert_equal(together, alone)


@pytest.mark.parametrize(("model", "mask"), [("keys", [1, 0, 1]), ("keys", [0, 1, 1]), ("pairs", [1, 1, 1])])
async def test_a_sequence_that_meets_the_needs_is_padded(client: AsyncClient, model: str, mask: list[int]) -> None:
    together, alone = await beside_a_longer_one(client, model, mask)
    assert together.run.batch_size == 2
    assert_equal(together, alone)


async def test_a_filled_in_mask_meets_the_needs(client: AsyncClient) -> None:
    short, long = ({"input_ids": np.arange(1, length)} for length in (4, 9))
    results = await client.infer("keys", [short, long])
    assert [result.run.batch_size for result in results] == [2, 2]


@pytest.mark.parametrize(("model", "mask", "row"), [("keys", [0, 0, 0], 0), ("pairs", [1, 0, 1, 1], 1)])
async def test_without_the_needs_padding_changes_the_answer(
    client: AsyncClient, model: str, mask: list[int], row: int
) -> None:
    together, alone = await beside_a_longer_one(client, f"{model}-control", mask)
    np.testing.assert_allclose(together.attention[0].weights[0, row], np.full(len(mask), 1 / 8), atol=TOLERANCE)
    with pytest.raises(AssertionError):
        assert_equal(together, alone)


async def test_get_model_returns_that_an_axis_is_tested(client: AsyncClient) -> None:
    (axis,) = (await client.model("keys")).axes
    assert axis.paddable
    assert (axis.padding_status, axis.padding_reason) == ("tested", "finite mask, unbounded scores")


async def test_sequences_of_a_request_run_one_by_one_with_batching_off(repository: Path) -> None:
    settings = Settings(repository=repository, grpc_port=0, http_port=0, run_overhead_tokens=1e6, batching="off")
    application = Application(settings)
    await application.start()
    async with AsyncClient(f"127.0.0.1:{application.grpc_port}") as client:
        model = await client.model("keys")
        assert (model.batching, model.batched, model.max_batch_size) == ("off", False, 8)
        assert not model.axes[0].paddable
        results = await client.infer("keys", [{"input_ids": np.arange(1, 4)}] * 3)
        assert [result.run.batch_size for result in results] == [1, 1, 1]
    await application.aclose()
