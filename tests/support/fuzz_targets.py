"""What `fuzz_inputs` mutates, and what must hold for each input: one class for each reader of foreign bytes.

A target makes an input from a `random.Random`, and checks it: it raises Broken, or an exception that the reader does
not declare. `outcome` returns a word for statistics. The project's own reader reads graphs, and the runtime never does.
"""

from __future__ import annotations

import json
import random
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from attnserve.v1 import attention_pb2, labels_pb2, tensor_pb2
from attnserve.v1 import inference_service_pb2 as pb
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.graphs.reading import read_graph
from attnserve_server.domain.errors import AttnserveError
from attnserve_server.domain.values import Priority
from attnserve_server.isolation.arena import Arena
from attnserve_server.isolation.messages import ENCODER, TO_ENGINE, Ask, Inbox, Outbox, Released, Withdraw
from attnserve_server.model.manifest import NUMPY_DTYPES, AxisSpec, InputRole, InputSpec, Manifest
from attnserve_server.model.repository import BundleInvalid, Repository
from attnserve_server.model.tokenizer import TextTokenizer, TokenizerInvalid, TruncationFailed
from attnserve_server.transport.intake import Intake
from attnserve_server.transport.quick import QuickReader
from attnserve_server.transport.status import code_of, is_fault, status_of
from attnserve_server.transport.validation import ValidRequest, check_model_reference, check_request_id, validate
from attnserve_server.transport.wire import MAX_STRUCTURE_BYTES, Received, find_field, receive
from bad_files import BAD_MODELS, ODD_MODELS
from mutating import change_message, changed_bytes, changed_value
from onnx_files import encoder
from tiny_bundle import tiny_graph, tiny_manifest, tiny_tokenizer


class Broken(AssertionError):
    """A rule does not hold for an input."""


class Target(ABC):
    """One reader of foreign bytes."""

    is_native = False
    """Whether other makers' native code parses the input, whose crash is counted and fails no run."""

    @abstractmethod
    def make(self, chance: random.Random) -> bytes:
        """Make one input."""

    @abstractmethod
    def outcome(self, data: bytes) -> str:
        """Read one input, check what must hold, and return a word for statistics."""


def _tensor(name: str, dtype: str, values: Sequence[float], shape: Sequence[int]) -> tensor_pb2.Tensor:
    kinds = {"int64": tensor_pb2.DATA_TYPE_INT64, "int32": tensor_pb2.DATA_TYPE_INT32}
    kinds |= {"float32": tensor_pb2.DATA_TYPE_FLOAT32, "float64": tensor_pb2.DATA_TYPE_FLOAT64}
    return tensor_pb2.Tensor(name=name, dtype=kinds[dtype], shape=shape, data=np.array(values, dtype).tobytes())


def _tensors(count: int, *, mixed: bool) -> pb.Sequence:
    sent = [
        _tensor("input_ids", "int64", [1] * count, [count]),
        _tensor("attention_mask", "int64", [1] * count, [count]),
    ]
    if mixed:
        sent += [
            _tensor("types", "int32", [0] * count, [count]),
            _tensor("pixels", "float32", [0.5] * 4, [2, 2]),
            _tensor("scale", "float64", [1.0], []),
        ]
    return pb.Sequence(tensors=pb.TensorInput(tensors=sent))


def _texts(*texts: str, **fields: Any) -> pb.InferRequest:
    return pb.InferRequest(sequences=[pb.Sequence(text=pb.TextInput(text=one)) for one in texts], **fields)


def seeds() -> list[pb.InferRequest]:
    """Valid requests of every kind."""
    select = attention_pb2.AttentionSelection
    made = [
        pb.InferRequest(sequences=[_tensors(count, mixed=mixed)] * times)
        for mixed in (False, True)
        for count, times in ((1, 1), (5, 1), (3, 3))
    ]
    made += [
        _texts("the cat sat"),
        _texts("the cat", "a mat", validate_only=True),
        pb.InferRequest(sequences=[pb.Sequence(text=pb.TextInput(text="the cat", text_pair="a mat"))]),
        _texts("the cat sat", outputs=pb.OutputSelection(names=["embedding"])),
        _texts("the cat", attention=select()),
        _texts("the cat", attention=select(layers=[-1, 0], head_reduction=2, layer_reduction=1, unit=2)),
        _texts("the cat sat", attention=select(sites=["layer0"], heads=[0, 1], top_k=2, min_weight=0.1)),
        _texts("the cat sat", attention=select(queries=[0, -1], features=[1, 3], special_tokens=2)),
        _texts("the cat sat", attention=select(layer_reduction=3, values=1)),
        _texts("the cat", labels=labels_pb2.LabelSelection()),
    ]  # fmt: skip
    for at, request in enumerate(made):
        request.model, request.version, request.request_id = "tiny", "1", f"r{at}"
        request.priority = at % 4
    return made


