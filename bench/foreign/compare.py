"""Converts a file of another tool by the command that a user calls, and compares the served answers with its source.

A case is such a file, with its inputs and, where they are known, the answers of the model that the tool converted.
`converted` returns why a file was refused. `compared` raises the client's errors if the server does not answer, and
KeyError for an input of the file whose value is not known.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from attnserve_client import AsyncClient, AttentionSelection, InferenceResult

from bench.foreign.case import Array, Case
from bench.foreign.continued import after_a_past

CONVERSION_LIMIT_S = 900.0
NO_CACHE = "no cache"
_PARTS = ("sequences", "outputs", "weights")
_NO_PAST = "sequences cannot have a past: "
CALL_LIMIT_S = 60.0
# float32: the order of sums differs from the source's, and onnxruntime's kernels approximate erf and tanh.
EXACT_OUTPUTS, EXACT_WEIGHTS = 1e-4, 1e-5
"""The greatest differences from a source in float32, relative to its greatest output, and absolute for weights."""
ROUNDED = {"fp32": 1e-4, "fp16": 2e-2, "int8": 5e-2}
"""The greatest differences of outputs from the file itself, by precision, relative to its greatest output."""


@dataclass(slots=True)
class Row:
    """The result of one case.

    Attributes:
        case: the case.
        found: sites with weights, and all sites of the bundle; None if it was not converted.
        weight_error: the greatest difference of weights from the source's, or from the file's own by the conversion.
        output_error: the greatest difference of outputs, relative to the greatest output.
        certificate: verdicts on the batch and on padding.
        past: the greatest difference after a past: of weights, or of outputs where the file rounds; or why there is
            none.
        notes: reasons for what is missing, and differences above their limits.
        wrong: whether a difference exceeds its limit without an error of the server.
    """

    case: Case
    found: tuple[int, int] | None = None
    weight_error: float | None = None
    output_error: float | None = None
    certificate: str = ""
    past: float | str = NO_CACHE
    notes: list[str] = field(default_factory=list)
    wrong: bool = False


def converted(case: Case, repository: Path) -> tuple[dict[str, Any] | None, str]:
    """Convert a case. Return its manifest, or None and the reason in one sentence.

    With a manifest, the sentence is the reason why a decoder with a cache takes no past; empty if it does.
    """
    command = [str(Path(sys.executable).with_name("attnserve-server")), "prepare", str(case.file), "--name", case.name]
    command += ["--repository", str(repository), "--no-try", "--attack-seconds", "3", "--json", *case.flags]
    places = [folder / "tokenizer.json" for folder in (case.file.parent, case.file.parent.parent)]
    tokenizer = next((place for place in places if case.words and place.is_file()), None)
    command += [] if tokenizer is None else ["--tokenizer", str(tokenizer)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CONVERSION_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return None, f"the conversion takes more than {CONVERSION_LIMIT_S:g} s"
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return None, lines[-1] if lines else f"exit code {done.returncode} without a message"
    refused = next((line for line in done.stderr.splitlines() if _NO_PAST in line), "")
    return json.loads(done.stdout), refused.partition(_NO_PAST)[2]


async def compared(client: AsyncClient, case: Case, manifest: dict[str, Any], no_past: str) -> Row:
    """Compare the answers of a served case with its source: each sequence alone, all at once, as texts, after a past.

    Args:
        client: of the server.
        case: the case.
        manifest: of its bundle.
        no_past: why a decoder with a cache takes no past; empty if it does, or has no cache.

    Raises:
        AttnserveError: the server does not answer.
    """
    sites = manifest["sites"]
    available = [site for site in sites if site["weights_output"] is not None]
    row = Row(case, found=(len(available), len(sites)), certificate=_certificate(manifest))
    row.notes += [f"{site['name']}: {site['unavailable_reason']}" for site in sites if site["unavailable_reason"]]
    if case.sites and len(available) != case.sites:
        row.notes.append(f"{case.sites} sites expected")
        row.wrong = len(sites) != case.sites  # one is neither found nor listed with a reason
    names = [spec["name"] for spec in manifest["inputs"]]
    inputs = [_named(each, names) for each in case.sequences]
    case, inputs = _of_the_files_lengths(case, inputs, manifest, row)
    if not inputs:
        return row
    selection = AttentionSelection() if available else None
    caches = _caches(manifest)
    alone = [await client.infer(case.name, each, attention=selection, timeout=CALL_LIMIT_S) for each in inputs]
    at_once = min(len(inputs), manifest["max_batch_size"])
    streamed = client.stream(case.name, inputs, attention=selection, per_message=at_once, timeout=CALL_LIMIT_S)
    found = [*alone, *[answer.result async for answer in streamed]]
    if manifest["text"] is not None and case.words:
        texts = [_as_text(each) for each in inputs]
        found += await client.infer(case.name, texts, attention=selection, timeout=CALL_LIMIT_S)
        row.notes.append("from texts too")
    times = len(found) // len(inputs)
    limit = EXACT_OUTPUTS if case.outputs else ROUNDED[manifest["precision"]]
    expected = case.outputs or _all_by_the_file(case, caches, row)
    if expected:
        pairs = zip(found, [*expected] * times, strict=True)
        row.output_error = max(_output_error(own, right) for own, right in pairs)
        row.wrong |= not row.output_error <= limit
    if case.weights and available:
        pairs = zip(found, case.weights * times, strict=True)
        row.weight_error = max(_weight_error(own, right) for own, right in pairs)
        row.wrong |= not row.weight_error <= EXACT_WEIGHTS
    elif available:
        row.weight_error = manifest["check"]["weight_max_abs_error"]
    after = await _after_a_past(client, case, inputs, row, limit, caches)
    row.past = after if after is not None else no_past or NO_CACHE
    if row.wrong:
        row.notes.append("above its limit")
    return row


def _as_text(sequence: dict[str, Array]) -> str | tuple[str, dict[str, Array]]:
    """Return the words of a sequence's ids; with them, what does not follow from a text, as an encoder's states."""
    text = " ".join(f"w{number}" for number in sequence["input_ids"])
    rest = {name: array for name, array in sequence.items() if name.startswith("encoder_")}
    return (text, rest) if rest else text


def _of_the_files_lengths(
    case: Case, inputs: list[dict[str, Array]], manifest: dict[str, Any], row: Row
) -> tuple[Case, list[dict[str, Array]]]:
    """Leave out sequences of lengths that the file does not take, since its tool fixed them, and note it."""
    fixed = {
        (spec["name"], place): size
        for spec in manifest["inputs"]
        for place, size in enumerate(spec["shape"])
        if isinstance(size, int)
    }
    kept = [
        number
        for number, each in enumerate(inputs)
        if all(each[name].shape[place] == size for (name, place), size in fixed.items() if name in each)
    ]
    if len(kept) == len(inputs):
        return case, inputs
    sizes = ", ".join(
        f"{size} along axis {place} of {name!r}"
        for (name, place), size in fixed.items()
        if any(each[name].shape[place] != size for each in inputs if name in each)
    )
    row.notes.append(f"the file takes {sizes} alone: {len(kept)} of {len(inputs)} sequences compared")
    parts = {name: tuple(getattr(case, name)[at] for at in kept if getattr(case, name)) for name in _PARTS}
    return replace(case, **parts), [inputs[at] for at in kept]


async def _after_a_past(
    client: AsyncClient,
    case: Case,
    inputs: list[dict[str, Array]],
    row: Row,
    limit: float,
    caches: Mapping[str, list[int | str]],
) -> float | None:
    """Return the greatest difference after a past, and mark a row above its limit; None for a model without a past."""
    past = (await client.model(case.name)).past
    if past is None:
        return None
    found, outputs, weights = await after_a_past(
        client, case, past, inputs, lambda given: _by_the_file(case, given, caches), CALL_LIMIT_S
    )
    of_outputs = max(_output_error(own, right) for own, right in zip(found, outputs, strict=True))
    of_weights = (
        max(_weight_error(own, right) for own, right in zip(found, weights, strict=True)) if weights[0] else 0.0
    )
    row.wrong |= not (of_outputs <= limit and of_weights <= EXACT_WEIGHTS)
    return of_weights if weights[0] else of_outputs


def _certificate(manifest: dict[str, Any]) -> str:
    """Return the verdict on each clause of the certificate: one word if all are proved."""
    clauses = manifest["certificate"]["clauses"]
    open_ = [f"{clause['axis']} {clause['verdict']}" for clause in clauses if clause["verdict"] != "proved"]
    return "; ".join(open_) or "proved"


def _caches(manifest: dict[str, Any]) -> dict[str, list[int | str]]:
    """Return the shape of each cache input, without the batch axis, as the output that continues it has it."""
    presents = [spec for spec in manifest["outputs"] if spec["name"].startswith("present")]
    names = ("past_key_values", "past")
    continued = {name + spec["name"].removeprefix("present"): spec["shape"] for spec in presents for name in names}
    inputs = [cache["input"] for cache in (manifest["past"] or {"caches": ()})["caches"]]
    return continued | {spec["name"]: spec["shape"] for spec in inputs}


def _all_by_the_file(case: Case, caches: Mapping[str, list[int | str]], row: Row) -> tuple[dict[str, Array], ...]:
    """Return the answers of the file itself to each sequence; none, with a note, if the runtime does not run it."""
    try:
        return tuple(_by_the_file(case, each, caches) for each in case.sequences)
    except Exception as error:  # noqa: BLE001 - the runtime's errors have no common class
        row.notes.append(
            f"no outputs to compare with, since the runtime refuses the file: {str(error).splitlines()[0]}"
        )
        return ()


def _by_the_file(case: Case, sequence: Mapping[str, Array], caches: Mapping[str, list[int | str]]) -> dict[str, Array]:
    """Return the answers of the file itself, run by onnxruntime with one sequence."""
    session = _opened(case.file)
    given = _named(sequence, [value.name for value in session.get_inputs()])
    given |= {value.name: _filled(value, given, caches) for value in session.get_inputs() if value.name not in given}
    found = session.run(None, {name: array[None] for name, array in given.items()})
    names = [value.name for value in session.get_outputs()]
    # The branch with a cache of a merged file returns the encoder's keys without any row.
    return {name: array[0] for name, array in zip(names, found, strict=True) if len(array)}


def _filled(value: onnxruntime.NodeArg, given: Mapping[str, Array], caches: Mapping[str, list[int | str]]) -> Array:
    """Return what a caller of the file has to send for an input that a case leaves out, without the batch axis.

    Raises:
        KeyError: no value is known for this input.
    """
    if value.name.startswith("past"):
        shape = caches.get(value.name, value.shape[1:])
        return np.zeros([0 if isinstance(size, str) else size for size in shape], np.float32)
    pasts = (array.shape[-2] for name, array in given.items() if "past" in name and ".encoder." not in name)
    past = max(pasts, default=0)
    known = {
        "token_type_ids": np.zeros_like(given["input_ids"]),
        "position_ids": np.arange(past, past + len(given["input_ids"])),
        "use_cache_branch": np.array(past > 0),
    }
    return known[value.name]


def _opened(file: Path) -> onnxruntime.InferenceSession:
    """Open a file with exact integer products, where a processor without VNNI would saturate them.

    The option does not load files in which two nodes share quantized weights. These are opened without optimization:
    a product between quantizers is then computed in floats, as the file states it.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception:  # noqa: BLE001 - the runtime's errors have no common class
        plain = onnxruntime.SessionOptions()
        plain.log_severity_level = 4
        plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return onnxruntime.InferenceSession(file, plain, providers=["CPUExecutionProvider"])


