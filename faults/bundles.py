"""The models that the rows serve, and their right answers, which onnxruntime computes from the bundle's files alone.

All are the tiny model of `tests/support/tiny_bundle`: two layers over ten words, of which the variants change a part.
Real failures come from the graphs themselves: one word makes NaN, another one makes the run fail.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from attnserve_server.model.manifest import AxisSpec, InputSpec, Manifest, OutputSpec
from attnserve_server.model.repository import UNSEALED, write_bundle
from made_by_hand import CHECK, PROVENANCE, proved
from onnx import TensorProto, helper, numpy_helper
from tiny_bundle import LAYERS, VOCABULARY, WORDS, tiny_graph, tiny_manifest, tiny_tokenizer

from faults.history import Answer

CANARY, TINY, HEAVY, SLOW, NAN, FAILING, ECHO = "canary", "tiny", "heavy", "slow", "nan", "failing", "echo"
POISON = "dog dog"
"""What makes `nan` answer NaN, and the run of `failing` fail. Warm-up repeats no word."""
STEPS, WIDTH = {HEAVY: 24, SLOW: 96}, 320
"""Products of a run by model, and their size: 1.6 GFLOP, some ten milliseconds on one core, for any batch, and 6.3."""
MOST_ROWS = 16
ECHO_WIDTH = 4
MAP = "map "
"""Prefix of the key of an input whose attention is selected: the last layer's mean over heads."""


def texts(random: np.random.Generator, count: int, words: Iterable[str] = WORDS[:-1]) -> list[str]:
    """Return texts of two to twelve words, none of them that of `POISON`."""
    known = list(words)
    return [" ".join(random.choice(known, random.integers(2, 13))) for _ in range(count)]


@functools.cache
def _plain_graph() -> bytes:
    return tiny_graph().SerializeToString()


def _graph(change: str, version: int) -> onnx.ModelProto:
    model = onnx.ModelProto.FromString(_plain_graph())
    table = next(one for one in model.graph.initializer if one.name == "table")
    values = numpy_helper.to_array(table) + np.float32(0.05 * (version - 1))
    if change == NAN:
        values = values.copy()
        values[VOCABULARY.index("dog")] = np.nan
    table.CopyFrom(numpy_helper.from_array(values.astype(np.float32), "table"))
    if change == FAILING:
        _add_failure(model)
    if change in STEPS:
        _add_work(model, STEPS[change])
    onnx.checker.check_model(model)
    return model


def _before_first(model: onnx.ModelProto, nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray]) -> None:
    """Put nodes at the start of the graph; their last output is added to the first hidden states."""
    first = next(one for one in model.graph.node if one.output[0] == "hidden0")
    first.output[0] = "hidden0_alone"
    at = list(model.graph.node).index(first)
    nodes.append(helper.make_node("Add", ["hidden0_alone", nodes[-1].output[0]], ["hidden0"]))
    for place, node in enumerate(nodes):
        model.graph.node.insert(at + 1 + place, node)
    model.graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in weights.items())


def _add_failure(model: onnx.ModelProto) -> None:
    """Count the places where the word follows itself, and look that number up in a table of one entry."""
    is_word = np.zeros(len(VOCABULARY), np.int64)
    is_word[VOCABULARY.index("dog")] = 1
    nodes = [
        helper.make_node("Gather", ["failing_is_word", "input_ids"], ["failing_words"]),
        helper.make_node("Slice", ["failing_words", "failing_0", "failing_last", "failing_1"], ["failing_before"]),
        helper.make_node("Slice", ["failing_words", "failing_1", "failing_end", "failing_1"], ["failing_after"]),
        helper.make_node("Mul", ["failing_before", "failing_after"], ["failing_pairs"]),
        helper.make_node("ReduceSum", ["failing_pairs"], ["failing_place"], keepdims=0),
        helper.make_node("Gather", ["failing_table", "failing_place"], ["failing_added"]),
    ]
    weights = {"is_word": is_word, "table": np.zeros(1, np.float32)}
    weights |= {name: np.array([at]) for name, at in (("0", 0), ("1", 1), ("last", -1), ("end", 2**31 - 1))}
    _before_first(model, nodes, {f"failing_{name}": values for name, values in weights.items()})


