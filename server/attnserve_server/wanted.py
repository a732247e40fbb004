"""The bundles that the settings name, and what a process that does not run them needs: policy, tokenizer, bounds.

A bundle is the folder of one converted model. `wanted_bundles` raises StartFailed for a missing one, and returns those
whose manifests are broken as faults. Nothing here imports the runtime, so that front processes do without its memory.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from attnserve_server.config import Settings
from attnserve_server.domain.errors import AttnserveError
from attnserve_server.model.batching import cautions
from attnserve_server.model.holding import content_of
from attnserve_server.model.manifest import Manifest
from attnserve_server.model.repository import TOKENIZER_FILE, Bundle, BundleFault, Repository
from attnserve_server.model.tokenizer import TextTokenizer
from attnserve_server.observability.logs import logger
from attnserve_server.scheduling.catalog import Catalog, ServedModel
from attnserve_server.scheduling.policy import SchedulingSettings

_log = logger(__name__)


class StartFailed(AttnserveError):
    """The server cannot start."""

    reason = "START_FAILED"


def wanted_bundles(settings: Settings) -> tuple[list[Bundle], list[BundleFault]]:
    """Return the bundles to load, and the broken ones among them.

    Args:
        settings: `repository` and `models` select the bundles.

    Raises:
        StartFailed: the repository has no bundle, or a named one does not exist.
    """
    bundles, faults = Repository(settings.repository).bundles()
    names = [(bundle.manifest.name, bundle.manifest.version) for bundle in bundles]
    names += [(fault.name, fault.version) for fault in faults]
    if not names:
        raise StartFailed(_why_none(settings.repository))
    unknown = [entry for entry in settings.models if not any(_matches(entry, *name) for name in names)]
    if unknown:
        there = ", ".join(f"{name}/{version}" for name, version in names)
        raise StartFailed(f"no model {', '.join(unknown)} in {settings.repository}; the repository has {there}")
    return (
        [bundle for bundle in bundles if is_wanted(settings, bundle.manifest.name, bundle.manifest.version)],
        [fault for fault in faults if is_wanted(settings, fault.name, fault.version)],
    )


def is_wanted(settings: Settings, name: str, version: str) -> bool:
    """Return whether the settings select a version."""
    return not settings.models or any(_matches(entry, name, version) for entry in settings.models)


def ready_models(catalog: Catalog) -> list[ServedModel]:
    """Return the models that are ready after the start. Raises StartFailed, with each reason, if there is none."""
    ready = catalog.ready()
    if not ready:
        why = "; ".join(f"{model.name}/{model.version}: {model.state_reason}" for model in catalog.all())
        raise StartFailed(f"no model could be loaded: {why}")
    return ready


def under_policy(bundle: Bundle, settings: Settings) -> Bundle:
    """Return the bundle with its manifest under the batching policy."""
    return replace(bundle, manifest=bundle.manifest.under(settings.batching))


def log_cautions(manifest: Manifest, settings: Settings) -> None:
    """Log what limits batching of a model as it is stored, and why."""
    for caution in cautions(manifest.certificate, settings.batching, alone=manifest.max_batch_size == 1):
        _log.warning(
            caution.effect,
            model=manifest.name,
            version=manifest.version,
            axis=caution.axis,
            status=caution.status,
            cause=caution.cause,
            remedy=caution.remedy,
            batching=settings.batching,
        )


def tokenizer_of(bundle: Bundle) -> TextTokenizer | None:
    """Load the tokenizer of a bundle; None for a model that takes tensors only.

    Raises:
        BundleInvalid: its file is not the one that the manifest lists.
        TokenizerInvalid: it cannot be used.
    """
    text = bundle.manifest.text
    if bundle.tokenizer_path is None or text is None:
        return None
    return TextTokenizer.load(
        content_of(bundle, TOKENIZER_FILE), text.axis, bundle.manifest.text_as_written, text.mask_token
    )


def scheduling_settings(settings: Settings, manifest: Manifest) -> SchedulingSettings:
    """Return the settings of one model's scheduling."""
    return SchedulingSettings(
        max_batch_size=min(settings.max_batch_size or manifest.max_batch_size, manifest.max_batch_size),
        max_batch_bytes=settings.max_batch_bytes,
        max_batch_tokens=settings.max_batch_tokens,
        max_queue_size=settings.max_queue_size,
        max_queue_bytes=settings.max_queue_bytes,
        look_ahead=settings.look_ahead,
        run_overhead_tokens=settings.run_overhead_tokens,
    )


def shared_among(settings: Settings, fronts: int) -> Settings:
    """Return the settings of one of several fronts, which share what the server may hold."""
    most = ("max_connections", "max_unread_bytes")
    return settings.model_copy(update={name: max(1, getattr(settings, name) // fronts) for name in most})


def why_not_loaded(error: Exception, name: str, version: str) -> str:
    """Log why a model failed to load, and return the reason for its state."""
    why = str(error) if isinstance(error, AttnserveError) else "internal error while loading; see the log"
    # The message of an AttnserveError without a cause is complete, so the log needs no traceback.
    traced = not isinstance(error, AttnserveError) or error.__cause__ is not None
    _log.error("model failed to load", model=name, version=version, reason=why, exc_info=error if traced else None)
    return why


def _why_none(repository: Path) -> str:
    """Why a repository has no model. The message goes to the operator only, so it may name the folder."""
    if not repository.is_dir():
        return f"no model in {repository}: the folder does not exist"
    if not os.access(repository, os.R_OK | os.X_OK):
        return f"no model in {repository}: user {os.getuid()} may not read the folder"
    return f"no model in {repository}: make one with `attnserve-server export` or `attnserve-server prepare`"


def _matches(entry: str, name: str, version: str) -> bool:
    return entry in (name, f"{name}/{version}")
