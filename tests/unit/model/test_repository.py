"""The repository: found and broken bundles, and atomic writes.

A repository is a folder of bundles, `<name>/<version>/`, each with a manifest that lists its files and digests. An
unknown name raises ModelNotFound. A bundle that was changed, or cannot be written, raises BundleInvalid.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from attnserve_server.domain.errors import ModelNotFound
from attnserve_server.model import repository as room
from attnserve_server.model.holding import held, verify
from attnserve_server.model.manifest import CheckReport, InputSpec, Manifest, OutputSpec, Provenance
from attnserve_server.model.repository import (
    MANIFEST_FILE,
    MODEL_FILE,
    TOKENIZER_FILE,
    UNSEALED,
    Bundle,
    BundleInvalid,
    Repository,
    digest_of,
    write_atomically,
    write_bundle,
)
from made_by_hand import proved


def manifest(name: str = "ranker", version: str = "1") -> Manifest:
    return Manifest(
        name=name,
        version=version,
        digest=UNSEALED,
        files={},
        precision="fp32",
        max_batch_size=4,
        axes=(),
        inputs=(InputSpec(name="x", dtype="float32", shape=(3,)),),
        outputs=(OutputSpec(name="y", dtype="float32", shape=(3,)),),
        provenance=Provenance(source="test", exporter="test", opset=23, created="2026-01-01T00:00:00+00:00"),
        check=CheckReport(
            against="nothing",
            lengths=(1,),
            output_max_abs_error=0,
            output_tolerance=0,
            weight_max_abs_error=0,
            weight_tolerance=0,
            row_sum_max_abs_error=0,
        ),
        certificate=proved(),
    )


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "graph").write_bytes(b"a graph" * 1000)
    (folder / "tokens").write_text("{}", encoding="utf-8")
    return {MODEL_FILE: folder / "graph", TOKENIZER_FILE: folder / "tokens"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def bundle(root: Path, sources: dict[str, Path]) -> Bundle:
    return write_bundle(root, manifest(), sources)


def rewrite(bundle: Bundle, **changes: object) -> None:
    path = bundle.path / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def test_written_bundle_is_found_and_verified(root: Path, bundle: Bundle, sources: dict[str, Path]) -> None:
    found, faults = Repository(root).bundles()
    assert found == [bundle]
    assert faults == []
    verify(found[0])
    assert found[0].path == root / "ranker" / "1"
    assert found[0].model_path.read_bytes() == sources[MODEL_FILE].read_bytes()
    assert found[0].tokenizer_path == root / "ranker" / "1" / TOKENIZER_FILE
    assert found[0].manifest.digest == digest_of(found[0].manifest.files)


def test_bundle_without_tokenizer_has_no_tokenizer_path(root: Path, sources: dict[str, Path]) -> None:
    assert write_bundle(root, manifest(), {MODEL_FILE: sources[MODEL_FILE]}).tokenizer_path is None


def test_digest_is_that_of_sorted_names_and_hashes() -> None:
    one, two = "1" * 64, "2" * 64
    assert digest_of({"b": two, "a": one}) == digest_of({"a": one, "b": two})
    assert digest_of({"a": one, "b": two}) != digest_of({"a": two, "b": one})


def test_highest_version_is_the_latest_by_number(root: Path, sources: dict[str, Path]) -> None:
    for version in ("2", "10", "9"):
        write_bundle(root, manifest(version=version), sources)
    repository = Repository(root)
    assert repository.bundle("ranker").manifest.version == "10"
    assert repository.bundle("ranker", "9").manifest.version == "9"
    assert repository.next_version("ranker") == "11"
    assert [found.manifest.version for found in repository.bundles()[0]] == ["2", "9", "10"]


def test_first_version_is_one(root: Path) -> None:
    assert Repository(root).next_version("ranker") == "1"
    assert Repository(root).free_version("ranker") == "1"


def test_missing_root_has_no_bundles(root: Path) -> None:
    assert Repository(root).bundles() == ([], [])


@pytest.mark.parametrize(
    ("name", "version"),
    [("other", ""), ("ranker", "2"), ("../ranker", ""), ("ranker", "../1"), ("ranker/1", ""), ("", ""), (".", ""),
     ("ranker\0", ""), ("ranker\n", ""), ("ranker", "01"), ("ranker", "0"), ("ranker", "-1"), ("ranker", "1\n")],
)  # fmt: skip
def test_unknown_and_invalid_names_are_not_found(root: Path, bundle: Bundle, name: str, version: str) -> None:
    with pytest.raises(ModelNotFound):
        Repository(root).bundle(name, version)


def test_stray_entries_are_ignored(root: Path, bundle: Bundle) -> None:
    (root / "README.md").write_text("models", encoding="utf-8")
    (root / ".git").mkdir()
    (root / "lost+found").mkdir()
    (root / "ranker" / "latest").mkdir()
    (root / "ranker" / "notes.txt").write_text("", encoding="utf-8")
    (root / "ranker" / ".2.abc.partial").mkdir()
    (root / "ranker" / "0").mkdir()
    (root / "empty").mkdir()
    assert Repository(root).bundles() == ([bundle], [])


BREAKAGES = {
    "no manifest": lambda bundle: (bundle.path / MANIFEST_FILE).unlink(),
    "truncated manifest": lambda bundle: os.truncate(bundle.path / MANIFEST_FILE, 100),
    "empty manifest": lambda bundle: os.truncate(bundle.path / MANIFEST_FILE, 0),
    "unknown format": lambda bundle: rewrite(bundle, format=3),
    "unknown field": lambda bundle: rewrite(bundle, favourite_colour="blue"),
    "another model's": lambda bundle: rewrite(bundle, name="other"),
    "another version's": lambda bundle: rewrite(bundle, version="7"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_broken_bundle_is_reported_and_the_others_are_found(
    breakage: str, root: Path, bundle: Bundle, sources: dict[str, Path]
) -> None:
    whole = write_bundle(root, manifest(name="whole"), sources)
    BREAKAGES[breakage](bundle)
    found, faults = Repository(root).bundles()
    assert found == [whole]
    assert [(fault.name, fault.version) for fault in faults] == [("ranker", "1")]
    assert str(root) not in faults[0].why
    with pytest.raises(BundleInvalid, match="ranker/1"):
        Repository(root).bundle("ranker")


def test_huge_manifest_is_not_read(root: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MAX_MANIFEST_BYTES", 10)
    (fault,) = Repository(root).bundles()[1]
    assert "exceed 10" in fault.why


def test_symbolic_links_are_refused_at_every_level(root: Path, bundle: Bundle, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(root / "ranker", elsewhere)
    (root / "ranker" / "2").symlink_to(elsewhere / "1")
    (root / "linked").symlink_to(elsewhere)
    assert [(fault.name, fault.version) for fault in Repository(root).bundles()[1]] == [
        ("linked", "1"),
        ("ranker", "2"),
    ]
    manifest_path = bundle.path / MANIFEST_FILE
    manifest_path.rename(tmp_path / "real.json")
    manifest_path.symlink_to(tmp_path / "real.json")
    with pytest.raises(BundleInvalid, match=r"manifest\.json is a symbolic link"):
        Repository(root).bundle("ranker", "1")


def tamper(bundle: Bundle) -> None:
    content = bytearray(bundle.model_path.read_bytes())
    content[50] ^= 1
    bundle.model_path.write_bytes(content)


def link(bundle: Bundle) -> None:
    target = bundle.path.parents[2] / "model-elsewhere"
    bundle.model_path.rename(target)
    bundle.model_path.symlink_to(target)


def climb(bundle: Bundle) -> None:
    rewrite(bundle, files={**bundle.manifest.files, "../secret": "0" * 64})


def hardlink(bundle: Bundle) -> None:
    os.link(bundle.model_path, bundle.path.parents[2] / "model-elsewhere")


def pipe(bundle: Bundle) -> None:
    bundle.model_path.unlink()
    os.mkfifo(bundle.model_path)


TAMPERINGS = {
    "one bit": (tamper, r"model\.onnx: sha256"),
    "truncated": (lambda bundle: os.truncate(bundle.model_path, 10), r"model\.onnx: sha256"),
    "missing": (lambda bundle: bundle.model_path.unlink(), r"model\.onnx: No such file"),
    "a link": (link, r"model\.onnx is a symbolic link"),
    "a hard link": (hardlink, r"model\.onnx has 2 hard links, .*; copy the file, or write the bundle again"),
    "a pipe": (pipe, r"model\.onnx is no regular file"),
    "unlisted data": (lambda bundle: (bundle.path / "weights.bin").touch(), r"'weights\.bin' is not listed"),
    "a name that climbs": (climb, r"manifest\.json: files"),
    "digest": (lambda bundle: rewrite(bundle, digest=UNSEALED), "digest"),
    "no model": (lambda bundle: rewrite(bundle, files={}), r"model\.onnx is not listed"),
}


@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_changed_files_do_not_verify(tampering: str, root: Path, bundle: Bundle) -> None:
    change, words = TAMPERINGS[tampering]
    verify(bundle)
    change(bundle)
    with pytest.raises(BundleInvalid, match=words) as refusal:
        verify(Repository(root).bundle("ranker"))
    assert str(root) not in str(refusal.value)
    with pytest.raises(BundleInvalid, match=words), held(Repository(root).bundle("ranker")):
        pytest.fail("it is held")


def test_held_files_stay_those_of_the_manifest_when_the_folder_changes(bundle: Bundle) -> None:
    before = {name: (bundle.path / name).read_bytes() for name in bundle.manifest.files}
    with held(bundle) as copy:
        tamper(bundle)
        os.truncate(bundle.path / "tokenizer.json", 3)
        assert {name: (copy.path / name).read_bytes() for name in before} == before
        folder = copy.path
        assert folder.stat().st_mode & 0o077 == 0, "no other user reads or changes it"
    assert not folder.exists()


@pytest.mark.parametrize("during", [False, True], ids=["unchanged", "changed while it is loaded"])
def test_without_a_temporary_folder_a_bundle_is_verified_before_and_after(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, during: bool
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(bundle.path / "nowhere"))
    held_now = held(bundle)
    assert held_now.__enter__() == bundle
    if during:
        tamper(bundle)
        with pytest.raises(BundleInvalid, match=r"model\.onnx: sha256"):
            held_now.__exit__(None, None, None)
    else:
        held_now.__exit__(None, None, None)


def test_external_weights_need_a_temporary_folder(
    root: Path, sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = write_bundle(root, manifest(name="large"), {**sources, "weights.data": sources["model.onnx"]})
    with held(bundle):
        pass
    monkeypatch.setattr(tempfile, "tempdir", str(root / "nowhere"))
    with (
        pytest.raises(BundleInvalid, match=r"temporary folder: No such file .*; give it \d+ bytes, or set TMPDIR"),
        held(bundle),
    ):
        pytest.fail("it is held")


def test_removed_folder_does_not_verify(root: Path, bundle: Bundle) -> None:
    shutil.rmtree(bundle.path)
    with pytest.raises(BundleInvalid, match="its folder cannot be read"):
        verify(bundle)


def test_versions_are_never_overwritten(root: Path, bundle: Bundle, sources: dict[str, Path]) -> None:
    with pytest.raises(BundleInvalid, match="never overwritten"):
        write_bundle(root, manifest(), sources)
    with pytest.raises(BundleInvalid, match="never overwritten"):
        Repository(root).free_version("ranker", "1")
    verify(Repository(root).bundle("ranker"))


def test_failed_write_leaves_nothing(root: Path, sources: dict[str, Path]) -> None:
    with pytest.raises(BundleInvalid, match="could not be written: No such file"):
        write_bundle(root, manifest(), {**sources, TOKENIZER_FILE: sources[TOKENIZER_FILE].with_name("missing")})
    assert list(root.iterdir()) == []


def test_bundle_is_invisible_until_it_is_whole(
    root: Path, sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[Bundle], list[room.BundleFault]]] = []
    real = room._sync

    def look(path: Path) -> None:
        if path != root / "ranker":  # this one is flushed after the rename
            seen.append(Repository(root).bundles())
        real(path)

    monkeypatch.setattr(room, "_sync", look)
    write_bundle(root, manifest(), sources)
    assert len(seen) == 4
    assert all(sight == ([], []) for sight in seen)
    assert len(Repository(root).bundles()[0]) == 1


def test_root_that_is_a_file_is_reported(tmp_path: Path, sources: dict[str, Path]) -> None:
    (tmp_path / "models").write_text("", encoding="utf-8")
    with pytest.raises(BundleInvalid, match="could not be written"):
        write_bundle(tmp_path / "models", manifest(), sources)


def test_a_file_is_replaced_in_a_folder_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "ports.json"
    place.write_text("old")
    opened = os.open

    def refuse_folders(path: Path, flags: int) -> int:
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags)

    monkeypatch.setattr(room.os, "open", refuse_folders)
    with write_atomically(place) as partial:
        partial.write_bytes(b"new")
    monkeypatch.undo()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("ports.json", "new")]


def test_the_folder_of_a_new_version_is_flushed_after_the_rename(
    root: Path, sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[str, bool]] = []
    sync = room._sync

    def record(path: Path) -> None:
        flushed.append((path.name, (root / "ranker" / "1").exists()))
        sync(path)

    monkeypatch.setattr(room, "_sync", record)
    write_bundle(root, manifest(), sources)
    assert flushed[-1] == ("ranker", True)
    assert not any(renamed for _, renamed in flushed[:-1])