def _named(sequence: Mapping[str, Array], names: Sequence[str]) -> dict[str, Array]:
    """Return a sequence with the file's own names, in order, where it has none of the maker's."""
    if any(name in names for name in sequence):
        return {name: array for name, array in sequence.items() if name in names}
    return dict(zip(names, sequence.values(), strict=False))


def _output_error(result: InferenceResult, expected: dict[str, Array]) -> float:
    outputs = _named(dict(expected), list(result.outputs))
    return max(_relative(result.outputs[name], array) for name, array in outputs.items())


def _relative(found: Array, expected: Array) -> float:
    if found.shape != expected.shape:
        return float("inf")
    greatest = max(float(np.abs(expected.astype(np.float64)).max(initial=0.0)), 1.0)
    return float(np.abs(found.astype(np.float64) - expected).max(initial=0.0)) / greatest


def _weight_error(result: InferenceResult, expected: dict[str, Array]) -> float:
    """Return the greatest difference, or infinity if maps have other shapes. Sites without weights have no map."""
    pairs = [(each.weights, expected.get(str(each.layer))) for each in result.attention]
    if any(right is None or own.shape != right.shape for own, right in pairs):
        return float("inf")
    return max(float(np.abs(own - right).max(initial=0.0)) for own, right in pairs if right is not None)
