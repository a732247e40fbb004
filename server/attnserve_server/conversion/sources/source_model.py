"""What an export needs of a source model, whoever made it: its graph, and its own answers to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import onnx

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.domain.values import Array

ZOO_PREFIX = "zoo:"
AUTO = "auto"
DEFAULT_OPSETS = {"dynamo": 23, "torchscript": 17}
"""The exporters, in the order in which `auto` tries them, with the opset of each where none is asked for.

23 is the first in which attention is one operator; 17 is where torch's older exporter is at home.
"""


@dataclass(frozen=True, slots=True)
class Reference:
    """What a source answers to one batch.

    Args:
        outputs: by name, (B, ...).
        weights: one (B, H, L, S) array per site, in the order in which the graph computes the sites; None for a site
            whose weights the source does not give.
    """

    outputs: dict[str, Array]
    weights: list[Array | None]


@dataclass(frozen=True, slots=True)
class Grid:
    """Patches of an image, row by row, behind `leading` positions such as that of a class token."""

    rows: int
    columns: int
    leading: int = 0


@dataclass(frozen=True, slots=True)
class ZooOptions:
    """How large a model of the zoo is: a named size, or parts of it that are otherwise (0: as the size has it)."""

    size: str = "small"
    layers: int = 0
    heads: int = 0
    width: int = 0
    seed: int = 0


class SourceModel(Protocol):
    """A model that can be exported: torch behind it, NumPy at its face."""

    @property
    def name(self) -> str:
        """What provenance calls it: a name, never a path."""

    @property
    def sha256(self) -> str:
        """Of its weights."""

    @property
    def architecture(self) -> str:
        """The class that answers."""

    @property
    def vocabulary_sizes(self) -> Mapping[str, int]:
        """How many ids there are, by the name of each input that holds ids."""

    @property
    def padding_id(self) -> int:
        """What pads token ids."""

    @property
    def max_lengths(self) -> Mapping[str, int]:
        """The greatest length of each dynamic axis, by its symbol."""

    @property
    def tokenizer_path(self) -> Path | None:
        """Its tokenizer.json, if it has one."""

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of the libraries that it is made with."""

    def to_graph(self, exporter: str, opset: int) -> onnx.ModelProto:
        """Trace it with one of `DEFAULT_OPSETS`. Raises BuildRefused where that exporter cannot."""

    def reference(self, feeds: Mapping[str, Array]) -> Reference:
        """Its own answer to a batch, from its definition and not from the graph."""


@runtime_checkable
class TellsMore(Protocol):
    """What some sources know beyond that."""

    @property
    def pair_start(self) -> int | None:
        """The token behind which the second text starts, where it has an axis to itself; None: no such."""

    @property
    def grids(self) -> Mapping[int, Grid]:
        """The patch grid of each fixed axis that runs over one, by the axis's length."""


def source_model(
    source: str,
    *,
    pooling: str = "",
    normalize: bool = False,
    expect_sha256: str = "",
    zoo_options: ZooOptions | None = None,
    steps: Steps | None = None,
) -> SourceModel:
    """The model behind a name.

    Args:
        source: `zoo:NAME`, a Hugging Face model folder, or `package:NAME` for one inside an installed package.
        pooling: `mean` adds the output `embedding`; text encoders and decoders only.
        normalize: scales that embedding to length 1.
        expect_sha256: what the weights' sha256 must be; empty: any.
        zoo_options: of a model of the zoo, and of no other.
        steps: is told what the person should know.

    Raises:
        BuildRefused: there is no such model, or its weights are others.
    """
    steps = steps or Steps.silent()
    if source.startswith(ZOO_PREFIX):
        # Its embedding is the mean anyway.
        if normalize or expect_sha256:
            raise BuildRefused("a model of the zoo is made on the spot: it has no digest to expect, and scales nothing")
        zoo = import_module("attnserve_server.conversion.sources.zoo")  # slow to import
        return cast("SourceModel", zoo.source_model(source.removeprefix(ZOO_PREFIX), zoo_options))
    if zoo_options not in {None, ZooOptions()}:
        raise BuildRefused("a size, or a seed, can be asked of models of the zoo alone")
    from attnserve_server.conversion.sources import hugging_face  # noqa: PLC0415 - slow to import

    return hugging_face.source_model(source, pooling, normalize=normalize, expect_sha256=expect_sha256, steps=steps)


def graph_of(source: SourceModel, exporter: str, opset: int, steps: Steps) -> tuple[onnx.ModelProto, str, int]:
    """A source's graph, the exporter that made it, and its opset.

    Args:
        source: what is traced.
        exporter: one of `DEFAULT_OPSETS`, or `auto` for the first that can.
        opset: of the operators; 0: the exporter's own default.
        steps: is told which exporters could not, and why.

    Raises:
        BuildRefused: there is no such exporter, or none of those tried can.
    """
    if exporter != AUTO and exporter not in DEFAULT_OPSETS:
        raise BuildRefused(f"exporter {exporter!r} is not known; {', '.join((AUTO, *DEFAULT_OPSETS))} are")
    tried = [exporter] if exporter != AUTO else list(DEFAULT_OPSETS)
    refusals: list[BuildRefused] = []
    for name in tried:
        version = opset or DEFAULT_OPSETS[name]
        try:
            return source.to_graph(name, version), name, version
        except BuildRefused as fault:
            refusals.append(fault)
            if name != tried[-1]:
                steps.warn(f"{fault}; trying the next exporter")
    raise refusals[0]
