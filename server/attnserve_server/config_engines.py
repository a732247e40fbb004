"""The settings of how engines are watched and replaced; `config.Settings` has them beside all others."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic_settings import BaseSettings


class EngineSettings(BaseSettings):
    """Each field is a setting, as in `config.Settings`."""

    watchdog_floor_s: Annotated[float, Field(ge=0.5, le=3600)] = Field(
        10.0,
        description="Least seconds after which a run counts as hung; 20 times its predicted time, if that is longer; "
        "120 s for the first run of a shape. With `--isolation process` the engine is then replaced, and so is one "
        "whose loop stands still for so long; with `none`, health reports NOT_SERVING. Default: well above any pause "
        "of a busy machine.",
    )
    engine_memory_bytes: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Maximum bytes of resident memory of one engine process, shared memory included; above it, the "
        "engine is replaced. 0: no limit. Default: 0, as what is too much depends on your models.",
    )
    standby: bool = Field(
        True,
        description="With `--isolation process`, keep one more process that has imported the runtime, to replace an "
        "engine without the seconds that the import takes. Default: true, as it takes less memory than a small model.",
    )
