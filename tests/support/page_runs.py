"""Runs the code blocks of a page as its reader would: in order, in one folder, against real servers.

`docs/blocks.py` finds the blocks. A command that fails, an exception of Python and an output that differs raise
AssertionError with page and line.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import typer
import yaml
from attnserve_server.cli import check
from commands import call, conversion_app
from credentials import Files
from onnx_files import encoder, saved
from serving import RunningServer, serve
from tiny_bundle import tiny_manifest, tiny_tokenizer, write_tiny_files
from two_sided_graphs import IMAGE

ROOT = Path(__file__).parents[2]
LEAST_MODELS = ".demo/models"
COMMAND_TIMEOUT_S = 300
CONVERSIONS = ("export", "prepare", "inspect", "check")
"""Commands of `attnserve-server` that are called in this process, where torch is imported already."""
FASTER = {"export": ("--no-try", "--no-fuse", "--exporter", "torchscript"), "prepare": ("--no-try", "--no-fuse")}
"""Options that only save time, added to the commands that convert."""
_ADDRESS = r"(?:localhost|127\.0\.0\.1|models\.example\.com|HOST):"
_RELATIVE, _ABSOLUTE = 0.02, 0.002
"""Two processors round sums in another order; three printed digits may differ in the last."""


def logical_lines(text: str) -> Iterator[str]:
    """Yield the commands of a block of bash: lines that end with a backslash or inside quotes are joined."""
    begun = ""
    for line in text.splitlines():
        begun = f"{begun}\n{line}" if begun else line
        try:
            shlex.split(begun, comments=True)
        except ValueError:
            continue
        if not begun.endswith("\\"):
            if begun.strip():
                yield begun
            begun = ""
    assert not begun, f"an open quote or a last backslash: {begun}"


def alike(expected: str, printed: str) -> bool:
    """Return whether the words of `expected` follow each other in `printed`. Numbers may differ a little.

    A line `...` matches any words.
    """
    left = _words(printed)
    for part in re.split(r"^\.\.\.$", expected, flags=re.MULTILINE):
        wanted = _words(part)
        starts = range(len(left) - len(wanted) + 1)
        found = (start for start in starts if all(map(_same, wanted, left[start : start + len(wanted)])))
        start = next(found, None)
        if start is None:
            return False
        left = left[start + len(wanted) :]
    return True


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[\s\[\]()]+", text) if word]


def _same(expected: str, printed: str) -> bool:
    if expected == printed:
        return True
    try:
        one, other = float(expected), float(printed)
    except ValueError:
        return False
    return "." in expected and abs(one - other) <= max(_ABSOLUTE, _RELATIVE * abs(one))


@dataclass
class PageRun:
    """The state of one page: its folder, its variables, what Python has defined, and its server.

    `shared` returns a server for the value of `--repository` that pages only read, or None.
    """

    folder: Path
    shared: Callable[[str], RunningServer | None]
    variables: dict[str, str] = field(default_factory=dict)
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    own: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    server: RunningServer | None = None
    started: int = 0

    def run(self, blocks: list[Any]) -> None:
        """Run all blocks of a page, and end its server."""
        printed = ""
        with self.own, contextlib.chdir(self.folder):
            self.serve(["--repository", LEAST_MODELS])
            for block in blocks:
                if block.no_run or block.run_by:
                    continue
                try:
                    for line in block.setup:
                        self.command(line)
                    printed = self.block(block, printed)
                except (Exception, SystemExit) as error:
                    raise AssertionError(f"{block.page}:{block.line}: {error}") from error

    def block(self, block: Any, before: str) -> str:
        """Run one block, and return what it prints. `before` is what the block before it printed."""
        text = self.localised(block.text)
        if block.language == "output":
            assert alike(block.text, before), f"the page shows\n{block.text}\nand the block prints\n{before}"
        elif block.file:
            Path(block.file).write_text(text, encoding="utf-8")
        elif block.language == "bash":
            return "".join(self.command(line) for line in logical_lines(block.text))
        elif block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile("\n" * block.line + text, block.page, "exec"), self.names)
            return output.getvalue()
        elif block.language in ("yaml", "json"):
            assert {"yaml": yaml.safe_load, "json": json.loads}[block.language](text)
        return before

    def command(self, line: str) -> str:
        """Run one command of bash, and return what it prints."""
        words = shlex.split(line.replace("\\\n", " "), comments=True)
        if not words or words[-1] == ".venv/bin/activate":
            return ""
        if words == ["make", "serve"]:
            return self.command(recipe("serve"))
        if words[0] == "export":
            self.variables |= dict(word.split("=", 1) for word in words[1:])
            return ""
        own = {}
        while re.match(r"[A-Z_]+=", words[0]):
            name, _, value = words.pop(0).partition("=")
            own[name] = self.localised(value)
        program = words[0].removeprefix(".venv/bin/")
        if program == "attnserve-server" and words[1] == "serve":
            self.serve(words[2:], own)
            return ""
        if program == "attnserve-server" and words[1] in CONVERSIONS and not {">", "|"} & set(words):
            return self.convert(words[1:])
        return self.bash(line, own)

    def bash(self, line: str, own: Mapping[str, str]) -> str:
        """Run a line of bash with the environment's programs, for the page's server."""
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        assert self.server
        line = self.localised(line.replace(".venv/bin/", ""))
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", line],
            env={**os.environ, "PATH": path, "ATTNSERVE_SERVER": self.server.target, **self.variables, **own},
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, f"{line}: exit code {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def convert(self, words: list[str]) -> str:
        """Call a conversion command in this process."""
        app: typer.Typer = conversion_app()
        check.register(app)
        result = call(app, *words, *FASTER.get(words[0], ()))
        assert result.exit_code == 0, f"{' '.join(words)}: {result.output}"
        return result.stdout

    def serve(self, words: list[str], variables: Mapping[str, str] | None = None) -> None:
        """Start a server with these arguments in the place of the one before, or take a shared one."""
        repository = words[words.index("--repository") + 1] if "--repository" in words else "models"
        found = self.shared(repository) if words == ["--repository", repository] else None
        if found:
            self.server = found
            return
        self.own.close()
        self.started += 1
        folder = self.folder / f".server{self.started}"
        folder.mkdir()
        rest = [word for word in words if word not in ("--repository", repository)]
        options = [word.replace("0.0.0.0", "127.0.0.1") for word in rest]
        environment = {**os.environ, **(variables or {})}
        self.server = self.own.enter_context(serve(Path(repository), folder, *options, env=environment))

    def localised(self, text: str) -> str:
        """Return a text with the addresses, and the process, of the page's server."""
        assert self.server
        ports = {"8000": self.server.rest_port, "8001": self.server.grpc_port, "8002": self.server.http_port}
        for port, real in ports.items():
            text = re.sub(_ADDRESS + port, f"127.0.0.1:{real}", text)
        return re.sub(r"\bPID\b", str(self.server.process.pid), text)


