"""The manifest: everything that a bundle says about its model. Reading and writing files is the repository's work."""

from __future__ import annotations

import math
import re
from enum import StrEnum
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
VERSION_PATTERN = r"^[1-9][0-9]{0,8}$"
BATCH = "batch"
"""The axis symbol of the batch, the first axis of every input and output."""

ModelName = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
ModelVersion = Annotated[str, StringConstraints(pattern=VERSION_PATTERN)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,254}$")]
"""A file beside the manifest: one path component that cannot climb."""
Symbol = Annotated[str, StringConstraints(min_length=1)]
Extent = Symbol | Annotated[int, Field(ge=1)]

NUMPY_DTYPES: dict[str, np.dtype[np.generic]] = {
    name: np.dtype(name) for name in ("bool", "uint8", "int8", "int32", "int64", "float16", "float32", "float64")
}
Dtype = Literal["bool", "uint8", "int8", "int32", "int64", "float16", "float32", "float64"]


def is_model_name(name: str) -> bool:
    """Whether `name` may name a model: it is one path component that cannot climb."""
    return re.fullmatch(NAME_PATTERN, name) is not None


def is_model_version(version: str) -> bool:
    """Whether `version` is a positive decimal integer."""
    return re.fullmatch(VERSION_PATTERN, version) is not None


class _Frozen(BaseModel):
    # Padding may be infinite (a bias that masks); as a string it is valid JSON and reads back as what it was.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class InputRole(StrEnum):
    """What the server may know about an input beyond its shape."""

    TOKEN_IDS = "token_ids"  # noqa: S105 - a role, no secret
    """Ids into the vocabulary: checked against its size, and made by the tokenizer."""
    ATTENTION_MASK = "attention_mask"
    """1 where there is data, 0 where there is padding."""
    TOKEN_TYPE_IDS = "token_type_ids"  # noqa: S105 - a role, no secret
    """0 for the first text, 1 for the second."""
    DATA = "data"
    """Anything else."""


class InputSpec(_Frozen):
    """One input. `shape` leaves out the batch axis; `padding` fills positions behind a sequence's end.

    `fill` is the value that the server uses where a caller leaves the input out; None: it must be sent.
    """

    name: str
    dtype: Dtype
    shape: tuple[Extent, ...]
    role: InputRole = InputRole.DATA
    padding: float = 0
    fill: float | None = None

    @model_validator(mode="after")
    def _values_fit_the_dtype(self) -> Self:
        for field, value in (("padding", self.padding), ("fill", self.fill)):
            if value is not None and not _fits(value, NUMPY_DTYPES[self.dtype]):
                raise ValueError(f"{self.name}: {field} {value:g} is no {self.dtype}")
        return self


class OutputSpec(_Frozen):
    """One output. `shape` leaves out the batch axis."""

    name: str
    dtype: Dtype
    shape: tuple[Extent, ...]


class AxisSpec(_Frozen):
    """A dynamic axis. `paddable`: padding along it was seen not to change a sequence's own outputs and weights.

    `fixed`: not dynamic after all; the graph always has `max_length` positions here (of patches, of latent queries, of
    an input whose length was fixed at export), and the symbol is there for sites to name. Inputs and outputs do not.
    """

    symbol: Symbol
    max_length: Annotated[int, Field(ge=1)]
    paddable: bool
    fixed: bool = False

    @model_validator(mode="after")
    def _fixed_is_never_padded(self) -> Self:
        if self.fixed and self.paddable:
            raise ValueError(f"axis {self.symbol}: a fixed axis has one length, so nothing along it is padded")
        return self


