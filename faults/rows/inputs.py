"""Rows 1 to 5 and 8 to 10: requests that are wrong in themselves. Each is refused by name, and costs nothing."""

from __future__ import annotations

import os
import random
import time
from typing import Any, Final

import numpy as np
from attnserve.v1 import attention_pb2, tensor_pb2
from attnserve.v1 import inference_service_pb2 as pb
from fuzz_targets import Requests
from tiny_bundle import MAX_LENGTH, VOCABULARY

from faults import bundles
from faults.history import End
from faults.lab import Lab, Row, Setup
from faults.wire import Wire, fields_of, reason_of

COMMON: Final = Setup(
    models=(bundles.CANARY, bundles.TINY, bundles.ECHO, bundles.NAN, bundles.FAILING),
    flags=("--max-response-bytes", "8192", "--log-level", "info"),
)
"""Of all rows that leave the server as it was."""
REFUSED: Final = ("INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED:RESPONSE_TOO_LARGE")
INT64, FLOAT32 = tensor_pb2.DATA_TYPE_INT64, tensor_pb2.DATA_TYPE_FLOAT32


def tensor(name: str, values: Any, kind: str = "<i8", **fields: Any) -> tensor_pb2.Tensor:
    """Return a tensor; `fields` replace what follows from the values."""
    array = np.asarray(values, kind)
    kinds = {"<i8": INT64, "<f4": FLOAT32, "<i4": tensor_pb2.DATA_TYPE_INT32}
    found = {"name": name, "dtype": kinds[kind], "shape": list(array.shape), "data": array.tobytes(), **fields}
    return tensor_pb2.Tensor(**found)


def of_tensors(model: str, *tensors: tensor_pb2.Tensor, **fields: Any) -> bytes:
    """Return a request of one sequence of tensors."""
    sequence = pb.Sequence(tensors=pb.TensorInput(tensors=tensors))
    return pb.InferRequest(model=model, sequences=[sequence], **fields).SerializeToString()


def of_text(model: str, text: str, **fields: Any) -> bytes:
    """Return a request of one text."""
    return pb.InferRequest(
        model=model, sequences=[pb.Sequence(text=pb.TextInput(text=text))], **fields
    ).SerializeToString()


async def refused(lab: Lab, wire: Wire, data: bytes, field: str, what: str) -> End:
    """Send a request that must be refused as invalid, with this field among those that are named."""
    end = await wire.send(data)
    lab.injected["requests"] += 1
    lab.must(end.code == "INVALID_ARGUMENT", f"{what}: {end.code} and not INVALID_ARGUMENT: {end.message}")
    if end.code == "INVALID_ARGUMENT":
        named = fields_of(wire.details)
        lab.must(any(field in one for one in named), f"{what}: no field {field!r} among {named}")
    return end


async def malformed(lab: Lab) -> None:
    """Row 1."""
    corpus, before = Requests(), lab.server.metric("grpc_server_handled_total", grpc_code="INVALID_ARGUMENT")
    async with lab.caller("mutated", "OK", *REFUSED) as wire:
        for number in range(lab.count(400, 20_000)):
            await wire.send(corpus.make(random.Random(f"{lab.seed}:{number}")))
            lab.injected["mutated messages"] += 1
        good = of_text(bundles.TINY, "the cat")
        bad = {
            "UTF-8": good.replace(b"the cat", b"the \xff\xfe\xfd"),
            "cut": good[:-3],
            "a field without its value": good + b"\x1a",
            "no protobuf": b"\xff" * 64,
        }
        for what, data in bad.items():
            end = await wire.send(data)
            lab.must(end.code == "INVALID_ARGUMENT", f"{what}: {end.code}")
            lab.injected["malformed messages"] += 1
        lab.must((await wire.send(good)).code == "OK", "the request that was changed is valid")
    counted = lab.server.metric("grpc_server_handled_total", grpc_code="INVALID_ARGUMENT") - before
    got = lab.checker.codes["mutated"]["INVALID_ARGUMENT"]
    lab.control(counted >= got >= len(bad), f"{counted:g} counted as INVALID_ARGUMENT, {got} received")


