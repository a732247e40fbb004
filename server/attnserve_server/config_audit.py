"""Settings of the audit log and of row features: what is recorded of requests. `config.Settings` has them too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings


class AuditSettings(BaseSettings):
    """The settings of the audit log and of row features. Each description ends with the reason for the default."""

    audit_log: Path | None = Field(
        None,
        description="File to which one JSON line is appended for each request: who sent it, which bundle answered, "
        "what it selected, and a keyed HMAC of its text or token ids. SIGHUP opens it again. Needs `--audit-key-file`. "
        "Default: none, as only you know whether such a record is needed, or allowed.",
    )
    audit_key_file: Path | None = Field(
        None,
        description="File whose content, of at least 32 bytes, is the key of the HMACs in the audit log. Default: "
        "none, as a key that others have would let them test texts against the log.",
    )
    audit_text: bool = Field(
        False,
        description="Write the texts of requests into the audit log, too. Default: false, as an audit log is often "
        "kept longer, and read by more people, than texts may be.",
    )
    audit_rotate_bytes: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Size above which the audit log is renamed to `<file>.1`, and older ones to `.2` and so on; 0: "
        "never. Default: 0, as rotation removes the oldest lines, which only you may decide.",
    )
    audit_keep: Annotated[int, Field(ge=1, le=9999)] = Field(
        10, description="Renamed audit logs that are kept. Default: 10, with which 1 GiB is ten files of 100 MiB."
    )

    feature_sample: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        description="Share of the requests without selected features whose row features are counted all the same, for "
        "the histograms of attention and for its drift. Their answers do not change. Default: 0, as weights that no "
        "caller selects cost time.",
    )

    @field_validator("audit_log", "audit_key_file", mode="before")
    @classmethod
    def _empty_is_no_path(cls, value: object) -> object:
        return None if value == "" else value

    @model_validator(mode="after")
    def _has_key(self) -> Self:
        if self.audit_log and not self.audit_key_file:
            raise ValueError(
                "--audit-log needs a key for its HMACs: set --audit-key-file to a file of at least 32 random bytes, "
                "as `openssl rand -out audit.key 32` writes it"
            )
        if not self.audit_log and (self.audit_key_file or self.audit_text):
            raise ValueError("--audit-key-file and --audit-text need --audit-log: set it, or leave them out")
        return self
