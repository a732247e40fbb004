"""Peers from PyPI, each in a virtual environment of its own under the ignored folder `.peers`."""

from __future__ import annotations

import subprocess
import sys
import venv
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
PLACE: Final = ROOT / ".peers"
APPS: Final = Path(__file__).parent / "apps"
INSTALL_TIMEOUT_S: Final = 1200.0
UNKNOWN: Final = "unknown"


@dataclass(frozen=True, slots=True)
class Peer:
    """A serving system.

    Attributes:
        name: as its makers write it.
        package: what is installed, and whose version is told; empty where our own environment serves.
        app: a script of `apps`.
        wire: how it is spoken to, see `wires`.
        more: packages beside it.
        forms: `single` runs one sequence at a time on two workers, `dynamic` is its documented batcher.
        why_not: why a form is missing.
        command: what runs the app, where it is not Python itself.
    """

    name: str
    package: str
    app: str
    wire: str
    more: tuple[str, ...] = ()
    forms: tuple[str, ...] = ("single", "dynamic")
    why_not: str = ""
    command: tuple[str, ...] = field(default=())

    @property
    def folder(self) -> Path:
        """Its virtual environment."""
        return PLACE / self.package.removeprefix("nvidia-").partition("[")[0]

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python" if self.package else Path(sys.executable)


_EQUAL = "its batcher joins what comes whatever the lengths, and cannot reshape it where they differ"
PEERS: Final = (
    Peer("MLServer", "mlserver", "mlserver_app.py", "v2", ("uvloop<0.22",), ("single",), _EQUAL),
    Peer("KServe", "kserve", "kserve_app.py", "v2", (), ("single",), "its batcher is a container, not in the package"),
    Peer(
        "BentoML", "bentoml", "bentoml_app.py", "bentoml", command=("bentoml", "serve", "bentoml_app:MiniLM", "--port")
    ),
    Peer("LitServe", "litserve", "litserve_app.py", "litserve"),
    Peer("Ray Serve", "ray[serve]", "ray_app.py", "http"),
    Peer("mosec", "mosec", "mosec_app.py", "mosec"),
    Peer("Triton (PyTriton)", "nvidia-pytriton", "pytriton_app.py", "v2", ("numpy<2",)),
    Peer("grpc.aio by hand", "", "grpc_aio.py", "grpc", (), ("single",), "it has no batcher"),
)


def installed(peer: Peer) -> str:
    """Installs a peer where it is not yet. Returns why it could not be; empty where it could."""
    # An install that was broken off leaves an interpreter without the package: the package tells, not the folder.
    if not peer.package or (peer.python.exists() and version(peer) != UNKNOWN):
        return ""
    line = [
        str(peer.python),
        "-m",
        "pip",
        "--quiet",
        "--disable-pip-version-check",
        "install",
        "--only-binary",
        ":all:",
    ]
    try:
        venv.create(peer.folder, with_pip=True)
        done = subprocess.run(
            [*line, peer.package, "onnxruntime", "numpy", *peer.more],
            capture_output=True,
            text=True,
            timeout=INSTALL_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"not installed within {INSTALL_TIMEOUT_S:g} s"
    except (OSError, subprocess.CalledProcessError) as error:
        return last_line(str(error))
    return "" if done.returncode == 0 else last_line(done.stderr)


def version(peer: Peer) -> str:
    """Of the installed package, as its own environment tells it."""
    if not peer.package:
        return f"grpcio {metadata.version('grpcio')}"
    name = peer.package.partition("[")[0]
    line = f"import importlib.metadata as m; print(m.version({name!r}))"
    done = subprocess.run([str(peer.python), "-c", line], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.strip() or UNKNOWN


def last_line(text: str) -> str:
    """The last line of a log that says something, without places on this machine."""
    lines = [line.strip() for line in text.splitlines() if any(map(str.isalpha, line))]
    return lines[-1].replace(str(ROOT), "")[-200:] if lines else "it said nothing"
