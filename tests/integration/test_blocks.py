"""Every code block of the pages runs here as it is written, or is marked with the reason why not.

Needs torch, bash and curl. A page's blocks run in order, in one folder. Servers are real ones: of the demo's model, of
small models for single examples, and those that a page starts. docs/blocks.py has the marks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from attnserve_server.model.heads import HeadSpec
from cache_graphs import CachedDecoder
from doc_scripts import blocks
from labelled_models import write_labelled
from onnx_files import saved
from page_runs import LEAST_MODELS, PageRun, alike, logical_lines, prepared
from serving import RunningServer, serve
from tiny_bundle import VOCABULARY, tiny_tokenizer
from two_sided_graphs import encoder_decoder, words_over_patches

pytestmark = [pytest.mark.torch, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
HEADS = {
    "sentiment": ("sequence_labels", ("logits",), ("negative", "positive"), {"logits": (2, "sum")}),
    "reranker": ("sequence_labels", ("logits",), ("LABEL_0",), {"logits": (1, "sum")}),
    "ner": ("token_labels", ("logits",), ("O", "PLACE", "NAME"), {"logits": (3, "each")}),
    "qa": ("spans", ("start_logits", "end_logits"), (), {"start_logits": (1, "flat"), "end_logits": (1, "flat")}),
}


def runnable() -> dict[str, list[blocks.Block]]:
    """Return the blocks of each page that has one to run, compare or parse."""
    found: dict[str, list[blocks.Block]] = {}
    for block in blocks.blocks():
        found.setdefault(block.page, []).append(block)
    done = ("runs", "compared", "parsed")
    return {page: of for page, of in found.items() if any(block.fate in done for block in of)}


PAGES = runnable()


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models that single examples name: heads, an image with a text, a pair of texts, a cache."""
    folder = tmp_path_factory.mktemp("examples")
    root = folder / "models"
    for name, (kind, outputs, labels, widths) in HEADS.items():
        (folder / name).mkdir()
        activation = {"activation": "identity"} if len(labels) == 1 else {}
        head = HeadSpec(kind=kind, outputs=outputs, labels=labels, **activation)
        write_labelled(root, folder / name, name, head, widths)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    graphs = {
        "clip": words_over_patches(len(VOCABULARY), leading=1),
        "translator": encoder_decoder(len(VOCABULARY)),
        "decoder": CachedDecoder().model(),
    }
    for name, graph in graphs.items():
        tokenizer = None if name == "decoder" else folder / "tokenizer.json"
        file = saved(graph, folder / f"{name}.onnx")
        prepare_bundle(PrepareRequest(file=file, name=name, repository=root, tokenizer=tokenizer, fuse=False))
    return root


@pytest.fixture(scope="module")
def shared(
    minilm_server: RunningServer, examples: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], RunningServer | None]]:
    """Servers that pages only read, started by the first page that needs them."""
    with contextlib.ExitStack() as stack:
        started = {LEAST_MODELS: minilm_server}

        def find(repository: str) -> RunningServer | None:
            if repository == "examples" and repository not in started:
                folder = tmp_path_factory.mktemp("examples-server")
                started[repository] = stack.enter_context(serve(examples, folder))
            only_minilm = repository != LEAST_MODELS or len(list(Path(repository).iterdir())) == 1
            return started.get(repository) if only_minilm else None

        yield find


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(
    page: str,
    shared: Callable[[str], RunningServer | None],
    minilm_repository: Path,
    examples: Path,
    tmp_path: Path,
) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    prepared(tmp_path, text, minilm_repository, examples)
    PageRun(tmp_path, shared).run(PAGES[page])


def test_failing_blocks_are_found(shared: Callable[[str], RunningServer | None], tmp_path: Path) -> None:
    """The control: a block that raises, a command that fails, and an output that differs."""
    (tmp_path / LEAST_MODELS / "minilm").mkdir(parents=True)
    block = "```{}\n{}\n```\n"
    cases = [
        (block.format("python", "1 / 0"), "page:1: division by zero"),
        (block.format("bash", "attnserve models none"), "page:1: attnserve models none: exit code"),
        (block.format("bash", "echo 1.5 a") + "\n" + block.format("output", "1.6 a"), "page:5: the page shows"),
    ]
    for number, (text, message) in enumerate(cases):
        (tmp_path / str(number)).mkdir()
        with pytest.raises(AssertionError, match=message):
            PageRun(tmp_path, shared).run(list(blocks.blocks_of(text, "page")))


def test_commands_are_joined_where_bash_joins_them() -> None:
    text = "one \\\n  two  # a comment\n\ncurl '{\n  \"a\": 1}'\nthree\n"
    assert list(logical_lines(text)) == ["one \\\n  two  # a comment", "curl '{\n  \"a\": 1}'", "three"]


def test_outputs_are_alike_up_to_small_differences_of_numbers() -> None:
    assert alike("a  0.350\nb", "x\na 0.351\nb\nc")
    assert not alike("a 0.350", "a 0.36")
    assert not alike("a 8", "a 9")
    assert alike("a 0.5\n...\nb", "a 0.5\nmore\nb")
    assert not alike("b\n...\na", "a 0.5\nmore\nb")
