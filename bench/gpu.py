"""The rate of a GPU, through the server and bare: `python -m bench.gpu --repository FOLDER --json FILE`.

For the highest version of each model of the repository, in one run: the bare session of onnxruntime at its best batch
and number of threads; the server under unary callers and streams, where none, a quarter or all of the requests select
attention; the bytes that a run returns for the mean over heads and for every head; and the seconds of a run over a grid
of batch and length. Callers are separate processes, which send messages made beforehand. They request one output, the
one named by `--output`, and attention where selected. `--client` starts such a process, and is for this module alone.

Without `--repository` it makes models of MiniLM's and BERT-large's sizes with random weights, each in float32 and
float16, in the folder of `--made`, where the next run finds them. That takes minutes, and needs torch and transformers.

Exit code 1 if a model cannot be made, a server does not start or a request fails, with the errors of the process that
failed; 2 if no model is chosen. Without a GPU it measures the CPU, and prints so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from attnserve.v1 import attention_pb2, inference_service_pb2
from attnserve_server.attention import resolve
from attnserve_server.domain.values import AttentionSelection, HeadReduction, PreparedSequence
from attnserve_server.engine.collation import collate
from attnserve_server.engine.providers import CPU
from attnserve_server.engine.session import RuntimeSession, runtime_version
from attnserve_server.engine.warmup import synthetic
from attnserve_server.model.manifest import Manifest
from attnserve_server.model.repository import Bundle, Repository

from bench import service
from bench.workload import sequences

BUDGETS = (1024, 2048, 4096, 8192, 16_384)
THREADS = (1, 2, 3, 4)
GRID_BATCH, GRID_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128), (16, 32, 64, 128, 256, 512)
GRID_MOST = 32_768
METHOD = "/attnserve.v1.InferenceService/"
WEIGHTS_ROWS, WEIGHTS_TOKENS = 32, 64
"""The batch whose weights are returned, every row's."""
MADE_SIZES, MADE_PRECISIONS = ("minilm", "large"), ("fp32", "fp16")
"""Sizes of `bench.encoders`, and the precisions of each."""
SHARES = {"none": 0.0, "a quarter": 0.25, "all": 1.0}
Sequences = list[PreparedSequence]


def prepared(manifest: Manifest, output: str, length: int) -> PreparedSequence:
    """Return a sequence of a length with one selected output."""
    made = synthetic(manifest, length)
    return PreparedSequence(made.tensors, made.lengths, (output,))


def batches(manifest: Manifest, output: str, lengths: list[int], budget: int) -> list[Sequences]:
    """Return sorted batches of about `budget` positions and at most 128 rows."""
    made: list[Sequences] = [[]]
    for length in sorted(lengths):
        if made[-1] and (length * (len(made[-1]) + 1) > budget or len(made[-1]) == GRID_BATCH[-1]):
            made.append([])
        made[-1].append(prepared(manifest, output, length))
    return made


def bare_rate(session: RuntimeSession, work: list[tuple[Any, Any]], threads: int, seconds: float) -> float:
    """Return sequences a second of threads that go through the batches repeatedly."""
    until, done = time.perf_counter() + seconds, [0] * threads

    def loop(number: int) -> None:
        at = number
        while time.perf_counter() < until:
            feeds, fetches, size = work[at % len(work)]  # type: ignore[misc]
            session.run(feeds, fetches)
            done[number] += size
            at += threads

    workers = [threading.Thread(target=loop, args=(number,)) for number in range(threads)]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(done) / (time.perf_counter() - began)


