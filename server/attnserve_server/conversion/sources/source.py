"""The interface of a conversion's source: a torch model or an ONNX file, read into a graph with its known facts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

import onnx

from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.caches.decoder import Decoder
from attnserve_server.conversion.choose.trials import OtherExport
from attnserve_server.conversion.inputs.signature import Signature
from attnserve_server.conversion.learning.fixed_axes import PatchGrid
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.verify.compare import Reference
from attnserve_server.domain.values import Array
from attnserve_server.model.heads import EmbeddingSpec, HeadSpec
from attnserve_server.model.specs import TextSpec

ZOO_PREFIX = "zoo:"
"""Start of the names of models of the zoo."""


@dataclass(frozen=True, slots=True)
class ZooOptions:
    """Size and seed of a model of the zoo: a named size, whose parts other than 0 are overridden."""

    size: str = "small"
    layers: int = 0
    heads: int = 0
    width: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Task:
    """What a checkpoint's task adds to hidden states.

    Attributes:
        head: how labels are made from the outputs; None without a head.
        embedding: how the output `embedding` is made; None without one.
        on_request: the outputs that are returned only to requests that name them.
        mask_token: the token that a text spells for a masked position; empty: none.
        prompts: texts that a request can put before its text, by name.
        default_prompt: name of the prompt of a request that names none; empty: no prompt.
        type_ids: whether the tokenizer marks the two texts of a pair by token types.
    """

    head: HeadSpec | None = None
    embedding: EmbeddingSpec | None = None
    on_request: frozenset[str] = frozenset()
    mask_token: str = ""
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str = ""
    type_ids: bool = True

    def added_to(self, text: TextSpec | None) -> TextSpec | None:
        """Return how text fills the inputs, with the mask token, the prompts and the token types of this task."""
        added = {name: getattr(self, name) for name in ("mask_token", "default_prompt", "type_ids")}
        return None if text is None else text.model_copy(update={**added, "prompts": dict(self.prompts)})


class TorchModel(Protocol):
    """A model that can be exported. Its interface has NumPy arrays and ONNX graphs only, no torch types."""

    @property
    def name(self) -> str:
        """The name for provenance, never a path."""

    @property
    def sha256(self) -> str:
        """Digest of its weights."""

    @property
    def architecture(self) -> str:
        """Name of its class."""

    @property
    def vocabulary_sizes(self) -> Mapping[str, int]:
        """The vocabulary size of each input of ids, by name."""

    @property
    def padding_id(self) -> int:
        """The id that pads token ids."""

    @property
    def max_lengths(self) -> Mapping[str, int]:
        """The greatest length of each dynamic axis, by symbol."""

    @property
    def tokenizer_path(self) -> Path | None:
        """Its tokenizer.json; None without one."""

    @property
    def pair_start(self) -> int | None:
        """The id before the second text, if that has its own input; else None."""

    @property
    def grids(self) -> Mapping[int, PatchGrid]:
        """The patch grid of each fixed axis over patches, by the length of the axis."""

    @property
    def task(self) -> Task:
        """What its task adds to hidden states."""

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of the libraries that export it."""

    def to_graph(self, exporter: str, opset: int) -> onnx.ModelProto:
        """Trace it with `dynamo` or `torchscript`. Raises BuildRefused if that exporter fails."""

    def reference(self, feeds: Mapping[str, Array]) -> Reference:
        """Return its own answer to a batch, computed by torch and not by the graph."""


@dataclass(frozen=True, slots=True)
class SourceGraph:
    """A source that was read: its graph, and the facts that the graph does not state.

    Attributes:
        name: for provenance, never a path.
        sha256: digest of the weights or of the file.
        versions: of the libraries that made the graph, for provenance.
        exporter: the program that wrote the graph, for provenance.
        opset: the operator set of the graph.
        proto: the graph, with inferred shapes.
        signature: the inputs of the graph.
        sampler: draws sequences for the graph.
        max_lengths: the greatest length that is requested along each free axis, by symbol.
        bounds: where each of these lengths comes from, by symbol; empty where the model's configuration states them.
        facts: what was solved for, in words.
        open_axes: which axes a refusal names if the graph does not run, and the options that fix them.
        vocabulary_size: of the first input of token ids; 0 if there is none.
        tokenizer: the tokenizer.json; None if clients cannot send text.
        pair_start: the id before the second text, if that has its own input; else None.
        grids: the patch grid of each fixed axis over patches, by the length of the axis.
        task: what the task adds to hidden states.
        model: the torch model that was traced; None for an ONNX file.
        others: exports by other exporters, which may be faster.
        decoder: the graphs of a decoder with a cache, of which `proto` is the prompt graph; None for any other graph.
    """

    name: str
    sha256: str
    versions: Mapping[str, str]
    exporter: str
    opset: int
    proto: onnx.ModelProto
    signature: Signature
    sampler: Sampler
    max_lengths: Mapping[str, int]
    bounds: Mapping[str, str] = field(default_factory=dict)
    facts: tuple[str, ...] = ()
    open_axes: str = ""
    vocabulary_size: int = 0
    tokenizer: Path | None = None
    pair_start: int | None = None
    grids: Mapping[int, PatchGrid] = field(default_factory=dict)
    task: Task = field(default_factory=Task)
    model: TorchModel | None = None
    others: tuple[OtherExport, ...] = ()
    decoder: Decoder | None = None

    @property
    def traced(self) -> bool:
        """Whether the graph was traced from a torch model, whose batch axis, padding id and lengths are known."""
        return self.model is not None


class Source(ABC):
    """A model that can be converted. Subclasses hold where it is and how to read it."""

    title: ClassVar[str]
    """The progress line while it is read."""

    @property
    def exporters(self) -> tuple[str, ...]:
        """The exporters that may write its graph, in the order in which they are tried; empty for a file."""
        return ()

    @abstractmethod
    def read(self, work: Path, steps: Steps) -> SourceGraph:
        """Read the model into a graph.

        Args:
            work: a folder for temporary files.
            steps: receives warnings.

        Raises:
            BuildRefused: the model cannot be converted.
            TokenizerInvalid: its tokenizer.json is not usable.
        """

    def without_batches(self, graph: SourceGraph, work: Path, steps: Steps) -> SourceGraph | None:
        """Return the graph with its batch axis fixed at 1, if it runs on one row only; else None.

        Args:
            graph: a graph that `read` returned, and whose conversion failed.
            work: a folder for temporary files.
            steps: receives warnings.
        """
        del graph, work, steps
        return None
