"""The selection of `make quick`: what it leaves out, and a list of it with reasons at the end of the run.

Without `--quick` it does nothing. tests/conftest.py takes over the hooks. With pytest-xdist, each worker collects all
tests. The lists of all workers are equal, and the controller prints the last that it receives.

A test with a marker of `MARKERS` or a fixture of `FIXTURES` is deselected, not skipped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

ROOT = Path(__file__).parents[2]
NEEDS_TORCH = "needs torch"
IMPORT_TORCH = (
    "tests/unit/conversion/choose/test_trials.py",
    "tests/unit/conversion/verify/test_limits.py",
)
"""Modules that import torch, themselves or by a helper, and so cannot be collected without it."""
MARKERS = {"torch": NEEDS_TORCH, "slow": "slow"}
FIXTURES = ("minilm_repository", "minilm_server", "minilm_references", "zoo_bundles")
"""They export a model, for which they need torch."""
LEFT_OUT = pytest.StashKey[Counter[tuple[str, str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="leave out tests that need torch or are marked slow")


def pytest_configure(config: pytest.Config) -> None:
    """With `--quick`, use fewer examples of each property."""
    config.stash[LEFT_OUT] = Counter()
    if config.getoption("quick"):
        settings.register_profile("quick", settings.get_profile("attnserve"), max_examples=20)
        settings.load_profile("quick")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Ignore modules that cannot be imported without torch."""
    if not config.getoption("quick") or not collection_path.is_relative_to(ROOT):
        return None
    path = collection_path.relative_to(ROOT)
    if str(path) not in IMPORT_TORCH:
        return None
    config.stash[LEFT_OUT][str(path), NEEDS_TORCH] += 1
    return True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect marked tests, and those that export a model."""
    if not config.getoption("quick"):
        return
    left_out = {item: next(reasons_of(item), None) for item in items}
    for item, reason in left_out.items():
        if reason:
            config.stash[LEFT_OUT][str(item.path.relative_to(ROOT)), reason] += 1
    items[:] = [item for item in items if not left_out[item]]
    config.hook.pytest_deselected(items=[item for item, reason in left_out.items() if reason])


def reasons_of(item: pytest.Item) -> Iterator[str]:
    """Yield the reasons for which a test is left out."""
    yield from (reason for marker, reason in MARKERS.items() if item.get_closest_marker(marker))
    if set(FIXTURES) & set(getattr(item, "fixturenames", ())):
        yield NEEDS_TORCH


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker of pytest-xdist left out."""
    for path, reason, count in getattr(node, "workeroutput", {}).get("left_out", ()):
        node.config.stash[LEFT_OUT][path, reason] = count


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send what this worker left out to the controller, if it is a worker."""
    if hasattr(session.config, "workeroutput"):
        left_out = session.config.stash[LEFT_OUT]
        session.config.workeroutput["left_out"] = [(*entry, count) for entry, count in left_out.items()]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """List what was left out, and why."""
    if not config.getoption("quick"):
        return
    terminalreporter.section("left out by --quick; `make test` runs all")
    for (path, reason), count in sorted(config.stash[LEFT_OUT].items()):
        shown = "whole module" if path in IMPORT_TORCH else f"{count} tests"
        terminalreporter.write_line(f"{path}: {shown}: {reason}")
