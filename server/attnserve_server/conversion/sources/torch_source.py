"""Torch models as sources: a Hugging Face folder, one inside a package, or a model of the zoo, exported to ONNX.

The zoo is a set of models that are generated from a seed. Torch is imported when a model is loaded, so that a
conversion of an ONNX file does not wait for it. A model that cannot be loaded or exported raises BuildRefused.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import onnx

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.choose.trials import OtherExport
from attnserve_server.conversion.graphs.reading import checked
from attnserve_server.conversion.inputs.signature import SEQUENCE, Signature, signature_of
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.sources.source import (
    ZOO_PREFIX,
    Source,
    SourceGraph,
    Task,
    TorchModel,
    ZooOptions,
)
from attnserve_server.model.heads import EMBEDDINGS
from attnserve_server.model.tokenizer import TextTokenizer

AUTO = "auto"
"""Selects the first exporter that can export the model."""
DEFAULT_OPSETS = {"dynamo": 23, "torchscript": 17}
"""The exporters in the order in which `auto` tries them, with the default opset of each.

Opset 23 is the first with an Attention operator; 17 is the newest that the TorchScript exporter fully supports.
"""
POOLINGS = ("", "mean")


@dataclass(frozen=True, slots=True)
class TorchSource(Source):
    """A torch model by its name.

    Attributes:
        model: `zoo:NAME`, a Hugging Face model folder, or `package:NAME` for one inside an installed package.
        pooling: "mean" adds the output `embedding`, the mean over unpadded tokens; empty: no such output.
        normalize: whether to scale that embedding to length 1.
        expect_sha256: the required digest of the weights; empty: any.
        head: whether to keep the head of a classifier.
        exporter: `auto`, `dynamo` or `torchscript`.
        opset: 0 for the exporter's default.
        zoo_options: size and seed of a model of the zoo.
        embedding_sizes: numbers of first values of the embedding that are embeddings too; empty: as its files state.

    Raises:
        BuildRefused: an option is unknown, or two options contradict each other.
    """

    model: str
    pooling: str = ""
    normalize: bool = False
    expect_sha256: str = ""
    head: bool = True
    exporter: str = AUTO
    opset: int = 0
    zoo_options: ZooOptions = field(default_factory=ZooOptions)
    embedding_sizes: tuple[int, ...] = ()

    title = "exporting the model to ONNX"

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise BuildRefused(f"pooling {self.pooling!r} is unknown; use 'mean'")
        if self.normalize and not self.pooling:
            raise BuildRefused("--normalize scales the pooled output: add --pooling mean")

    @property
    def exporters(self) -> tuple[str, ...]:
        """The requested exporter, or all of them."""
        return tuple(DEFAULT_OPSETS) if self.exporter == AUTO else (self.exporter,)

    def read(self, work: Path, steps: Steps) -> SourceGraph:
        """Load the model and export it to ONNX. See `Source.read`."""
        del work
        model = load_model(
            self.model,
            pooling=self.pooling,
            normalize=self.normalize,
            expect_sha256=self.expect_sha256,
            head=self.head,
            zoo_options=self.zoo_options,
            steps=steps,
        )
        if model.tokenizer_path is not None:
            TextTokenizer.load(model.tokenizer_path, SEQUENCE)  # fails before the slow export
        graph, exporter, opset = export_graph(model, self.exporter, self.opset, steps)
        proto = checked(graph, model.name)
        signature = signature_of(proto.graph, model.padding_id)
        return SourceGraph(
            name=model.name,
            sha256=model.sha256,
            versions=model.versions,
            exporter=_provenance(exporter),
            opset=opset,
            proto=proto,
            signature=signature,
            sampler=Sampler(signature, vocabulary_sizes=model.vocabulary_sizes),
            max_lengths={symbol: model.max_lengths[symbol] for symbol in signature.symbols},
            vocabulary_size=max(model.vocabulary_sizes.values(), default=0),
            tokenizer=model.tokenizer_path,
            pair_start=model.pair_start,
            grids=model.grids,
            task=_sized(model.task, self.embedding_sizes, proto.graph),
            model=model,
            others=tuple(self._others(model, exporter)),
        )

    def _others(self, model: TorchModel, first: str) -> list[OtherExport]:
        """Return the exports by the exporters after the first one that succeeded."""
        others = []
        for exporter in self.exporters[self.exporters.index(first) + 1 :]:
            opset = self.opset or DEFAULT_OPSETS[exporter]
            what = f"{exporter} at opset {opset}, beside {first}"
            others.append(OtherExport(what, _provenance(exporter), opset, partial(_export, model, exporter, opset)))
        return others


def _provenance(exporter: str) -> str:
    return f"torch.onnx.export, {exporter}"


def _export(model: TorchModel, exporter: str, opset: int) -> tuple[onnx.ModelProto, Signature]:
    proto = checked(model.to_graph(exporter, opset), model.name)
    return proto, signature_of(proto.graph, model.padding_id)


def load_model(
    name: str,
    *,
    pooling: str = "",
    normalize: bool = False,
    expect_sha256: str = "",
    head: bool = True,
    zoo_options: ZooOptions | None = None,
    steps: Steps | None = None,
) -> TorchModel:
    """Load the torch model with a name.

    Args:
        name: `zoo:NAME`, a Hugging Face model folder, or `package:NAME` for one inside an installed package.
        pooling: "mean" adds the output `embedding`; text encoders and decoders only.
        normalize: whether to scale that embedding to length 1.
        expect_sha256: the required digest of the weights; empty: any.
        head: whether to keep the head of a classifier.
        zoo_options: size and seed of a model of the zoo.
        steps: receives warnings.

    Raises:
        BuildRefused: there is no such model, its weights have another digest, or an option does not apply to it.
    """
    steps = steps or Steps.silent()
    if name.startswith(ZOO_PREFIX):
        # Models of the zoo have the pooled output in any case.
        if normalize or expect_sha256:
            raise BuildRefused("models of the zoo are generated during export: remove --normalize and --expect-sha256")
        from attnserve_server.conversion.sources.zoo.model import zoo_model  # noqa: PLC0415 - imports torch

        return zoo_model(name.removeprefix(ZOO_PREFIX), zoo_options)
    if zoo_options not in {None, ZooOptions()}:
        raise BuildRefused("--size, --layers, --heads, --width and --seed apply to models of the zoo only")
    from attnserve_server.conversion.sources.hugging_face import hugging_face_model  # noqa: PLC0415 - imports torch

    return hugging_face_model(
        name, pooling, normalize=normalize, expect_sha256=expect_sha256, keep_head=head, steps=steps
    )


def _sized(task: Task, sizes: tuple[int, ...], graph: onnx.GraphProto) -> Task:
    """Return a task with the sizes to which its embedding may be cut.

    Args:
        task: has those that the files of the model state, of which the full length is none.
        sizes: those that were requested instead; empty: none were.
        graph: has the output of the embedding.

    Raises:
        BuildRefused: The model has no embedding, or a requested size is not below its length.
    """
    embedding = task.embedding
    if embedding is None:
        if sizes:
            raise BuildRefused("--embedding-size cuts an embedding, and the model has none: add --pooling mean")
        return task
    found = next((one.type.tensor_type.shape.dim for one in graph.output if one.name in EMBEDDINGS), ())
    width = (found[-1].dim_value if found else 0) or sys.maxsize
    for size in sizes:
        if not 0 < size < width:
            raise BuildRefused(
                f"--embedding-size {size} is not from 1 to {width - 1}: the embedding has {width} values"
            )
    kept = tuple(sorted({size for size in sizes or embedding.sizes if size < width}))
    return replace(task, embedding=embedding.model_copy(update={"sizes": kept}))


def export_graph(model: TorchModel, exporter: str, opset: int, steps: Steps) -> tuple[onnx.ModelProto, str, int]:
    """Export a model, and return its graph, the exporter that wrote it, and its opset.

    Args:
        model: the model.
        exporter: a key of `DEFAULT_OPSETS`, or `auto` for the first that succeeds.
        opset: 0 for the exporter's default.
        steps: receives a warning for each exporter that fails before another succeeds.

    Raises:
        BuildRefused: the exporter is unknown, or every exporter failed; the message is that of the first.
    """
    if exporter != AUTO and exporter not in DEFAULT_OPSETS:
        raise BuildRefused(f"exporter {exporter!r} is unknown; use one of {', '.join((AUTO, *DEFAULT_OPSETS))}")
    names = [exporter] if exporter != AUTO else list(DEFAULT_OPSETS)
    refusals: list[BuildRefused] = []
    for name in names:
        version = opset or DEFAULT_OPSETS[name]
        try:
            return model.to_graph(name, version), name, version
        except BuildRefused as fault:
            refusals.append(fault)
            if name != names[-1]:
                steps.warn(f"{fault}; trying the next exporter")
    raise refusals[0]
