"""Models and the server in the terms of the protocol: metadata, configuration, statistics and the index."""

from __future__ import annotations

from typing import Any, Final

from attnserve.oip import open_inference_pb2 as oip

from attnserve_server import __version__
from attnserve_server.domain.clock import wall_s
from attnserve_server.domain.errors import ModelNotFound
from attnserve_server.scheduling.catalog import ModelState, ServedModel, Statistics
from attnserve_server.transport.dataplane import DataPlane
from attnserve_server.transport.oip.layout import BYTES, Layout
from attnserve_server.transport.validation import check_model_reference

PLATFORM: Final = "onnx_attnserve"
BACKEND: Final = "onnxruntime"
OWN_OUTPUTS: Final = ("attnserve-outputs", "model")
"""Metadata or header of a call that describes a model without virtual outputs: tools request all outputs at once."""
EXTENSIONS: Final = (
    *("binary_tensor_data", "model_configuration", "model_repository", "model_repository(unload_dependents)"),
    *("parameters", "statistics"),
)
_STATES: Final = {
    ModelState.LOADING: "LOADING",
    ModelState.READY: "READY",
    ModelState.DRAINING: "UNLOADING",
    ModelState.FAILED: "UNAVAILABLE",
}
_TYPES: Final[dict[str, Any]] = {BYTES: oip.TYPE_STRING}


def server() -> oip.ServerMetadataResponse:
    """Name the server and its extensions."""
    return oip.ServerMetadataResponse(name="attnserve", version=__version__, extensions=EXTENSIONS)


def is_ready(served: ServedModel) -> bool:
    """Return whether a model takes requests."""
    return served.state is ModelState.READY


def metadata(plane: DataPlane, name: str, version: str, *, virtual: bool = True) -> oip.ModelMetadataResponse:
    """Describe a model's inputs and outputs. Raises AttnserveError as in the status table.

    `virtual`: whether outputs of attention are among them.
    """
    served, layout = _layout(plane, name, version)
    tensors = oip.ModelMetadataResponse.TensorMetadata
    return oip.ModelMetadataResponse(
        name=served.name,
        versions=versions(plane, name),
        platform=PLATFORM,
        inputs=[
            tensors(name=one.name, datatype=one.datatype, shape=[-1, *layout.fixed(one.dims)])
            for one in layout.tensors_in()
        ],
        outputs=[
            tensors(name=one.name, datatype=one.datatype, shape=[-1, *layout.fixed(one.dims)])
            for one in layout.tensors_out(virtual=virtual)
        ],
    )


def config(plane: DataPlane, name: str, version: str, *, virtual: bool = True) -> oip.ModelConfig:
    """Describe a model in the form of Triton's configuration, as `metadata`."""
    served, layout = _layout(plane, name, version)
    return oip.ModelConfig(
        name=served.name,
        platform=PLATFORM,
        backend=BACKEND,
        max_batch_size=layout.max_batch_size,
        input=[
            oip.ModelInput(
                name=one.name,
                data_type=_type(one.datatype),
                # Triton's own dimension of a scalar for each row.
                dims=layout.fixed(one.dims) or [1],
                optional=one.optional,
            )
            for one in layout.tensors_in()
        ],
        output=[
            oip.ModelOutput(name=one.name, data_type=_type(one.datatype), dims=layout.fixed(one.dims) or [1])
            for one in layout.tensors_out(virtual=virtual)
        ],
        instance_group=[oip.ModelInstanceGroup(name=served.name, kind=oip.ModelInstanceGroup.KIND_AUTO)],
        dynamic_batching=oip.ModelDynamicBatching(priority_levels=2, default_priority_level=2),
    )


def _type(datatype: str) -> Any:
    return _TYPES.get(datatype) or oip.DataType.Value(f"TYPE_{datatype}")


def statistics(plane: DataPlane, name: str, version: str, now: float) -> oip.ModelStatisticsResponse:
    """Return counts and times of one model, of all its versions, or of all models.

    Args:
        plane: has the models.
        name: the model's name; empty: all.
        version: its version; empty: all.
        now: the time, in monotonic seconds.

    Raises:
        AttnserveError: As in the status table.
    """
    if name or version:
        check_model_reference(name, version)
    found = [one for one in plane.all() if name in {"", one.name} and version in {"", one.version}]
    if name and not found:
        raise ModelNotFound(name, version)
    return oip.ModelStatisticsResponse(
        model_stats=[_statistics(one.name, one.version, one.statistics, now) for one in found]
    )


def _statistics(name: str, version: str, known: Statistics, now: float) -> oip.ModelStatistics:
    def spent(count: int, seconds: float) -> oip.StatisticDuration:
        return oip.StatisticDuration(count=count, ns=round(max(seconds, 0.0) * 1e9))

    requests, sequences = known.requests, known.sequences
    rest_s = known.seconds - (known.queue_s + known.compute_s) * requests / max(sequences, 1)
    return oip.ModelStatistics(
        name=name,
        version=version,
        last_inference=0 if known.last_s is None else round((wall_s() - now + known.last_s) * 1000),
        inference_count=sequences,
        execution_count=round(known.runs),
        inference_stats=oip.InferStatistics(
            success=spent(requests, known.seconds),
            fail=spent(known.failed, 0.0),
            queue=spent(sequences, known.queue_s),
            compute_input=spent(sequences, 0.0),
            compute_infer=spent(sequences, known.compute_s),
            compute_output=spent(requests, rest_s),
        ),
    )


def index(plane: DataPlane, *, ready: bool) -> oip.RepositoryIndexResponse:
    """List the models; with `ready`, only those that are."""
    entry = oip.RepositoryIndexResponse.ModelIndex
    return oip.RepositoryIndexResponse(
        models=[
            entry(name=one.name, version=one.version, state=_STATES[one.state], reason=one.state_reason)
            for one in plane.all()
            if is_ready(one) or not ready
        ]
    )


def versions(plane: DataPlane, name: str) -> list[str]:
    """Return the versions of a model. Raises InvalidRequest and ModelNotFound."""
    check_model_reference(name, "")
    found = [one.version for one in plane.all() if one.name == name]
    if not found:
        raise ModelNotFound(name, "")
    return found


def _layout(plane: DataPlane, name: str, version: str) -> tuple[ServedModel, Layout]:
    """Return a model and its layout. Raises NotServing or ModelFailed for one whose manifest is not known."""
    served, reader = plane.described(name, version)
    if reader is None:
        served.serving()
    assert reader is not None, "a model that serves has a manifest"
    return served, Layout.of(reader)
