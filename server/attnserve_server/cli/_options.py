"""Options that several commands share, each with its flag, its help text and its range. No command lives here.

A value out of its range ends the command with exit code 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Name = Annotated[
    str, typer.Option("--name", "-n", help="The name under which clients request the model.", metavar="NAME")
]
RepositoryRoot = Annotated[
    Path, typer.Option("--repository", "-r", help="The folder that holds all models. Created if it does not exist.")
]
Version = Annotated[
    str, typer.Option("--version", help="A positive integer. Default: one more than the highest existing version.")
]
MaxBatchSize = Annotated[
    int, typer.Option("--max-batch-size", min=1, help="The most sequences that the server puts into one batch.")
]
PrecisionOption = Annotated[
    Literal["fp32", "fp16", "int8"],
    typer.Option(
        "--precision", help="fp32 keeps the source's own precision; int8 quantizes the weights of matrix products."
    ),
]
Fuse = Annotated[
    bool, typer.Option("--fuse/--no-fuse", help="Keep fused attention operators where they measure faster.")
]
TryMore = Annotated[
    bool,
    typer.Option(
        "--try/--no-try",
        help="Benchmark the other exporter (unless --exporter names one) and the runtime's rewritings; keep what is "
        "clearly faster.",
    ),
]
ReferenceTexts = Annotated[
    Path | None,
    typer.Option(
        "--reference-texts",
        exists=True,
        dir_okay=False,
        metavar="FILE",
        help="Texts like those that the model will serve, one a line: what its attention is like on them is stored in "
        "the bundle, and the server reports how far requests drift from it. Without it: English sentences.",
    ),
]
Target = Annotated[
    Literal["cpu", "openvino"],
    typer.Option(
        "--target",
        help="The provider that will serve the model. Fused and plain attention, and exporters, are timed there; the "
        "fastest with equal answers is kept.",
    ),
]
BatchingOption = Annotated[
    Literal["proved", "tested", "off"],
    typer.Option(
        "--batching",
        help="The batching policy that the report, its warnings and the final check assume; `serve` has its own.",
    ),
]
AttackSeconds = Annotated[
    float,
    typer.Option("--attack-seconds", min=0, help="Time limit, in seconds, of the attack on what is not proved."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
