"""The examples run against a server in this process.

Needs no more than the checkout: the models are the tiny text model and a graph of words over an image. An example
without a test fails the last one.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from attnserve_server.app import Application
from attnserve_server.config import Settings
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from onnx_files import saved
from tiny_bundle import VOCABULARY, write_tiny_files, write_tiny_repository
from two_sided_graphs import IMAGE, words_over_patches

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = "the cat looked at a dog"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models `tiny`, of text, and `clip`, of a text over the patches of an image."""
    folder = tmp_path_factory.mktemp("examples")
    files = write_tiny_files(folder)
    write_tiny_repository(folder / "models", files)
    graph = saved(words_over_patches(len(VOCABULARY), leading=1), folder / "clip.onnx")
    prepare_bundle(
        PrepareRequest(file=graph, name="clip", repository=folder / "models", tokenizer=files["tokenizer.json"])
    )
    return folder / "models"


@pytest.fixture
async def target(repository: Path) -> AsyncIterator[str]:
    application = Application(Settings(repository=repository, grpc_port=0, http_port=0, instances=1))
    await application.start()
    yield f"127.0.0.1:{application.grpc_port}"
    await application.aclose()


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples.{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What an example printed, without the log lines of the server, which start with the year."""
    return [line for line in capsys.readouterr().out.splitlines() if not line[:4].isdecimal()]


async def run(name: str, *arguments: Any) -> None:
    main = example(name).main
    if inspect.iscoroutinefunction(main):
        await main(*arguments)
    else:
        await asyncio.to_thread(main, *arguments)


async def test_async_client_prints_an_embedding_of_each_text(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    await run("async_client", target, "tiny")
    lines = printed(capsys)
    assert len(lines) == 3
    assert all("8 dimensions, in a batch of" in line for line in lines)


async def test_stream_prints_the_invalid_text_and_the_most_similar_pair(
    target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    await run("stream", target, "tiny")
    failed, best = printed(capsys)
    assert failed.startswith("text 2 failed: ")
    assert best.startswith("most similar: ")
    assert sum(repr(text) in best for text in example("stream").TEXTS) == 2


async def test_attention_page_writes_a_page_and_prints_links(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "map.html"
    await run("attention_page", target, "tiny", TEXT, output)
    assert output.read_text(encoding="utf-8").startswith("<!doctype html>")
    *links, wrote = printed(capsys)
    assert len(links) == 5
    assert all(" looks at " in link for link in links)
    assert wrote == f"wrote {output}"


async def test_image_text_prints_a_patch_for_each_word(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = tmp_path / "image.npy"
    np.save(pixels, np.random.default_rng(0).normal(size=(3, *IMAGE)).astype(np.float32))
    await run("image_text", target, "clip", TEXT, pixels)
    lines = printed(capsys)
    assert [line.split()[0] for line in lines] == ["[CLS]", *TEXT.split(), "[SEP]"]
    assert all("row " in line and "column " in line for line in lines)


def test_every_example_but_the_demo_has_a_test_here() -> None:
    # `make demo` runs the demo, and test_readme_checkpoints.py the checkpoints.
    names = {path.stem for path in EXAMPLES.glob("*.py")} - {"demo", "tiny_checkpoints"}
    tested = Path(__file__).read_text(encoding="utf-8")
    assert names
    assert {name for name in names if f'run("{name}"' not in tested} == set()
