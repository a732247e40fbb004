"""Attention maps as pandas and xarray have them. Both libraries are extras, and imported by the first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from attnserve_client._map_data import MapData
from attnserve_client._tokens import Token

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


def frame(found: MapData, head: int | None) -> pd.DataFrame:
    """Return one head's weights as a table: a row for each query, a column for each key, named by their texts.

    Raises:
        ImportError: pandas is not installed.
        ValueError: The map has no such head, or holds scores.
    """
    pandas: Any = _library("pandas")
    weights = found.head_weights(head)
    rows, columns = (
        pandas.Index([token.text for token in tokens], name=name)
        for name, tokens in (("query", found.query_tokens), ("key", found.key_tokens))
    )
    made: pd.DataFrame = pandas.DataFrame(weights, index=rows, columns=columns)
    return made


def data_array(found: MapData) -> xr.DataArray:
    """Return weights, or scores, as an array with the dimensions `head`, `query` and `key`.

    The coordinates `query` and `key` are indices of units, `query_text` and `key_text` their texts. `head` has the
    numbers of the heads, unless they are joined.

    Raises:
        ImportError: xarray is not installed.
    """
    xarray: Any = _library("xarray")
    heads = {} if found.is_joined else {"head": ("head", np.array(found.heads))}
    made: xr.DataArray = xarray.DataArray(
        found.scores if found.values == "scores" else found.weights,
        dims=("head", "query", "key"),
        name=found.values,
        coords=heads | _units("query", found.query_tokens) | _units("key", found.key_tokens),
        attrs={
            "model": found.model,
            "sites": list(found.sites),
            "layer": found.layer,
            "heads": list(found.heads),
            "kind": found.kind,
            "form": found.form,
        },
    )
    return made


def _units(name: str, tokens: tuple[Token, ...]) -> dict[str, Any]:
    return {
        name: (name, np.array([token.index for token in tokens], dtype=np.int64)),
        f"{name}_text": (name, np.array([token.text for token in tokens], dtype=object)),
    }


def _library(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        raise ImportError(f"this needs {name}: pip install 'attnserve[{name}]'") from None
