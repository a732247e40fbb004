"""What changes on the disk after a bundle was loaded reaches no answer, also where the runtime maps external weights.

The tiny model, with its weights in a file beside the graph. A file that does not match its digest raises BundleInvalid.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from attnserve_server.config import Settings
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.loading import open_bundle
from attnserve_server.model.holding import KeptFiles, content_of
from attnserve_server.model.repository import Bundle, BundleInvalid, Repository, write_bundle
from tiny_bundle import tiny_manifest, write_tiny_files

DATA = "weights.data"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    files = write_tiny_files(tmp_path)
    external = tmp_path / "external" / "model.onnx"
    external.parent.mkdir()
    model = onnx.load(files["model.onnx"])
    onnx.save(model, external, save_as_external_data=True, location=DATA, size_threshold=128)
    files |= {"model.onnx": external, DATA: external.with_name(DATA)}
    return write_bundle(tmp_path / "repository", tiny_manifest(), files)


def answer(session: RuntimeSession) -> np.ndarray:
    ids = np.array([[2, 4, 5, 3]], np.int64)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feeds |= {f"attention_items.layer{layer}": np.zeros(0, np.int64) for layer in range(2)}
    return session.run(feeds, ["embedding"])[0]


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def overwrite(path: Path) -> None:
    """Change a file in place, as `cp` onto it does: its inode stays."""
    with path.open("r+b") as file:
        file.write(np.full(path.stat().st_size // 4, 2.0, np.float32).tobytes())


@pytest.mark.parametrize(
    "change", [overwrite, lambda path: os.truncate(path, 0), Path.unlink], ids=["overwritten", "cut", "gone"]
)
@pytest.mark.parametrize("wide_threads", [1, 2], ids=["one session", "two that share weights"])
def test_answers_stay_those_of_the_files_that_were_loaded(bundle: Bundle, change, wide_threads: int) -> None:
    settings = Settings(provider="cpu", wide_threads=wide_threads)
    opened = open_bundle(bundle, settings)
    sessions = [*opened.sessions, *([opened.wide] if opened.wide else [])]
    assert len(sessions) == wide_threads
    before = [answer(session) for session in sessions]
    change(bundle.path / DATA)
    for session, expected in zip(sessions, before, strict=True):
        np.testing.assert_array_equal(answer(session), expected)
    assert opened.bundle.path == bundle.path, "costs are written beside the bundle"
    with pytest.raises(BundleInvalid, match=DATA):
        open_bundle(Repository(bundle.path.parents[1]).bundle("tiny"), settings)


def test_control_a_session_on_the_file_itself_answers_from_what_is_there_now(bundle: Bundle) -> None:
    session = RuntimeSession.load(bundle.model_path, provider="cpu")
    before = answer(session)
    overwrite(bundle.path / DATA)
    assert np.abs(answer(session) - before).max() > 1e-3, "the runtime maps the file"


@pytest.mark.parametrize("wide_threads", [1, 2], ids=["one session", "two that share weights"])
def test_kept_files_are_loaded_after_others_took_their_place(bundle: Bundle, wide_threads: int) -> None:
    settings = Settings(provider="cpu", wide_threads=wide_threads)
    expected = answer(open_bundle(bundle, settings).sessions[0])
    kept = KeptFiles(bundle)
    try:
        moved = bundle.path.rename(bundle.path.with_name(".old"))
        bundle.path.mkdir()
        for name in bundle.manifest.files:
            (moved / name).unlink()
            (bundle.path / name).write_bytes(b"others")
        with pytest.raises(BundleInvalid):  # the control
            open_bundle(bundle, settings)
        opened = open_bundle(kept.bundle, settings)
        np.testing.assert_array_equal(answer(opened.sessions[0]), expected)
        assert kept.bundle == bundle
    finally:
        kept.close()


def test_kept_files_that_are_written_in_place_are_refused(bundle: Bundle) -> None:
    kept = KeptFiles(bundle)
    try:
        overwrite(bundle.path / DATA)
        with pytest.raises(BundleInvalid, match=f"{DATA}: sha256"):
            open_bundle(kept.bundle, Settings(provider="cpu"))
    finally:
        kept.close()


def test_kept_files_are_read_from_their_beginning_each_time_and_closed_once(bundle: Bundle) -> None:
    before = open_descriptors()
    kept = KeptFiles(bundle)
    assert open_descriptors() == before + len(bundle.manifest.files)
    assert content_of(kept.bundle, DATA) == content_of(kept.bundle, DATA) == (bundle.path / DATA).read_bytes()
    kept.close()
    kept.close()
    assert open_descriptors() == before


def test_a_bundle_with_a_missing_file_is_not_kept_and_leaves_nothing_open(bundle: Bundle) -> None:
    before = open_descriptors()
    (bundle.path / "tokenizer.json").unlink()
    with pytest.raises(BundleInvalid, match=r"tokenizer\.json: No such file"):
        KeptFiles(bundle)
    assert open_descriptors() == before