def _mixed_manifest() -> Manifest:
    tiny = tiny_manifest(text=False)
    inputs = (
        *tiny.inputs,
        InputSpec(name="types", dtype="int32", shape=("seq",), role=InputRole.TOKEN_TYPE_IDS, fill=0),
        InputSpec(name="pixels", dtype="float32", shape=("patch", 2), fill=None),
        InputSpec(name="scale", dtype="float64", shape=(), fill=1),
    )
    axes = (*tiny.axes, AxisSpec(symbol="patch", max_length=3, paddable=False))
    return tiny.model_copy(update={"inputs": inputs, "axes": axes})


def _intakes() -> list[Intake]:
    tokenizer = TextTokenizer(tiny_tokenizer(), "seq")
    bounds = {"max_batch_size": 4, "max_text_bytes": 200, "max_response_bytes": 20_000}
    return [Intake.of(tiny_manifest(), tokenizer, **bounds), Intake.of(_mixed_manifest(), None, **bounds)]


def same(one: ValidRequest, other: ValidRequest) -> bool:
    """Whether two requests were read alike, tensors included."""
    if len(one.sequences) != len(other.sequences):
        return False
    fields = (
        "lengths",
        "outputs",
        "attention",
        "labels",
        "units",
        "response_bytes",
        "is_whole_request",
        "unpadded",
        "past",
    )
    for first, second in zip(one.sequences, other.sequences, strict=True):
        if first.tensors.keys() != second.tensors.keys() or any(
            getattr(first, f) != getattr(second, f) for f in fields
        ):
            return False
        for name, tensor in first.tensors.items():
            twin = second.tensors[name]
            if tensor.dtype != twin.dtype or tensor.shape != twin.shape or tensor.tobytes() != twin.tobytes():
                return False
    return (one.outputs, one.effective, one.priority, one.predicted_bytes) == (
        other.outputs, other.effective, other.priority, other.predicted_bytes,
    )  # fmt: skip


