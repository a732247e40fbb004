"""Take the pictures of the terminal for the README and the documentation.

With ATTNSERVE_PICTURES=1 they are written to docs/pictures. Their bytes differ between machines with other fonts, so
that no test compares them.
"""

from __future__ import annotations

import io
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from explored import save
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text
from scraping import wait_until
from serving import RunningServer, command

pytestmark = pytest.mark.browser


def test_picture_of_a_map_in_the_terminal(minilm: RunningServer, chromium: Any, tmp_path: Path) -> None:
    line = ["explain", "minilm", "The buyer agrees to assume all liabilities.", "--server", minilm.target]
    save(terminal(chromium, line), "terminal.png", tmp_path)


def test_picture_of_a_server_in_the_terminal(minilm: RunningServer, chromium: Any, tmp_path: Path) -> None:
    metrics = f"http://127.0.0.1:{minilm.http_port}/metrics"
    bench = [command("attnserve"), "bench", "minilm", "--server", minilm.target, "--duration", "60", "--callers", "8"]
    bench += ["--attention-share", "0.1"]
    with subprocess.Popen(bench, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as load:
        try:
            wait_until(lambda: answered(metrics) > 100, lambda: "no load", 60)
            line = ["top", "--once", "--interval", "5", "--server", minilm.target, "--metrics", metrics]
            save(terminal(chromium, line), "top.png", tmp_path)
        finally:
            load.kill()
    assert load.returncode != 0, "the load ended before the picture was taken"


def answered(metrics: str) -> float:
    """Return how many sequences the server has computed."""
    with urlopen(metrics) as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith("attnserve_sequences_total{"))


def terminal(chromium: Any, line: list[str]) -> Any:
    """Run a command of `attnserve` in colour. Return what it prints, as an element of a page like a terminal."""
    variables = {**os.environ, "FORCE_COLOR": "1", "COLORTERM": "truecolor", "COLUMNS": "96", "TERM": "xterm-256color"}
    program = [command("attnserve"), *line]
    done = subprocess.run(program, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    console = Console(record=True, file=io.StringIO(), width=96, force_terminal=True, color_system="truecolor")
    console.print(Text.from_ansi(f"$ attnserve {shlex.join(line[: line.index('--server')])}\n{done.stdout.rstrip()}"))
    code = console.export_html(theme=MONOKAI, inline_styles=True, code_format="<pre>{code}</pre>")
    page = chromium.new_context(viewport={"width": 1000, "height": 800}, device_scale_factor=2).new_page()
    style = (
        "pre { display: inline-block; padding: 1em; color: #d9d9d9; background: #0c0c0c; font: 15px DejaVu Sans Mono }"
    )
    page.set_content(f"<style>{style}</style>{code}")
    return page.locator("pre").first
