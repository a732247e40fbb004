"""The project's image, built and run hardened on this machine, with a real model in it.

Without root or the container tools, tests with these fixtures are skipped with the reason. A build or a start that
fails raises CommandFailed, and one that takes too long `subprocess.TimeoutExpired`. A container that ends, or is not
healthy in 60 s, raises AssertionError with its logs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from containers import ROOT, CommandFailed, Container, Engine, build_base, build_image, missing_tools, run_hardened
from credentials import Files, Tokens
from scraping import free_port, wait_until

START_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Served:
    """A container that serves, and its ports on loopback."""

    container: Container
    grpc_port: int
    http_port: int

    @property
    def target(self) -> str:
        """The address that the SDK connects to."""
        return f"127.0.0.1:{self.grpc_port}"

    def healthy(self) -> bool:
        """Return whether the image's health command succeeds in the container."""
        try:
            self.container.exec("attnserve-server", "healthcheck")
        except CommandFailed:
            assert self.container.running(), self.container.logs()
            return False
        return True


@pytest.fixture(scope="session")
def engine() -> Engine:
    """buildah and podman, with the base image and earlier builds in ATTNSERVE_E2E_CACHE (default: .e2e)."""
    if reason := missing_tools():
        pytest.skip(reason)
    return Engine.at(Path(os.environ.get("ATTNSERVE_E2E_CACHE", ROOT / ".e2e")).absolute())


@pytest.fixture(scope="session")
def image(engine: Engine) -> str:
    """The name of the project's image, built from the working tree."""
    return build_image(engine, build_base(engine))


@pytest.fixture(scope="session")
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with MiniLM: the one of ATTNSERVE_E2E_REPOSITORY, else one that is exported now."""
    given = os.environ.get("ATTNSERVE_E2E_REPOSITORY")
    repository = Path(given) if given else request.getfixturevalue("minilm_repository")
    mounted = Path(shutil.copytree(repository, tmp_path_factory.mktemp("mounted") / "models"))
    # All users may read the bundles; the temporary folder above them may be private.
    mounted.chmod(0o755)
    return mounted


@contextmanager
def running(engine: Engine, image: str, models: Path, volumes: Sequence[str] = (), **env: str) -> Iterator[Served]:
    """Serve `models` from a hardened container until the block ends. No shell can run in the container."""
    names = ("GRPC", "HTTP", "REST")
    ports = {f"ATTNSERVE_{name}_PORT": str(free_port()) for name in names}
    container = run_hardened(
        engine,
        image,
        env={"ATTNSERVE_HOST": "127.0.0.1", **ports, **env},
        # The shells are replaced by empty files, so any command that needs a shell fails.
        volumes=[f"{models}:/models:ro", "/dev/null:/usr/bin/dash:ro", "/dev/null:/usr/bin/bash:ro", *volumes],
    )
    served = Served(container, int(ports["ATTNSERVE_GRPC_PORT"]), int(ports["ATTNSERVE_HTTP_PORT"]))
    try:
        wait_until(served.healthy, container.logs, START_TIMEOUT_S)
        yield served
    finally:
        container.remove()


@pytest.fixture(scope="session")
def served(engine: Engine, image: str, models: Path) -> Iterator[Served]:
    """A container shared by all tests that leave it running."""
    with running(engine, image, models) as served:
        yield served


@dataclass(frozen=True)
class Secured:
    """A container that serves with TLS to callers with tokens, and the files of both."""

    served: Served
    files: Files
    tokens: Tokens


@pytest.fixture(scope="session")
def secured(engine: Engine, image: str, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """A container as an operator would run it: TLS, the tokens `caller` and `prometheus`, an audit log, drift."""
    folder = tmp_path_factory.mktemp("secrets")
    folder.chmod(0o755)
    files, tokens = Files(folder), Tokens(folder / "tokens.txt")
    tokens.add("caller", "infer,attention")
    tokens.add("prometheus", "metrics")
    env = {
        "ATTNSERVE_TLS_CERT": f"/secrets/{files.cert.name}",
        "ATTNSERVE_TLS_KEY": f"/secrets/{files.key.name}",
        "ATTNSERVE_TOKENS_FILE": f"/secrets/{tokens.path.name}",
        "ATTNSERVE_AUDIT_LOG": "/dev/null",
        "ATTNSERVE_AUDIT_KEY_FILE": "/secrets/audit.key",
        "ATTNSERVE_FEATURE_SAMPLE": "0.5",
    }
    (folder / "audit.key").write_bytes(os.urandom(32))
    with running(engine, image, models, [f"{folder}:/secrets:ro"], **env) as served:
        yield Secured(served, files, tokens)


@pytest.fixture
def own_served(engine: Engine, image: str, models: Path) -> Iterator[Served]:
    """A separate container for one test."""
    with running(engine, image, models) as served:
        yield served
