"""Commands that run models run in a child process: its exit code is passed on, and a crash is one sentence.

`program` is a command line that runs Python code with `run_in_child`, and `ran` runs it with its temporary files in a
folder that must be empty afterwards. A crash exits with 2, and SIGTERM, which is passed on, with 143.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest


def program(body: str) -> list[str]:
    """A command line that runs `body` in a child process."""
    inner = "import os, signal, sys, tempfile\n" + textwrap.dedent(body)
    call = f"run_in_child([sys.executable, '-c', {inner!r}])"
    return [sys.executable, "-c", f"import sys; from attnserve_server.cli import run_in_child; sys.exit({call})"]


def ran(command: list[str], scratch: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command with its temporary files in `scratch`, and checks that it left none there."""
    scratch.mkdir()
    environment = {**os.environ, "TMPDIR": str(scratch)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert not list(scratch.iterdir())
    return done


@pytest.mark.parametrize(("body", "code"), [("print('done')", 0), ("sys.exit(7)", 7), ("sys.exit(0)", 0)])
def test_exit_code_and_output_are_those_of_the_command(body: str, code: int, tmp_path: Path) -> None:
    done = ran(program(body), tmp_path / "scratch")
    assert done.returncode == code
    assert done.stderr == ""
    assert done.stdout == ("done\n" if "print" in body else "")


@pytest.mark.parametrize(
    ("name", "words"),
    [("SIGSEGV", "ended by SIGSEGV"), ("SIGABRT", "ended by SIGABRT"), ("SIGKILL", "ran out of memory")],
)
def test_crash_is_one_sentence_and_temporary_files_are_removed(name: str, words: str, tmp_path: Path) -> None:
    body = f"open(os.path.join(tempfile.mkdtemp(), 'half'), 'w').close(); os.kill(os.getpid(), signal.{name})"
    done = ran(program(body), tmp_path / "scratch")
    assert done.returncode == 2
    assert done.stderr.startswith("error: the model ended the runtime's process: it ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_command_stopped_by_a_signal_reports_no_fault_of_the_model(tmp_path: Path) -> None:
    done = ran(program("os.kill(os.getpid(), signal.SIGTERM)"), tmp_path / "scratch")
    assert (done.returncode, done.stderr) == (143, "")


def test_request_to_stop_is_passed_on_to_the_child(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    body = "tempfile.mkdtemp(); print('ready', flush=True); signal.pause()"
    with subprocess.Popen(
        program(body), stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(scratch)}
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(60) == 143
    assert not list(scratch.iterdir())


def test_memory_of_a_command_that_runs_models_is_limited(tmp_path: Path) -> None:
    inner = """
        import resource, sys
        from attnserve_server import cli
        cli._run_command = lambda: print(resource.getrlimit(resource.RLIMIT_DATA)[0], sys.argv[1:])
        cli.run_as_child()
    """
    outer = f"""
        import sys
        from attnserve_server import cli
        cli._CHILD = {textwrap.dedent(inner)!r}
        sys.argv = ["attnserve-server", "inspect", "model.onnx"]
        cli.main()
    """
    done = ran([sys.executable, "-c", textwrap.dedent(outer)], tmp_path / "scratch")
    limit, _, arguments = done.stdout.strip().partition(" ")
    assert 0 < int(limit) < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert arguments == "['inspect', 'model.onnx']"


def test_child_does_not_import_modules_from_the_working_folder(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "typer.py").write_text("raise SystemExit(99)", encoding="ascii")
    arguments = "sys.argv = ['attnserve-server', 'inspect', '--help']"
    program = f"import sys; {arguments}; from attnserve_server.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=folder, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert b"Usage: attnserve-server inspect" in done.stdout
