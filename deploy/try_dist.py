"""Try the built distributions as a user would: content, base install, a server, and the quick start.

Each install is made in an empty environment in a temporary folder, with dependencies from the package index. The server
serves the tiny model of tests/support. docs/quick-start.md is followed word for word, up to the map of a model; its
environment finds the dependencies in that of this interpreter, because torch is large. The folder DIST (default:
dist) must hold one wheel and one sdist; any other number raises ValueError. Exit code 1 if a check or an install fails.

python deploy/try_dist.py [DIST]
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
    with zipfile.ZipFile(wheel) as archive:
        described = [archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA")]
    relative = [link for text in described for link in re.findall(r"\]\((?!https?:|mailto:|#)([^)]+)\)", text)]
    if relative:
        raise Failed(f"links of the README that PyPI cannot follow: {', '.join(relative)}")
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


def check_quick_start(dist: Path, version: str, folder: Path) -> None:
    """Follow docs/quick-start.md in two terminals, with a tiny checkpoint as the reader's model. Raises Failed."""
    folder.mkdir()
    checkpoints = [sys.executable, str(ROOT / "examples/tiny_checkpoints.py"), str(folder / "checkpoints")]
    subprocess.run(checkpoints, check=True, timeout=COMMAND_TIMEOUT_S, stdout=subprocess.DEVNULL)
    (folder / "checkpoints/embedder").rename(folder / "my-model")
    ports, (first, second) = folder / "ports.json", quick_start()
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "ATTNSERVE"))}
    variables |= {
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
        "PYTHONPATH": str(dependencies(folder / "dependencies")),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(dist),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "ATTNSERVE_PORTS_FILE": str(ports),
        **{f"ATTNSERVE_{name}_PORT": "0" for name in ("GRPC", "HTTP", "REST")},
    }
    with (
        (folder / "first.log").open("w+") as log,
        subprocess.Popen(
            ["bash", "-e", "-c", first], cwd=folder, env=variables, stdout=log, stderr=log, start_new_session=True
        ) as terminal,
    ):
        try:
            wait_for(ports, terminal, COMMAND_TIMEOUT_S, (folder / "first.log").read_text)
            found = json.loads(ports.read_text())
            variables["ATTNSERVE_SERVER"] = f"127.0.0.1:{found['grpc']}"
            line = ["bash", "-e", "-c", f"{second}attnserve --version\n"]
            done = subprocess.run(
                line, cwd=folder, env=variables, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
            )
            for expected in ("mine", "strongest links", "looks at", version):
                if done.returncode != 0 or expected not in done.stdout:
                    raise Failed(f"the quick start does not show {expected!r}: {done.stdout}{done.stderr}")
            if not (folder / "map.html").read_text(encoding="utf-8").startswith("<!doctype html>"):
                raise Failed("the quick start writes no page")
            with urllib.request.urlopen(f"http://127.0.0.1:{found['rest']}/explore", timeout=10) as page:
                page.read()
        finally:
            os.killpg(terminal.pid, signal.SIGINT)  # Ctrl-C
            terminal.wait(timeout=START_TIMEOUT_S)


def quick_start() -> tuple[str, str]:
    """Return what a reader of docs/quick-start.md types into the first terminal, which serves, and into the second."""
    sys.path.insert(0, str(ROOT / "docs"))
    from blocks import blocks_of  # noqa: PLC0415 - found by the line above

    page = ROOT / "docs/quick-start.md"
    texts = [block.text for block in blocks_of(page.read_text(encoding="utf-8"), page.name)]
    (serves,) = (at for at, text in enumerate(texts) if text.startswith("attnserve-server serve"))
    return "".join(texts[: serves + 1]), "".join(texts[serves + 1 :])


def dependencies(folder: Path) -> Path:
    """Make a folder of links to all packages of this interpreter but attnserve and pip, and return it."""
    folder.mkdir()
    own = re.compile(r"_?(attnserve|pip)\b.*|__pycache__|.*\.pth")
    for package in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not own.fullmatch(package.name):
            (folder / package.name).symlink_to(package)
    return folder


def wait_for(ports: Path, process: subprocess.Popen[Any], timeout_s: float, log: Callable[[], str]) -> None:
    """Wait until a server has written its ports. Raises Failed, with the log, if it ends or takes too long."""
    until = time.monotonic() + timeout_s
    while not (ports.exists() and ports.stat().st_size):
        if process.poll() is not None or time.monotonic() > until:
            raise Failed(f"the server did not start: {log()}")
        time.sleep(0.05)


def ended(process: subprocess.Popen[str]) -> str:
    """Kill a process, and return what it printed."""
    process.kill()
    return str(process.communicate())


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
            wait_for(ports, server, START_TIMEOUT_S, lambda: ended(server))
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
            check_quick_start(dist, version, Path(work, "quick-start"))
    except Failed as failure:
        print(failure, file=sys.stderr)
        return 1
    print(f"{wheel.name} and {sdist.name}: content, base install, server and quick start are as they should be")
    return 0


if __name__ == "__main__":
    sys.exit(main())
