"""The files around the code: CI and hooks call existing targets, fragments have known kinds, packages are tried.

Targets are those of the Makefile, and fragments are the files of changelog.d/. One test runs `make`, and the others
read the files. The script deploy/try_dist.py is given distributions made by hand; it raises `Failed` for one with
missing or stray files.
"""

from __future__ import annotations

import importlib.util
import io
import re
import subprocess
import tarfile
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[3]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z0-9-]+):", MAKEFILE, re.MULTILINE))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def made_by(path: Path) -> set[str]:
    """The targets of make that a script or workflow calls, comments left out."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    return set(re.findall(r"\b(?:make|stage) ([a-z0-9-]+)", "\n".join(lines)))


@pytest.mark.parametrize("path", [*WORKFLOWS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_ci_calls_targets_that_exist(path: Path) -> None:
    called = made_by(path)
    assert called, "the control: it calls make"
    assert called <= TARGETS


def test_environment_is_not_made_by_a_python_that_is_missing_or_too_old(tmp_path: Path) -> None:
    old, folder = tmp_path / "old", tmp_path / "venv"
    old.write_text("#!/bin/sh\nexit 1\n", encoding="ascii")  # what the version check gives on an older Python
    old.chmod(0o755)
    for python in (old, tmp_path / "missing"):
        line = ["make", f"VENV={folder}", f"PYTHON={python}", f"{folder}/bin/python"]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert "attnserve needs Python 3.11 or newer; name one, as in PYTHON=python3.12" in done.stderr
        assert not folder.exists()


def test_workflow_and_script_call_the_same_targets() -> None:
    assert made_by(ROOT / ".github/workflows/ci.yml") == made_by(ROOT / ".ci/run")


def test_actions_are_pinned_to_a_major_version() -> None:
    uses = [use for path in WORKFLOWS for use in re.findall(r"uses: (\S+)", path.read_text(encoding="utf-8"))]
    assert uses
    assert [use for use in uses if not re.fullmatch(r"[\w-]+/[\w/-]+@v\d+", use)] == []


def test_quick_matrix_is_the_supported_versions_of_python() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    prefix = "Programming Language :: Python :: "
    supported = [line.removeprefix(prefix) for line in PROJECT["project"]["classifiers"] if line.startswith(prefix)]
    assert jobs["quick"]["strategy"]["matrix"]["python"] == supported


def test_hooks_run_tools_that_check_runs_too() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    entries = [hook["entry"].replace(".venv/bin/", "$(BIN)/").removesuffix(" --force-exclude") for hook in hooks]
    assert [entry for entry in entries if entry.removesuffix(" --fix") not in MAKEFILE] == []


def test_issue_forms_have_the_fields_that_github_requires() -> None:
    forms = [path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    assert forms
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= form.keys(), path.name
        fields = [part for part in form["body"] if part["type"] != "markdown"]
        assert all(part["id"] and part["attributes"]["label"] for part in fields), path.name


def test_changelog_fragments_have_a_known_kind() -> None:
    kinds = [kind["directory"] for kind in PROJECT["tool"]["towncrier"]["type"]]
    names = [path.name for path in (ROOT / "changelog.d").iterdir() if path.name != "README.md"]
    form = re.compile(rf"(\d+|\+[a-z0-9-]+)\.({'|'.join(kinds)})\.md")
    assert [name for name in names if not form.fullmatch(name)] == []


def test_changelog_has_the_line_where_a_release_is_inserted() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert text.count(PROJECT["tool"]["towncrier"]["start_string"]) == 1


@pytest.fixture(scope="module")
def try_dist() -> ModuleType:
    """The script that `make dist` ends with."""
    spec = importlib.util.spec_from_file_location("try_dist", ROOT / "deploy" / "try_dist.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def packed(folder: Path, wheel: tuple[str, ...], sdist: tuple[str, ...]) -> tuple[Path, Path]:
    """A wheel and an sdist that hold these empty files."""
    paths = folder / "attnserve-0.1.0-py3-none-any.whl", folder / "attnserve-0.1.0.tar.gz"
    with zipfile.ZipFile(paths[0], "w") as archive:
        for name in wheel:
            archive.writestr(name, "")
    with tarfile.open(paths[1], "w:gz") as archive:
        for name in sdist:
            archive.addfile(tarfile.TarInfo(f"attnserve-0.1.0/{name}"), io.BytesIO())
    return paths


def test_whole_distributions_pass(try_dist: ModuleType, tmp_path: Path) -> None:
    wheel = (*try_dist.NEEDED, "attnserve-0.1.0.dist-info/METADATA")
    assert try_dist.check_content(*packed(tmp_path, wheel, try_dist.SDIST_NEEDED)) == "0.1.0"


@pytest.mark.parametrize(
    ("added", "removed", "message"),
    [
        ((), "attnserve_client/py.typed", "missing: attnserve_client/py.typed"),
        (("tests/unit/test_x.py",), None, "not for users: tests/unit/test_x.py"),
        (("attnserve_client/test_x.py",), None, "not for users: attnserve_client/test_x.py"),
        (("bench/run.py",), None, "not for users: bench/run.py"),
    ],
)
def test_missing_or_stray_file_is_refused(
    try_dist: ModuleType, tmp_path: Path, added: tuple[str, ...], removed: str | None, message: str
) -> None:
    wheel = tuple(name for name in (*try_dist.NEEDED, *added) if name != removed)
    with pytest.raises(try_dist.Failed, match=re.escape(message)):
        try_dist.check_content(*packed(tmp_path, wheel, try_dist.SDIST_NEEDED))


def test_links_that_pypi_cannot_follow_are_refused(try_dist: ModuleType, tmp_path: Path) -> None:
    wheel, sdist = packed(tmp_path, try_dist.NEEDED, try_dist.SDIST_NEEDED)
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("attnserve-0.1.0.dist-info/METADATA", "[a](https://example.org) [b](docs/README.md)")
    with pytest.raises(try_dist.Failed, match=r"cannot follow: docs/README\.md"):
        try_dist.check_content(wheel, sdist)


def test_readme_of_pypi_has_absolute_links_or_none() -> None:
    pytest.importorskip("hatchling", reason="a development tool")
    spec = importlib.util.spec_from_file_location("pypi_readme", ROOT / "deploy" / "pypi_readme.py")
    assert spec
    assert spec.loader
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    text = (
        "<!-- run-by: x -->\n![a [b] c](pictures/a.png) [page](docs/README.md#x) "
        "[web](https://example.org) [here](#x)\n"
    )
    made = hook.absolute(text, "https://example.org/attnserve", "0.1.0")
    assert made == (
        "![a [b] c](https://example.org/attnserve/raw/v0.1.0/pictures/a.png) "
        "[page](https://example.org/attnserve/blob/v0.1.0/docs/README.md#x) [web](https://example.org) [here](#x)\n"
    )
    assert hook.absolute(text, "", "0.1.0") == " page [web](https://example.org) [here](#x)\n"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not re.search(r"\]\((?!https?:|#)", hook.absolute(readme, "", "0.1.0"))


def test_failing_command_is_reported_with_its_output(try_dist: ModuleType, tmp_path: Path) -> None:
    environment = try_dist.Environment.__new__(try_dist.Environment)
    environment.folder = tmp_path
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "false").write_text("#!/bin/sh\necho out; exit 3\n")
    (tmp_path / "bin" / "false").chmod(0o755)
    with pytest.raises(try_dist.Failed, match="false -x: exit code 3, not 0: out"):
        environment.run(0, "false", "-x")
    with pytest.raises(try_dist.Failed, match="'in' is not in its output: out"):
        environment.expect("in", 3, "false")


def test_every_requirement_is_pinned_in_the_constraints() -> None:
    pins = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    extras = PROJECT["project"]["optional-dependencies"]
    named = {re.split(r"[\[=<>~]", entry)[0].lower() for extra in extras.values() for entry in extra} - {"attnserve"}
    assert named - pins == set()
