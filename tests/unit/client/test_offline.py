"""Script and style of the page of `to_html()` are made from the explorer's modules, by client/offline.py."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "client" / "offline.py"


@pytest.fixture(scope="module")
def offline() -> ModuleType:
    module = ModuleType("offline")
    module.__file__ = str(SCRIPT)
    exec(compile(SCRIPT.read_text(encoding="utf-8"), SCRIPT, "exec"), module.__dict__)
    return module


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the script and of what it reads."""
    for folder in ("client/attnserve_client/_page", "server/attnserve_server/explorer"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(SCRIPT, tmp_path / "client")
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(folder / "client" / "offline.py"), *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_files_in_the_repository_are_up_to_date() -> None:
    done = run(ROOT, "--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["words.js", "shared.css"])
def test_change_of_a_shared_file_changes_the_page(copy: Path, name: str) -> None:
    source = copy / "server/attnserve_server/explorer" / name
    source.write_text(source.read_text(encoding="utf-8") + "\n/* changed */\n", encoding="utf-8")
    checked = run(copy, "--check")
    assert checked.returncode == 1
    assert "run `make client`" in checked.stderr
    assert run(copy).returncode == 0
    assert run(copy, "--check").returncode == 0


def test_modules_follow_those_that_they_import(offline: ModuleType) -> None:
    sources = {
        "main.js": 'import { b } from "./two.js";\n\nb();\n',
        "one.js": "const a = 1;\n\nexport { a };\n",
        "two.js": 'import { a } from "./one.js";\n\nconst b = () => a;\n\nexport { b };\n',
        "unused.js": "const c = 1;\n\nexport { c };\n",
    }
    assert offline.ordered(sources, "main.js") == ["one.js", "two.js", "main.js"]
    made = offline.bundled(sources, "main.js")
    assert "import" not in made
    assert "export" not in made
    assert made.index("const a") < made.index("const b") < made.index("b();")


def test_equal_names_and_unknown_imports_are_refused(offline: ModuleType) -> None:
    one = "const a = 1;\n\nexport { a };\n"
    with pytest.raises(ValueError, match=r"a is in one\.js and in main\.js"):
        offline.bundled({"one.js": one, "main.js": 'import { a } from "./one.js";\n\nconst a = 2;\n'}, "main.js")
    with pytest.raises(ValueError, match=r"main\.js imports b, which one\.js does not export"):
        offline.bundled({"one.js": one, "main.js": 'import { b } from "./one.js";\n\nb();\n'}, "main.js")