async def shapes(lab: Lab) -> None:
    """Row 2."""
    huge = [
        ([2**62, 8], "overflow"), ([2**31, 2**31, 4], "overflow"), ([2**40], "a terabyte"), ([2**63 - 1], "the most"),
        ([-1], "negative"), ([0], "zero"), ([3, 0, 2], "zero"), ([1] * 9, "rank 9"), ([2**20] * 8, "rank 8"),
    ]  # fmt: skip
    for _ in range(lab.count(60, 3_000)):
        rank = int(lab.random.integers(1, 12))
        shape = [int(lab.random.choice([-(2**63), -1, 0, 2**31, 2**40, 2**62, 2**63 - 1])) for _ in range(rank)]
        huge.append((shape, "random"))
    before = lab.server.usage().memory_mb
    async with lab.caller("shapes", "INVALID_ARGUMENT") as wire:
        for shape, what in huge:
            data = of_tensors(bundles.TINY, tensor("input_ids", [1, 2], shape=shape))
            await refused(lab, wire, data, "tensors", f"{what} {shape}")
            data = of_tensors(bundles.ECHO, tensor("x", [1.0], "<f4", shape=shape))
            await refused(lab, wire, data, "tensors", f"{what} {shape}")
    grown = lab.server.usage().memory_mb - before
    lab.measured["grown_mb"] = round(grown, 2)
    lab.control(max(abs(one) for shape, _ in huge for one in shape) >= 2**62, "sizes reach beyond any memory")
    # A few pages of the allocator, and of the client's connection, are not of these requests.
    lab.must(grown < 1.0, f"memory grew by {grown:.2f} MB, above 1 MB")


async def tensors(lab: Lab) -> None:
    """Row 3."""
    ids = tensor("input_ids", [2, 4, 5, 3])
    wrong = {
        "data too short": tensor("input_ids", [2, 4], shape=[3]),
        "data too long": tensor("input_ids", [2, 4, 5], shape=[2]),
        "no data": tensor("input_ids", [2], data=b""),
        "another type": tensor("input_ids", [2, 4], "<i4"),
        "float for int": tensor("input_ids", [2, 4], "<f4"),
        "no type": tensor("input_ids", [2, 4], dtype=0),
        "another name": tensor("ids", [2, 4]),
        "no name": tensor("", [2, 4]),
        "another rank": tensor("input_ids", [[2, 4]]),
    }
    async with lab.caller("tensors", "OK", "INVALID_ARGUMENT") as wire:
        for what, one in wrong.items():
            await refused(lab, wire, of_tensors(bundles.TINY, one), "tensors", what)
        await refused(lab, wire, of_tensors(bundles.TINY, ids, ids), "tensors", "twice the same name")
        mask = tensor("attention_mask", [1, 1, 1])
        await refused(lab, wire, of_tensors(bundles.TINY, ids, mask), "tensors", "another length of the mask")
        for _ in range(lab.count(60, 3_000)):
            size = int(lab.random.integers(1, 40))
            short = int(lab.random.integers(0, 8 * size))
            one = tensor("input_ids", np.ones(size), data=bytes(short))
            await refused(lab, wire, of_tensors(bundles.TINY, one), "tensors", f"{short} bytes for {size} ids")
        lab.control((await wire.send(of_tensors(bundles.TINY, ids))).code == "OK", "the right tensor is answered")


