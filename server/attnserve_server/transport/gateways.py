"""What gateways ask for: the load of models, and tokenizer files, which are sent in pieces. Event loop only."""

from __future__ import annotations

from typing import Final

from attnserve.v1 import inference_service_pb2 as wire

from attnserve_server.domain.errors import NotServing, TextUnavailable
from attnserve_server.model.repository import TOKENIZER_FILE
from attnserve_server.model.specs import TextSpec
from attnserve_server.scheduling.admission import Demand
from attnserve_server.scheduling.catalog import ModelState, ServedModel
from attnserve_server.transport.codec import CHUNK_BYTES
from attnserve_server.transport.dataplane import STATES, DataPlane

_NOTHING: Final = Demand(0, 0, 0)


def loads(plane: DataPlane, request: wire.GetLoadRequest, max_queue_size: int) -> wire.GetLoadResponse:
    """Return the load of a model's versions, or of all models.

    Raises:
        InvalidRequest: No model can have this name.
        ModelNotFound: There is none of this name.
    """
    versions = plane.versions(request.model)
    return wire.GetLoadResponse(models=[_load_of(served, max_queue_size) for served in versions])


def tokenizer_piece(plane: DataPlane, request: wire.GetTokenizerRequest) -> wire.GetTokenizerResponse:
    """Return a piece of a model's tokenizer file.

    Raises:
        InvalidRequest: No model can have this name or version.
        ModelNotFound: There is no such model.
        NotServing: It is loading.
        TextUnavailable: It has no tokenizer.
    """
    served = plane.find(request.model, request.version)
    manifest, tokenizer = served.manifest, served.tokenizer
    if manifest is None or (manifest.text is not None and tokenizer is None):
        raise NotServing(served.name, served.state.value)
    if manifest.text is None or tokenizer is None:
        raise TextUnavailable(served.name)
    file, begin = tokenizer.file, request.offset
    return wire.GetTokenizerResponse(
        model=served.name,
        version=served.version,
        digest=f"sha256:{manifest.files[TOKENIZER_FILE].removeprefix('sha256:')}",
        total_bytes=len(file),
        offset=begin,
        data=file[begin : begin + CHUNK_BYTES],
        settings=_settings_of(manifest.text, pads=manifest.text.axis in manifest.text_as_written),
    )


def _load_of(served: ServedModel, max_queue_size: int) -> wire.ModelLoad:
    message = wire.ModelLoad(model=served.name, version=served.version, state=STATES[served.state])
    if served.scheduler is None or served.state is not ModelState.READY:
        return message
    load = served.scheduler.load()
    message.waiting_sequences, message.waiting_tokens = load.waiting.sequences, load.waiting.tokens
    message.waiting_bytes, message.running_tokens = load.waiting.bytes, load.running_tokens
    message.instances, message.max_waiting_sequences = load.instances, max_queue_size
    if load.seconds_per_token is not None:
        message.predicted_wait_seconds = load.wait_s(load.tokens_ahead(_NOTHING))
    return message


def _settings_of(text: TextSpec, *, pads: bool) -> wire.TokenizerSettings:
    return wire.TokenizerSettings(
        max_tokens=text.max_tokens,
        pads_and_truncates=pads,
        mask_token=text.mask_token,
        pair_is_separate=bool(text.pair_axis),
        pair_max_tokens=text.pair_max_tokens,
        pair_start_id=text.pair_start,
    )
