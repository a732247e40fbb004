"""Peers, the serving systems that the benchmark compares, and bare runtimes, from PyPI: each installed under `.peers`.

`installed` returns why a peer cannot be installed. `version` returns `unknown` where the package is not there, and
raises OSError where its environment is not.
"""

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
        name: Its name, as its makers write it.
        package: The package that is installed, and whose version is reported. Empty: this project's environment serves.
        app: A script of `apps`.
        wire: Its protocol, a name in `wires`.
        more: Packages beside it.
        forms: `single` runs one sequence at a time on two workers, `dynamic` is its documented batcher. Those of
            a bare runtime are precisions.
        why_not: Why a form is missing.
        command: The command that runs the app, where it is not Python itself.
        reported: The package whose version is reported, where it is not `package`.
    """

    name: str
    package: str
    app: str
    wire: str
    more: tuple[str, ...] = ()
    forms: tuple[str, ...] = ("single", "dynamic")
    why_not: str = ""
    command: tuple[str, ...] = field(default=())
    reported: str = ""

    @property
    def folder(self) -> Path:
        """Its virtual environment."""
        return PLACE / self.package.removeprefix("nvidia-").partition("[")[0]

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python" if self.package else Path(sys.executable)


_EQUAL = "its batcher joins requests of any lengths, and cannot reshape them where they differ"
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
    Peer("grpc.aio by hand", "", "grpc_aio.py", "grpc", (), ("single",), "it has no batcher", reported="grpcio"),
)
BARE: Final = (
    Peer("onnxruntime", "", "bare_app.py", "", forms=("fp32",), reported="onnxruntime"),
    Peer("OpenVINO", "openvino", "bare_app.py", "", forms=("fp32", "bf16")),
)
"""Runtimes without a server."""


def installed(peer: Peer) -> str:
    """Install a peer unless it is installed. Return why it cannot be installed, or an empty string."""
    # An interrupted install leaves an interpreter without the package, so the package decides, not the folder.
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
    """Return the version of the installed package, as its own environment reports it."""
    if not peer.package:
        return f"{peer.reported} {metadata.version(peer.reported)}"
    name = peer.package.partition("[")[0]
    line = f"import importlib.metadata as m; print(m.version({name!r}))"
    done = subprocess.run([str(peer.python), "-c", line], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.strip() or UNKNOWN


def last_line(text: str) -> str:
    """Return the last non-empty line of a log, without paths of this machine."""
    lines = [line.strip() for line in text.splitlines() if any(map(str.isalpha, line))]
    return lines[-1].replace(str(ROOT), "")[-200:] if lines else "its log is empty"