def bare(bundle: Bundle, output: str, session: RuntimeSession, lengths: list[int], seconds: float) -> dict[str, Any]:
    """Return sequences a second of the bare session, over batch budgets and threads."""
    rates: dict[str, float] = {}
    for budget in BUDGETS:
        collated = [collate(batch, bundle.manifest) for batch in batches(bundle.manifest, output, lengths, budget)]
        work: Any = [(one.feeds, one.fetches, one.size) for one in collated]
        np.random.default_rng(0).shuffle(work)
        for feeds, fetches, _ in work[:: max(1, len(work) // 20)]:
            session.run(feeds, fetches)
        for threads in THREADS:
            rates[f"{budget} tokens, {threads} threads"] = bare_rate(session, work, threads, seconds)
    best = max(rates, key=lambda name: rates[name])
    return {"best": best, "sequences_per_s": rates[best], "all": rates}


def cost_rows(bundle: Bundle, output: str, session: RuntimeSession) -> list[tuple[int, int, float]]:
    """Return (rows, positions, seconds) over the grid, collation and copies back included."""
    rows = []
    for size in GRID_BATCH:
        for tokens in GRID_TOKENS:
            if size * tokens > GRID_MOST or tokens > bundle.manifest.axes[0].max_length:
                continue
            batch = collate([prepared(bundle.manifest, output, tokens)] * size, bundle.manifest)
            timings = []
            for _ in range(8):
                began = time.perf_counter()
                session.run(batch.feeds, batch.fetches)
                timings.append(time.perf_counter() - began)
            rows.append((size, tokens, statistics.median(timings[3:])))
    return rows


def returned(bundle: Bundle, output: str, session: RuntimeSession) -> dict[str, dict[str, float]]:
    """Return the bytes and milliseconds of a run with weights of every row, as a mean over heads and of every head.

    `none` is the same run without weights.
    """
    manifest, found = bundle.manifest, {}
    plain = prepared(manifest, output, min(WEIGHTS_TOKENS, manifest.axes[0].max_length))
    rows = min(WEIGHTS_ROWS, manifest.max_batch_size)
    selections = {
        f"{which}, {how}": AttentionSelection(layers=layers, head_reduction=reduction)
        for which, layers in (("last layer", (-1,)), ("all layers", ()))
        for how, reduction in (("mean over heads", HeadReduction.MEAN), ("every head", HeadReduction.EACH))
    }
    for name, selection in {"none": None, **selections}.items():
        chosen = None if selection is None else resolve(selection, manifest.sites, manifest.name)
        batch = collate([replace(plain, attention=chosen)] * rows, manifest)
        timings = []
        for _ in range(18):
            began = time.perf_counter()
            outputs = session.run(batch.feeds, batch.fetches)
            timings.append(time.perf_counter() - began)
        moved = sum(array.nbytes for array in outputs)
        found[name] = {"bytes": float(moved), "ms": 1e3 * statistics.median(timings[3:])}
    return found


def made_in(folder: Path) -> Path:
    """Make the models of `MADE_SIZES` in the folder, unless they are there, and return their repository.

    Raises:
        SystemExit: A command that makes one failed. It printed why.
    """
    repository = folder / "models"
    for size in MADE_SIZES:
        checkpoint = folder / size
        if not checkpoint.exists():
            command_of([sys.executable, "-m", "bench.encoders", size, str(checkpoint)])
        for precision in MADE_PRECISIONS:
            name = f"{size}-{precision}"
            if not (repository / name).exists():
                line = [str(Path(sys.executable).with_name("attnserve-server")), "export", str(checkpoint)]
                line += ["--name", name, "--repository", str(repository), "--pooling", "mean", "--no-try"]
                command_of([*line, "--max-batch-size", "128", "--precision", precision])
    return repository


def command_of(line: list[str]) -> None:
    """Run a command that makes a model. Raises SystemExit if it fails."""
    if subprocess.run(line, check=False).returncode:
        sys.exit(f"{' '.join(line[1:4])} failed; --repository measures models that are there")


def message(model: str, output: str, items: list[Any], *, selecting: bool, name: str) -> Any:
    """Return a request for some sequences. `selecting`: it selects the last layer's mean map."""
    made = inference_service_pb2.InferRequest(model=model, request_id=name)
    for ids in items:
        made.sequences.append(service.request(ids).sequences[0])
    made.outputs.names.append(output)
    if selecting:
        made.attention.CopyFrom(
            attention_pb2.AttentionSelection(layers=[-1], head_reduction=attention_pb2.HEAD_REDUCTION_MEAN)
        )
    return made


async def stream_client(target: str, messages: list[Any], sizes: dict[bytes, int], seconds: float) -> int:
    """Return sequences answered on one stream with all messages in flight. Each is sent again once it is answered."""
    wires = {
        one.request_id.encode(): inference_service_pb2.StreamInferRequest(request=one).SerializeToString()
        for one in messages
    }
    done, until = 0, time.monotonic() + seconds
    async with grpc.aio.insecure_channel(target, options=[("grpc.max_receive_message_length", -1)]) as channel:
        call = channel.stream_stream(METHOD + "StreamInfer")()
        for wire in wires.values():
            await call.write(wire)
        async for answer in call:
            reply = inference_service_pb2.StreamInferResponse.FromString(answer)
            if not reply.HasField("response"):
                kind = reply.WhichOneof("message")
                sys.exit(f"request {reply.request_id} got a {kind} instead of a whole response: {reply}")
            name = reply.request_id.encode()
            done += sizes[name]
            if time.monotonic() > until:
                call.cancel()
                break
            await call.write(wires[name])
    return done


async def unary_client(target: str, messages: list[Any], callers: int, seconds: float) -> tuple[int, list[float]]:
    """Return the sequences answered to `callers`, and the seconds of each call."""
    wires = [one.SerializeToString() for one in messages]
    until, waits, at = time.monotonic() + seconds, [], iter(range(10**9))
    async with grpc.aio.insecure_channel(target, options=[("grpc.max_receive_message_length", -1)]) as channel:
        infer = channel.unary_unary(METHOD + "Infer")

        async def caller() -> None:
            while time.monotonic() < until:
                began = time.monotonic()
                await infer(wires[next(at) % len(wires)], timeout=60)
                waits.append(time.monotonic() - began)

        await asyncio.gather(*(caller() for _ in range(callers)))
    return len(waits), waits


def client(target: str, model: str, output: str, kind: str, share: float, seconds: float, seed: int) -> None:
    """Run one process of callers, and print its results. `kind`: `stream`, or a number of unary callers."""
    items = sequences(2048, service_vocabulary(), seed)
    random = np.random.default_rng(seed)
    if kind == "stream":
        groups = [items[at : at + 32] for at in range(0, 1024, 32)]
        # A share of the messages, because a message selects attention for all of its sequences or for none.
        messages = [
            message(model, output, group, selecting=bool(number < share * len(groups)), name=f"{number:04}")
            for number, group in enumerate(groups)
        ]
        sizes = {one.request_id.encode(): len(one.sequences) for one in messages}
        began = time.monotonic()
        answered = asyncio.run(stream_client(target, messages, sizes, seconds))
        print(json.dumps({"sequences": answered, "seconds": time.monotonic() - began, "waits": []}))
        return
    messages = [
        message(model, output, [ids], selecting=bool(random.random() < share), name=f"{number}")
        for number, ids in enumerate(items)
    ]
    began = time.monotonic()
    answered, waits = asyncio.run(unary_client(target, messages, int(kind), seconds))
    print(json.dumps({"sequences": answered, "seconds": time.monotonic() - began, "waits": waits}))


def service_vocabulary() -> int:
    """Return the size of BERT's uncased vocabulary, which all models here have."""
    return 30_522


def kinds_of(kind: str, processes: int) -> list[str]:
    """Return the kind of each process: a stream each, or a share of the unary callers. None has no callers."""
    if kind == "stream":
        return [kind] * processes
    each, more = divmod(int(kind), processes)
    return [str(each + (number < more)) for number in range(processes) if each or number < more]


def outputs_of(lines: list[list[str]], timeout_s: float) -> list[str]:
    """Run commands at once, and return what each printed.

    Raises:
        SystemExit: One failed, or did not end in time. The message has its errors. The others are killed.
    """
    running: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder, f"{number}.out") for number in range(len(lines))]
        errors = [path.with_suffix(".err") for path in outs]
        try:
            for line, out, error in zip(lines, outs, errors, strict=True):
                with out.open("wb") as stdout, error.open("wb") as stderr:
                    running.append(subprocess.Popen(line, stdout=stdout, stderr=stderr))
            until = time.monotonic() + timeout_s
            while None in (codes := [one.poll() for one in running]) and not any(codes):
                if time.monotonic() > until:
                    sys.exit(f"a process of callers did not end within {timeout_s:g} s")
                time.sleep(0.05)
            for code, error in zip(codes, errors, strict=True):
                if code:
                    sys.exit(f"a process of callers ended with code {code}: {error.read_text(errors='replace')}")
            return [path.read_text() for path in outs]
        finally:
            for one in running:
                one.kill()
                one.wait()