class Requests(Target):
    """Bytes of an InferRequest, or of one on a stream, from the wire to a request that may run."""

    def __init__(self) -> None:
        self._seeds = seeds()
        self._bytes = [one.SerializeToString() for one in self._seeds]
        self._intakes = _intakes()
        self._quick = [QuickReader.of(intake) for intake in self._intakes]
        self._filler = tensor_pb2.Tensor(name="filler", data=bytes(MAX_STRUCTURE_BYTES + 10)).SerializeToString()

    def make(self, chance: random.Random) -> bytes:
        """A valid request with changed fields, changed bytes, or both; one in 64 is long enough to be scanned."""
        at = chance.randrange(len(self._seeds))
        data, kind = self._bytes[at], chance.randrange(8)
        if kind <= 5:
            proto = pb.InferRequest()
            proto.CopyFrom(self._seeds[at])
            change_message(chance, proto)
            data = proto.SerializeToString()
        if kind >= 5:
            data = changed_bytes(chance, data, self._bytes)
        if chance.randrange(64) == 0:
            inner = b"\x0a" + _varint(len(self._filler)) + self._filler  # TensorInput.tensors
            one = b"\x0a" + _varint(len(inner)) + inner  # Sequence.tensors
            data += b"\x1a" + _varint(len(one)) + one
        return data

    def outcome(self, data: bytes) -> str:
        """Both readers agree, and a refusal is one status that is no internal error."""
        streamed = b"\x0a" + _varint(len(data)) + data
        find_field(streamed, 1, 8)
        try:
            received = receive(pb.InferRequest, data)
            message = received.message
            if message.request_id:
                check_request_id(message.request_id)
        except AttnserveError as error:
            return _status(error)
        self._compare_with_protobuf(received, data)
        try:
            check_model_reference(message.model, message.version)
        except AttnserveError as error:
            _status(error)  # what follows does not depend on the name
        readers = zip(self._intakes, self._quick, strict=True)
        return "+".join(self._read(received, intake, quick) for intake, quick in readers)

    def _read(self, received: Received[pb.InferRequest], intake: Intake, quick: QuickReader | None) -> str:
        fast = None if quick is None else quick.read(received)
        try:
            slow = validate(received, intake)
        except AttnserveError as error:
            if fast is not None:
                raise Broken("the quick reader accepts what validation refuses") from error
            return _status(error)
        if fast is not None and not same(fast, slow):
            raise Broken("the quick reader reads another request than validation")
        return "valid"

    def _compare_with_protobuf(self, received: Received[pb.InferRequest], data: bytes) -> None:
        """Tensor data that was not copied is what protobuf's own parser finds."""
        if len(data) <= MAX_STRUCTURE_BYTES:
            return
        whole = pb.InferRequest.FromString(data)
        for one, other in zip(received.message.sequences, whole.sequences, strict=True):
            for mine, theirs in zip(one.tensors.tensors, other.tensors.tensors, strict=True):
                if bytes(received.data_of(mine)) != theirs.data:
                    raise Broken("tensor data differs from what protobuf reads")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _status(error: AttnserveError) -> str:
    """The status of a refusal, which must fit a trailer, be plain text and be no internal error."""
    if is_fault(error):
        raise Broken("an internal error for a caller's bytes") from error
    status = status_of(error, "r")
    if status.ByteSize() > 4096 + 512 or not status.message.isascii() or not status.message.isprintable():
        raise Broken(f"a status that is too long or not plain: {status.ByteSize()} bytes") from error
    return code_of(status).name


class EngineMessages(Target):
    """What an engine decodes from a front."""

    ARENA = 2**20

    def __init__(self) -> None:
        self._arena = Arena(Arena.create_descriptor(self.ARENA), self.ARENA)
        self._inbox: Inbox | None = None
        outbox, self._messages = Outbox(self._arena), list[bytes]()
        for intake in _intakes():
            for number, request in enumerate(seeds()):
                try:
                    valid = validate(Received(request, request.ByteSize()), intake)
                except AttnserveError:
                    continue
                self._messages.append(outbox.ask(number, "r", None, 9, 1, valid.sequences))
        big = np.zeros((100, 100), np.float32)
        sequence = valid.sequences[0]
        sequence.tensors = {"big": big}
        self._messages.append(outbox.ask(99, "r", 1.5, 9, 1, [sequence]))
        self._messages += [ENCODER.encode(Withdraw(3, expired=True)), ENCODER.encode(Released([1, 2]))]
        self._values = [msgspec.msgpack.decode(one) for one in self._messages]

    def make(self, chance: random.Random) -> bytes:
        """A message of a front with changed values, or changed bytes."""
        at = chance.randrange(len(self._messages))
        if chance.random() < 0.7:
            return msgspec.msgpack.encode(changed_value(chance, self._values[at]))
        return changed_bytes(chance, self._messages[at], self._messages)

    def outcome(self, data: bytes) -> str:
        """A message is decoded, or raises what `messages` declares; arrays are within the message or the arena."""
        inbox = self._inbox = self._inbox or Inbox(self._arena, lambda _: None)
        try:
            message = TO_ENGINE.decode(data)
            if not isinstance(message, Ask):
                return type(message).__name__
            sequences = inbox.sequences(message)
            Priority(message.priority)
        except (msgspec.DecodeError, ValueError) as error:
            return type(error).__name__
        known = set(NUMPY_DTYPES.values())
        for sequence in sequences:
            for array in sequence.tensors.values():
                if array.dtype.newbyteorder("=") not in known:
                    raise Broken(f"an array of {array.dtype}")
                if array.nbytes > max(len(data), self.ARENA):
                    raise Broken(f"an array of {array.nbytes} bytes in a message of {len(data)}")
        return "Ask"


