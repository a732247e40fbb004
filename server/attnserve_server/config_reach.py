"""Settings of how the server is reached: its ports, and who may call it. `config.Settings` has them with all others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import util
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode

from attnserve_server.domain.machine import is_loopback

Port = Annotated[int, Field(ge=0, le=65535)]


def why_no_spans(environment: Mapping[str, str]) -> str:
    """Return why spans cannot be exported, with the remedy; empty if they can be. `environment`: variables."""
    try:
        found = util.find_spec("opentelemetry.exporter.otlp.proto.grpc") and util.find_spec("opentelemetry.sdk")
    except ModuleNotFoundError:
        found = None
    if found is None:
        return "the packages of OpenTelemetry are not installed: pip install 'attnserve[otel]'"
    if (exporter := environment.get("OTEL_TRACES_EXPORTER", "").strip()) not in {"", "otlp", "none"}:
        return f"the variable OTEL_TRACES_EXPORTER is {exporter!r}; only otlp is supported: set that, or unset it"
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if protocol := environment.get(name, "").strip():
            remedy = "unset it, and use the collector's port for gRPC, usually 4317"
            return (
                "" if protocol == "grpc" else f"the variable {name} is {protocol!r}; only grpc is supported: {remedy}"
            )
    return ""


class ReachSettings(BaseSettings):
    """The settings of ports and callers. Each description ends with the reason for the default."""

    host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address that all ports listen on. Any other than loopback needs TLS and a check of callers, or "
        "`--insecure`. Default: loopback, which only this machine reaches.",
    )
    grpc_port: Port = Field(8001, description="gRPC port; 0 lets the system choose. Default: the same as Triton's.")
    rest_port: Port = Field(
        8000,
        description="Port of REST: inference, OpenAI embeddings and rerank as JSON; 0: the system chooses. The number "
        "of `--http-port` merges both. Default: as Triton's, where its clients expect it.",
    )
    http_port: Port = Field(
        8002, description="HTTP port of `/metrics`, `/livez`, `/readyz`; 0: the system chooses. Default: as Triton's."
    )
    cors_origin: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Origins, as `https://app.example`, whose pages may call REST from a browser. Default: none, so "
        "that no foreign page can use a server that only this machine reaches.",
    )
    explorer: bool | None = Field(
        None,
        description="Serve the page `/explore` on the REST port, which shows in a browser where a model looks. "
        "Default: where `--host` is loopback, because only its own user can open it there.",
    )
    openai_token_ids: bool = Field(
        False,
        description="Accept token ids in `/v1/embeddings`. Default: false, as clients send ids of another tokenizer, "
        "whose embeddings would be wrong without an error.",
    )
    tls_cert: Path | None = Field(
        None,
        description="PEM file of the server's certificate, then those of its issuers, for all ports. The TLS files "
        "and `--tokens-file` are read again when they change, and on SIGHUP. Default: none, as only you can get one.",
    )
    tls_key: Path | None = Field(
        None, description="PEM file of its private key, without a passphrase. Default: as `--tls-cert`."
    )
    tls_client_ca: Path | None = Field(
        None,
        description="PEM file of the authorities whose client certificates are required: for every gRPC call, and on "
        "the other ports for all but health checks. Default: none, as most callers have tokens.",
    )
    tokens_file: Path | None = Field(
        None,
        description="File of bearer tokens, one line each with digest, scopes and quota; `attnserve-server token` "
        "makes them. All but health checks then need a token. Default: none, as only this machine reaches loopback.",
    )
    insecure: bool = Field(
        False,
        description="Accept an address that other machines reach without TLS, or without a check of callers. Default: "
        "false, as anyone there could then use the models, and read tokens.",
    )
    ports_file: Path | None = Field(
        None, description="JSON file for all ports, once models are ready. Default: none, as ports are mostly fixed."
    )

    @field_validator("cors_origin")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [one for one in value if re.fullmatch(r"https?://[a-zA-Z0-9.\[\]:-]+", one) is None]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is not an origin; write scheme and host, such as https://app.example")
        return value

    @property
    def explores(self) -> bool:
        """Whether the explorer is served: `explorer`, decided for this address."""
        return is_loopback(self.host) if self.explorer is None else self.explorer

    @property
    def merges_ports(self) -> bool:
        """Whether REST and `/metrics` share a port."""
        return self.rest_port == self.http_port != 0
