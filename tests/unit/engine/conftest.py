"""Tiny ONNX models of plain operators, each with one behaviour that a test needs; their manifest and sequences.

`embedder_path`, `poisoned_path` and `slow_path` are model files. `manifest` describes the first two, and `sequence_of`
makes a sequence of ids that selects the attention of some layers. `embed` and `weights_by_hand` give the right answers,
from the definition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from attnserve_server.conversion.rewrite.taps import add_means
from attnserve_server.domain.values import (
    AttentionUnit,
    AxisUnits,
    EffectiveSelection,
    HeadReduction,
    LayerReduction,
    PreparedSequence,
    SpecialTokens,
    WeightDtype,
)
from attnserve_server.model.manifest import (
    AxisSpec,
    InputRole,
    InputSpec,
    Manifest,
    OutputSpec,
    SiteSpec,
)
from made_by_hand import CHECK, PROVENANCE, proved
from onnx import TensorProto, helper, numpy_helper

VOCABULARY = 50
HEADS = 2
HEAD_DIM = 4
WIDTH = HEADS * HEAD_DIM
TABLE = np.random.default_rng(7).standard_normal((VOCABULARY, WIDTH)).astype(np.float32)
"""Each id's embedding, (vocabulary, width)."""
POISON_ID = 49
"""The id that `poisoned` cannot look up."""
INFINITE_ID = 47
"""The id whose embedding in `poisoned` is minus infinity."""
NAN_ID = 48
"""The id whose embedding in `poisoned` is not a number."""


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, tuple[int, Sequence[str | int]]],
    outputs: Mapping[str, tuple[int, Sequence[str | int]]],
    constants: Mapping[str, np.ndarray],
) -> Path:
    graph = helper.make_graph(
        list(nodes),
        "tiny",
        [helper.make_tensor_value_info(name, kind, list(shape)) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, kind, list(shape)) for name, (kind, shape) in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def encoder(path: Path, table: np.ndarray, *, sites: int = 2, means: bool = False) -> Path:
    """Embeds ids, masks, sums, and taps `sites` places: softmax(q k / 2 + mask), with q = k = the embedding.

    `means`: whether the taps return the mean over heads too.
    """
    node = helper.make_node
    nodes = [
        node("Gather", ["table", "input_ids"], ["hidden"]),
        node("Cast", ["attention_mask"], ["keep"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["keep", "last"], ["keep_hidden"]),
        node("Mul", ["hidden", "keep_hidden"], ["masked"]),
        node("Identity", ["masked"], ["last_hidden_state"]),
        node("ReduceSum", ["masked", "one"], ["embedding"], keepdims=0),
        node("Sub", ["keep", "ones"], ["minus"]),
        node("Mul", ["minus", "huge"], ["bias"]),
        node("Unsqueeze", ["bias", "middle"], ["bias_4d"]),
    ]
    inputs: dict[str, tuple[int, Sequence[str | int]]] = {
        "input_ids": (TensorProto.INT64, ("batch", "seq")),
        "attention_mask": (TensorProto.INT64, ("batch", "seq")),
    }
    outputs: dict[str, tuple[int, Sequence[str | int]]] = {
        "last_hidden_state": (TensorProto.FLOAT, ("batch", "seq", WIDTH)),
        "embedding": (TensorProto.FLOAT, ("batch", WIDTH)),
    }
    for site in range(sites):
        name = f"site{site}"
        items = f"attention_items.{name}"
        inputs[items] = (TensorProto.INT64, (f"items{site}",))
        outputs[f"attention.{name}"] = (TensorProto.FLOAT, (f"items{site}", HEADS, "seq", "seq_key"))
        nodes += [
            node("Gather", ["hidden", items], [f"{name}.h"]),
            node("Reshape", [f"{name}.h", "split"], [f"{name}.split"]),
            node("Transpose", [f"{name}.split"], [f"{name}.q"], perm=[0, 2, 1, 3]),
            node("Transpose", [f"{name}.split"], [f"{name}.k"], perm=[0, 2, 3, 1]),
            node("MatMul", [f"{name}.q", f"{name}.k"], [f"{name}.raw"]),
            node("Mul", [f"{name}.raw", f"scale{site}"], [f"{name}.scaled"]),
            node("Gather", ["bias_4d", items], [f"{name}.bias"]),
            node("Add", [f"{name}.scaled", f"{name}.bias"], [f"{name}.scores"]),
            node("Softmax", [f"{name}.scores"], [f"attention.{name}"], axis=-1),
        ]
    constants = {
        "table": table,
        "last": np.array([2], np.int64),
        "one": np.array([1], np.int64),
        "middle": np.array([1, 2], np.int64),
        "ones": np.array(1, np.float32),
        "huge": np.array(1e9, np.float32),
        "split": np.array([0, 0, HEADS, HEAD_DIM], np.int64),
        **{f"scale{site}": np.array(0.5 * (site + 1), np.float32) for site in range(sites)},
    }
    save(path, nodes, inputs, outputs, constants)
    if means:
        model = ir.load(path)
        add_means(model.graph, manifest_of(sites=sites, means=True).sites)
        ir.save(model, path)
    return path


@pytest.fixture
def embedder_path(tmp_path: Path) -> Path:
    return encoder(tmp_path / "embedder.onnx", TABLE)


@pytest.fixture
def joined_path(tmp_path: Path) -> Path:
    """The same, with means over heads."""
    return encoder(tmp_path / "joined.onnx", TABLE, means=True)


@pytest.fixture
def poisoned_path(tmp_path: Path) -> Path:
    """Fails on POISON_ID, which is past its table, and returns NaN for NAN_ID and -inf for INFINITE_ID."""
    table = TABLE[:POISON_ID].copy()
    table[INFINITE_ID] = -np.inf
    table[NAN_ID] = np.nan
    return encoder(tmp_path / "poisoned.onnx", table)


@pytest.fixture
def slow_path(tmp_path: Path) -> Path:
    """Runs 2^40 small steps, which take days; only terminating the run ends it."""
    node = helper.make_node
    body = helper.make_graph(
        [node("Identity", ["going"], ["still"]), node("Mul", ["state", "decay"], ["next"])],
        "body",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, ["batch", "seq"]),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, ["batch", "seq"]),
        ],
        [numpy_helper.from_array(np.array(0.5, np.float32), "decay")],
    )
    return save(
        tmp_path / "slow.onnx",
        [node("Loop", ["steps", "always", "x"], ["y"], body=body)],
        {"x": (TensorProto.FLOAT, ("batch", "seq"))},
        {"y": (TensorProto.FLOAT, ("batch", "seq"))},
        {"steps": np.array(2**40, np.int64), "always": np.array(True)},
    )


