"""How an answer was made: the run of each sequence, and the receipt of its request."""

from __future__ import annotations

from dataclasses import dataclass

from attnserve.v1 import inference_service_pb2 as wire


@dataclass(frozen=True, slots=True)
class Run:
    """How one sequence was run; all zeros if the model did not run.

    Attributes:
        batch_size: Sequences in the run, this one included.
        useful_tokens: Positions of all these sequences that carry data.
        computed_tokens: All positions of the run, padding included.
        queue_s: Time from arrival to the start of the run, in seconds.
        compute_s: Time of the run, in seconds.
        instance: Number of the instance that ran it, from 0.
    """

    batch_size: int = 0
    useful_tokens: int = 0
    computed_tokens: int = 0
    queue_s: float = 0.0
    compute_s: float = 0.0
    instance: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of a request went on the server; all zeros if the model did not run, or an old server answered.

    Attributes:
        queue_s: Time from the request's arrival to the start of a run, in seconds: the longest of its sequences.
        compute_s: Time of a run, in seconds: the longest of its sequences' runs.
        attention_s: Time to reduce attention to the selection, in seconds, of all its sequences together.
        encode_s: Time to encode the results, in seconds.
    """

    queue_s: float = 0.0
    compute_s: float = 0.0
    attention_s: float = 0.0
    encode_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Receipt:
    """The model and server that produced an answer.

    Attributes:
        request_id: Id of the request.
        model: Name of the model.
        version: Its version.
        digest: `sha256:` and the hexadecimal digest of its bundle.
        execution_provider: Execution provider of onnxruntime, for example `CPUExecutionProvider`.
        precision: Precision that it ran in: `fp32`, `fp16`, `int8`, or `bf16-scores` (bfloat16 throughout).
        timings: Where the time of the request went.
    """

    request_id: str
    model: str
    version: str
    digest: str
    execution_provider: str
    precision: str
    timings: Timings = Timings()


def receipt_of(message: wire.Receipt) -> Receipt:
    """Decode a receipt."""
    return Receipt(
        request_id=message.request_id,
        model=message.model,
        version=message.version,
        digest=message.digest,
        execution_provider=message.execution_provider,
        precision=message.precision,
        timings=_timings_of(message.timings),
    )


def run_of(message: wire.Run) -> Run:
    """Decode how a sequence was run."""
    return Run(
        batch_size=message.batch_size,
        useful_tokens=message.useful_tokens,
        computed_tokens=message.computed_tokens,
        queue_s=message.queue_seconds,
        compute_s=message.compute_seconds,
        instance=message.instance,
    )


def _timings_of(message: wire.Timings) -> Timings:
    return Timings(
        queue_s=message.queue_seconds,
        compute_s=message.compute_seconds,
        attention_s=message.attention_seconds,
        encode_s=message.encode_seconds,
    )
