"""The package: its public names, its version, and what the base install can do without any extra.

An extra is a set of optional libraries, such as those of `attnserve[cli]`. `run` runs a program in another process, in
which imports of some libraries fail. A function that needs a missing one raises ImportError, and a command exits with
2; both name the extra to install.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import attnserve_client
import pytest
from attnserve_client import errors

BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError(name + " is blocked", name=name)
        return None

sys.meta_path.insert(0, Blocker())
"""
EXTRAS = ("rich", "typer", "matplotlib", "pydantic", "onnxruntime", "torch", "grpc_health", "attnserve_server")


def run(program: str, blocked: tuple[str, ...] = EXTRAS) -> subprocess.CompletedProcess[str]:
    source = BLOCKED.replace("{blocked}", repr(set(blocked))) + program
    line = [sys.executable, "-W", "error", "-c", source]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)


def test_client_works_without_any_extra() -> None:
    done = run(
        "from attnserve_client import Client\n"
        "from attnserve_client.testing import FakeServer\n"
        "with FakeServer() as server, Client(server.target) as client:\n"
        "    found = client.infer('fake', 'a text', attention=True).attention[0]\n"
        "    assert '<h1>' in found.to_html()\n"
        "    try:\n"
        "        found.plot()\n"
        "    except ImportError as error:\n"
        "        print(error)\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "plot() needs matplotlib: pip install 'attnserve[plot]'\n"


@pytest.mark.parametrize("missing", ["rich", "typer"])
def test_command_without_its_extra_prints_what_to_install(missing: str) -> None:
    done = run("from attnserve_client.cli import main\nmain()\n", blocked=(missing,))
    assert done.returncode == 2
    assert done.stderr == f"attnserve needs {missing}: pip install 'attnserve[cli]'\n"
    assert done.stdout == ""


def test_control_blocker_blocks_an_extra() -> None:
    done = run("import rich\n")
    assert done.returncode == 1, "the tests above must notice an import of an extra"
    assert "rich is blocked" in done.stderr


def test_top_level_has_at_most_25_names() -> None:
    assert len(attnserve_client.__all__) <= 25
    assert all(hasattr(attnserve_client, name) for name in attnserve_client.__all__)


def test_errors_module_has_every_error_of_the_top_level() -> None:
    exported = {
        value for name in attnserve_client.__all__ if isinstance(value := getattr(attnserve_client, name), type)
    }
    raised = {each for each in exported if issubclass(each, Exception)}
    assert raised
    assert all(getattr(errors, each.__name__) is each for each in raised)


def test_version_is_that_of_the_installed_distribution() -> None:
    assert attnserve_client.__version__ == importlib.metadata.version("attnserve")


def test_version_of_a_bare_source_tree_is_unknown() -> None:
    done = run(
        "import importlib.metadata as metadata\n"
        "def missing(name):\n"
        "    raise metadata.PackageNotFoundError(name)\n"
        "metadata.version = missing\n"
        "import attnserve_client\n"
        "print(attnserve_client.__version__)\n"
    )
    assert (done.stdout, done.stderr) == ("unknown\n", "")