async def tokens(lab: Lab) -> None:
    """Row 4."""
    size = len(VOCABULARY)
    async with lab.caller("tokens", "OK", "INVALID_ARGUMENT") as wire:
        for one in (-1, size, size + 1, 2**31, 2**63 - 1, -(2**63)):
            await refused(lab, wire, of_tensors(bundles.TINY, tensor("input_ids", [2, one, 3])), "tensors", f"id {one}")
        for one in (0, size - 1):
            end = await wire.send(of_tensors(bundles.TINY, tensor("input_ids", [2, one, 3])))
            lab.control(end.code == "OK", f"id {one}, which is in the vocabulary: {end.code}")
        for length in (MAX_LENGTH + 1, 4 * MAX_LENGTH):
            long = of_tensors(bundles.TINY, tensor("input_ids", [4] * length))
            await refused(lab, wire, long, "", f"{length} ids")
            await refused(lab, wire, of_text(bundles.TINY, "cat " * length), "", f"{length} words")
        end = await wire.send(of_tensors(bundles.TINY, tensor("input_ids", [4] * MAX_LENGTH)))
        lab.control(end.code == "OK", f"as many ids as the model takes: {end.code}")
        # The reference tokenizes it as a text; the checker compares.
        for text in ("[SEP] the [CLS] cat", "[MASK] [PAD]", "the[SEP]cat"):
            await wire.infer(bundles.TINY, text)
            await wire.infer(bundles.TINY, bundles.MAP + text)
            lab.injected["texts with special tokens"] += 1


async def floats(lab: Lab) -> None:
    """Row 5."""
    async with lab.caller("floats", "OK", "INVALID_ARGUMENT") as wire:
        values = np.ones((3, bundles.ECHO_WIDTH), np.float32)
        lab.control((await wire.send(of_tensors(bundles.ECHO, tensor("x", values, "<f4")))).code == "OK", "finite")
        for bad in (np.nan, np.inf, -np.inf):
            for _ in range(lab.count(4, 100)):
                place = tuple(int(lab.random.integers(0, one)) for one in values.shape)
                wrong = values.copy()
                wrong[place] = bad
                await refused(lab, wire, of_tensors(bundles.ECHO, tensor("x", wrong, "<f4")), "tensors", f"{bad}")
        # A mask that hides every key: the model alone gives uniform weights, because its mask is finite.
        ids = tensor("input_ids", [2, 4, 5, 3])
        select = attention_pb2.AttentionSelection(layers=[-1], head_reduction=attention_pb2.HEAD_REDUCTION_MEAN)
        hidden = pb.OutputSelection(names=["hidden"])
        data = of_tensors(bundles.TINY, ids, tensor("attention_mask", [0] * 4), outputs=hidden, attention=select)
        call = wire.recorder.begin(timeout_s=10)
        answer = pb.InferResponse.FromString(
            await wire.channel.unary_unary("/attnserve.v1.InferenceService/Infer")(data, timeout=10)
        )
        wire.recorder.end(call, "OK")
        weights = np.frombuffer(answer.results[0].attention.maps[0].weights.data, "<f4")
        outputs = np.frombuffer(answer.results[0].outputs[0].data, "<f4")
        lab.must(bool(np.allclose(weights, 0.25, atol=1e-5)), f"weights of a masked row are {weights[:4]}")
        lab.must(bool(np.isfinite(outputs).all()), "a masked row has outputs that are not finite")
        lab.injected["masked rows"] += 4


async def too_large(lab: Lab) -> None:
    """Row 8."""
    computed = lab.server.metric("attnserve_sequences_total", model=bundles.TINY)
    select = attention_pb2.AttentionSelection()
    async with lab.caller("large", "OK", "RESOURCE_EXHAUSTED:RESPONSE_TOO_LARGE") as wire:
        words = "cat " * (MAX_LENGTH - 2)
        for _ in range(lab.count(20, 500)):
            end = await wire.send(of_text(bundles.TINY, words, attention=select))
            lab.must(end.code == "RESOURCE_EXHAUSTED", f"all maps of 32 tokens: {end.code}")
            lab.injected["requests"] += 1
        _, facts = reason_of(wire.details)
        predicted, allowed = (int(facts.get(f"{name}_bytes", 0)) for name in ("predicted", "allowed"))
        lab.measured |= {"predicted_bytes": predicted, "allowed_bytes": allowed}
        lab.must(predicted > allowed == 8192, f"{predicted} predicted, {allowed} allowed bytes")
        lab.must(
            lab.server.metric("attnserve_sequences_total", model=bundles.TINY) == computed, "a refused request was run"
        )
        end = await wire.send(of_text(bundles.TINY, "the cat", attention=select))
        lab.control(end.code == "OK", "all maps of a short text are answered")
    ran = await lab.until(
        lambda: lab.server.metric("attnserve_sequences_total", model=bundles.TINY) == computed + 1, 5.0
    )
    lab.control(ran, "a request that is answered is counted as run")


