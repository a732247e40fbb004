"""Which bundles a server takes, and how one is opened: settings and files in, the rooms' own values out."""

from __future__ import annotations

import os
from pathlib import Path

from attnserve_server.config import Settings, cores
from attnserve_server.domain.errors import AttnserveError
from attnserve_server.engine.cost_file import CostKey, machine
from attnserve_server.engine.golden import verify_golden
from attnserve_server.engine.session import RuntimeSession, runtime_version
from attnserve_server.model.golden import read_golden
from attnserve_server.model.manifest import Manifest
from attnserve_server.model.repository import Bundle, BundleFault, Repository, verify
from attnserve_server.model.tokenizer import TextTokenizer
from attnserve_server.observability.logs import logger
from attnserve_server.scheduling.policy import SchedulingSettings

_log = logger(__name__)


class StartFailed(AttnserveError):
    """The server cannot start."""

    reason = "START_FAILED"


def wanted_bundles(settings: Settings) -> tuple[list[Bundle], list[BundleFault]]:
    """The bundles that are wanted, and those in their places that are broken.

    Raises:
        StartFailed: There is none, or one that was asked for is not there.
    """
    bundles, faults = Repository(settings.repository).bundles()
    names = [(bundle.manifest.name, bundle.manifest.version) for bundle in bundles]
    names += [(fault.name, fault.version) for fault in faults]
    if not names:
        raise StartFailed(_why_none(settings.repository))
    wanted = settings.models
    unknown = [entry for entry in wanted if not any(_matches(entry, *name) for name in names)]
    if unknown:
        there = ", ".join(f"{name}/{version}" for name, version in names)
        raise StartFailed(f"no model {', '.join(unknown)} in {settings.repository}; it has {there}")

    def is_wanted(name: str, version: str) -> bool:
        return not wanted or any(_matches(entry, name, version) for entry in wanted)

    return (
        [bundle for bundle in bundles if is_wanted(bundle.manifest.name, bundle.manifest.version)],
        [fault for fault in faults if is_wanted(fault.name, fault.version)],
    )


def open_bundle(bundle: Bundle, settings: Settings) -> tuple[RuntimeSession, TextTokenizer | None]:
    """Verifies and loads a bundle's files, and asks the model for its golden answers. Runs in a thread.

    Raises:
        BundleInvalid: A file is missing, or another one.
        TokenizerInvalid: The tokenizer cannot be used.
        ProviderUnavailable: The execution provider that was asked for is not there.
        LoadFailed: The runtime refused the model.
        GoldenMismatch: The model does not answer as it did when it was checked.
    """
    verify(bundle)
    golden = read_golden(bundle)
    tokenizer = None
    if bundle.tokenizer_path is not None and bundle.manifest.text is not None:
        tokenizer = TextTokenizer.load(bundle.tokenizer_path, bundle.manifest.text.axis)
    session = RuntimeSession.load(
        bundle.model_path,
        provider=settings.provider,
        intra_op_threads=settings.intra_op_threads,
        required_provider=settings.require_provider,
    )
    named = {"model": bundle.manifest.name, "version": bundle.manifest.version}
    if golden:
        worst = verify_golden(session, bundle.manifest, golden)
        _log.info("golden answers hold", **named, sequences=len(golden), error_over_allowed=round(worst, 4))
    else:
        _log.warning("bundle has no golden answers: prepare it anew, so that every load is verified", **named)
    return session, tokenizer


def cost_key(session: RuntimeSession, manifest: Manifest, settings: Settings) -> CostKey:
    """What the cost of this model's runs depends on, here and with these settings."""
    return CostKey(
        digest=manifest.digest,
        provider=session.provider,
        runtime=runtime_version(),
        machine=machine(),
        cores=cores(),
        intra_op_threads=settings.intra_op_threads,
    )


def scheduling_settings(settings: Settings, manifest: Manifest) -> SchedulingSettings:
    """The part of the settings that one model's scheduling needs."""
    return SchedulingSettings(
        max_batch_size=min(settings.max_batch_size or manifest.max_batch_size, manifest.max_batch_size),
        max_batch_bytes=settings.max_batch_bytes,
        max_batch_tokens=settings.max_batch_tokens,
        max_queue_size=settings.max_queue_size,
        max_queue_bytes=settings.max_queue_bytes,
        look_ahead=settings.look_ahead,
        run_overhead_tokens=settings.run_overhead_tokens,
    )


def _why_none(repository: Path) -> str:
    """Why a repository has no model, for the operator who named it: this alone may name the folder."""
    if not repository.is_dir():
        return f"no model in {repository}: there is no such folder"
    if not os.access(repository, os.R_OK | os.X_OK):
        return f"no model in {repository}: user {os.getuid()} may not read that folder"
    return f"no model in {repository}: make one with `attnserve-server export` or `attnserve-server prepare`"


def _matches(entry: str, name: str, version: str) -> bool:
    return entry in (name, f"{name}/{version}")