def recipe(target: str) -> str:
    """Return the command of `attnserve-server` in a recipe of the Makefile, with its variables filled in."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.search(rf"^{target}:.*\n(?:\t.*\n)*?\t@?\$\(BIN\)/(attnserve-server .*)$", makefile, re.MULTILINE)
    assert found, target
    return found[1].replace("$(DEMO)", ".demo").replace(" $(SERVE_ARGS)", "")


def prepared(folder: Path, text: str, minilm: Path, examples: Path) -> None:
    """Write the files that a page takes for granted: what its reader would have in the place of these names.

    Args:
        folder: that of the page.
        text: the page. Files that it does not name are not made.
        minilm: the repository of the demo's model.
        examples: the repository of models for single examples.
    """
    (folder / LEAST_MODELS).mkdir(parents=True)
    if f"serve --repository {LEAST_MODELS}" in text:
        shutil.copytree(minilm / "minilm", folder / LEAST_MODELS / "minilm")  # a server refuses links
    else:
        (folder / LEAST_MODELS / "minilm").symlink_to(minilm / "minilm")
    (folder / "examples").symlink_to(examples)
    makers: dict[str, Callable[[Path], object]] = {
        "models": _tiny_models,
        "tls.pem": _certificates,
        "dog.npy": lambda _: np.save(folder / "dog.npy", np.zeros((3, *IMAGE), np.float32)),
        "model.onnx": _file,
    }
    for name, make in makers.items():
        if name in text:
            make(folder)


def _tiny_models(folder: Path) -> None:
    from attnserve_server.model.repository import write_bundle  # noqa: PLC0415 - only these pages need it

    (folder / "tiny").mkdir()
    files = write_tiny_files(folder / "tiny")
    write_bundle(folder / "models", tiny_manifest("minilm"), files)
    write_bundle(folder / "new", tiny_manifest("minilm", "2"), files)


def _certificates(folder: Path) -> None:
    files = Files(folder)
    (folder / "ca.pem").write_bytes(files.authority.cert_pem.bytes())


def _file(folder: Path) -> None:
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    saved(encoder(), folder / "model.onnx")
