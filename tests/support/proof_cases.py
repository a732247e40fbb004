"""Tiny graphs for the proof of batching, with the expected verdicts.

The proof states, for the batch and each symbol, whether other rows or padding can change an answer: proved (they
cannot), refuted (they can), or unknown. `Case.model` raises onnx.parser.ParseError for a wrong body.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
from attnserve_server.conversion.inputs.signature import Signature, signature_of
from attnserve_server.conversion.proof import prove
from attnserve_server.conversion.proof.prove import Proof
from attnserve_server.model.certificate import Verdict
from attnserve_server.model.manifest import (
    BATCH,
    DerivedLength,
    InputRole,
    OutputSpec,
    SiteSpec,
)
from onnx import helper, numpy_helper

PROVED, REFUTED, UNKNOWN = Verdict.PROVED, Verdict.REFUTED, Verdict.UNKNOWN
VOCABULARY = 6
LONGEST = 64
"""The greatest length of each symbol, where a case sets none."""


@dataclass(frozen=True)
class Case:
    """One graph with the verdicts on its batch and its symbols.

    Args:
        name: Unique in its table, for the test's id.
        body: `(inputs) => (outputs) <initializers> { nodes }` in ONNX's text form. An initializer without content gets
            random numbers.
        batch: The verdict on the batch.
        seq: The verdict on each symbol, or a mapping with one for every symbol (else KeyError).
        why: A part of the reason, by axis.
        needs: The expected mask needs.
        padding: The padding of inputs, where it is not 0.
        weights: The output that is the tap of the only site.
        causal: Whether that site is causal.
        run: Whether onnxruntime's CPU provider runs the graph.
        scale: The scale of the random floats.
        content: The range of an input's random content, where it is limited.
        derived: The forms of axis symbols that no input has.
        longest: The greatest length of each symbol.
        shortest: The smallest length of a run.
        functions: The model's local functions, in ONNX's text form.
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
        """The signature of its inputs, with the paddings of the case."""
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
        """Return the proof of the graph."""
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
        """Return the right verdict for an axis."""
        if axis == BATCH:
            return self.batch
        return self.seq if isinstance(self.seq, Verdict) else self.seq[axis]

    @cached_property
    def session(self) -> ort.InferenceSession:
        """Return a session that runs the graph without fusion."""
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


X = "float[batch, seq, 4] x"
MASK = "int64[batch, seq] attention_mask"


def graph(nodes: str, inputs: str = X, outputs: str = "float[batch, seq, 4] y", given: str = "") -> str:
    """Return the body of a case: by default of one sequence of vectors, (B, S, 4), to another."""
    initializers = f" <{given}>" if given else ""
    return f"({inputs}) => ({outputs}){initializers} {{ {nodes} }}"
