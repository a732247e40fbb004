"""Settings of loading: which models, how their bundles are tried, when the server is ready, and who may change them.

`config.Settings` has them with all others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, NoDecode


class ModelSettings(BaseSettings):
    """The settings of loading. Each description ends with the reason for the default."""

    repository: Path = Field(
        Path("models"),
        description="Folder of the bundles, `<repository>/<name>/<version>/`. Default: `models` in the working folder.",
    )
    models: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Models to load, as `name` or `name/version`, separated by commas. Default: every model."
    )
    ready: Literal["any", "all"] = Field(
        "any",
        description="When health and `/readyz` report the server ready. `any`: once every model has been tried and one "
        "serves. `all`: once every model and version serves; after that, while each model has a version that serves. "
        "Default: `any`, so that one bad bundle does not take a replica out of service.",
    )
