"""What commands print of a bundle that they made."""

from __future__ import annotations

import typer

from attnserve_server.model.batching import rulings
from attnserve_server.model.certificate import Batching
from attnserve_server.model.report import QualityReport
from attnserve_server.model.repository import Bundle


def report(bundle: Bundle, batching: Batching, *, as_json: bool) -> None:
    """The bundle in a few lines, or its manifest."""
    manifest = bundle.manifest
    if as_json:
        typer.echo(manifest.model_dump_json(indent=2))
        return
    check = manifest.check
    available = sum(site.available for site in manifest.sites)
    tapped = f"{available} of {len(manifest.sites)} attention sites"
    typer.echo(f"{manifest.name}/{manifest.version}: {tapped}, {manifest.precision}")
    typer.echo(
        f"checked against {check.against}: outputs within {check.output_max_abs_error:.1e}, "
        f"weights within {check.weight_max_abs_error:.1e}, row sums within {check.row_sum_max_abs_error:.1e}"
    )
    for ruling in rulings(manifest, batching):
        typer.echo(str(ruling))
    if check.fusion is not None:
        typer.echo(str(check.fusion))
    for trial in check.trials:
        typer.echo(str(trial))
    if check.requantize is not None:
        typer.echo(str(check.requantize))
    if check.quality is not None:
        typer.echo(quality_line(check.quality))


def quality_line(quality: QualityReport) -> str:
    """What a reduced precision costs and brings, in one line."""
    rows = "" if quality.top1_agreement is None else f", {quality.top1_agreement:.1%} of attention rows agree"
    speed = "" if quality.speed_ratio is None else f", {quality.speed_ratio:.2f} times as fast"
    cosine = f"cosine of {quality.output} {quality.cosine_mean:.4f}, at worst {quality.cosine_worst:.4f}"
    apart = "" if quality.output_max_abs_error is None else f", numbers within {quality.output_max_abs_error:.2g}"
    return f"on {quality.inputs}, beside {quality.against}: {cosine}{apart}{rows}{speed}"
