"""The manifest: everything that a bundle says about its model. Reading and writing files is the repository's work.

Its parts have modules of their own: `tensors`, `sites`, `report`. They are imported from here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import numpy.typing as npt
from pydantic import Field, StringConstraints, model_validator

from attnserve_server.model.certificate import Batching, Certificate
from attnserve_server.model.frozen import (
    NAME_PATTERN,
    NUMPY_DTYPES,
    VERSION_PATTERN,
    Dimension,
    Dtype,
    FileName,
    Frozen,
    ModelName,
    ModelVersion,
    Sha256,
)
from attnserve_server.model.report import CheckReport, GoldenSpec, Provenance
from attnserve_server.model.specs import (
    AxisSpec,
    DerivedLength,
    IndexRange,
    InputRole,
    InputSpec,
    OutputSpec,
    SiteSpec,
    TextSpec,
)

__all__ = [
    "BATCH",
    "NAME_PATTERN",
    "NUMPY_DTYPES",
    "AxisSpec",
    "CheckReport",
    "DerivedLength",
    "Dimension",
    "Dtype",
    "GoldenSpec",
    "IndexRange",
    "InputRole",
    "InputSpec",
    "Manifest",
    "OutputSpec",
    "Provenance",
    "SiteSpec",
    "TextSpec",
    "axes_under",
    "is_model_name",
    "is_model_version",
]

BATCH = "batch"
"""The axis symbol of the batch, the first axis of every input and output."""


Rewriting = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]{1,64}$")]
"""The runtime's own name of one of its graph rewritings."""


def is_model_name(name: str) -> bool:
    """Whether `name` may name a model: it is one path component that cannot climb."""
    return re.fullmatch(NAME_PATTERN, name) is not None


def is_model_version(version: str) -> bool:
    """Whether `version` is a positive decimal integer."""
    return re.fullmatch(VERSION_PATTERN, version) is not None


def axes_under(axes: Sequence[AxisSpec], certificate: Certificate | None, batching: Batching) -> tuple[AxisSpec, ...]:
    """The axes with `paddable` as a policy has it: by the certificate's clauses, derived axes as their sources."""
    clauses = () if certificate is None else certificate.clauses
    padded = {clause.axis for clause in clauses if clause.allows(batching)}
    padded -= {axis.symbol for axis in axes if axis.fixed}
    return tuple(
        axis.model_copy(update={"paddable": (axis.derived.source if axis.derived else axis.symbol) in padded})
        for axis in axes
    )


