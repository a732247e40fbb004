"""Costs of runs are stored beside the bundle, by machine; a broken file is ignored.

Costs are timed runs of one model; a bundle is the model's folder. `write_costs` returns False where it cannot write,
and nothing raises.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from attnserve_server.engine.cost import TimedRun
from attnserve_server.engine.cost_file import CostKey, cost_path, machine, read_costs, write_costs
from attnserve_server.model.holding import verify
from attnserve_server.model.repository import Bundle, Repository
from tiny_bundle import write_tiny_files, write_tiny_repository

RUNS = (TimedRun(1, 8, 0.001), TimedRun(4, 32, 0.02))
KEY = CostKey(
    digest="sha256:1", provider="CPUExecutionProvider", runtime="one", machine="a", cores=2, intra_op_threads=1
)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    files, root = tmp_path / "files", tmp_path / "models"
    files.mkdir()
    return Repository(write_tiny_repository(root, write_tiny_files(files))).bundle("tiny")


def test_costs_are_read_as_written_and_the_bundle_stays_valid(bundle: Bundle) -> None:
    assert read_costs(bundle, KEY) == ()
    assert write_costs(bundle, KEY, RUNS)
    assert read_costs(bundle, KEY) == RUNS
    verify(bundle)


@pytest.mark.parametrize("field", ["digest", "provider", "runtime", "machine", "cores", "intra_op_threads"])
def test_each_machine_has_its_own_entry(bundle: Bundle, field: str) -> None:
    other = KEY.model_copy(update={field: 3 if isinstance(getattr(KEY, field), int) else "another"})
    write_costs(bundle, KEY, RUNS)
    assert read_costs(bundle, other) == ()
    write_costs(bundle, other, RUNS[:1])
    assert read_costs(bundle, KEY) == RUNS
    assert read_costs(bundle, other) == RUNS[:1]


@pytest.mark.parametrize("content", [b"", b"{", b'{"entries": [{"runs": []}]}', b" " * 2**21, b'{"entries": 1}'])
def test_unreadable_cost_file_is_ignored_and_replaced(bundle: Bundle, content: bytes) -> None:
    cost_path(bundle).write_bytes(content)
    assert read_costs(bundle, KEY) == ()
    assert write_costs(bundle, KEY, RUNS)
    assert read_costs(bundle, KEY) == RUNS


def test_failed_write_of_costs_returns_false_and_leaves_no_file(bundle: Bundle) -> None:
    cost_path(bundle).mkdir()  # not even root can replace a folder by a file
    assert not write_costs(bundle, KEY, RUNS)
    assert [entry.name for entry in bundle.path.parent.iterdir() if entry.is_file()] == []


def test_oldest_entries_are_dropped(bundle: Bundle) -> None:
    for number in range(70):
        write_costs(bundle, KEY.model_copy(update={"cores": number + 1}), RUNS)
    assert read_costs(bundle, KEY.model_copy(update={"cores": 1})) == ()
    assert read_costs(bundle, KEY.model_copy(update={"cores": 70})) == RUNS


def test_machine_has_a_name() -> None:
    assert machine().strip()
