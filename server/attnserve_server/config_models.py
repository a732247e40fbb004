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
    try_loads: bool = Field(
        True,
        description="Load each bundle in a separate process first, and repeat its golden answers there, so that one "
        "that crashes, hangs or takes too much memory fails alone. With `--isolation process`, for bundles that are "
        "loaded after the start: before it is over, an engine is such a process itself. Default: true, as with one "
        "process a bad bundle would otherwise end the server.",
    )
    load_timeout_s: Annotated[float, Field(gt=0, le=86_400)] = Field(
        300.0,
        description="Seconds that a bundle may take to load in that process. Default: models of several GB load in "
        "less, on a slow disk too.",
    )
    load_memory_bytes: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Memory that that process may take, in bytes, without pages of files; 0: 1 GiB and six times the "
        "bundle's size, at most the memory of the machine or container. Default: 0, which is five times what MiniLM "
        "takes.",
    )
    admin: bool = Field(
        False,
        description="Serve `ModelService`, by which callers with the scope `admin` load, unload and reload models. "
        "Default: false, as a server without tokens would let every caller do so.",
    )
    reflection: bool = Field(
        False,
        description="Serve gRPC reflection, by which tools such as grpcurl learn the methods, and channelz, which "
        "lists the connections of the process that answers; with tokens, to callers with the scope `admin`. Default: "
        "false, as connections show who calls.",
    )
    watch_repository: bool = Field(
        False,
        description="Look at the repository each second, load bundles that appear or change, and unload those that are "
        "removed. SIGHUP does the same once. Default: false, as a folder that disappears by mistake would end its "
        "model.",
    )
