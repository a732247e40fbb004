"""Inputs, outputs and parameters of a request over gRPC or REST. Unknown parameters are refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from attnserve.v1 import inference_service_pb2

from attnserve_server.domain.errors import Violations, quoted
from attnserve_server.transport.oip.layout import ATTENTION

FINAL: Final = "triton_enable_empty_final_response"
_RESERVED: Final[Mapping[str, str]] = {
    **dict.fromkeys(("sequence_id", "sequence_start", "sequence_end"), "no model here keeps state between requests"),
    **dict.fromkeys(
        ("shared_memory_region", "shared_memory_offset", "shared_memory_byte_size"),
        "send the bytes in the request",
    ),
    "classification": "no output is reduced to classes here",
}
"""Parameters that the protocol defines and that are not supported, with the reason or the remedy."""
SIZE, BINARY, ALL_BINARY = _OF_BINARY_DATA = ("binary_data_size", "binary_data", "binary_data_output")
"""Parameters by which REST requests place bytes: of an input, an output and a request. kserve's client sends them
over gRPC too, where they have no effect."""
_SUPPORTED: Final = "priority, timeout, prompt_name, top_k"
MAX_TOP_K: Final = 4096
MAX_OUTPUTS: Final = 4096


@dataclass(slots=True)
class Parameters:
    """What the parameters of one request mean.

    `priority`: of the native contract. `timeout_s`: None without one. `top_k`: 0 without one. `final`: whether an
    answer on a stream states that it is the only one.
    """

    priority: Any = inference_service_pb2.PRIORITY_UNSPECIFIED
    timeout_s: float | None = None
    prompt: str | None = None
    top_k: int = 0
    final: bool = False


NONE: Final = Parameters()
"""Of a request without parameters. Not to be changed."""


@dataclass(slots=True)
class Given:
    """One input of a request: its bytes, or the strings of one of BYTES."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes | memoryview
    texts: Sequence[bytes] = ()


@dataclass(slots=True)
class Wanted:
    """A request as the protocol has it, over gRPC or REST. `outputs`: names; empty: all but virtual ones."""

    inputs: list[Given]
    outputs: Sequence[str]
    parameters: Parameters
    size: int
    """Bytes on the wire."""
    all_binary: bool = True
    """Whether outputs are answered as bytes, unless `binary` differs for one; else as JSON, which REST alone has."""
    binary: Mapping[str, bool] = field(default_factory=dict)

    def is_binary(self, output: str) -> bool:
        """Return whether an output is answered as bytes."""
        return self.binary.get(output, self.all_binary)

    @property
    def rows(self) -> int:
        """Rows of the batch, as the first input has it; for quotas, before anything is checked."""
        shape = self.inputs[0].shape if self.inputs else ()
        return min(max(shape[0], 1), MAX_OUTPUTS) if shape else 1

    @property
    def attention(self) -> bool:
        """Whether it selects attention."""
        return any(name.startswith(ATTENTION) for name in self.outputs)


def read_parameters(given: Mapping[str, Any], violations: Violations) -> Parameters:
    """Read the parameters of a request.

    Args:
        given: values, int, str, bool or float, by name.
        violations: what is wrong is added to.
    """
    found = Parameters()
    for name, value in given.items():
        field = f"parameters[{quoted(name)}]"
        if name == "priority":
            number = _number(value, field, 0, 2**64 - 1, violations)
            high, low = inference_service_pb2.PRIORITY_HIGH, inference_service_pb2.PRIORITY_LOW
            found.priority = found.priority if not number else high if number == 1 else low
        elif name == "timeout":
            found.timeout_s = (_number(value, field, 0, 2**63 - 1, violations) / 1e6) or None
        elif name == "top_k":
            found.top_k = _number(value, field, 1, MAX_TOP_K, violations)
        elif name == "prompt_name" and isinstance(value, str):
            found.prompt = value
        elif name == FINAL and isinstance(value, bool):
            found.final = value
        elif name not in _OF_BINARY_DATA:
            violations.add(field, _why_not(name, value))
    return found


def refuse_parameters(given: Mapping[str, Any], path: str, violations: Violations) -> None:
    """Refuse the parameters of an input or an output: none has an effect there."""
    for name in [one for one in given if one not in _OF_BINARY_DATA]:
        violations.add(f"{path}.parameters[{quoted(name)}]", _why_not(name, None))


def _number(value: object, field: str, least: int, most: int, violations: Violations) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        violations.add(field, f"{quoted(str(value))} is no integer; send a number without a fraction")
        return 0
    if not least <= value <= most:
        violations.add(field, f"{value} is not from {least} to {most}")
        return 0
    return value


def _why_not(name: str, value: object) -> str:
    if name in _RESERVED:
        return f"not supported: {_RESERVED[name]}; leave it out"
    if name in {"prompt_name", FINAL} and value is not None:
        return f"{quoted(str(value))} has the wrong type: {'a string' if name == 'prompt_name' else 'a bool'} is needed"
    return f"unknown; a request may have {_SUPPORTED}, and an input or an output has no parameters: leave it out"


def of_message(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a message's parameters by name; None for one without a value."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        kind = value.WhichOneof("parameter_choice")
        found[name] = None if kind is None else getattr(value, kind)
    return found
