"""Loading: open a bundle, and derive the runtime's values from the settings.

A bundle is the folder of one converted model. `open_bundle` raises an AttnserveError with the reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from attnserve_server.config import Settings
from attnserve_server.domain.clock import Clock
from attnserve_server.domain.machine import cores
from attnserve_server.engine import openvino
from attnserve_server.engine.cost_file import CostKey, machine
from attnserve_server.engine.executor import Executor
from attnserve_server.engine.golden import read_golden, verify_golden
from attnserve_server.engine.providers import (
    CPU,
    CUDA,
    GPU_PROVIDERS,
    OPENVINO,
    TENSORRT,
    PrecisionUnavailable,
    named,
    visible_gpus,
)
from attnserve_server.engine.session import LoadFailed, RuntimeSession, runtime_version
from attnserve_server.engine.shapes import ShapePlan
from attnserve_server.engine.sharing import load_shared
from attnserve_server.engine.warmup import are_dear, bucket_plan, new_shape_ratio, plan_of, prepare
from attnserve_server.model.holding import held
from attnserve_server.model.manifest import Manifest
from attnserve_server.model.repository import Bundle
from attnserve_server.model.tokenizer import TextTokenizer
from attnserve_server.observability.logs import logger
from attnserve_server.scheduling.verifier import ShadowSettings
from attnserve_server.wanted import tokenizer_of

_log = logger(__name__)

INSTANCES_PER_GPU: Final = 3
"""On an H200, two and three instances ran MiniLM 1.5 and 1.8 times as often as one (16 x 64 tokens, float32)."""


@dataclass(frozen=True, slots=True)
class Opened:
    """What a bundle was opened to.

    Args:
        sessions: of the graph, one for each device.
        tokenizer: None for a model that takes tensors only.
        past_sessions: of the continuing graph, one for each device; empty for a bundle without one.
        bundle: with its manifest in the precision that serves.
        wide: a session of the graph whose runs use all cores; None: there is none.
    """

    sessions: list[RuntimeSession]
    tokenizer: TextTokenizer | None
    past_sessions: list[RuntimeSession]
    bundle: Bundle
    wide: RuntimeSession | None = None


def open_bundle(bundle: Bundle, settings: Settings) -> Opened:
    """Load one session per device from a held copy of a bundle, and check the golden answers of each. Runs in a thread.

    Args:
        bundle: from `under_policy`.
        settings: provider, devices and threads.

    Raises:
        BundleInvalid: a file is missing or changed, or cannot be copied, or its golden answers cannot be read.
        TokenizerInvalid: the tokenizer cannot be used.
        ProviderUnavailable: the requested execution provider is not available.
        PrecisionUnavailable: the requested precision is not offered: by the provider, the processor, or for the bundle.
        LoadFailed: the runtime could not load the model.
        GoldenMismatch: the model does not repeat its golden answers.
    """
    with held(bundle) as copy:
        opened = _open(copy, settings)
        return replace(opened, bundle=replace(opened.bundle, path=bundle.path))


def _open(bundle: Bundle, settings: Settings) -> Opened:
    """Do what `open_bundle` does, from files that do not change."""
    tokenizer = tokenizer_of(bundle)
    first, *others = settings.device_ids or (0,)
    sessions = [_session(bundle, settings, first)]
    provider = sessions[0].provider
    _report_other_nodes(bundle, sessions[0])
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
    precision = sessions[0].precision
    served = bundle.manifest.model_copy(update={"precision": precision}) if precision else bundle.manifest
    return Opened(sessions, tokenizer, past_sessions, replace(bundle, manifest=served), wide)


def _with_wide(
    bundle: Bundle, settings: Settings, sessions: list[RuntimeSession]
) -> tuple[list[RuntimeSession], RuntimeSession | None]:
    """Return sessions that share their weights with a wide one, and that; sessions and None where there is none.

    The sessions given end before those that take their place are made, so that their memory is given back.
    """
    threads = settings.wide_threads or cores()
    if threads <= settings.intra_op_threads:
        return sessions, None
    sessions.clear()
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
        remedy = "give the temporary folder three times the space of the bundle, or set --wide-threads 1"
        _log.warning("no run uses all cores: no session for that", **named, reason=why, remedy=remedy)
        return [_session(bundle, settings, 0, CPU)], None
    return [narrow], wide


def _report_other_nodes(bundle: Bundle, session: RuntimeSession) -> None:
    """Log which operators the session's provider leaves to another one: they may be why it is slow."""
    others = {name: nodes for name, nodes in session.nodes_by_provider().items() if name != session.provider}
    if others:
        _log.warning(
            "the provider leaves nodes to others: convert the model for it with `--target`, or compare providers with "
            "`attnserve-server recommend`",
            model=bundle.manifest.name,
            version=bundle.manifest.version,
            provider=session.provider,
            nodes=others,
        )


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