def served(
    target: str, name: str, output: str, kind: str, share: float, *, seconds: float, processes: int
) -> dict[str, Any]:
    """Return sequences a second through the server, from several processes of callers."""
    line = [sys.executable, "-m", "bench.gpu", "--client", target, name, output]
    kinds = kinds_of(kind, processes)
    lines = [[*line, each, str(share), str(seconds), str(seed)] for seed, each in enumerate(kinds)]
    reports = [json.loads(printed) for printed in outputs_of(lines, seconds + 120)]
    waits = [wait for report in reports for wait in report["waits"]]
    result = {"sequences_per_s": sum(report["sequences"] / report["seconds"] for report in reports)}
    if waits:
        result |= {f"p{q}_ms": 1e3 * float(np.percentile(waits, q)) for q in (50, 99)}
    return result


def measure(bundle: Bundle, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one model."""
    session = RuntimeSession.load(bundle.model_path)
    names = [spec.name for spec in bundle.manifest.outputs]
    output = options.output if options.output in names else names[0]
    lengths = [len(ids) for ids in sequences(options.sequences, service_vocabulary())]
    report: dict[str, Any] = {
        "provider": session.provider,
        "runtime": runtime_version(),
        "precision": bundle.manifest.precision,
        "output": output,
        "mean_tokens": statistics.mean(lengths),
        "bare": bare(bundle, output, session, lengths, options.seconds / 4),
    }
    if any(site.available for site in bundle.manifest.sites):
        report["returned"] = returned(bundle, output, session)
    if not options.no_costs:
        report["costs"] = cost_rows(bundle, output, session)
    del session
    flags = ("--models", bundle.manifest.name, "--max-stream-in-flight", "512", *options.flags)
    with service.running(options.repository, *flags) as server:
        how = {"processes": options.processes, "seconds": options.seconds}
        served(server.target, bundle.manifest.name, output, "stream", 0.0, **how)
        for kind in ("stream", *options.callers):
            for name, share in SHARES.items():
                cpu = server.cpu_seconds()
                found = served(server.target, bundle.manifest.name, output, kind, share, **how)
                found["over_bare"] = found["sequences_per_s"] / report["bare"]["sequences_per_s"]
                found["tokens_per_s"] = found["sequences_per_s"] * report["mean_tokens"]
                # The start of the callers' processes counts too: about a second in which the server idles.
                found["server_cores"] = (server.cpu_seconds() - cpu) / options.seconds
                report[f"{kind}, {name} selecting"] = found
                print(bundle.manifest.name, kind, name, found, flush=True)
    return report


def chosen_of(bundles: list[Bundle], names: list[str] | None) -> list[Bundle]:
    """Return the highest version of each model that is named, or of all. `bundles` is sorted by name and version."""
    highest = {each.manifest.name: each for each in bundles}
    return [each for name, each in highest.items() if not names or name in names]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", type=Path, help="folder of bundles; without it, models of random weights")
    parser.add_argument("--made", type=Path, default=Path(".demo/gpu"), help="folder for models of random weights")
    parser.add_argument("--models", nargs="+", help="names of the models to measure; default: all")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--seconds", type=float, default=4.0, help="duration of each measurement")
    parser.add_argument("--sequences", type=int, default=4000, help="sequences whose lengths are drawn")
    parser.add_argument("--processes", type=int, default=4, help="processes of callers")
    parser.add_argument("--callers", nargs="+", default=["64", "256"], help="unary callers, over all processes")
    parser.add_argument(
        "--output", default="embedding", help="output that requests select; a model without it returns its first output"
    )
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="flags for the server: all that follow")
    parser.add_argument("--no-costs", action="store_true", help="skip the grid of batch and length")
    parser.add_argument("--client", nargs=7, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        target, model, output, kind, share, seconds, seed = options.client
        client(target, model, output, kind, float(share), float(seconds), int(seed))
        return
    if options.repository is None:
        options.repository = made_in(options.made)
    report: dict[str, Any] = {}
    bundles = Repository(options.repository).bundles()[0]
    chosen = chosen_of(bundles, options.models)
    if not chosen:
        names = ", ".join(each.manifest.name for each in chosen_of(bundles, None)) or "none"
        parser.error(f"no model to measure; the repository's models are: {names}")
    for bundle in chosen:
        report[bundle.manifest.name] = found = measure(bundle, options)
        print(bundle.manifest.name, "bare", found["bare"]["best"], found["bare"]["sequences_per_s"], flush=True)
        for what, one in found.get("returned", {}).items():
            print(
                f"{bundle.manifest.name} weights of {what}: {one['bytes']:,.0f} bytes, {one['ms']:.2f} ms", flush=True
            )
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="ascii")
        if found["provider"] == CPU:
            print("this was no GPU: the runtime used the CPU")


if __name__ == "__main__":
    main()