def _add_work(model: onnx.ModelProto, steps: int) -> None:
    """Multiply a matrix that depends on the input by a rotation, again and again; none of it changes the answer."""
    random = np.random.default_rng(11)
    rotation, _ = np.linalg.qr(random.standard_normal((WIDTH, WIDTH)))
    nodes = [
        helper.make_node("Cast", ["attention_mask"], ["heavy_cast"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["heavy_cast"], ["heavy_one"], keepdims=0),
        helper.make_node("Mul", ["heavy_rotation", "heavy_one"], ["heavy_step0"]),
    ]
    nodes += [
        helper.make_node("MatMul", [f"heavy_step{step}", "heavy_rotation"], [f"heavy_step{step + 1}"])
        for step in range(steps)
    ]
    nodes += [
        helper.make_node("ReduceMax", [f"heavy_step{steps}"], ["heavy_greatest"], keepdims=0),
        helper.make_node("Mul", ["heavy_greatest", "heavy_nothing"], ["heavy_added"]),
    ]
    weights = {"heavy_rotation": rotation.astype(np.float32), "heavy_nothing": np.array(0, np.float32)}
    _before_first(model, nodes, weights)


def _echo() -> tuple[onnx.ModelProto, Manifest]:
    """An identity of float32 (batch, seq, 4): the model for values that only floats have."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "seq", ECHO_WIDTH]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], ECHO, ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    shape = ("seq", ECHO_WIDTH)
    manifest = Manifest(
        name=ECHO,
        version="1",
        digest=UNSEALED,
        files={},
        precision="fp32",
        max_batch_size=MOST_ROWS,
        axes=(AxisSpec(symbol="seq", max_length=64, paddable=True),),
        inputs=(InputSpec(name="x", dtype="float32", shape=shape, fill=0),),
        outputs=(OutputSpec(name="y", dtype="float32", shape=shape),),
        sites=(),
        provenance=PROVENANCE,
        check=CHECK,
        certificate=proved("seq"),
    )
    return model, manifest


def write(root: Path, name: str, version: int = 1) -> Path:
    """Write one bundle in one step, and return its folder. Raises BundleInvalid if it exists."""
    if name == ECHO:
        model, manifest = _echo()
    else:
        model = _graph(name, version)
        manifest = tiny_manifest(name, str(version)).model_copy(update={"max_batch_size": MOST_ROWS})
    with tempfile.TemporaryDirectory() as folder:
        files = {"model.onnx": Path(folder, "model.onnx")}
        onnx.save(model, files["model.onnx"])
        if manifest.text is not None:
            files["tokenizer.json"] = Path(folder, "tokenizer.json")
            tiny_tokenizer().save(str(files["tokenizer.json"]))
        return write_bundle(root, manifest, files).path


def write_repository(root: Path, *names: str) -> Path:
    """Write the first version of each of these models, of `tiny` two."""
    for name in names:
        write(root, name)
        if name == TINY:
            write(root, name, 2)
    return root


def remove(root: Path, name: str, version: int) -> None:
    """Remove a version: out of sight in one step, then from the disk."""
    place = root / name / str(version)
    hidden = root / f".removed-{name}-{version}"
    place.rename(hidden)
    shutil.rmtree(hidden)


class References:
    """Right answers of bundles, each computed alone, once. A version that was read stays known after its removal."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._sessions: dict[tuple[str, str], onnxruntime.InferenceSession] = {}
        self._answers: dict[tuple[str, str, str], Answer] = {}
        self._tokenizer = tiny_tokenizer()
        self._tokenizer.encode_special_tokens = True  # a text that spells a special token is a text

    def read(self, root: Path) -> None:
        """Read the bundles of a repository that are not known yet."""
        for model in root.glob("[!.]*/*/model.onnx"):
            self.add(model.parent)

    def add(self, folder: Path) -> None:
        """Read one bundle."""
        key = folder.parent.name, folder.name
        if key not in self._sessions and key[0] != ECHO:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = options.inter_op_num_threads = 1
            options.log_severity_level = 4
            data = (folder / "model.onnx").read_bytes()
            self._sessions[key] = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def __call__(self, model: str, version: str, key: str) -> Answer:
        """Return the answer to the input of a key: a text, or `MAP` and a text.

        Raises KeyError for a version that was never read.
        """
        found = self._answers.get((model, version, key))
        if found is None:
            found = self._answers[model, version, key] = self._computed(self._sessions[model, version], key)
        return found

    def _computed(self, session: onnxruntime.InferenceSession, key: str) -> Answer:
        selected = key.startswith(MAP)
        ids = np.array([self._tokenizer.encode(key.removeprefix(MAP)).ids], np.int64)
        none, one = np.zeros(0, np.int64), np.zeros(1, np.int64)
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        feeds |= {f"attention_items.layer{layer}": none for layer in range(LAYERS)}
        names = ["embedding"]
        if selected:
            feeds[f"attention_items.layer{LAYERS - 1}"] = one
            names.append(f"attention.layer{LAYERS - 1}")
        values = session.run(names, feeds)
        answer = {"embedding": values[0][0]}
        if selected:
            answer[f"attention_mean.layer{LAYERS - 1}"] = values[1][0].mean(axis=0)
        return answer