def _graph_plan(manifest: Manifest, settings: Settings) -> ShapePlan | None:
    """The plan of CUDA graphs; None for none. Every input must be along one axis, which must be padded."""
    if not settings.cuda_graphs:
        return None
    shapes = tuple((int(rows), int(tokens)) for rows, _, tokens in (one.partition("x") for one in settings.cuda_graphs))
    plan = plan_of(manifest, shapes)
    if plan is None:
        why = "the inputs do not share one padded axis, or no shape has as few rows as a run may have"
        _log.warning(f"no CUDA graphs: {why}", model=manifest.name, max_batch_size=manifest.max_batch_size)
    return plan


def _openvino_options(manifest: Manifest, settings: Settings) -> dict[str, str]:
    """Properties of OpenVINO's device: a stream for each instance, so that one session serves all of them.

    Raises:
        PrecisionUnavailable: the setting does not apply to this provider or bundle.
    """
    streams = settings.instances or cores()
    options = {openvino.STREAMS: str(streams), openvino.THREADS: str(streams * settings.intra_op_threads)}
    if settings.cache_dir is not None:
        options[openvino.CACHE] = str(settings.cache_dir)
    if settings.precision == "bf16":
        options[openvino.PRECISION] = "bf16"
        if named(settings.provider) != OPENVINO:
            why = f"provider is {settings.provider}, which serves the bundle's own; set --provider openvino, or"
            raise PrecisionUnavailable("bf16", f"{why} --precision bundle")
        if manifest.precision == "int8":
            why = "the bundle is int8, which is the faster of the two; set --precision bundle, or serve its fp32 bundle"
            raise PrecisionUnavailable("bf16", why)
    return {**options, **settings.openvino_options}


def _session(bundle: Bundle, settings: Settings, device_id: int, provider: str = "") -> RuntimeSession:
    return RuntimeSession.load(
        bundle.model_path,
        provider=provider or settings.provider,
        required_provider=settings.require_provider,
        device_id=device_id,
        graphs=_graph_plan(bundle.manifest, settings),
        provider_options={
            CUDA: settings.cuda_options,
            TENSORRT: settings.tensorrt_options,
            OPENVINO: _openvino_options(bundle.manifest, settings),
        },
        left_out=bundle.manifest.left_out,
        intra_op_threads=settings.intra_op_threads,
    )


async def prepare_shapes(executor: Executor, opened: Opened, settings: Settings, clock: Clock) -> None:
    """Prepare the shapes that a model's runs are padded to, where its provider prepares each new shape. Event loop.

    Args:
        executor: of the model, after its warm-up.
        opened: the model. Only the graph without a past has such shapes.
        settings: `shape_buckets`; 0: none.
        clock: measures runs.

    Raises:
        RunFailed: the model cannot run a shape.
    """
    session, manifest = opened.sessions[0], opened.bundle.manifest
    if session.provider != OPENVINO or settings.shape_buckets == 0 or executor.cost is None:
        return
    plan = bucket_plan(manifest, executor.cost, settings.shape_buckets)
    if plan is None:
        _log.info("no prepared shapes: padding could change answers of this model", model=manifest.name)
        return
    if settings.shape_buckets is None:
        ratio = await asyncio.to_thread(new_shape_ratio, session, manifest, clock)
        if not are_dear(ratio):
            _log.info("no prepared shapes: new ones are cheap", model=manifest.name, first_over_later=round(ratio, 2))
            return
    began = clock.now()
    await executor.on_all_instances(prepare, session, manifest, plan)
    session.buckets = plan
    _log.info("shapes are prepared", model=manifest.name, shapes=len(plan.shapes), s=round(clock.now() - began, 3))


def cost_key(session: RuntimeSession, manifest: Manifest, settings: Settings) -> CostKey:
    """Return the key of this model's timed runs, on this machine and with these settings."""
    return CostKey(
        digest=manifest.digest,
        provider=f"{session.provider} {session.precision}".strip(),
        runtime=runtime_version(),
        machine=machine(),
        cores=cores(),
        intra_op_threads=settings.intra_op_threads,
        max_batch_size=manifest.max_batch_size,
    )


def batch_check_settings(settings: Settings) -> ShadowSettings | None:
    """Return the settings of the shadow check; None if it is off."""
    if not settings.verify_batches:
        return None
    return ShadowSettings(share=settings.verify_batches, action=settings.verify_action)


def wide_cost_key(key: CostKey, settings: Settings) -> CostKey:
    """Return the key of the timed runs on all cores, from that of the others."""
    threads = settings.wide_threads or cores()
    return key.model_copy(update={"provider": f"{key.provider} wide", "intra_op_threads": threads})
