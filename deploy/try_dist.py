"""Try the built distributions as a user would: their content, the base install, and a server from the extra `server`.

Each install is made in an empty environment in a temporary folder, with dependencies from the package index. The server
serves the tiny model of tests/support. The folder DIST (default: dist) must hold one wheel and one sdist; any other
number raises ValueError. Exit code 1 if a check or an install fails.

python deploy/try_dist.py [DIST]
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
NEEDED = (
    "attnserve/v1/inference_service_pb2.py",
    "attnserve/v1/inference_service_pb2.pyi",
    "attnserve/v1/inference_service_pb2_grpc.py",
    "attnserve/v1/inference_service.proto",
    "attnserve_client/py.typed",
    "attnserve_server/py.typed",
    "attnserve_server/explorer/explore.html",
    "attnserve_server/explorer/explore.js",
    "attnserve_server/explorer/shared.css",
    "attnserve_client/_page/page.js",
)
"""Files of the wheel that nothing imports when the tests run from the source tree."""
PACKAGES = {"attnserve", "attnserve_client", "attnserve_server"}
SDIST_NEEDED = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md")
CALL = """
from importlib.metadata import version
import attnserve_client
from attnserve_client import Client
from attnserve_client.testing import FakeServer
assert attnserve_client.__version__ == version("attnserve") == "{version}"
with FakeServer() as server, Client(server.target) as client:
    result = client.infer("fake", "a sentence", attention=True)
assert result.outputs["embedding"].shape == (16,), result
assert result.attention[0].weights.size, result
"""
START_TIMEOUT_S = 60.0
COMMAND_TIMEOUT_S = 600.0


class Failed(Exception):
    """A distribution is not as it should be. The message is for the person who builds it."""


class Environment:
    """An empty virtual environment, and commands in it. They run outside the source tree and import nothing from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=COMMAND_TIMEOUT_S)

    def install(self, what: str) -> None:
        """Install one requirement with the project's pins."""
        pins = ["--quiet", "--disable-pip-version-check", "--constraint", str(ROOT / "constraints.txt")]
        self.run(0, "pip", "install", *pins, what)

    def start(self, program: str, *arguments: str) -> subprocess.Popen[str]:
        """Start a program of this environment."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "ATTNSERVE"))}
        line = [str(self.folder / "bin" / program), *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(line, cwd=self.folder, env=variables, stdout=pipe, stderr=pipe, text=True)

    def run(self, code: int, program: str, *arguments: str) -> str:
        """Run a program to its end and return what it printed. Raises Failed for another exit code."""
        with self.start(program, *arguments) as process:
            output, errors = process.communicate(timeout=COMMAND_TIMEOUT_S)
        if process.returncode != code:
            raise Failed(
                f"{program} {' '.join(arguments)}: exit code {process.returncode}, not {code}: {output}{errors}"
            )
        return output + errors

    def expect(self, text: str, code: int, program: str, *arguments: str) -> None:
        """Run a program whose output must hold `text`. Raises Failed."""
        output = self.run(code, program, *arguments)
        if text not in output:
            raise Failed(f"{program} {' '.join(arguments)}: {text!r} is not in its output: {output}")


def check_content(wheel: Path, sdist: Path) -> str:
    """Check which files the distributions hold, and return their version. Raises Failed."""
    names = zipfile.ZipFile(wheel).namelist()
    missing = [name for name in NEEDED if name not in names]
    stray = [name for name in names if name.split("/")[0] not in PACKAGES and ".dist-info/" not in name]
    stray += [name for name in names if re.search(r"(^|/)(tests?|__pycache__)/|(^|/)test_\w+\.py$", name)]
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    missing += [f"{name} (sdist)" for name in SDIST_NEEDED if name not in packed]
    if missing or stray:
        raise Failed(f"missing: {', '.join(missing) or 'none'}; not for users: {', '.join(stray) or 'none'}")
    return wheel.name.split("-")[1]


def check_base(wheel: Path, version: str, folder: Path) -> None:
    """Check the base install: the client works, and commands name the extra that they need."""
    base = Environment(folder)
    base.install(str(wheel))
    base.run(0, "python", "-W", "error", "-c", CALL.format(version=version))
    base.expect("attnserve needs rich: pip install 'attnserve[cli]'", 2, "attnserve", "--help")
    base.expect("pip install 'attnserve[server]'", 2, "attnserve-server", "--help")


def check_server(wheel: Path, version: str, folder: Path, repository: Path) -> None:
    """Check the extra `server`: both commands, and a server that answers and drains."""
    served = Environment(folder)
    served.install(f"{wheel}[server]")
    served.expect(version, 0, "attnserve", "--version")
    served.expect(version, 0, "attnserve-server", "--version")
    served.expect(
        "pip install 'attnserve[convert,server]'", 2, "attnserve-server", "inspect", str(repository / "model.onnx")
    )
    with serving(served, repository, folder / "ports.json") as target:
        served.expect('"embedding"', 0, "attnserve", "infer", "tiny", "the cat sat", "--json", "--server", target)


@contextmanager
def serving(environment: Environment, repository: Path, ports: Path) -> Iterator[str]:
    """Serve `repository` on a free loopback port and yield the target; then check that SIGTERM ends it with 0."""
    options = [
        "--repository",
        str(repository),
        "--grpc-port",
        "0",
        "--http-port",
        "0",
        "--rest-port",
        "0",
        "--ports-file",
        str(ports),
    ]
    with environment.start("attnserve-server", "serve", *options) as server:
        try:
            until = time.monotonic() + START_TIMEOUT_S
            while not ports.exists():
                if server.poll() is not None or time.monotonic() > until:
                    server.kill()
                    raise Failed(f"the server did not start: {server.communicate()}")
                time.sleep(0.05)
            yield f"127.0.0.1:{json.loads(ports.read_text())['grpc']}"
            server.send_signal(signal.SIGTERM)
            output = server.communicate(timeout=START_TIMEOUT_S)
            if server.returncode != 0:
                raise Failed(f"the server ended with {server.returncode} after SIGTERM: {output}")
        finally:
            server.kill()


def main() -> int:
    """Check the one wheel and the one sdist of a folder."""
    dist = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "dist").absolute()
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from tiny_bundle import write_tiny_files, write_tiny_repository  # noqa: PLC0415 - found by the line above

    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    try:
        version = check_content(wheel, sdist)
        with tempfile.TemporaryDirectory() as work:
            check_base(wheel, version, Path(work, "base"))
            repository = write_tiny_repository(Path(work, "models"), write_tiny_files(Path(work)))
            check_server(wheel, version, Path(work, "server"), repository)
    except Failed as failure:
        print(failure, file=sys.stderr)
        return 1
    print(f"{wheel.name} and {sdist.name}: content, base install and server are as they should be")
    return 0


if __name__ == "__main__":
    sys.exit(main())
