"""Settings: each field is a setting, a flag, an `ATTNSERVE_*` variable and a row of docs/reference/configuration.md.

`Settings.load` takes a setting from its flag, else from its variable, else the default. It raises SettingsInvalid,
which lists all invalid settings.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from attnserve_server.config_audit import AuditSettings
from attnserve_server.config_bounds import MIB, Bounds, Count, size_of
from attnserve_server.config_engines import EngineSettings
from attnserve_server.config_models import ModelSettings
from attnserve_server.config_reach import ReachSettings, why_no_spans
from attnserve_server.domain.errors import AttnserveError
from attnserve_server.domain.machine import is_loopback, suits_processes

PREFIX = "ATTNSERVE_"
_OTHERS = tuple(
    PREFIX + name
    for name in (
        "FAILPOINTS",
        "TRACEBACK",
        "E2E_REPOSITORY",
        "E2E_CACHE",
        "BROWSER_REPOSITORY",
        "PICTURES",
        "SERVER",
        "TLS",
        "CA",
        "CERT",
        "KEY",
        "TOKEN",
        "TOKEN_FILE",
        "MODELS_DIR",
    )
)
"""Variables that are no settings: for tests, for tracebacks, of the client, and of the compose file."""


class SettingsInvalid(AttnserveError):
    """One or more settings are invalid; the message lists all of them."""

    reason = "SETTINGS_INVALID"

    def __init__(self, faults: list[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(faults))


class Serving(ModelSettings, ReachSettings, AuditSettings, EngineSettings):
    """What is served, where, to whom, and how it runs. Each description ends with the reason for the default."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", validate_default=True)

    provider: str = Field(
        "auto",
        min_length=1,
        description="onnxruntime execution provider, or `cpu`, `cuda`, `openvino`, `tensorrt`, or `auto`: CUDA if it "
        "loads, else CPU. `attnserve-server recommend` measures which is fastest. Default: `auto`, which needs no "
        "package beyond the runtime.",
    )
    require_provider: str | None = Field(
        None,
        description="Refuse to start unless this execution provider is in use. Default: none, as a CPU serves too.",
    )
    precision: Literal["bundle", "bf16"] = Field(
        "bundle",
        description="Precision of the arithmetic. `bf16`: bfloat16, with `--provider openvino` on a processor with AMX "
        "or AVX512_BF16. Receipts state the precision that serves. Default: `bundle`, the bundle's own, because "
        "bfloat16 changes answers.",
    )
    device_ids: Annotated[tuple[Annotated[int, Field(ge=0, le=255)], ...], NoDecode] = Field(
        (), description="Visible GPUs to load each model on, by the driver's numbers. Default: all of them."
    )
    cuda_options: Annotated[dict[str, str], NoDecode] = Field(
        {},
        description="Options of the CUDA provider, `key=value,...`, as onnxruntime documents them. They override the "
        "server's: `gpu_mem_limit=8589934592`, `use_tf32=1`. Default: exact float32, and memory as it is needed.",
    )
    cuda_graphs: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Shapes, `rows x tokens` as `1x32,8x64`, whose runs are recorded as CUDA graphs. Smaller runs are "
        "padded to them, and runs are executed one at a time. Default: none, as this helps on a mostly idle GPU only.",
    )
    tensorrt_options: Annotated[dict[str, str], NoDecode] = Field(
        {},
        description="Options of the TensorRT provider in the same form: `trt_fp16_enable=1,trt_engine_cache_enable=1,"
        "trt_engine_cache_path=/cache`. Default: a timing cache only, as other options depend on the model.",
    )
    openvino_options: Annotated[dict[str, str], NoDecode] = Field(
        {},
        description="Properties of OpenVINO's CPU device in the same form, as OpenVINO documents them: "
        "`ENABLE_HYPER_THREADING=NO`. They override the server's. Default: none; streams, threads and precision follow "
        "the settings of these names.",
    )
    shape_buckets: Annotated[int, Field(ge=0, le=1024)] | None = Field(
        None,
        description="Maximum number of shapes, rows x tokens, that OpenVINO prepares at warm-up. Smaller runs are "
        "padded to them where padding is proved to change no answer; 0: none. Default: up to 64 where a new shape's "
        "first run takes twice the time of later ones, as measured at warm-up, else none.",
    )
    cache_dir: Path | None = Field(
        None,
        description="Folder where OpenVINO stores compiled graphs, with their weights, so that later starts load "
        "faster. Default: none, as a copy of each model takes disk space.",
    )
    isolation: Literal["auto", "process", "none"] = Field(
        "auto",
        description="`process`: front processes, and an engine process for each model, which is replaced if a run "
        "crashes. `none`: one process, which ends then. Default: auto, `process` on four cores or more.",
    )
    fronts: Annotated[int, Field(ge=0, le=64)] = Field(
        0, description="Front processes; 0: one on two cores, at most 8. Default: 0, as runs need the other cores."
    )
    instances: Annotated[int, Field(ge=0, le=256)] = Field(
        0,
        description="Maximum number of concurrent runs of each model; 0: one per core on a CPU, three per GPU, where "
        "the copies and launches of one run overlap the kernels of another. Default: 0, as that uses the whole "
        "machine.",
    )
    intra_op_threads: Annotated[int, Field(ge=1, le=256)] = Field(
        1, description="Threads within one run. Default: 1, as parallel runs use cores better than parallel operators."
    )
    wide_threads: Annotated[int, Field(ge=0, le=256)] = Field(
        0,
        description="Threads of a run on a CPU while no other work waits or runs; 0: one per core, 1: off. The second "
        "session that this takes shares the weights through a temporary file of their size, which is removed as soon "
        "as it is mapped. Default: 0, as a lone request then waits two thirds as long on two cores.",
    )
    max_batch_size: Annotated[int, Field(ge=0, le=4096)] = Field(
        0,
        description="Maximum number of sequences in one run and in one request; 0: the bundle's own limit, which no "
        "setting exceeds. If sequences run alone, a request may still hold as many. Default: 0, as conversion "
        "found that limit by running the model.",
    )
    max_batch_tokens: Annotated[int, Field(ge=1)] = Field(
        16_384,
        description="Maximum number of tokens in one run, padding included. Default: 32 sequences of 512, which fill "
        "a GPU; batches on a CPU stay far below it.",
    )
    max_batch_bytes: Count = Field(
        1024 * MIB,
        description="Maximum bytes of tensors in one run, with whole attention maps; a sequence that needs more runs "
        "alone. Default: fits beside the weights in a container of a few GiB.",
    )
    batching: Literal["proved", "tested", "off"] = Field(
        "proved",
        description="Which sequences share a run. `proved`: only if no sequence can change another's answer "
        "(a finite mask with unbounded scores counts if the attack at conversion changed no answer); `tested`: also if "
        "the attack changed no answer; `off`: every sequence runs alone. A refuted model is never batched. Default: "
        "`proved`, as an answer that depends on its batch neighbours is wrong without an error.",
    )
    run_overhead_tokens: Annotated[float, Field(ge=0, le=1e9)] | None = Field(
        None,
        description="Overhead of one run, in tokens: a greater value makes fuller batches with more padding. Default: "
        "as measured at warm-up on this machine.",
    )
    look_ahead: Annotated[int, Field(ge=1, le=4096)] = Field(
        128,
        description="Number of waiting sequences, nearest in length to the oldest, that are considered for its batch. "
        "Default: more than a run on a CPU takes, and enough to fill a GPU.",
    )
    verify_batches: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        description="Share of the sequences from batches that idle instances run again alone, to compare the answers: "
        "0.001 checks at most one in a thousand. Default: 0, off, as copies of answers take memory.",
    )
    verify_action: Literal["count", "isolate"] = Field(
        "count",
        description="Action if such an answer differs: `count` counts and logs it; `isolate` also runs each sequence "
        "of that model alone until the next start. Default: `count`, as isolation costs throughput.",
    )
    remember_costs: bool = Field(
        True,
        description="Store the measured costs of runs beside the bundle, by machine and provider, and reuse them. "
        "Default: true, as that saves seconds at each start; later runs correct the costs in any case.",
    )
    drain_grace_s: Annotated[float, Field(ge=0, le=3600)] = Field(
        25.0,
        description="Seconds that pending requests have after SIGTERM. Default: below the 30 s of Kubernetes before "
        "SIGKILL.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info",
        description="Minimum level of logged lines. Default: `info`, which shows invalid requests, not every answer.",
    )

    tracing: bool = Field(
        False,
        description="Send spans of requests and batches to an OpenTelemetry collector, by OTLP over gRPC, and put "
        "trace ids on latency histograms. The variables `OTEL_*` state where, and which share; needs the extra `otel`. "
        "Default: false, as only you know the collector.",
    )

    @field_validator("tracing")
    @classmethod
    def _exports(cls, value: bool) -> bool:
        wrong = why_no_spans(os.environ) if value else ""
        if wrong:
            raise ValueError(wrong)
        return value

    @field_validator("cuda_graphs")
    @classmethod
    def _shapes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [shape for shape in value if re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,5}", shape) is None]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is not a shape; write rows x tokens, such as 8x64")
        return value

    @field_validator("models", "cuda_graphs", "device_ids", "cors_origin", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("cuda_options", "openvino_options", "tensorrt_options", mode="before")
    @classmethod
    def _pairs(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        pairs = [part.partition("=") for part in value.split(",") if part.strip()]
        wrong = [key for key, equals, _ in pairs if not equals or not key.strip()]
        if wrong:
            raise ValueError(f"{wrong[0].strip()!r} is not key=value")
        return {key.strip(): text.strip() for key, _, text in pairs}

    @field_validator(
        *("ports_file", "require_provider", "run_overhead_tokens", "shape_buckets", "cache_dir"),
        *("explorer", "tls_cert", "tls_key", "tls_client_ca", "tokens_file"),
        mode="before",
    )
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value

    @property
    def isolated(self) -> bool:
        """Whether the server is several processes: `isolation`, decided for this machine."""
        return self.isolation == "process" or (self.isolation == "auto" and suits_processes())

    @model_validator(mode="after")
    def _agree(self) -> Self:
        for name in ("http_port", "rest_port"):
            if self.grpc_port == getattr(self, name) != 0:
                raise ValueError(f"grpc_port and {name} are both {self.grpc_port}; they must differ")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("of --tls-cert and --tls-key only one is set; set both, or neither")
        if self.tls_client_ca and not self.tls_cert:
            raise ValueError("--tls-client-ca needs TLS: set --tls-cert and --tls-key")
        missing = [] if self.tls_cert else ["without TLS (set --tls-cert and --tls-key)"]
        if not self.tokens_file and not self.tls_client_ca:
            missing += ["without a check of callers (set --tokens-file or --tls-client-ca)"]
        if missing and not self.insecure and not is_loopback(self.host):
            raise ValueError(
                f"--host {self.host} can be reached from other machines, {' and '.join(missing)}; "
                "use 127.0.0.1, or accept the risk with --insecure (ATTNSERVE_INSECURE=true)"
            )
        return self


class Settings(Bounds, Serving):
    """All settings."""

    @field_validator("*", mode="before")
    @classmethod
    def _sizes(cls, value: object, info: ValidationInfo) -> object:
        of_bytes = isinstance(value, str) and str(info.field_name).endswith("_bytes")
        return size_of(str(value)) if of_bytes else value

    @classmethod
    def load(cls, flags: Mapping[str, Any]) -> Settings:
        """Make settings from flags, then variables, then defaults.

        Args:
            flags: values of the command line by field; None: not given.

        Raises:
            SettingsInvalid: with every invalid setting, and every `ATTNSERVE_*` variable that is none.
        """
        given = {name: value for name, value in flags.items() if value is not None}
        faults = unknown_variables(os.environ)
        try:
            settings = cls(**given)
        except ValidationError as error:
            faults = [_fault(dict(fault)) for fault in error.errors(include_url=False)] + faults
            raise SettingsInvalid(faults) from None
        if faults:
            raise SettingsInvalid(faults)
        return settings


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Return a fault for each `ATTNSERVE_*` variable that neither the server nor the client reads.

    Kubernetes sets variables for each service. Those of a service named `attnserve`, or `attnserve-...`, are
    not checked: they share the prefix of its `*_SERVICE_HOST`.
    """
    services = {name.removesuffix("_SERVICE_HOST") for name in environment if name.endswith("_SERVICE_HOST")}
    known = [variable_of(field) for field in Settings.model_fields]
    faults = []
    for name in sorted(environment):
        of_service = any(name.startswith((f"{each}_SERVICE_", f"{each}_PORT")) for each in services)
        if not name.startswith(PREFIX) or name in known or name in _OTHERS or of_service:
            continue
        close = difflib.get_close_matches(name.removeprefix(PREFIX), [each.removeprefix(PREFIX) for each in known], 1)
        remedy = f"did you mean {PREFIX}{close[0]}?" if close else "`attnserve-server serve --help` lists them"
        faults.append(f"{name}: there is no such setting; {remedy}")
    return faults


def variable_of(field: str) -> str:
    """Return the environment variable of a setting."""
    return PREFIX + field.upper()


def flag_of(field: str) -> str:
    """Return the command line flag of a setting."""
    return "--" + field.replace("_", "-")


def _fault(fault: dict[str, Any]) -> str:
    message = str(fault["msg"]).removeprefix("Value error, ")
    if not fault["loc"]:
        return message
    field = str(fault["loc"][0])
    message = message[0].lower() + message[1:]
    return f"{flag_of(field)} ({variable_of(field)}): {message}, got {str(fault['input'])!r}"