class Manifest(Frozen):
    """All that a bundle says about its model; `manifest.json` is this, as JSON.

    Format 2 has a batching certificate; format 1, of earlier releases, has none. What may be padded and joined depends
    on the policy as well: `under` returns the manifest that holds under one, which every run is planned by.
    """

    format: Literal[1, 2] = 2
    name: ModelName
    version: ModelVersion
    digest: Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
    files: dict[FileName, Sha256]
    precision: Literal["fp32", "fp16", "int8"]
    max_batch_size: Annotated[int, Field(ge=1)]
    axes: tuple[AxisSpec, ...]
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
    sites: tuple[SiteSpec, ...] = ()
    vocabulary_size: Annotated[int, Field(ge=0)] = 0
    text: TextSpec | None = None
    left_out: tuple[Rewriting, ...] | None = None
    """Rewritings that the runtime is told to leave out on a CPU, where this graph is faster without them; None: those
    that the server leaves out of any graph."""
    provenance: Provenance
    check: CheckReport
    golden: GoldenSpec | None = None
    certificate: Certificate | None = None

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        fed = [site.items_input for site in self.sites if site.items_input is not None]
        fetched = [site.weights_output for site in self.sites if site.weights_output is not None]
        named = {
            "axis": [BATCH, *(axis.symbol for axis in self.axes)],
            "site": [site.name for site in self.sites],
            "input": [*(spec.name for spec in self.inputs), *fed],
            "output": [*(spec.name for spec in self.outputs), *fetched],
            # An encoder-decoder has token ids, and a mask, along each of its axes.
            "role": [
                f"{spec.role} along {', '.join(map(str, spec.shape))}"
                for spec in self.inputs
                if spec.role is not InputRole.DATA
            ],
        }
        for what, names in named.items():
            doubled = sorted({name for name in names if names.count(name) > 1})
            if doubled:
                raise ValueError(f"{what} names are used twice: {doubled}")
        return self

    @model_validator(mode="after")
    def _axes_are_declared(self) -> Self:
        declared = {axis.symbol for axis in self.axes}
        shapes = {spec.name: spec.shape for spec in self.inputs} | {spec.name: spec.shape for spec in self.outputs}
        used = {name: {extent for extent in shape if isinstance(extent, str)} for name, shape in shapes.items()}
        # A site that gives no weights may well have axes that nothing else names.
        used |= {f"site {site.name}": {site.query_axis, site.key_axis} for site in self.sites if site.available}
        for name, symbols in used.items():
            if symbols - declared:
                raise ValueError(f"{name}: axis symbols {sorted(symbols - declared)} are not declared in axes")
        if [site.layer for site in self.sites] != list(range(len(self.sites))):
            raise ValueError("sites must be listed in order of their layers, from 0")
        return self

    @model_validator(mode="after")
    def _derived_axes_have_a_source(self) -> Self:
        given = {axis.symbol for axis in self.axes if axis.derived is None}
        for axis in self.axes:
            if axis.derived is not None and axis.derived.source not in given:
                raise ValueError(
                    f"axis {axis.symbol}: it is derived from {axis.derived.source}, which is no other axis"
                )
        for spec in self.inputs:
            derived = {extent for extent in spec.shape if isinstance(extent, str)} - given
            if derived:
                raise ValueError(f"input {spec.name}: {sorted(derived)} are derived, so no input has them")
        return self

    @model_validator(mode="after")
    def _text_has_a_place(self) -> Self:
        if self.text is None:
            return self
        for axis, max_tokens in self.text.axes.items():
            if self.input_of_role(InputRole.TOKEN_IDS, axis) is None:
                raise ValueError(f"text: there is no input of token ids of shape ({axis},)")
            longest = self.axis(axis).max_length
            if max_tokens > longest:
                raise ValueError(f"text: {max_tokens} tokens exceed {longest}, the axis's greatest length")
        return self

    @model_validator(mode="after")
    def _certificate_covers_the_axes(self) -> Self:
        if (self.certificate is None) is not (self.format == 1):
            raise ValueError("a manifest of format 2 has a certificate, and one of format 1 has none")
        if self.certificate is None:
            return self
        listed = [clause.axis for clause in self.certificate.clauses]
        wanted = [BATCH, *(axis.symbol for axis in self.axes if axis.derived is None and not axis.fixed)]
        missing = sorted(set(wanted) - set(listed))
        if missing or len(set(listed)) != len(listed):
            raise ValueError(f"certificate: {listed} must have one clause for each of {wanted}")
        strangers = sorted({need.input for need in self.certificate.masks} - {spec.name for spec in self.inputs})
        if strangers:
            raise ValueError(f"certificate: masks {strangers} are no inputs")
        return self

    def under(self, batching: Batching) -> Manifest:
        """The manifest that holds under a policy: `paddable` of each axis, and `max_batch_size` 1 where rows run alone.

        Derived axes follow their sources. Without a certificate no axis is padded; rows of equal lengths are joined.
        """
        certificate = self.certificate
        joined = batching != "off" and (certificate is None or certificate.clause(BATCH).allows(batching))
        return self.model_copy(
            update={
                "axes": axes_under(self.axes, certificate, batching),
                "max_batch_size": self.max_batch_size if joined else 1,
            }
        )

    def breaks_masks(self, tensors: Mapping[str, npt.NDArray[Any]]) -> bool:
        """Whether one sequence's inputs break a need of the certificate, so that it must not be padded.

        Args:
            tensors: every input of a need, without the batch axis.
        """
        needs = () if self.certificate is None else self.certificate.masks
        return any(not need.met_by(tensors[need.input], self.input(need.input).padding) for need in needs)

    @property
    def fixed_lengths(self) -> dict[str, int]:
        """Length of each axis that is the same for every sequence, whatever is sent."""
        return {axis.symbol: axis.max_length for axis in self.axes if axis.fixed}

    def with_derived(self, lengths: Mapping[str, int]) -> dict[str, int]:
        """A sequence's lengths by axis symbol, with those of the axes that are derived from them."""
        derived = {
            axis.symbol: axis.derived.of(lengths[axis.derived.source])
            for axis in self.axes
            if axis.derived is not None and axis.derived.source in lengths
        }
        return {**lengths, **derived}

    def axis(self, symbol: str) -> AxisSpec:
        """The axis of this symbol. Raises KeyError if there is none."""
        return {axis.symbol: axis for axis in self.axes}[symbol]

    def input(self, name: str) -> InputSpec:
        """The input of this name. Raises KeyError if there is none."""
        return {spec.name: spec for spec in self.inputs}[name]

    def output(self, name: str) -> OutputSpec:
        """The output of this name. Raises KeyError if there is none."""
        return {spec.name: spec for spec in self.outputs}[name]

    def input_of_role(self, role: InputRole, axis: str = "") -> InputSpec | None:
        """The input of this role, if the model has one: along this axis alone, or, with none named, the first."""
        return next(
            (spec for spec in self.inputs if spec.role is role and (not axis or spec.shape == (axis,))),
            None,
        )

    @property
    def text_as_written(self) -> tuple[str, ...]:
        """The axes along which the tokenizer pads and cuts as its file says.

        Of a bundle that does not say: those of the first text, or of a pair, along which no mask could hide padding.
        """
        if self.text is None or self.text.as_written is not None:
            return () if self.text is None else self.text.as_written or ()
        hidden = self.input_of_role(InputRole.ATTENTION_MASK, self.text.axis) is not None
        return () if hidden else (self.text.axis,)

    def vocabulary_of(self, spec: InputSpec) -> int:
        """How many ids an input of token ids knows; 0 where that is not known."""
        return spec.vocabulary_size or self.vocabulary_size
