"""The part of a manifest that describes an attention site and its tap, and checks that its fields agree."""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from attnserve_server.domain.values import AttentionValue
from attnserve_server.model.bands import BandSpec
from attnserve_server.model.frozen import Frozen

LOWEST_SCORE: Final = float(np.finfo(np.float32).min)
"""What a tap writes as the score of a hidden key. A run finishes with minus infinity in its place."""


class SiteSpec(Frozen):
    """One place where the graph computes attention, and its tap.

    The tap reads `items_input`, int64 (n,), rows of the batch. It writes `weights_output`, float32 (n, heads, query,
    key), or (n, heads, query, columns of the band) with a `band` and without `whole_rows`. Both are None if the site
    could not be tapped; `unavailable_reason` then has the reason.
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
    scores_unavailable_reason: str = ""
    """Why it gives no scores."""

    def output_of(self, values: AttentionValue) -> str | None:
        """Return the name of the tap's output with weights or scores; None if it gives none."""
        return self.scores_output if values is AttentionValue.SCORES else self.weights_output

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
        if self.available == bool(self.unavailable_reason):
            raise ValueError(f"site {self.name}: it must have either a tap or an unavailable_reason")
        if self.heads % self.kv_heads:
            raise ValueError(f"site {self.name}: {self.heads} heads are not a multiple of {self.kv_heads} kv_heads")
        if self.band is not None and self.form != "windowed":
            raise ValueError(f"site {self.name}: form is {self.form}; only windowed sites have a band")
        if self.scores_output is not None and (not self.available or self.scores_unavailable_reason):
            raise ValueError(f"site {self.name}: scores need a tap, and no scores_unavailable_reason")
        if self.scores_output is not None and self.band is not None and not self.whole_rows:
            raise ValueError(f"site {self.name}: scores are over all keys, so its weights need whole_rows")
        if self.whole_rows and self.band is None:
            raise ValueError(f"site {self.name}: whole_rows needs a band")
        return self
