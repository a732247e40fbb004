"""Loading: choose the bundles that the settings name, open one, and derive each package's values from the settings.

A bundle is the folder of one converted model. `wanted_bundles` raises StartFailed for a missing one, and returns those
whose manifests are broken as faults; `open_bundle` raises another AttnserveError, with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from attnserve_server.config import Settings, cores
from attnserve_server.domain.errors import AttnserveError
from attnserve_server.engine.cost_file import CostKey, machine
from attnserve_server.engine.golden import read_golden, verify_golden
from attnserve_server.engine.gpu import GraphPlan
from attnserve_server.engine.providers import CPU, CUDA, GPU_PROVIDERS, TENSORRT, visible_gpus
from attnserve_server.engine.session import LoadFailed, RuntimeSession, runtime_version
from attnserve_server.engine.sharing import load_shared
from attnserve_server.model.batching import cautions
from attnserve_server.model.manifest import Manifest
from attnserve_server.model.repository import Bundle, BundleFault, Repository, verify
from attnserve_server.model.tokenizer import TextTokenizer
from attnserve_server.observability.logs import logger
from attnserve_server.scheduling.policy import SchedulingSettings
from attnserve_server.scheduling.verifier import ShadowSettings

_log = logger(__name__)

INSTANCES_PER_GPU: Final = 3
"""On an H200, two and three instances ran MiniLM 1.5 and 1.8 times as often as one (16 x 64 tokens, float32)."""


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
    wanted = settings.models
    unknown = [entry for entry in wanted if not any(_matches(entry, *name) for name in names)]
    if unknown:
        there = ", ".join(f"{name}/{version}" for name, version in names)
        raise StartFailed(f"no model {', '.join(unknown)} in {settings.repository}; the repository has {there}")

    def is_wanted(name: str, version: str) -> bool:
        return not wanted or any(_matches(entry, name, version) for entry in wanted)

    return (
        [bundle for bundle in bundles if is_wanted(bundle.manifest.name, bundle.manifest.version)],
        [fault for fault in faults if is_wanted(fault.name, fault.version)],
    )


def under_policy(bundle: Bundle, settings: Settings) -> Bundle:
    """Return the bundle with its manifest under the batching policy. Log what limits batching, and why."""
    manifest = bundle.manifest
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
    return replace(bundle, manifest=manifest.under(settings.batching))


@dataclass(frozen=True, slots=True)
class Opened:
    """What a bundle was opened to.

    Args:
        sessions: of the graph, one for each device.
        tokenizer: None for a model that takes tensors only.
        past_sessions: of the continuing graph, one for each device; empty for a bundle without one.
        wide: a session of the graph whose runs use all cores; None: there is none.
    """

    sessions: list[RuntimeSession]
    tokenizer: TextTokenizer | None
    past_sessions: list[RuntimeSession]
    wide: RuntimeSession | None = None


def open_bundle(bundle: Bundle, settings: Settings) -> Opened:
    """Verify a bundle's files, load one session per device, and check the golden answers of each. Runs in a thread.

    Args:
        bundle: from `under_policy`.
        settings: provider, devices and threads.

    Raises:
        BundleInvalid: a file is missing or changed, or its golden answers cannot be read.
        TokenizerInvalid: the tokenizer cannot be used.
        ProviderUnavailable: the requested execution provider is not available.
        LoadFailed: the runtime could not load the model.
        GoldenMismatch: the model does not repeat its golden answers.
    """
    verify(bundle)
    tokenizer, text = None, bundle.manifest.text
    if bundle.tokenizer_path is not None and text is not None:
        written = bundle.manifest.text_as_written
        tokenizer = TextTokenizer.load(bundle.tokenizer_path, text.axis, written, text.mask_token)
    first, *others = settings.device_ids or (0,)
    sessions = [_session(bundle, settings, first)]
    provider = sessions[0].provider
    if provider in GPU_PROVIDERS and not settings.device_ids:
        others = list(range(1, visible_gpus()))
    if provider in GPU_PROVIDERS:
        sessions += [_session(bundle, settings, device_id, provider) for device_id in others]
    wide = None
    if provider == CPU:
        sessions, wide = _with_wide(bundle, settings, sessions)
    _check_golden(bundle, sessions if wide is None else [*sessions, wide])
    continuing, past_sessions = bundle.continuing, list[RuntimeSession]()
    if continuing is not None:
        devices = (first, *others) if provider in GPU_PROVIDERS else (first,)
        past_sessions = [_session(continuing, settings, device_id, provider) for device_id in devices]
        _check_golden(continuing, past_sessions)
    return Opened(sessions, tokenizer, past_sessions, wide)


def _with_wide(
    bundle: Bundle, settings: Settings, sessions: list[RuntimeSession]
) -> tuple[list[RuntimeSession], RuntimeSession | None]:
    """Return sessions that share their weights with a wide one, and that; those given and None where there is none."""
    threads = settings.wide_threads or cores()
    if threads <= settings.intra_op_threads:
        return sessions, None
    try:
        narrow, wide = load_shared(
            bundle.model_path,
            left_out=bundle.manifest.left_out,
            intra_op_threads=settings.intra_op_threads,
            wide_threads=threads,
        )
    except (OSError, LoadFailed) as error:
        why = str(error.__cause__ or error)
        named = {"model": bundle.manifest.name, "version": bundle.manifest.version}
        _log.warning("runs use one core: no session for all cores", **named, reason=why)
        return sessions, None
    return [narrow], wide


def _check_golden(bundle: Bundle, sessions: Sequence[RuntimeSession]) -> None:
    """Compare the answers of each session with the golden ones of its graph. Raises GoldenMismatch."""
    golden = read_golden(bundle)
    named = {"model": bundle.manifest.name, "version": bundle.manifest.version, "graph": bundle.graph}
    for session in sessions if golden else ():
        worst = verify_golden(session, bundle.manifest, golden)
        _log.info("golden answers are repeated", **named, sequences=len(golden), error_over_allowed=round(worst, 4))
    if not golden:
        _log.warning("bundle has no golden answers: convert it again, so that every load is checked", **named)


def instances_of(sessions: Sequence[RuntimeSession], settings: Settings) -> int:
    """Return the number of instances: the setting, or one per core on a CPU, three per GPU, one with CUDA graphs."""
    if settings.instances:
        return settings.instances
    if sessions[0].provider not in GPU_PROVIDERS:
        return cores()
    return len(sessions) if settings.cuda_graphs else INSTANCES_PER_GPU * len(sessions)


def _graph_plan(manifest: Manifest, settings: Settings) -> GraphPlan | None:
    """The plan of CUDA graphs; None for none. Every input must be along one axis, which must be padded."""
    if not settings.cuda_graphs:
        return None
    if {spec.shape for spec in manifest.inputs} != {(axis.symbol,) for axis in manifest.axes if axis.paddable}:
        _log.warning("no CUDA graphs: the inputs do not share one padded axis", model=manifest.name)
        return None
    shapes = tuple((int(rows), int(tokens)) for rows, _, tokens in (one.partition("x") for one in settings.cuda_graphs))
    if manifest.max_batch_size == 1:
        # Rows that fill up a recorded shape are batch neighbours too.
        shapes = tuple((rows, tokens) for rows, tokens in shapes if rows == 1)
        if not shapes:
            _log.warning("no CUDA graphs: sequences run alone, and no shape has one row", model=manifest.name)
            return None
    return GraphPlan(shapes, {spec.name: spec.padding for spec in manifest.inputs})


def _session(bundle: Bundle, settings: Settings, device_id: int, provider: str = "") -> RuntimeSession:
    return RuntimeSession.load(
        bundle.model_path,
        provider=provider or settings.provider,
        required_provider=settings.require_provider,
        device_id=device_id,
        graphs=_graph_plan(bundle.manifest, settings),
        provider_options={CUDA: settings.cuda_options, TENSORRT: settings.tensorrt_options},
        left_out=bundle.manifest.left_out,
        intra_op_threads=settings.intra_op_threads,
    )


def cost_key(session: RuntimeSession, manifest: Manifest, settings: Settings) -> CostKey:
    """Return the key of this model's timed runs, on this machine and with these settings."""
    return CostKey(
        digest=manifest.digest,
        provider=session.provider,
        runtime=runtime_version(),
        machine=machine(),
        cores=cores(),
        intra_op_threads=settings.intra_op_threads,
        max_batch_size=manifest.max_batch_size,
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


def batch_check_settings(settings: Settings) -> ShadowSettings | None:
    """Return the settings of the shadow check; None if it is off."""
    if not settings.verify_batches:
        return None
    return ShadowSettings(share=settings.verify_batches, action=settings.verify_action)


def _why_none(repository: Path) -> str:
    """Why a repository has no model. The message goes to the operator only, so it may name the folder."""
    if not repository.is_dir():
        return f"no model in {repository}: the folder does not exist"
    if not os.access(repository, os.R_OK | os.X_OK):
        return f"no model in {repository}: user {os.getuid()} may not read the folder"
    return f"no model in {repository}: make one with `attnserve-server export` or `attnserve-server prepare`"


def _matches(entry: str, name: str, version: str) -> bool:
    return entry in (name, f"{name}/{version}")