class JsonFiles(Target):
    """A file of JSON."""

    def __init__(self, values: list[Any]) -> None:
        """Store the contents of valid files."""
        self._values = values
        self._texts = [json.dumps(one).encode() for one in values]

    def make(self, chance: random.Random) -> bytes:
        """A file with changed values, or changed bytes."""
        at = chance.randrange(len(self._values))
        if chance.random() < 0.8:
            return json.dumps(changed_value(chance, self._values[at]), default=str).encode()
        return changed_bytes(chance, self._texts[at], self._texts)


class Manifests(JsonFiles):
    """manifest.json of a bundle."""

    def __init__(self) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="attnserve-fuzz-"))
        self._file = self._root / "tiny" / "1" / "manifest.json"
        self._file.parent.mkdir(parents=True)
        models = [tiny_manifest(), tiny_manifest(text=False), _mixed_manifest()]
        super().__init__([json.loads(one.model_dump_json()) for one in models])

    def outcome(self, data: bytes) -> str:
        """A manifest is refused in one sentence, or can be served."""
        self._file.write_bytes(data)
        try:
            manifest = Repository(self._root).bundle("tiny", "1").manifest
        except BundleInvalid:
            return "refused"
        intake = Intake.of(manifest, None, max_batch_size=4, max_text_bytes=200, max_response_bytes=20_000)
        QuickReader.of(intake)
        return "read"


class Tokenizers(JsonFiles):
    """tokenizer.json of a bundle, and a text with it."""

    is_native = True

    def __init__(self) -> None:
        self._file = Path(tempfile.mkdtemp(prefix="attnserve-fuzz-")) / "tokenizer.json"
        padded = tiny_tokenizer()
        padded.enable_padding(length=16, pad_id=0)
        padded.enable_truncation(12)
        super().__init__([json.loads(one.to_str()) for one in (tiny_tokenizer(), padded)])

    def outcome(self, data: bytes) -> str:
        """A tokenizer is refused, or tokenizes; it may refuse a text with the declared error."""
        self._file.write_bytes(data)
        try:
            tokenizer = TextTokenizer.load(self._file, "seq")
        except TokenizerInvalid:
            return "refused"
        try:
            tokens = tokenizer.encode("the cat sat on a mat", "a dog", limit=10_000)
        except TruncationFailed:
            return "not truncated"
        if len(tokens.ids) > 10_000 and tokens.units.special:
            raise Broken(f"{len(tokens.ids)} tokens over the limit")
        return "tokenizes"


class Models(Target):
    """An ONNX file, up to the point where the runtime would read it."""

    is_native = True

    def __init__(self) -> None:
        self._file = Path(tempfile.mkdtemp(prefix="attnserve-fuzz-")) / "model.onnx"
        builders: list[Callable[[], onnx.ModelProto]] = [
            tiny_graph,
            encoder,
            *(make for make, _ in ODD_MODELS.values()),
        ]
        builders = builders * 4 + [make for make, _ in BAD_MODELS.values()]
        self._models = [model for model in (build() for build in builders) if model.ByteSize() < 200_000]
        self._bytes = [model.SerializeToString() for model in self._models]

    def make(self, chance: random.Random) -> bytes:
        """A model with changed fields, changed bytes, or both."""
        at = chance.randrange(len(self._models))
        data, kind = self._bytes[at], chance.randrange(8)
        if kind <= 5:
            proto = onnx.ModelProto()
            proto.CopyFrom(self._models[at])
            change_message(chance, proto)
            data = proto.SerializeToString()
        return changed_bytes(chance, data, self._bytes) if kind >= 5 else data

    def outcome(self, data: bytes) -> str:
        """A file is read, or refused in one sentence without a path."""
        self._file.write_bytes(data)
        try:
            read_graph(self._file)
        except BuildRefused as error:
            if str(self._file.parent) in str(error) or "\n" in str(error):
                raise Broken(f"a refusal with a path or several lines: {error}") from error
            return "refused"
        return "read"


TARGETS: dict[str, type[Target]] = {
    "requests": Requests,
    "engine": EngineMessages,
    "manifests": Manifests,
    "tokenizers": Tokenizers,
    "models": Models,
}
