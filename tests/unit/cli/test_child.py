"""A command in a process of its own: its exit code is passed on, and a crash is one sentence and leaves nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest


def ran(body: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """A program that runs `command` in a child, with its temporary files under a folder of the test's."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    program = (
        "import os, signal, sys, tempfile\n"
        "from attnserve_server.cli.child import run_in_child\n"
        f"def command():\n{textwrap.indent(textwrap.dedent(body), '    ')}\n"
        "sys.exit(run_in_child(command))\n"
    )
    environment = {**os.environ, "TMPDIR": str(scratch)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert not list(scratch.iterdir())
    return done


@pytest.mark.parametrize(("body", "code"), [("print('done')", 0), ("sys.exit(7)", 7), ("sys.exit(0)", 0)])
def test_exit_code_and_output_are_the_commands_own(body: str, code: int, tmp_path: Path) -> None:
    done = ran(body, tmp_path)
    assert done.returncode == code
    assert done.stderr == ""
    assert done.stdout == ("done\n" if "print" in body else "")


@pytest.mark.parametrize(
    ("name", "words"),
    [("SIGSEGV", "ended by SIGSEGV"), ("SIGABRT", "ended by SIGABRT"), ("SIGKILL", "ran out of memory")],
)
def test_crash_is_one_sentence_and_temporary_files_are_removed(name: str, words: str, tmp_path: Path) -> None:
    body = f"open(os.path.join(tempfile.mkdtemp(), 'half'), 'w').close(); os.kill(os.getpid(), signal.{name})"
    done = ran(body, tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the model brought the runtime down: it ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_command_that_was_asked_to_stop_says_nothing_of_the_model(tmp_path: Path) -> None:
    done = ran("os.kill(os.getpid(), signal.SIGTERM)", tmp_path)
    assert (done.returncode, done.stderr) == (143, "")


def test_memory_is_bounded_by_the_machines_own(tmp_path: Path) -> None:
    body = """
        import resource
        bound, _ = resource.getrlimit(resource.RLIMIT_DATA)
        print(0 < bound < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    """
    assert ran(body, tmp_path).stdout == "True\n"
