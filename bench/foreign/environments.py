"""The environments of other people's tools, each with its packages and its maker, under the ignored folder `.foreign`.

`installed` returns why an environment cannot be made.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
PLACE: Final = ROOT / ".foreign"
MAKERS: Final = Path(__file__).parent / "makers"
INSTALL_LIMIT_S: Final = 1800.0
MAKING_LIMIT_S: Final = 1800.0


@dataclass(frozen=True, slots=True)
class Environment:
    """One environment: its name, its pinned packages (none: this project's environment), and its maker's script."""

    name: str
    maker: str
    packages: tuple[str, ...] = ()

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return PLACE / self.name / "bin" / "python" if self.packages else Path(sys.executable)


ENVIRONMENTS: Final = (Environment("project", "graph_tools.py"),)


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
        return str(getattr(error, "stderr", "") or error).strip().splitlines()[-1]
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
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]
