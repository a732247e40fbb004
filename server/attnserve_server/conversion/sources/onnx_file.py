"""An ONNX file as a source, from any exporter: read within bounds, with the meaning of its inputs inferred.

`OnnxFile.read` raises BuildRefused for a file that cannot be converted, and TokenizerInvalid for a tokenizer.json that
is not usable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.caches.splitting import decoder_of
from attnserve_server.conversion.finders.catalogue import refuse_without_kernel
from attnserve_server.conversion.graphs.reading import read_graph
from attnserve_server.conversion.inputs.signature import (
    Signature,
    signature_of,
    with_counted_masks,
    with_counted_positions,
)
from attnserve_server.conversion.inputs.sizes import bounds_of, with_sizes
from attnserve_server.conversion.inputs.text import padding_id_of, text_of
from attnserve_server.conversion.learning.batch_axis import takes_one_row_alone
from attnserve_server.conversion.learning.inputs import with_free_length
from attnserve_server.conversion.learning.polarity import with_polarity
from attnserve_server.conversion.learning.positions import with_learnt_positions
from attnserve_server.conversion.learning.solving import Solved, solved_axes
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.rewrite.counted_masks import CountedMasks, with_whole_masks
from attnserve_server.conversion.rewrite.repair import repaired
from attnserve_server.conversion.sources.source import Source, SourceGraph
from attnserve_server.model.manifest import InputRole
from attnserve_server.model.repository import sha256_of
from attnserve_server.model.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class OnnxFile(Source):
    """An ONNX file.

    Attributes:
        file: the file.
        tokenizer: its tokenizer.json; None: clients cannot send text.
        max_length: the greatest length along each axis of tokens; None: 512, as `bounds_of` sets it.
        max_lengths: the greatest lengths of single axes, by symbol.
        sizes: fixed sizes of dynamic axes, by symbol.
        pair_start: the token before the second text, if that has its own input; empty: none.
    """

    file: Path
    tokenizer: Path | None = None
    max_length: int | None = None
    max_lengths: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    pair_start: str = ""

    title = "reading the file"

    def read(self, work: Path, steps: Steps) -> SourceGraph:
        """Read the file, and infer the roles and axes of its inputs. See `Source.read`."""
        padding_id = padding_id_of(self.tokenizer)
        proto, limit = read_graph(self.file), self.max_length
        refuse_without_kernel(proto, self.file.name)
        proto = repaired(proto, self.file.name)
        decoder = decoder_of(proto, self.file.name)
        if decoder is not None:
            proto = decoder.prompt
        proto, masks = with_whole_masks(proto)
        _warn_of_counts(masks, steps)
        if self.tokenizer is not None:
            freed = with_free_length(proto, signature_of(proto.graph, padding_id), work)
            if freed is not None:
                proto, length = freed
                limit = min(self.max_length or length, length)
                steps.warn(
                    f"the graph does not depend on its fixed length of {length}: it accepts texts of up to "
                    f"{limit} tokens"
                )
        proto, solved = self._solved(proto, padding_id, work, steps)
        signature = solved.signature
        signature = (
            with_learnt_positions(proto, signature, work) if decoder is None else with_counted_positions(signature)
        )
        signature = with_polarity(proto, signature, work)
        signature = with_counted_masks(signature, masks.kept)
        if signature.fixed_batch:
            steps.warn("the batch axis is fixed at 1: every sequence runs alone")
        _warn_of_unbounded(signature, steps)
        for spec in signature.inputs:
            if spec.inverted:
                steps.warn(f"1 hides a position in {spec.name!r}: texts, and requests without it, get zeros")
        bounds = bounds_of(signature, limit, self.max_lengths)
        max_lengths = {symbol: bound.length for symbol, bound in bounds.items()}
        ids = [spec for spec in signature.inputs if spec.role is InputRole.TOKEN_IDS]
        return SourceGraph(
            name=self.file.name,
            sha256=sha256_of(self.file),
            versions={"onnx": onnx.__version__},
            exporter=" ".join(part for part in (proto.producer_name, proto.producer_version) if part) or "unknown",
            opset=next((entry.version for entry in proto.opset_import if entry.domain in {"", "ai.onnx"}), 0),
            proto=proto,
            signature=signature,
            sampler=Sampler(signature),
            max_lengths=max_lengths,
            bounds={symbol: bound.reason for symbol, bound in bounds.items()},
            facts=solved.facts,
            open_axes=solved.open_axes,
            vocabulary_size=ids[0].vocabulary_size if ids else 0,
            tokenizer=self.tokenizer,
            pair_start=self._pair_start(signature, max_lengths, steps),
            decoder=decoder,
        )

    def _solved(
        self, proto: onnx.ModelProto, padding_id: int, work: Path, steps: Steps
    ) -> tuple[onnx.ModelProto, Solved]:
        """Fix the axes that the caller fixes, and solve for others. Return the graph with fixed sizes, and the rest."""
        name = self.file.name
        if self.sizes:
            proto = with_sizes(proto, signature_of(proto.graph, padding_id), self.sizes, name)
        solved = solved_axes(proto, signature_of(proto.graph, padding_id), work)
        if solved.sizes:
            proto = with_sizes(proto, signature_of(proto.graph, padding_id), solved.sizes, name)
        given = tuple(f"axis {symbol!r} is {size}, by --axis" for symbol, size in self.sizes.items())
        solved = replace(solved, facts=(*given, *solved.facts))
        for fact in solved.facts:
            steps.report(fact)
        return proto, solved

    def without_batches(self, graph: SourceGraph, work: Path, steps: Steps) -> SourceGraph | None:
        """Fix the batch axis at 1, if the graph runs on one row and not on three. See `Source.without_batches`."""
        if graph.signature.fixed_batch or not takes_one_row_alone(graph.proto, graph.signature, work):
            return None
        steps.warn(
            "the graph does not run on a batch of three rows: every sequence runs alone, and the "
            "batch axis is fixed at 1"
        )
        names = {spec.name for spec in graph.signature.inputs}
        for value in graph.proto.graph.input:
            if value.name in names:
                value.type.tensor_type.shape.dim[0].dim_value = 1
        signature = replace(graph.signature, fixed_batch=1)
        return replace(graph, signature=signature, sampler=Sampler(signature))

    def _pair_start(self, signature: Signature, max_lengths: Mapping[str, int], steps: Steps) -> int | None:
        """Check the tokenizer against the inputs, and return the id of the token before the second text, if any.

        Raises:
            BuildRefused: text cannot fill the inputs, or the tokenizer lacks the token.
            TokenizerInvalid: the tokenizer.json is not usable.
        """
        if self.tokenizer is None:
            return None
        text = text_of(signature.inputs, max_lengths)
        if text is None:
            raise BuildRefused(
                f"{self.file.name} has no input of token ids, such as input_ids, for --tokenizer to fill"
            )
        tokenizer = TextTokenizer.load(self.tokenizer, text.axis)
        pair_start = tokenizer.id_of(self.pair_start) if self.pair_start else None
        if self.pair_start and pair_start is None:
            raise BuildRefused(f"the tokenizer has no token {self.pair_start!r}, which --pair-start names")
        text_of(signature.inputs, max_lengths, pair_start)
        beyond = [spec.name for spec in signature.inputs if not spec.optional and spec.role is not InputRole.TOKEN_IDS]
        if beyond:
            steps.warn(f"text does not fill input {beyond[0]!r}: clients must send tensors")
        return pair_start


def _warn_of_counts(masks: CountedMasks, steps: Steps) -> None:
    """Warn of masks that the file reduces to a count, which holds only for ones that precede all zeros."""
    if masks.restored:
        named = " and ".join(repr(name) for name in masks.restored if name) or "that it computes"
        steps.warn(
            f"the file reduces the mask {named} to a count of its ones, which answers masks with zeros before ones "
            "wrongly: its attention now reads the whole mask"
        )
    for name, operator in masks.kept.items():
        steps.warn(
            f"{operator} reads only the number of ones of {name!r}: the server refuses masks with a zero before a one"
        )


def _warn_of_unbounded(signature: Signature, steps: Steps) -> None:
    """Warn of inputs that index a table of unknown size."""
    for spec in signature.inputs:
        if spec.role is InputRole.TOKEN_IDS and not spec.vocabulary_size:
            steps.warn(f"the vocabulary size of {spec.name!r} is unknown: an id beyond it fails at run time")
        indexes = spec.role is InputRole.DATA and not spec.dtype.startswith("float")
        if indexes and spec.name in signature.unbounded and not spec.index_ranges:
            steps.warn(
                f"the range of {spec.name!r} is unknown: a number beyond the table that it indexes fails at run time"
            )
