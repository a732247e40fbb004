"""Attention sites as a manifest describes them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from attnserve_server.model.bands import BandSpec
from attnserve_server.model.frozen import Frozen


class SiteSpec(Frozen):
    """One place where attention is computed, and the graph's tap for it.

    The tap reads `items_input` (int64, (n,): rows of the batch) and writes `weights_output` (float32, (n, heads, query,
    key), or with a `band` and without `whole_rows` (n, heads, query, columns of the band)). Both are None where the
    site could not be tapped; `unavailable_reason` then says why.
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
    """Which keys a query of a windowed site sees; None: its weights are of all keys."""
    whole_rows: bool = False
    """Whether the tap writes (n, heads, query, key) all the same, of which the band's columns are taken afterwards."""

    @property
    def available(self) -> bool:
        """Whether its weights can be had."""
        return self.weights_output is not None

    @property
    def columns(self) -> str | int:
        """What the last axis of its weights has: the key axis, or so many columns of the band."""
        return self.key_axis if self.band is None or self.whole_rows else self.band.width

    @property
    def weight_axes(self) -> tuple[str, str]:
        """The axis symbols of the rows and of the columns of its weights; the columns of a band have none: empty."""
        return self.query_axis, self.columns if isinstance(self.columns, str) else ""

    @model_validator(mode="after")
    def _tap_is_whole(self) -> Self:
        if (self.items_input is None) != (self.weights_output is None):
            raise ValueError(f"site {self.name}: a tap has both an input and an output, or neither")
        if self.available == bool(self.unavailable_reason):
            raise ValueError(f"site {self.name}: either a tap or a reason why there is none")
        if self.heads % self.kv_heads:
            raise ValueError(f"site {self.name}: {self.kv_heads} key heads do not divide {self.heads} heads")
        if self.band is not None and self.form != "windowed":
            raise ValueError(f"site {self.name}: a band is of windowed sites, and this one is {self.form}")
        if self.whole_rows and self.band is None:
            raise ValueError(f"site {self.name}: rows are whole anyway where there is no band")
        return self
