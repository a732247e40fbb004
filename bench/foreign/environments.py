"""The environments of other people's tools, each with its packages and its maker, under the ignored folder `.foreign`.

A maker is a script that writes cases: files of these tools, with inputs and answers. `installed` returns why an
environment cannot be made, and `made` why its maker failed; a log that cannot be written raises OSError.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.peers.install import last_line

ROOT: Final = Path(__file__).parents[2]
PLACE: Final = ROOT / ".foreign"
MAKERS: Final = Path(__file__).parent / "makers"
INSTALL_LIMIT_S: Final = 1800.0
MAKING_LIMIT_S: Final = 1800.0


@dataclass(frozen=True, slots=True)
class Environment:
    """One environment.

    Attributes:
        name: its name.
        maker: the script in `makers` that writes its cases.
        packages: what is installed; empty: this project's environment.
        short: whether the short run (`--short`) makes its cases too.
    """

    name: str
    maker: str
    packages: tuple[str, ...] = ()
    short: bool = False

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return PLACE / self.name / "bin" / "python" if self.packages else Path(sys.executable)


_TORCH: Final = "torch==2.13.0"
ENVIRONMENTS: Final = (
    Environment("project", "graph_tools.py", short=True),
    Environment("torch", "torch_modules.py"),
    Environment("optimum", "optimum_files.py", ("optimum-onnx==0.1.0", "onnxruntime==1.32.0", _TORCH)),
    Environment("genai", "genai_files.py", ("onnxruntime-genai==0.18.0", "onnx-ir", "transformers==5.23.0", _TORCH)),
    Environment("sentence", "sentence_files.py", ("sentence-transformers[onnx]==5.7.0", _TORCH)),
    Environment("vision", "vision_files.py", ("timm==1.0.31", "open_clip_torch==3.3.0", "onnxscript", _TORCH)),
    Environment("tensorflow", "keras_files.py", ("tf2onnx==1.17.0", "tensorflow==2.21.0")),
    Environment("jax", "jax_files.py", ("jax2onnx==0.17.1",)),
)
"""In the order of the table."""


def installed(environment: Environment) -> str:
    """Make an environment unless it is there. Return why it cannot be made, or an empty string."""
    mark = PLACE / environment.name / "packages.txt"
    wanted = "\n".join(environment.packages)
    if not environment.packages or (mark.exists() and mark.read_text(encoding="utf-8") == wanted):
        return ""
    line = [str(environment.python), "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    try:
        venv.create(PLACE / environment.name, with_pip=True, clear=True)
        subprocess.run(
            [*line, *environment.packages], capture_output=True, text=True, timeout=INSTALL_LIMIT_S, check=True
        )
    except subprocess.TimeoutExpired:
        return f"not installed within {INSTALL_LIMIT_S:g} s"
    except (OSError, subprocess.CalledProcessError) as error:
        return last_line(str(getattr(error, "stderr", "") or error))
    mark.write_text(wanted, encoding="utf-8")
    return ""


def made(environment: Environment, folder: Path, *, short: bool) -> str:
    """Run an environment's maker, which writes cases into a folder. Return why it failed, or an empty string."""
    line = [str(environment.python), str(MAKERS / environment.maker), str(folder), *(["--short"] if short else [])]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=MAKING_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"its maker takes more than {MAKING_LIMIT_S:g} s"
    (folder / "maker.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    return "" if done.returncode == 0 else last_line(done.stderr)