class SiteSpec(_Frozen):
    """One place where attention is computed, and the graph's tap for it.

    The tap reads `items_input` (int64, (n,): rows of the batch) and writes `weights_output` (float32, (n, heads, query,
    key)). Both are None where the site could not be tapped; `unavailable_reason` then says why.
    """

    name: str
    layer: Annotated[int, Field(ge=0)]
    kind: Literal["self", "causal", "cross"]
    form: Literal["dense", "windowed", "linear"]
    operator: str
    heads: Annotated[int, Field(ge=1)]
    kv_heads: Annotated[int, Field(ge=1)]
    head_dim: Annotated[int, Field(ge=0)]
    query_axis: str
    key_axis: str
    items_input: str | None = None
    weights_output: str | None = None
    unavailable_reason: str = ""

    @property
    def available(self) -> bool:
        """Whether its weights can be had."""
        return self.weights_output is not None

    @model_validator(mode="after")
    def _tap_is_whole(self) -> Self:
        if (self.items_input is None) != (self.weights_output is None):
            raise ValueError(f"site {self.name}: a tap has both an input and an output, or neither")
        if self.available == bool(self.unavailable_reason):
            raise ValueError(f"site {self.name}: either a tap or a reason why there is none")
        if self.heads % self.kv_heads:
            raise ValueError(f"site {self.name}: {self.kv_heads} key heads do not divide {self.heads} heads")
        return self


class TextSpec(_Frozen):
    """How text becomes inputs: the tokenizer runs along `axis`."""

    axis: str
    max_tokens: Annotated[int, Field(ge=1)]


class Provenance(_Frozen):
    """Where a bundle comes from. `source` is a name, never a path of the machine that built it."""

    source: str
    source_sha256: Sha256 | None = None
    exporter: str
    opset: int
    created: str
    versions: dict[str, str] = Field(default_factory=dict)


class CheckReport(_Frozen):
    """What the check at the end of export or prepare saw; the reference is named in `against`."""

    model_config = ConfigDict(allow_inf_nan=False)

    against: str
    lengths: tuple[int, ...]
    output_max_abs_error: float
    output_tolerance: float
    weight_max_abs_error: float
    weight_tolerance: float
    row_sum_max_abs_error: float
    padding_max_abs_error: float | None = None
    tapped_over_source_time: float | None = None


class Manifest(_Frozen):
    """All that a bundle says about its model; `manifest.json` is this, as JSON."""

    format: Literal[1] = 1
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
    provenance: Provenance
    check: CheckReport

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        fed = [site.items_input for site in self.sites if site.items_input is not None]
        fetched = [site.weights_output for site in self.sites if site.weights_output is not None]
        named = {
            "axis": [BATCH, *(axis.symbol for axis in self.axes)],
            "site": [site.name for site in self.sites],
            "input": [*(spec.name for spec in self.inputs), *fed],
            "output": [*(spec.name for spec in self.outputs), *fetched],
            "role": [str(spec.role) for spec in self.inputs if spec.role is not InputRole.DATA],
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
    def _text_has_a_place(self) -> Self:
        if self.text is None:
            return self
        ids = self.input_of_role(InputRole.TOKEN_IDS)
        if ids is None or ids.shape != (self.text.axis,):
            raise ValueError(f"text: there is no input of token ids of shape ({self.text.axis},)")
        longest = self.axis(self.text.axis).max_length
        if self.text.max_tokens > longest:
            raise ValueError(f"text: {self.text.max_tokens} tokens exceed {longest}, the axis's greatest length")
        return self

    @property
    def fixed_lengths(self) -> dict[str, int]:
        """Length of each axis that is the same for every sequence, whatever is sent."""
        return {axis.symbol: axis.max_length for axis in self.axes if axis.fixed}

    def axis(self, symbol: str) -> AxisSpec:
        """The axis of this symbol. Raises KeyError if there is none."""
        return {axis.symbol: axis for axis in self.axes}[symbol]

    def input(self, name: str) -> InputSpec:
        """The input of this name. Raises KeyError if there is none."""
        return {spec.name: spec for spec in self.inputs}[name]

    def output(self, name: str) -> OutputSpec:
        """The output of this name. Raises KeyError if there is none."""
        return {spec.name: spec for spec in self.outputs}[name]

    def input_of_role(self, role: InputRole) -> InputSpec | None:
        """The input of this role, if the model has one."""
        return next((spec for spec in self.inputs if spec.role is role), None)


def _fits(value: float, dtype: np.dtype[np.generic]) -> bool:
    """Whether a dtype holds the value: within its range if of fractions, exactly if of whole numbers."""
    if np.issubdtype(dtype, np.floating):
        return math.isinf(value) or abs(value) <= float(np.finfo(dtype.name).max)
    if dtype == np.bool_:
        return value in {0, 1}
    range_ = np.iinfo(dtype.name)
    return float(value).is_integer() and range_.min <= value <= range_.max
