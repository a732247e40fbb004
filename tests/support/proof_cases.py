"""Tiny graphs for the proof of batching: what it must say of each, and runs that show whether that is true."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
from attnserve_server.build.inputs.signature import Signature, signature_of
from attnserve_server.build.proof import prove
from attnserve_server.build.proof.prove import Proof
from attnserve_server.model.certificate import Clause, Verdict
from attnserve_server.model.equality import WEIGHTS_PREFIX, Equality
from attnserve_server.model.manifest import (
    BATCH,
    NUMPY_DTYPES,
    DerivedLength,
    InputRole,
    InputSpec,
    OutputSpec,
    SiteSpec,
)
from onnx import helper, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]
Feeds = dict[str, Array]

PROVED, REFUTED, UNKNOWN = Verdict.PROVED, Verdict.REFUTED, Verdict.UNKNOWN
VOCABULARY = 6
LONGEST = 64
"""The greatest length of each symbol, where a case does not name another."""
ROUNDS = 12
"""Random sequences that a case is run with: enough to show each difference that the table speaks of."""


@dataclass(frozen=True)
class Case:
    """One graph with the verdicts on its batch and its symbols.

    Args:
        name: unique in its table, for the test's id.
        body: `(inputs) => (outputs) <initializers> { nodes }` in ONNX's text form. An initializer without content gets
            random numbers.
        batch: the verdict on the batch.
        seq: the verdict on each symbol, or on those of a mapping.
        why: a part of the reason that is given, by axis.
        needs: what is taken for granted of masks.
        padding: of inputs, where it is not 0.
        weights: the output that is the tap of the one site.
        causal: whether that site is.
        run: whether onnxruntime's CPU provider runs the graph.
        content: numbers to draw an input's content from.
    """

    name: str
    body: str
    batch: Verdict = PROVED
    seq: Verdict | Mapping[str, Verdict] = PROVED
    why: Mapping[str, str] = field(default_factory=dict)
    needs: Mapping[str, str] | None = None
    padding: Mapping[str, float] = field(default_factory=dict)
    weights: str = ""
    causal: bool = False
    run: bool = True
    scale: float = 1.0
    content: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    derived: Mapping[str, DerivedLength] = field(default_factory=dict)
    longest: int = LONGEST
    precision: str = "fp32"
    opset: int = 23
    ir_version: int = 10
    functions: str = ""
    shortest: int = 1

    @cached_property
    def model(self) -> onnx.ModelProto:
        """The graph as a model."""
        domains = f'"" : {self.opset}, "com.microsoft" : 1, "ai.onnx.ml" : 3, "local" : 1, "elsewhere" : 1'
        text = f"<ir_version: {self.ir_version}, opset_import: [{domains}]> agraph {self.body}\n{self.functions}"
        model = onnx.parser.parse_model(text)
        _fill(model.graph, self.name)
        return model

    @cached_property
    def signature(self) -> Signature:
        """Of its inputs, with the paddings of the case."""
        found = signature_of(self.model.graph)
        specs = [
            spec.model_copy(update={"padding": self.padding[spec.name]}) if spec.name in self.padding else spec
            for spec in found.inputs
        ]
        specs = [
            spec.model_copy(update={"vocabulary_size": spec.vocabulary_size or VOCABULARY})
            if spec.role is InputRole.TOKEN_IDS
            else spec
            for spec in specs
        ]
        return Signature(tuple(specs), found.symbols, found.fixed_batch)

    @cached_property
    def outputs(self) -> tuple[OutputSpec, ...]:
        """All outputs but the tap."""
        found = []
        for value in self.model.graph.output:
            if value.name != self.weights:
                tensor = value.type.tensor_type
                dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
                shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)[1:]
                found.append(OutputSpec(name=value.name, dtype=dtype, shape=shape))  # type: ignore[arg-type]
        return tuple(found)

    @cached_property
    def sites(self) -> tuple[SiteSpec, ...]:
        """The site whose weights are an output, if there is one."""
        if not self.weights:
            return ()
        value = next(value for value in self.model.graph.output if value.name == self.weights)
        dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        site = SiteSpec(
            name="site",
            layer=0,
            kind="self",
            form="dense",
            operator="Softmax",
            heads=dims[1],
            kv_heads=dims[1],
            head_dim=4,
            query_axis=dims[2],
            key_axis=dims[3],
            items_input="items",
            weights_output=self.weights,
        )
        return (site,)

    def proof(self) -> Proof:
        """What is proved of it."""
        return prove(
            self.model,
            self.signature,
            self.outputs,
            self.sites,
            max_lengths=dict.fromkeys(self.signature.symbols, self.longest),
            derived=self.derived,
            precision=self.precision,
        )

    def expected(self, axis: str) -> Verdict:
        """The verdict that is right for an axis."""
        if axis == BATCH:
            return self.batch
        return self.seq if isinstance(self.seq, Verdict) else self.seq[axis]

    @cached_property
    def session(self) -> ort.InferenceSession:
        """Runs it as it is written: nothing is fused."""
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        return ort.InferenceSession(self.model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _fill(graph: onnx.GraphProto, name: str) -> None:
    """Give each initializer without content random numbers, the same ones at each run."""
    known = {tensor.name for tensor in graph.initializer} | {value.name for value in graph.input}
    made = {output for node in graph.node for output in node.output}
    rng = np.random.default_rng(len(name))
    for value in list(graph.value_info):
        if value.name in known or value.name in made:
            continue
        tensor = value.type.tensor_type
        shape = [dim.dim_value for dim in tensor.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        drawn = rng.normal(size=shape) if np.issubdtype(dtype, np.floating) else rng.integers(0, 7, shape)
        graph.initializer.append(numpy_helper.from_array(np.asarray(drawn, dtype), value.name))
        graph.value_info.remove(value)


@dataclass(frozen=True)
class Runs:
    """Runs of one case: a sequence alone, and the same one among others and padded."""

    case: Case
    proof: Proof
    seed: int = 0

    def worst(self, axis: str) -> float:
        """The greatest difference that other rows (`batch`) or padding along a symbol make; above 1: not equal."""
        rng = np.random.default_rng(self.seed)
        worst = 0.0
        for turn in range(ROUNDS):
            worst = max(worst, self._once(rng, axis, turn))
            if worst > 1:
                return worst
        return worst

    def _once(self, rng: np.random.Generator, axis: str, turn: int) -> float:
        lengths = {symbol: int(rng.integers(self.case.shortest, 7)) for symbol in self.case.signature.symbols}
        own = self._content(rng, lengths, holes=turn % 2 == 1)
        fixed = self.case.signature.fixed_batch
        alone = self._run({name: array[None] for name, array in own.items()}, 1)
        if axis == BATCH:
            if fixed:
                return 0.0
            count, place = int(rng.integers(2, 4)), 0
            others = [
                self._content(rng, lengths, holes=True, scale=10.0 if turn % 3 else 1.0) for _ in range(count - 1)
            ]
            place = int(rng.integers(0, count))
            rows = [*others[:place], own, *others[place:]]
            together = self._run({name: np.stack([row[name] for row in rows]) for name in own}, count)
            return self._error(alone, together, lengths, place)
        more = {**lengths, axis: lengths[axis] + int(rng.integers(1, 9))}
        padded = {spec.name: _padded(own[spec.name], spec, more)[None] for spec in self.case.signature.inputs}
        return self._error(alone, self._run(padded, 1), lengths, 0)

    def _content(
        self, rng: np.random.Generator, lengths: Mapping[str, int], *, holes: bool, scale: float = 1.0
    ) -> Feeds:
        feeds = {}
        for spec in self.case.signature.inputs:
            shape = [lengths[extent] if isinstance(extent, str) else extent for extent in spec.shape]
            array = self._drawn(rng, spec, shape, scale)
            need = next((mask for mask in self.proof.masks if mask.input == spec.name), None)
            if spec.role is InputRole.ATTENTION_MASK or need is not None:
                array = self._mask(rng, spec, shape, array, holes=holes and (need is None or need.need == "some"))
                assert need is None or need.met_by(array, spec.padding)
            feeds[spec.name] = array
        return feeds

    def _drawn(self, rng: np.random.Generator, spec: InputSpec, shape: Sequence[int], scale: float) -> Array:
        dtype = NUMPY_DTYPES[spec.dtype]
        low_high = self.case.content.get(spec.name)
        if low_high is not None:
            return np.asarray(rng.uniform(*low_high, shape), dtype)
        if dtype == np.bool_:
            return np.asarray(rng.integers(0, 2, shape), dtype)
        if np.issubdtype(dtype, np.floating):
            return np.asarray(rng.normal(size=shape) * scale * self.case.scale, dtype)
        return np.asarray(rng.integers(0, VOCABULARY, shape), dtype)

    @staticmethod
    def _mask(rng: np.random.Generator, spec: InputSpec, shape: Sequence[int], array: Array, *, holes: bool) -> Array:
        hidden = NUMPY_DTYPES[spec.dtype].type(spec.padding)
        if spec.role is InputRole.TOKEN_IDS:
            allowed: Array = np.where(array == hidden, hidden + 1, array)
        else:
            allowed = np.full(shape, 0 if spec.padding else 1, NUMPY_DTYPES[spec.dtype])
        if not holes or not shape:
            return allowed
        gone = rng.random(shape) < 0.4
        gone[..., int(rng.integers(0, shape[-1]))] = False
        return np.where(gone, hidden, allowed)

    def _run(self, feeds: Feeds, rows: int) -> Feeds:
        graph = {value.name: value for value in self.case.session.get_inputs()}
        given = {name: array for name, array in feeds.items() if name in graph}
        for name in graph:
            if name not in given:  # of a tap
                given[name] = np.arange(rows, dtype=np.int64)
        names = [value.name for value in self.case.session.get_outputs()]
        return dict(zip(names, self.case.session.run(None, given), strict=True))

    def _error(self, alone: Feeds, together: Feeds, lengths: Mapping[str, int], place: int) -> float:
        equality = Equality(self.case.precision)
        worst = 0.0
        targets = [(spec.name, spec.shape) for spec in self.case.outputs]
        targets += [(site.weights_output or "", (site.heads, *site.weight_axes)) for site in self.case.sites]
        for name, shape in targets:
            cut = [slice(self._extent(extent, lengths)) for extent in shape]
            one, other = alone[name][0], together[name][place][tuple(cut)]
            said = f"{WEIGHTS_PREFIX}{name}" if name == self.case.weights else name
            worst = max(worst, equality.error(said, other, one))
        return worst

    def _extent(self, extent: str | int, lengths: Mapping[str, int]) -> int:
        if isinstance(extent, int):
            return extent
        form = self.case.derived.get(extent)
        return lengths[extent] if form is None else form.of(lengths[form.source])


def _padded(own: Array, spec: InputSpec, lengths: Mapping[str, int]) -> Array:
    shape = [lengths[extent] if isinstance(extent, str) else extent for extent in spec.shape]
    padded = np.full(shape, NUMPY_DTYPES[spec.dtype].type(spec.padding), NUMPY_DTYPES[spec.dtype])
    padded[tuple(slice(size) for size in own.shape)] = own
    return padded


def faults_of(case: Case) -> list[str]:
    """What the proof says wrong of a case, and where its runs contradict it; empty where all is as the table has it."""
    proof = case.proof()
    faults = [fault for clause in proof.clauses for fault in _of_clause(case, clause)]
    needs = {need.input: need.need for need in proof.masks}
    if case.needs is not None and needs != case.needs:
        faults.append(f"needs {needs}, not {dict(case.needs)}")
    if bool(proof.causal_sites) != case.causal:
        faults.append(f"causal sites are {set(proof.causal_sites)}")
    if case.run:
        runs = Runs(case, proof)
        for clause in proof.clauses:
            faults += _of_runs(case, clause, runs)
    return faults


def _of_clause(case: Case, clause: Clause) -> list[str]:
    expected, why = case.expected(clause.axis), case.why.get(clause.axis, "")
    if clause.verdict is not expected:
        return [f"{clause.axis} is {clause.verdict}, not {expected}: {clause.reason}"]
    if why not in clause.reason:
        return [f"{clause.axis} is {clause.verdict} because of {clause.reason!r}, not of {why!r}"]
    if (clause.verdict is PROVED) == bool(clause.reason):
        return [f"{clause.axis} is {clause.verdict} with the reason {clause.reason!r}"]
    return []


def _of_runs(case: Case, clause: Clause, runs: Runs) -> list[str]:
    if clause.verdict is UNKNOWN or (clause.axis == BATCH and case.signature.fixed_batch):
        return []
    worst = runs.worst(clause.axis)
    if clause.verdict is PROVED and worst > 1:
        return [f"UNSOUND: {clause.axis} is proved, and a run differs by {worst:.3g} of what is allowed"]
    if clause.verdict is REFUTED and worst <= 1:
        return [f"{clause.axis} is refuted ({clause.reason}), and no run differs"]
    return []


X = "float[batch, seq, 4] x"
MASK = "int64[batch, seq] attention_mask"


def graph(nodes: str, inputs: str = X, outputs: str = "float[batch, seq, 4] y", given: str = "") -> str:
    """The body of a case: by default of one sequence of vectors, (B, S, 4), to another."""
    initializers = f" <{given}>" if given else ""
    return f"({inputs}) => ({outputs}){initializers} {{ {nodes} }}"
