"""The script that generates the client for threads from the client for asyncio.

The script is client/unasync.py; most tests run it, on a copy where files change. `--check` exits with 1 where a file
differs from what would be generated. A rule that matches nowhere raises ValueError.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from attnserve_client import AsyncClient, Client

SCRIPT = Path(__file__).parents[3] / "client" / "unasync.py"


@pytest.fixture(scope="module")
def unasync() -> ModuleType:
    module = ModuleType("unasync")
    module.__file__ = str(SCRIPT)
    exec(compile(SCRIPT.read_text(encoding="utf-8"), str(SCRIPT), "exec"), vars(module))
    return module


def copied(tmp_path: Path) -> Path:
    """A copy of the script, of both clients, and of the settings of ruff."""
    script = tmp_path / "unasync.py"
    (tmp_path / "pyproject.toml").write_bytes((SCRIPT.parents[1] / "pyproject.toml").read_bytes())
    script.write_bytes(SCRIPT.read_bytes())
    for name in ("_async", "_sync"):
        source = SCRIPT.parent / "attnserve_client" / name
        (tmp_path / "attnserve_client" / name).mkdir(parents=True)
        for path in source.glob("*.py"):
            (tmp_path / "attnserve_client" / name / path.name).write_bytes(path.read_bytes())
    return script


def run(script: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, check=False)


def test_check_passes_on_the_committed_client() -> None:
    done = run(SCRIPT, "--check")
    assert (done.returncode, done.stderr) == (0, "")


def test_check_fails_when_a_file_differs_from_its_source(tmp_path: Path) -> None:
    script = copied(tmp_path)
    run(script)  # in this folder, ruff sorts imports in another order
    generated = tmp_path / "attnserve_client" / "_sync" / "client.py"
    generated.write_text(generated.read_text(encoding="utf-8") + "\n# edited by hand\n", encoding="utf-8")
    done = run(script, "--check")
    assert done.returncode == 1
    assert "run `make client`: client.py" in done.stderr


def test_generating_again_restores_edited_files_and_removes_orphans(tmp_path: Path) -> None:
    script = copied(tmp_path)
    folder = tmp_path / "attnserve_client" / "_sync"
    (folder / "client.py").write_text("", encoding="utf-8")
    (folder / "removed.py").write_text("", encoding="utf-8")
    assert run(script).returncode == 0
    assert run(script, "--check").returncode == 0
    assert not (folder / "removed.py").exists()


def test_keywords_names_and_docstrings_are_converted(unasync: ModuleType) -> None:
    source = 'async def f(x: AsyncClient):\n    """Use `async with AsyncClient()`."""\n    await asyncio.sleep(1)\n'
    expected = 'def f(x: Client):\n    """Use `with Client()`."""\n    time.sleep(1)\n'
    assert unasync.convert(source) == expected


def test_rule_that_matches_nowhere_is_an_error(unasync: ModuleType) -> None:
    with pytest.raises(ValueError, match="match nowhere"):
        unasync.generate({"client.py": "async def f(): ...\n"})


@pytest.mark.parametrize("word", ["async", "await", "asyncio", "Async"])
def test_generated_client_has_no_word_of_asyncio(word: str) -> None:
    source = (SCRIPT.parent / "attnserve_client" / "_sync" / "client.py").read_text(encoding="utf-8")
    _, code = source.split("\n", 1)  # the first line names the source file
    assert word not in code


def test_both_clients_have_the_same_methods() -> None:
    def public(client: type) -> set[str]:
        return {name for name in dir(client) if not name.startswith("_")}

    assert public(Client) == public(AsyncClient)
    assert public(Client) == {
        *("close", "embed", "infer", "loads", "load_model", "model", "models", "ready", "reload_repository", "rerank"),
        *("stream", "tokenizer", "unload_model", "wait_ready", "faithfulness"),
    }
