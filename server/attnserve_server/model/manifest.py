"""The manifest: everything that a bundle states about its model and its attention sites, with checks that it agrees.

Other parts are in `specs`, `report` and `certificate`, and are imported from here. A bundle is a converted model's
folder, and a site a place that computes attention. Parts that contradict each other raise pydantic's ValidationError.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, StringConstraints, model_validator

from attnserve_server.domain.values import AttentionValue, EffectiveSelection
from attnserve_server.model.bands import BandSpec
from attnserve_server.model.certificate import Batching, Certificate
from attnserve_server.model.formula import parsed
from attnserve_server.model.frozen import (
    BATCH,
    NAME_PATTERN,
    NUMPY_DTYPES,
    Dimension,
    Dtype,
    FileName,
    Frozen,
    ModelName,
    ModelVersion,
    Sha256,
    is_model_name,
    is_model_version,
)
from attnserve_server.model.heads import EmbeddingSpec, HeadSpec, check_task
from attnserve_server.model.past import PastSpec
from attnserve_server.model.report import CheckReport, GoldenSpec, Provenance, ReferenceFeatures
from attnserve_server.model.specs import (
    AxisSpec,
    DerivedLength,
    Following,
    IndexRange,
    InputRole,
    InputSpec,
    OutputSpec,
    TextSpec,
    axes_under,
)

__all__ = [
    "BATCH", "LOWEST_SCORE", "NAME_PATTERN", "NUMPY_DTYPES", "AxisSpec", "CheckReport", "DerivedLength",
    "Dimension", "Dtype", "Following", "GoldenSpec", "IndexRange", "InputRole", "InputSpec", "Manifest",
    "OutputSpec", "PastSpec", "Provenance", "SiteSpec", "TextSpec", "axes_under", "is_model_name",
    "is_model_version",
]  # fmt: skip

Rewriting = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]{1,64}$")]
"""The runtime's name of one of its graph optimizers."""


LOWEST_SCORE: Final = float(np.finfo(np.float32).min)
"""What a tap writes as the score of a hidden key. A run finishes with minus infinity in its place."""


class SiteSpec(Frozen):
    """One place where the graph computes attention, and its tap.

    The tap reads `items_input`, int64 (n,), rows of the batch. It writes `weights_output`, float32 (n, heads, query,
    key), or (n, heads, query, columns of the band) with a `band` and without `whole_rows`. Both are None if the site
    has no tap, for the `unavailable_reason`.
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
    band: BandSpec | None = None
    """The keys of each column of a windowed site's weights; None: the weights are over all keys."""
    whole_rows: bool = False
    """Whether the tap of a banded site writes (n, heads, query, key); the band's columns are taken after the run."""
    scores_output: str | None = None
    """The tap's second output, the scores, of the shape of the weights over all keys; None: it gives none."""
    scores_unavailable_reason: str = ""  # why it gives no scores
    mean_output: str | None = None
    """The weights' mean over all heads, without that axis. None: one head, or a bundle of an earlier release."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the tap's outputs."""
        return tuple(filter(None, (self.weights_output, self.scores_output, self.mean_output)))

    def output_of(self, values: AttentionValue) -> str | None:
        """Return the name of the tap's output with weights or scores; None if it gives none."""
        return self.scores_output if values is AttentionValue.SCORES else self.weights_output

    def mean_of(self, selection: EffectiveSelection) -> str | None:
        """Return `mean_output` if a selection of this site reads only the mean over all heads; else None."""
        return self.mean_output if self.mean_output and selection.joins_heads(self.layer, self.heads) else None

    @property
    def why_no_scores(self) -> str:
        """Why it gives no scores; empty if it gives them. Bundles of earlier releases state nothing."""
        if self.scores_output is not None:
            return ""
        earlier = "its bundle was converted before scores were served; convert the model again"
        return self.scores_unavailable_reason or self.unavailable_reason or earlier

    @property
    def available(self) -> bool:
        """Whether the site has a tap."""
        return self.weights_output is not None

    @property
    def columns(self) -> str | int:
        """The last dimension of the weights: the key axis, or the number of the band's columns."""
        return self.key_axis if self.band is None or self.whole_rows else self.band.width

    @property
    def weight_axes(self) -> tuple[str, str]:
        """Axis symbols of the rows and of the columns of the weights; empty for the columns of a band."""
        return self.query_axis, self.columns if isinstance(self.columns, str) else ""

    @model_validator(mode="after")
    def _tap_is_whole(self) -> Self:
        if (self.items_input is None) != (self.weights_output is None):
            raise ValueError(f"site {self.name}: items_input and weights_output must be given together")
        if self.mean_output is not None and not self.available:
            raise ValueError(f"site {self.name}: a mean_output needs a weights_output")
        if self.available == bool(self.unavailable_reason):
            raise ValueError(f"site {self.name}: it must have either a tap or an unavailable_reason")
        if self.heads % self.kv_heads:
            raise ValueError(f"site {self.name}: {self.heads} heads are not a multiple of {self.kv_heads} kv_heads")
        if self.band is not None and self.form != "windowed":
            raise ValueError(f"site {self.name}: form is {self.form}; only windowed sites have a band")
        narrow = self.band is not None and not self.whole_rows
        if self.scores_output is not None and (not self.available or self.scores_unavailable_reason or narrow):
            raise ValueError(f"site {self.name}: scores need a tap over all keys, and no scores_unavailable_reason")
        if self.whole_rows and self.band is None:
            raise ValueError(f"site {self.name}: whole_rows needs a band")
        return self


