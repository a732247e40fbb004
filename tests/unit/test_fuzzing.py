"""The mutated inputs of `make fuzz-short` reach what they are for, and find a defect that is put in.

A target is run in this process on a few hundred inputs; `found` collects what it raises.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
from attnserve_server.conversion.graphs import reading
from attnserve_server.isolation import messages
from attnserve_server.model import sealing
from attnserve_server.transport import quick
from fuzz_targets import TARGETS, EngineMessages, Models, Requests, Target, Tokenizers

SEED = 5


def found(target: Target, count: int) -> Counter[str]:
    """What happens to inputs: outcomes, and names of exceptions."""
    results: Counter[str] = Counter()
    for number in range(count):
        made = target.make(random.Random(f"{SEED}:{number}"))
        try:
            results[target.outcome(made)] += 1
        except BaseException as error:  # noqa: BLE001 - a panic of native code is no Exception
            results[f"raised {type(error).__name__}"] += 1
    return results


def raised(results: Counter[str]) -> list[str]:
    return [name for name in results if name.startswith("raised")]


@pytest.mark.parametrize(
    ("name", "count", "usual"),
    [
        ("requests", 300, {"INVALID_ARGUMENT", "valid+INVALID_ARGUMENT", "valid+FAILED_PRECONDITION"}),
        ("engine", 900, {"Ask", "Withdraw", "Released", "ValidationError", "DecodeError"}),
        ("manifests", 150, {"read", "refused"}),
        ("tokenizers", 60, {"tokenizes", "refused"}),
        ("models", 60, {"read", "refused"}),
    ],
)
async def test_inputs_are_read_and_refused_and_nothing_else(name: str, count: int, usual: set[str]) -> None:
    results = found(TARGETS[name](), count)
    assert raised(results) == []
    assert usual <= set(results)


def test_an_input_follows_from_its_number() -> None:
    target = Requests()
    one, other = (target.make(random.Random("requests:1:7")) for _ in range(2))
    assert one == other


def test_a_quick_reader_that_accepts_too_much_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Requests()
    monkeypatch.setattr(quick, "fits", lambda *_: True)
    assert raised(found(target, 600)) != []


def test_a_quick_reader_that_reads_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Requests()
    monkeypatch.setattr(quick, "PRIORITIES", dict.fromkeys(quick.PRIORITIES, next(iter(quick.PRIORITIES.values()))))
    assert raised(found(target, 300)) == ["raised Broken"]


def test_an_exception_that_is_not_declared_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(message: str, version: str) -> None:
        message.encode("ascii")

    target = Requests()
    monkeypatch.setattr("fuzz_targets.check_model_reference", careless)
    assert "raised UnicodeEncodeError" in found(target, 600)


async def test_an_engine_that_believes_a_size_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def trusting(self: messages.Inbox, message: messages.ArrayMessage, number: int) -> object:
        del self, number
        return messages.np.zeros(messages.math.prod(message.shape), message.dtype)

    target = EngineMessages()
    monkeypatch.setattr(messages.Inbox, "_array", trusting)
    assert "raised Broken" in found(target, 4000)


def test_a_tokenizer_that_is_not_tried_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Tokenizers()
    monkeypatch.setattr(sealing, "_try_texts", lambda _: None)
    assert raised(found(target, 800)) != []


def test_a_reader_of_models_that_lets_errors_through_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(proto: object, name: str) -> None:
        raise KeyError(name)

    target = Models()
    monkeypatch.setattr(reading, "refuse_unknown_versions", careless)
    assert "raised KeyError" in found(target, 30)