async def long_text(lab: Lab) -> None:
    """Row 9."""
    count = lab.count(20, 200)
    async with lab.caller("long", "OK", "INVALID_ARGUMENT") as wire:
        before, begun = lab.server.cpu_s(), time.monotonic()
        for number in range(count):
            text = chr(ord("a") + number % 26) * 2**20
            await refused(lab, wire, of_text(bundles.TINY, text), "text", "1 MiB of one character")
        spent = (lab.server.cpu_s() - before) / count
        lab.measured |= {"cpu_ms": round(spent * 1e3, 2), "ms": round((time.monotonic() - begun) / count * 1e3, 2)}
        lab.quick(spent <= 0.05, f"{spent * 1e3:.1f} ms of processor time a text, above 50 ms (the canary's included)")
        lab.control((await wire.send(of_text(bundles.TINY, "a" * 60))).code == "OK", "a short text is answered")


NAMES: Final = (
    "none", "../decoy", "..", ".", "/", "/etc/passwd", "tiny/1", "tiny/../decoy", "decoy\0", "decoy\n", "\0", "\n",
    "a" * 10_000, "tiny ", " tiny", "TINY", "%2e%2e/decoy", "..\\decoy", "con", "-", "\u202edecoy", "😀",
)  # fmt: skip


async def unknown(lab: Lab) -> None:
    """Row 10."""
    decoy = bundles.write(lab.bench.folder / "outside", "decoy").parent
    decoy.rename(lab.bench.folder / "decoy")
    files = list((lab.bench.folder / "decoy" / "1").iterdir())
    for file in files:
        os.utime(file, (1, time.time()))  # noqa: TID251 - a file's times are of the wall clock
    async with lab.caller("names", "NOT_FOUND", "INVALID_ARGUMENT") as wire:
        for name in NAMES:
            for version in ("", "1", "9", "../../decoy/1", "1/..", "-1", "1\0", "x" * 300):
                if (name, version) != ("none", ""):
                    await wire.send(of_text(name, "the cat", version=version))
                    lab.injected["names"] += 1
        for version in ("9", "../1", "0", "01", "1 "):
            await wire.send(of_text(bundles.TINY, "the cat", version=version))
            lab.injected["names"] += 1
    read = [file.name for file in files if file.stat().st_atime > 1]
    lab.must(not read, f"the server opened {read}")
    files[0].read_bytes()
    if files[0].stat().st_atime <= 1:
        lab.measured["opened_files"] = "not measured: the file system does not record reads"


ROWS: Final = (
    Row(1, "malformed protobuf, bad UTF-8", COMMON, malformed),
    Row(2, "shapes that overflow, dims of 0 and below, rank above 8", COMMON, shapes),
    Row(3, "data, dtype or name of a tensor is wrong", COMMON, tensors),
    Row(4, "token ids and lengths at their limits, special tokens in texts", COMMON, tokens),
    Row(5, "NaN and infinity in inputs, masks that hide every key", COMMON, floats),
    Row(8, "attention beyond the limit of an answer", COMMON, too_large),
    Row(9, "1 MiB of text of one character", COMMON, long_text),
    Row(10, "unknown models and versions, names that are paths", COMMON, unknown),
)
