"""The repository: bundles as folders, `<root>/<name>/<version>/`. It loads no model.

A bundle is one converted model: its graph, its manifest and other files. A bundle is written to a hidden folder and
renamed, so that a reader finds the whole bundle or none. Entries that cannot be bundles (files, hidden folders, invalid
names and versions) are ignored. A broken bundle is reported, and the others load.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import ValidationError

from attnserve_server.domain.errors import AttnserveError, ModelNotFound
from attnserve_server.model.manifest import Manifest, is_model_name, is_model_version

MODEL_FILE = "model.onnx"
TOKENIZER_FILE = "tokenizer.json"
MANIFEST_FILE = "manifest.json"
MAX_MANIFEST_BYTES = 16 * 2**20
"""Maximum size of a manifest; one of a thousand sites has some hundred kilobytes."""
UNSEALED = "sha256:" + "0" * 64
"""The digest of a manifest whose files are not written yet."""

_TAKEN = "this version exists already; versions are never overwritten: choose another version"


class BundleInvalid(AttnserveError):
    """A bundle is broken, or cannot be written. The message names it as name/version and holds no path."""

    reason = "BUNDLE_INVALID"

    def __init__(self, name: str, version: str, why: str) -> None:
        self.name, self.version, self.why = name, version, why
        super().__init__(f"bundle {name}/{version}: {why}")

    def metadata(self) -> dict[str, str]:
        """The bundle's name and version."""
        return {"model": self.name, "version": self.version}


