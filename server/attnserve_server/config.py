"""Settings: each field is a setting, a flag, an `ATTNSERVE_*` variable and a row of docs/reference/configuration.md."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from attnserve_server.domain.errors import AttnserveError

PREFIX = "ATTNSERVE_"
MIB = 2**20

Port = Annotated[int, Field(ge=0, le=65535)]
Count = Annotated[int, Field(ge=1)]


class SettingsInvalid(AttnserveError):
    """Settings are wrong; all faults are told together."""

    reason = "SETTINGS_INVALID"

    def __init__(self, faults: list[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(faults))


class Settings(BaseSettings):
    """Everything that an operator can set. Each description ends with the reason for the default."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", validate_default=True)

    repository: Path = Field(
        Path("models"),
        description="Folder of the bundles, `<repository>/<name>/<version>/`. Default: `models` in the working folder.",
    )
    models: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Models to load, as `name` or `name/version`, separated by commas. Default: all of them."
    )
    host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address that both ports listen on. Default: loopback, as nothing here authenticates callers.",
    )
    grpc_port: Port = Field(
        8001, description="Port of gRPC; 0 lets the system choose. Default: where Triton's users expect it."
    )
    http_port: Port = Field(
        8002,
        description="Port of `/metrics`, `/livez`, `/readyz`; 0 lets the system choose. Default: as Triton's metrics.",
    )
    ports_file: Path | None = Field(
        None,
        description="File to write both ports to, as JSON, once models answer. Default: none: ports are mostly fixed.",
    )
    provider: str = Field(
        "auto",
        min_length=1,
        description="onnxruntime execution provider, or `auto`: CUDA where it loads, else CPU. Default: what is there.",
    )
    require_provider: str | None = Field(
        None,
        description="Refuse to start unless this execution provider is in use. Default: none, as CPUs serve too.",
    )
    device_ids: Annotated[tuple[Annotated[int, Field(ge=0, le=255)], ...], NoDecode] = Field(
        (), description="GPUs to load each model on, as the driver numbers the visible ones. Default: all of them."
    )
    cuda_options: Annotated[dict[str, str], NoDecode] = Field(
        {},
        description="Options of the CUDA provider, `key=value,...`, as onnxruntime documents them, over our own: "
        "`gpu_mem_limit=8589934592`, `use_tf32=1`. Default: exact float32, memory as it is needed.",
    )
    cuda_graphs: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Shapes, `rows x tokens` as `1x32,8x64`, whose runs are recorded as CUDA graphs: smaller runs are "
        "padded up to them, and runs take turns. Default: none, as it is for latency on a GPU that is mostly idle.",
    )
    tensorrt_options: Annotated[dict[str, str], NoDecode] = Field(
        {},
        description="Options of the TensorRT provider, likewise: `trt_fp16_enable=1,trt_engine_cache_enable=1,"
        "trt_engine_cache_path=/cache`. Default: none beside a timing cache.",
    )
    instances: Annotated[int, Field(ge=0, le=256)] = Field(
        0,
        description="Runs at a time for each model; 0: one for each core on a CPU, three for each GPU, where one run's "
        "copies and launches overlap another's kernels. Default: that.",
    )
    intra_op_threads: Annotated[int, Field(ge=1, le=256)] = Field(
        1, description="Threads within one run. Default: 1, as parallel runs use cores better than parallel operators."
    )
    max_batch_size: Annotated[int, Field(ge=0, le=4096)] = Field(
        0,
        description="Most sequences in one run and in one request; 0: as each bundle says, which "
        "no setting exceeds. Default: that. Where sequences run alone, a request may still hold as many.",
    )
    max_batch_tokens: Annotated[int, Field(ge=1)] = Field(
        16_384,
        description="Most positions in one run, padding included. Default: 32 sequences of 512, a GPU's fill; "
        "CPU batches stay far below it by themselves.",
    )
    max_batch_bytes: Count = Field(
        1024 * MIB,
        description="Most bytes of tensors in one run, whole attention maps included; a sequence that needs more runs "
        "alone. Default: fits beside the weights in a container of a few GiB.",
    )
    batching: Literal["proved", "tested", "off"] = Field(
        "proved",
        description="What must be known before sequences share a run: `proved`, that none can change another's answer "
        "(a finite mask with unbounded scores counts where it withstood the attack at conversion); `tested`, that it "
        "withstood the attack; `off`: every sequence runs alone. What is refuted is never batched. Default: `proved`, "
        "as an answer that depends on its neighbours is wrong without an error.",
    )
    run_overhead_tokens: Annotated[float, Field(ge=0, le=1e9)] | None = Field(
        None,
        description="What one run costs before its first position, in positions: more of it makes fuller batches with "
        "more padding. Default: as measured at warm-up on this machine.",
    )
    look_ahead: Annotated[int, Field(ge=1, le=4096)] = Field(
        128,
        description="How many waiting sequences are looked at as company for the oldest: of all that wait, those "
        "nearest to it in length. Default: more than a CPU's run takes, and a GPU's fill.",
    )
    verify_batches: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        description="Share of the sequences answered from a batch that are run again alone, on idle instances, and "
        "compared: 0.001 checks one in a thousand, as far as instances are idle. Default: 0, off: nothing is kept.",
    )
    verify_action: Literal["count", "isolate"] = Field(
        "count",
        description="What follows where such an answer differs: `count` counts and logs it; `isolate` also runs each "
        "sequence of that model alone until the next start. Default: count, as isolating costs throughput.",
    )
    remember_costs: bool = Field(
        True,
        description="Keep what runs cost beside the bundle, by machine and provider, and measure it no more. Default: "
        "yes, as that saves seconds at each start; real runs correct it either way.",
    )
    max_queue_size: Count = Field(
        4096, description="Most sequences that wait for one model. Default: seconds of work on a CPU, not minutes."
    )
    max_queue_bytes: Count = Field(
        512 * MIB,
        description="Most bytes that waiting sequences and their answers need, for one model. Default: eight requests "
        "of the greatest size.",
    )
    max_text_bytes: Count = Field(
        65_536,
        description="Most bytes of UTF-8 in one text, counted before tokenizing. Default: 8192 English tokens, twice.",
    )
    max_request_bytes: Annotated[int, Field(ge=1024, le=2**31 - 1)] = Field(
        64 * MIB, description="Most bytes of one gRPC message from a caller. Default: what the SDK allows both ways."
    )
    max_response_bytes: Annotated[int, Field(ge=1, le=2**31 - 64 * MIB)] = Field(
        48 * MIB,
        description="Most bytes of tensor data in one answer. Default: leaves room for tokens under a 64 MiB message.",
    )
    max_stream_in_flight: Annotated[int, Field(ge=1, le=65_536)] = Field(
        256,
        description="Requests under way on one stream; at the bound the server reads no further. Default: keeps a "
        "batch full while another runs.",
    )
    max_stream_answer_bytes: Count = Field(
        128 * MIB,
        description="Most bytes of tensor data in answers that one stream computes or has not been read from yet; more "
        "requests wait. Default: a few of the greatest answers, so that a slow reader cannot fill the memory.",
    )
    keepalive_s: Annotated[float, Field(ge=1, le=7200)] = Field(
        60.0,
        description="Idle seconds before a connection is pinged. Default: less than load balancers' 350 s.",
    )
    keepalive_min_interval_s: Annotated[float, Field(ge=0, le=7200)] = Field(
        5.0,
        description="Least seconds between a caller's pings; faster ones are cut off. Default: gRPC's own is minutes.",
    )
    drain_grace_s: Annotated[float, Field(ge=0, le=3600)] = Field(
        25.0,
        description="Seconds that requests under way get after SIGTERM. Default: below Kubernetes' 30 s to SIGKILL.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least level that is logged. Default: callers' faults show, each answer does not."
    )

    @field_validator("cuda_graphs")
    @classmethod
    def _shapes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [shape for shape in value if re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,5}", shape) is None]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is no shape as 8x64")
        return value

    @field_validator("models", "cuda_graphs", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("device_ids", mode="before")
    @classmethod
    def _numbers(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("cuda_options", "tensorrt_options", mode="before")
    @classmethod
    def _pairs(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        pairs = [part.partition("=") for part in value.split(",") if part.strip()]
        wrong = [key for key, equals, _ in pairs if not equals or not key.strip()]
        if wrong:
            raise ValueError(f"{wrong[0].strip()!r} is no key=value")
        return {key.strip(): text.strip() for key, _, text in pairs}

    @field_validator("ports_file", "require_provider", "run_overhead_tokens", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        if self.grpc_port == self.http_port != 0:
            raise ValueError(f"grpc_port and http_port are both {self.grpc_port}; they must differ")
        return self

    @classmethod
    def load(cls, flags: Mapping[str, Any]) -> Settings:
        """Settings from flags, then variables, then defaults.

        Args:
            flags: What the command line gave, by field; None means not given.

        Raises:
            SettingsInvalid: With every fault.
        """
        given = {name: value for name, value in flags.items() if value is not None}
        try:
            return cls(**given)
        except ValidationError as error:
            raise SettingsInvalid([_fault(dict(fault)) for fault in error.errors(include_url=False)]) from None


def variable_of(field: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + field.upper()


def flag_of(field: str) -> str:
    """The command line flag of a setting."""
    return "--" + field.replace("_", "-")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fault(fault: dict[str, Any]) -> str:
    message = str(fault["msg"]).removeprefix("Value error, ")
    if not fault["loc"]:
        return message
    field = str(fault["loc"][0])
    message = message[0].lower() + message[1:]
    return f"{flag_of(field)} ({variable_of(field)}): {message}, got {str(fault['input'])!r}"
