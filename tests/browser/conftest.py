"""Fixtures of the browser tests: real Chromium on real servers on loopback.

A page fails its test if it requests anything from elsewhere, if its content policy blocks something, or if a script of
it fails. Without Chromium or Playwright, every test is skipped, with the line that installs them.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attnserve_server.model.heads import HeadSpec
from browser import CHROMIUM
from explored import INSTALL, LABELS, Open, Opened
from labelled_models import write_labelled
from onnx_files import saved
from serving import RunningServer, command, serve
from tiny_bundle import VOCABULARY, tiny_tokenizer, write_tiny_files, write_tiny_repository
from two_sided_graphs import encoder_decoder, patches_alone, words_over_patches

REPOSITORY = "ATTNSERVE_BROWSER_REPOSITORY"
"""Names a repository that has MiniLM as `minilm`; without it, the tests export the model, which needs torch."""
VIOLATIONS = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => window.violations.push(event.violatedDirective));
"""
READY = "#version option, #sign:not([hidden])"


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason=INSTALL)
    if not CHROMIUM:
        pytest.skip(INSTALL)
    with playwright.sync_playwright() as started:
        flags = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--font-render-hinting=none"]
        browser = started.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def opener(chromium: Any) -> Iterator[Open]:
    """Opens a server's explorer, and checks at the end that no page broke the rules of this module."""
    opened: list[Opened] = []
    contexts = []

    def open_page(server: RunningServer, fragment: str = "", path: str = "/explore", **options: Any) -> Opened:
        context = chromium.new_context(**{"viewport": {"width": 1440, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.add_init_script(VIOLATIONS)
        made = Opened(page, f"http://127.0.0.1:{server.rest_port}")
        opened.append(made)
        page.on("request", lambda request: made.requests.append(request.url))
        page.on("console", lambda message: made.console.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: made.console.append(str(error)))
        page.goto(made.address + path + fragment)
        page.locator(READY).first.wait_for(state="attached")
        return made

    yield open_page
    try:
        for one in opened:
            elsewhere = [url for url in one.requests if not url.startswith((one.address, "blob:" + one.address))]
            assert elsewhere == []
            assert one.page.evaluate("window.violations") == []
            wrong = [line for line in one.console if not any(part in line for part in one.expected)]
            assert wrong == []
    finally:
        for context in contexts:
            context.close()


@pytest.fixture(scope="session")
def minilm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server over MiniLM in one process."""
    named = os.environ.get(REPOSITORY)
    repository = Path(named) if named else request.getfixturevalue("minilm_repository")
    with serve(repository, tmp_path_factory.mktemp("minilm-browser"), "--isolation", "none") as running:
        yield running


@pytest.fixture(scope="session")
def tiny_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny`, versions 1 and 2; `plain`, which takes tensors alone; `classifier`, whose labels have hostile names."""
    files = write_tiny_files(tmp_path_factory.mktemp("tiny"))
    root = write_tiny_repository(tmp_path_factory.mktemp("repository"), files)
    head = HeadSpec(kind="sequence_labels", outputs=("logits",), labels=LABELS)
    write_labelled(root, tmp_path_factory.mktemp("classifier"), "classifier", head, {"logits": (3, "sum")})
    return root


@pytest.fixture(scope="session")
def tiny(tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server over `tiny_repository` in one process."""
    flags = ("--isolation", "none", "--instances", "1")
    with serve(tiny_repository, tmp_path_factory.mktemp("tiny-browser"), *flags) as running:
        yield running


@pytest.fixture(scope="session")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server over `translator`, which takes two texts, `clip`, a text and an image, and `vision`, an image."""
    folder = tmp_path_factory.mktemp("sides")
    tokenizer = folder / "tokenizer.json"
    tiny_tokenizer().save(str(tokenizer))
    models = {
        "translator": (encoder_decoder(len(VOCABULARY)), ["--pair-start", "[SEP]"]),
        "clip": (words_over_patches(len(VOCABULARY), leading=1), []),
        "vision": (patches_alone(), None),
    }
    for name, (graph, options) in models.items():
        line = [command("attnserve-server"), "prepare", str(saved(graph, folder / f"{name}.onnx")), "--name", name]
        line += ["--repository", str(folder / "models")]
        line += [] if options is None else ["--tokenizer", str(tokenizer), *options]
        done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
    with serve(folder / "models", folder, "--isolation", "none", "--instances", "1") as running:
        yield running