@dataclass(frozen=True, slots=True)
class BundleFault:
    """A folder in the place of a bundle that cannot be read as one, and why."""

    name: str
    version: str
    why: str


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose manifest was read. Its files may be used only as `holding.held`.

    Args:
        path: its folder.
        manifest: of its graph `graph`.
        graph: name of the file of that graph.
        descriptors: of its files, opened before, by their names; empty: they are read in its folder.
    """

    path: Path
    manifest: Manifest
    graph: str = MODEL_FILE
    descriptors: Mapping[str, int] = field(default_factory=dict, compare=False)

    def file(self, name: str) -> Path:
        """Return the path of one of its files, for this process."""
        return Path(f"/proc/self/fd/{self.descriptors[name]}") if name in self.descriptors else self.path / name

    def files_bytes(self) -> int:
        """Return the bytes of its files; those that cannot be read count nothing."""
        found = 0
        for name in self.manifest.files:
            with contextlib.suppress(OSError):
                found += self.file(name).stat().st_size
        return found

    @property
    def model_path(self) -> Path:
        """Path of the graph."""
        return self.file(self.graph)

    @property
    def continuing(self) -> Bundle | None:
        """The bundle with its continuing graph, which runs sequences with a past; None if it has none."""
        past, manifest = self.manifest.past, self.manifest.continuing
        return None if past is None or manifest is None else replace(self, manifest=manifest, graph=past.file)

    @property
    def tokenizer_path(self) -> Path | None:
        """Path of the tokenizer; None for a model that takes tensors only."""
        return self.path / TOKENIZER_FILE if TOKENIZER_FILE in self.manifest.files else None


class Repository:
    """The bundles under one root. It holds no state: every call reads the disk."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def bundles(self) -> tuple[list[Bundle], list[BundleFault]]:
        """Return all bundles, sorted by name and version, and the broken ones. Only manifests are read."""
        found: list[Bundle] = []
        faults: list[BundleFault] = []
        for name in sorted(entry.name for entry in _folders(self._root) if is_model_name(entry.name)):
            for version in self._versions(name):
                try:
                    found.append(self._read(name, version))
                except BundleInvalid as fault:
                    faults.append(BundleFault(name, version, fault.why))
        return found, faults

    def stamps(self) -> dict[tuple[str, str], object]:
        """Return, for each name and version, what changes when a file of its folder is written or replaced."""
        names = [entry.name for entry in _folders(self._root) if is_model_name(entry.name)]
        return {
            (name, version): _stamp(self._root / name / version) for name in names for version in self._versions(name)
        }

    def bundle(self, name: str, version: str = "") -> Bundle:
        """Return the bundle of this name and version; of the highest version if `version` is empty.

        Raises:
            ModelNotFound: there is none, or the name or version is invalid (no file is opened then).
            BundleInvalid: it is broken. A broken highest version does not fall back to an older one.
        """
        if not is_model_name(name) or (version and not is_model_version(version)):
            raise ModelNotFound(name, version)
        versions = self._versions(name)
        if not versions or (version and version not in versions):
            raise ModelNotFound(name, version)
        return self._read(name, version or versions[-1])

    def free_version(self, name: str, version: str = "") -> str:
        """Return the version for a new bundle: the given one, or the next one if `version` is empty.

        Raises:
            BundleInvalid: this version exists already.
        """
        place = self._root / name / version
        if version and (place.exists() or place.is_symlink()):
            raise BundleInvalid(name, version, _TAKEN)
        return version or self.next_version(name)

    def next_version(self, name: str) -> str:
        """Return one more than the highest version, broken ones included; "1" if there is none."""
        versions = self._versions(name)
        return str(int(versions[-1]) + 1) if versions else "1"

    def _versions(self, name: str) -> list[str]:
        """Versions in ascending numerical order."""
        entries = [entry.name for entry in _folders(self._root / name) if is_model_version(entry.name)]
        return sorted(entries, key=int)

    def _read(self, name: str, version: str) -> Bundle:
        path = self._root / name / version
        if (self._root / name).is_symlink() or path.is_symlink():
            raise BundleInvalid(name, version, "a symbolic link stands in the place of its folder")
        manifest_path = path / MANIFEST_FILE
        try:
            size = _regular_size(manifest_path)
        except ValueError as fault:
            raise BundleInvalid(name, version, str(fault)) from None
        if size > MAX_MANIFEST_BYTES:
            raise BundleInvalid(name, version, f"{MANIFEST_FILE}: {size} bytes exceed {MAX_MANIFEST_BYTES}")
        try:
            manifest = Manifest.model_validate_json(manifest_path.read_bytes())
        except ValidationError as fault:
            first = fault.errors(include_url=False, include_input=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            raise BundleInvalid(
                name, version, f"{MANIFEST_FILE}: {place + ': ' if place else ''}{first['msg']}"
            ) from None
        except OSError as fault:
            raise BundleInvalid(name, version, f"{MANIFEST_FILE}: {fault.strerror}") from None
        if (manifest.name, manifest.version) != (name, version):
            raise BundleInvalid(name, version, f"{MANIFEST_FILE} is that of {manifest.name}/{manifest.version}")
        return Bundle(path, manifest)


def write_bundle(root: Path, manifest: Manifest, files: Mapping[str, Path]) -> Bundle:
    """Write a bundle into the repository, whole or not at all.

    Args:
        root: the repository's root; created if it does not exist.
        manifest: the manifest; its `files` and `digest` (see `UNSEALED`) are set here.
        files: the path to copy each file from, by its name in the bundle.

    Returns:
        The bundle as it was written.

    Raises:
        BundleInvalid: this version exists already, or the file system refused the write.
    """
    name, version = manifest.name, manifest.version
    home = root / name
    place = home / version
    if place.exists() or place.is_symlink():
        raise BundleInvalid(name, version, _TAKEN)
    try:
        home.mkdir(parents=True, exist_ok=True)
        with write_atomically(place) as partial:
            partial.mkdir(mode=0o700)
            digests: dict[str, str] = {}
            for file, source in files.items():
                shutil.copyfile(source, partial / file)
                digests[file] = sha256_of(partial / file)
            sealed = manifest.model_copy(update={"files": digests, "digest": digest_of(digests)})
            (partial / MANIFEST_FILE).write_text(sealed.model_dump_json(indent=2) + "\n", encoding="utf-8")
            for written in partial.iterdir():
                written.chmod(0o644)
            partial.chmod(0o755)
        _sync(home)
    except OSError as fault:
        raise BundleInvalid(name, version, f"could not be written: {fault.strerror}") from None
    finally:
        _remove_if_empty(home)
    return Bundle(place, sealed)


@contextmanager
def write_atomically(place: Path) -> Iterator[Path]:
    """Write a file or a folder so that a reader of `place` gets the whole content or none.

    The content is flushed to the disk before it is renamed. If the body or the rename fails, it is removed. The folder
    of `place` is not flushed, so it need not be readable; a crash right after the rename may undo the rename.

    Args:
        place: the final path. An existing file is replaced; an existing folder that is not empty makes the rename fail.

    Yields:
        A hidden path in the same folder, where nothing exists yet, to write the content to.

    Raises:
        OSError: the file system refused the write.
    """
    partial = place.with_name(f".{place.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        for written in partial.iterdir() if partial.is_dir() else ():
            _sync(written)
        _sync(partial)
        partial.replace(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def digest_of(files: Mapping[str, str]) -> str:
    """Return the digest of a bundle: sha256 over the sorted lines "name sha256", each with a newline."""
    lines = "".join(f"{name} {sha256}\n" for name, sha256 in sorted(files.items()))
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folders(path: Path) -> list[Path]:
    """Folders and symbolic links in a folder; empty if the folder does not exist."""
    try:
        return [entry for entry in path.iterdir() if entry.is_symlink() or entry.is_dir()]
    except OSError:
        return []


def _stamp(folder: Path) -> object:
    """Return times, sizes and inodes of a folder's files."""
    found = []
    try:
        for entry in sorted(os.scandir(folder), key=lambda one: one.name):
            facts = entry.stat(follow_symlinks=False)
            found.append((entry.name, facts.st_mtime_ns, facts.st_size, facts.st_ino))
    except OSError:
        return None
    return tuple(found)


def _regular_size(path: Path) -> int:
    """The size of a regular file, in bytes. Raises ValueError, with the file's name only, for anything else."""
    try:
        status = path.lstat()
    except OSError as fault:
        raise ValueError(f"{path.name}: {fault.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "no regular file"
        raise ValueError(f"{path.name} is {kind}")
    return status.st_size


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk, so that a rename cannot reach the disk before the content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_if_empty(path: Path) -> None:
    """Remove the model's folder if the write that created it failed."""
    try:
        path.rmdir()
    except OSError:
        return