@pytest.fixture
def embed() -> Callable[[np.ndarray], np.ndarray]:
    """The output of `embedder` for one sequence's ids, (T,) -> (width,), from its definition."""
    return lambda ids: TABLE[ids].sum(axis=0)


def manifest_of(*, sites: int = 2, paddable: bool = True, means: bool = False) -> Manifest:
    """The manifest of `encoder`."""
    return Manifest(
        name="tiny",
        version="1",
        digest="sha256:" + "0" * 64,
        files={},
        precision="fp32",
        max_batch_size=16,
        axes=(AxisSpec(symbol="seq", max_length=128, paddable=paddable),),
        inputs=(
            InputSpec(name="input_ids", dtype="int64", shape=("seq",), role=InputRole.TOKEN_IDS, padding=1),
            InputSpec(name="attention_mask", dtype="int64", shape=("seq",), role=InputRole.ATTENTION_MASK),
        ),
        outputs=(
            OutputSpec(name="last_hidden_state", dtype="float32", shape=("seq", WIDTH)),
            OutputSpec(name="embedding", dtype="float32", shape=(WIDTH,)),
        ),
        sites=tuple(
            SiteSpec(
                name=f"site{layer}",
                layer=layer,
                kind="self",
                form="dense",
                operator="MatMul",
                heads=HEADS,
                kv_heads=HEADS,
                head_dim=HEAD_DIM,
                query_axis="seq",
                key_axis="seq",
                items_input=f"attention_items.site{layer}",
                weights_output=f"attention.site{layer}",
                mean_output=f"attention_mean.site{layer}" if means else None,
            )
            for layer in range(sites)
        ),
        vocabulary_size=VOCABULARY,
        provenance=PROVENANCE,
        check=CHECK,
        certificate=proved("seq"),
    )


@pytest.fixture
def manifest() -> Manifest:
    return manifest_of()


@pytest.fixture
def joined() -> Manifest:
    """The manifest of `joined_path`."""
    return manifest_of(means=True)


def whole_maps(*layers: int) -> EffectiveSelection:
    """A selection of every head of these layers, not reduced."""
    return EffectiveSelection(
        layers=layers,
        heads=tuple(tuple(range(HEADS)) for _ in layers),
        head_reduction=HeadReduction.EACH,
        layer_reduction=LayerReduction.EACH,
        queries=(),
        unit=AttentionUnit.TOKEN,
        special_tokens=SpecialTokens.KEEP,
        top_k=0,
        min_weight=0.0,
        dtype=WeightDtype.FLOAT32,
    )


@pytest.fixture
def sequence_of() -> Callable[..., PreparedSequence]:
    """A sequence of these ids that selects the maps of these layers."""

    def make(
        ids: Sequence[int], layers: Sequence[int] = (), outputs: tuple[str, ...] = ("embedding",)
    ) -> PreparedSequence:
        array = np.array(ids, np.int64)
        return PreparedSequence(
            tensors={"input_ids": array, "attention_mask": np.ones_like(array)},
            lengths={"seq": len(array)},
            outputs=outputs,
            attention=whole_maps(*layers) if layers else None,
            units={"seq": AxisUnits("seq", len(array))} if layers else {},
        )

    return make


@pytest.fixture
def weights_by_hand() -> Callable[[Sequence[int], int], np.ndarray]:
    """The weights of one site for one sequence, from the definition: (H, T, T)."""

    def compute(ids: Sequence[int], layer: int) -> np.ndarray:
        heads = TABLE[np.array(ids)].reshape(len(ids), HEADS, HEAD_DIM).transpose(1, 0, 2).astype(np.float64)
        scores = heads @ heads.transpose(0, 2, 1) * 0.5 * (layer + 1)
        exponents = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return exponents / exponents.sum(axis=-1, keepdims=True)

    return compute