class Manifest(Frozen):
    """The content of `manifest.json`.

    Format 2 has a batching certificate; format 1, of earlier releases, has none. Whether axes are padded and rows share
    a run also depends on the policy: `under` returns the manifest for a policy, and scheduling and collation use that.
    """

    format: Literal[1, 2] = 2
    name: ModelName
    version: ModelVersion
    digest: Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
    files: dict[FileName, Sha256]
    precision: Literal["fp32", "fp16", "int8", "bf16-scores"]  # the last one only as served: `equality.FLOORS`
    max_batch_size: Annotated[int, Field(ge=1)]
    axes: tuple[AxisSpec, ...]
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
    sites: tuple[SiteSpec, ...] = ()
    vocabulary_size: Annotated[int, Field(ge=0)] = 0
    text: TextSpec | None = None
    head: HeadSpec | None = None
    embedding: EmbeddingSpec | None = None
    left_out: tuple[Rewriting, ...] | None = None
    """Graph optimizers that the runtime disables on a CPU, because this graph is faster without them.

    None: the server's default, `engine.session.LEFT_OUT`.
    """
    provenance: Provenance
    check: CheckReport
    golden: GoldenSpec | None = None
    reference_features: ReferenceFeatures | None = None  # None: not a model of text, or of an earlier release
    certificate: Certificate | None = None
    past: PastSpec | None = None
    """The continuing graph of a decoder with a cache; None: sequences have no past."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        sites = self.sites
        named = {
            "axis": [BATCH, *(axis.symbol for axis in self.axes)],
            "site": [site.name for site in sites],
            "input": [*(spec.name for spec in self.inputs), *(site.items_input for site in sites if site.items_input)],
            "output": [*(spec.name for spec in self.outputs), *(name for site in sites for name in site.outputs)],
            # An encoder-decoder has token ids and a mask along each of its axes.
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
        # A site without a tap may have axes that no tensor has.
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
        sources = {axis.symbol for axis in self.axes if axis.follows is None}
        for axis in self.axes:
            for source in axis.follows.symbols if axis.follows else ():
                if source not in sources:
                    raise ValueError(
                        f"axis {axis.symbol}: its source {source} must be another axis that is not derived"
                    )
        for spec in self.inputs:
            derived = {extent for extent in spec.shape if isinstance(extent, str)} - given
            if derived:
                raise ValueError(f"input {spec.name}: {sorted(derived)} are derived axes, which inputs cannot have")
        return self

    @model_validator(mode="after")
    def _text_has_a_place(self) -> Self:
        if self.text is None:
            return self
        for axis, max_tokens in self.text.axes.items():
            if self.input_of_role(InputRole.TOKEN_IDS, axis) is None:
                raise ValueError(f"text: no input of role token_ids has the shape ({axis},)")
            longest = self.axis(axis).max_length
            if max_tokens > longest:
                raise ValueError(f"text: {max_tokens} tokens exceed {longest}, the maximum length of axis {axis}")
        return self

    @model_validator(mode="after")
    def _head_has_outputs(self) -> Self:
        check_task(self.head, self.embedding, self.outputs)
        return self

    @model_validator(mode="after")
    def _certificate_covers_the_axes(self) -> Self:
        if (self.certificate is None) is not (self.format == 1):
            raise ValueError("a manifest of format 2 must have a certificate, and one of format 1 must not")
        if self.certificate is None:
            return self
        listed = [clause.axis for clause in self.certificate.clauses]
        wanted = [BATCH, *(axis.symbol for axis in self.axes if axis.free)]
        missing = sorted(set(wanted) - set(listed))
        if missing or len(set(listed)) != len(listed):
            raise ValueError(f"certificate: {listed} must have one clause for each of {wanted}")
        strangers = sorted({need.input for need in self.certificate.masks} - {spec.name for spec in self.inputs})
        if strangers:
            raise ValueError(f"certificate: masks {strangers} are not inputs")
        return self

    @model_validator(mode="after")
    def _past_agrees(self) -> Self:
        if self.past is not None:
            self.past.check(self)
        return self

    @property
    def continuing(self) -> Manifest | None:
        """The manifest of the continuing graph, under the same policy; None if there is none."""
        return None if self.past is None else self.past.continuing(self)

    def under(self, batching: Batching) -> Manifest:
        """Return the manifest for a policy: `paddable` of each axis, and `max_batch_size` 1 if rows run alone.

        Without a certificate no axis is padded, and rows of equal lengths share a run.
        """
        certificate = self.certificate
        joined = batching != "off" and (certificate is None or certificate.clause(BATCH).allows(batching))
        return self.model_copy(
            update={
                "axes": axes_under(self.axes, certificate, batching),
                "max_batch_size": self.max_batch_size if joined else 1,
                "past": None if self.past is None else self.past.under(batching),
            }
        )

    def breaks_masks(self, tensors: Mapping[str, npt.NDArray[Any]]) -> bool:
        """Whether one sequence's masks violate an assumption of the certificate, so that it must not be padded.

        Args:
            tensors: inputs by name, without the batch axis; every input of `certificate.masks` must be among them.
        """
        needs = () if self.certificate is None else self.certificate.masks
        return any(not need.met_by(tensors[need.input], self.input(need.input).padding) for need in needs)

    @property
    def fixed_lengths(self) -> dict[str, int]:
        """Length of each fixed axis, by symbol."""
        return {axis.symbol: axis.max_length for axis in self.axes if axis.fixed}

    def with_derived(self, lengths: Mapping[str, int]) -> dict[str, int]:
        """Return a sequence's lengths by axis symbol, with those of the derived axes added."""
        found = {axis.symbol: axis.derived.at(lengths) for axis in self.axes if axis.derived is not None}
        for axis in self.axes:
            if axis.formula and lengths.keys() >= {*(formula := parsed(axis.formula)).symbols}:
                found[axis.symbol] = formula.length_at(lengths)
        return {**lengths, **{symbol: length for symbol, length in found.items() if length is not None}}

    def axis(self, symbol: str) -> AxisSpec:
        """Return the axis of this symbol. Raise KeyError if there is none."""
        return {axis.symbol: axis for axis in self.axes}[symbol]

    def input(self, name: str) -> InputSpec:
        """Return the input of this name. Raise KeyError if there is none."""
        return {spec.name: spec for spec in self.inputs}[name]

    def output(self, name: str) -> OutputSpec:
        """Return the output of this name. Raise KeyError if there is none."""
        return {spec.name: spec for spec in self.outputs}[name]

    def input_of_role(self, role: InputRole, axis: str = "") -> InputSpec | None:
        """Return the input of this role along `axis` alone; the first of this role if `axis` is empty; None if none."""
        return next(
            (spec for spec in self.inputs if spec.role is role and (not axis or spec.shape == (axis,))),
            None,
        )

    @property
    def text_as_written(self) -> tuple[str, ...]:
        """The axes along which the tokenizer pads and truncates as its file declares.

        If the bundle does not state them: the first text's axis, unless a mask hides padding along it.
        """
        if self.text is None or self.text.as_written is not None:
            return () if self.text is None else self.text.as_written or ()
        hidden = self.input_of_role(InputRole.ATTENTION_MASK, self.text.axis) is not None
        return () if hidden else (self.text.axis,)

    def vocabulary_of(self, spec: InputSpec) -> int:
        """Return the number of valid ids of an input of token ids; 0 if it is not known."""
        return spec.vocabulary_size or self.vocabulary_size
