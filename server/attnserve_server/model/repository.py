"""The repository: bundles as folders, `<root>/<name>/<version>/`. Reads, verifies and writes them; knows no runtime.

A bundle appears whole or not at all: it is written into a hidden folder beside its place and renamed into it. What is
in the root without being a bundle (files, hidden folders, names and versions that cannot be) is ignored; what is a
bundle and broken is reported, and hinders no other.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from attnserve_server.domain.errors import AttnserveError, ModelNotFound
from attnserve_server.model.manifest import Manifest, is_model_name, is_model_version

MODEL_FILE = "model.onnx"
TOKENIZER_FILE = "tokenizer.json"
MANIFEST_FILE = "manifest.json"
MAX_MANIFEST_BYTES = 16 * 2**20
"""A manifest of a thousand sites is some hundred kilobytes; more than this is no manifest."""
UNSEALED = "sha256:" + "0" * 64
"""The digest of a manifest whose files are not written yet."""

_TAKEN = "there is such a version already; versions are never overwritten"


class BundleInvalid(AttnserveError):
    """A bundle is broken, or cannot be written. The message names it as name/version, never by a path."""

    reason = "BUNDLE_INVALID"

    def __init__(self, name: str, version: str, why: str) -> None:
        self.name, self.version, self.why = name, version, why
        super().__init__(f"bundle {name}/{version}: {why}")

    def metadata(self) -> dict[str, str]:
        """Which bundle."""
        return {"model": self.name, "version": self.version}


@dataclass(frozen=True, slots=True)
class BundleFault:
    """A folder in the place of a bundle that is none, and why."""

    name: str
    version: str
    why: str


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose manifest was read. Its files are trusted only after `verify`."""

    path: Path
    manifest: Manifest

    @property
    def model_path(self) -> Path:
        """The graph."""
        return self.path / MODEL_FILE

    @property
    def tokenizer_path(self) -> Path | None:
        """The tokenizer; None for models that take tensors only."""
        return self.path / TOKENIZER_FILE if TOKENIZER_FILE in self.manifest.files else None


class Repository:
    """The bundles under one root. Holds no state: every call looks at the disk."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def bundles(self) -> tuple[list[Bundle], list[BundleFault]]:
        """All bundles by name and then version, and those that are broken. Reads manifests, not models."""
        found: list[Bundle] = []
        faults: list[BundleFault] = []
        for name in sorted(entry.name for entry in _folders(self._root) if is_model_name(entry.name)):
            for version in self._versions(name):
                try:
                    found.append(self._read(name, version))
                except BundleInvalid as fault:
                    faults.append(BundleFault(name, version, fault.why))
        return found, faults

    def bundle(self, name: str, version: str = "") -> Bundle:
        """The bundle of this name and version; of the highest version if that is empty.

        Raises:
            ModelNotFound: there is none, or the name or version cannot be one (no file is opened for it).
            BundleInvalid: it is broken. A broken highest version does not fall back to an older one unasked.
        """
        if not is_model_name(name) or (version and not is_model_version(version)):
            raise ModelNotFound(name, version)
        versions = self._versions(name)
        if not versions or (version and version not in versions):
            raise ModelNotFound(name, version)
        return self._read(name, version or versions[-1])

    def free_version(self, name: str, version: str = "") -> str:
        """The version under which to write a new bundle: the one that is wished for, or the next one.

        Raises:
            BundleInvalid: there is such a version already.
        """
        place = self._root / name / version
        if version and (place.exists() or place.is_symlink()):
            raise BundleInvalid(name, version, _TAKEN)
        return version or self.next_version(name)

    def next_version(self, name: str) -> str:
        """One more than the highest version, broken ones counted; "1" where there is none."""
        versions = self._versions(name)
        return str(int(versions[-1]) + 1) if versions else "1"

    def _versions(self, name: str) -> list[str]:
        """Versions in ascending order, as numbers."""
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


def verify(bundle: Bundle) -> None:
    """Check every file of a bundle against its manifest: present, regular, unchanged; and nothing beside them.

    A file that the manifest does not list may be data that the graph would read unchecked, so it is refused.

    Raises:
        BundleInvalid: says which file, and what is wrong with it.
    """
    manifest = bundle.manifest
    files = manifest.files

    def fault(why: str) -> BundleInvalid:
        return BundleInvalid(manifest.name, manifest.version, why)

    if MODEL_FILE not in files:
        raise fault(f"{MODEL_FILE} is not listed in {MANIFEST_FILE}")
    try:
        unknown = sorted({entry.name for entry in bundle.path.iterdir()} - {*files, MANIFEST_FILE})
    except OSError as why:
        raise fault(f"its folder cannot be read: {why.strerror}") from None
    if unknown:
        raise fault(f"{unknown[0]!r} is not listed in {MANIFEST_FILE}")
    for name, expected in files.items():
        try:
            _regular_size(bundle.path / name)
            found = sha256_of(bundle.path / name)
        except ValueError as why:
            raise fault(str(why)) from None
        except OSError as why:
            raise fault(f"{name}: {why.strerror}") from None
        if found != expected:
            raise fault(f"{name}: sha256 {found} is not the {expected} of {MANIFEST_FILE}")
    if digest_of(files) != manifest.digest:
        raise fault(f"digest {manifest.digest} is not that of its files, {digest_of(files)}")


def write_bundle(root: Path, manifest: Manifest, files: Mapping[str, Path]) -> Bundle:
    """Write a bundle into the repository, whole or not at all.

    Args:
        root: the repository's root; made if it is not there.
        manifest: the manifest, whose `files` and `digest` (see `UNSEALED`) are filled in here.
        files: where to copy each file from, by its name in the bundle.

    Raises:
        BundleInvalid: there is such a version already, or the disk refused.
    """
    name, version = manifest.name, manifest.version
    home = root / name
    place = home / version
    if place.exists() or place.is_symlink():
        raise BundleInvalid(name, version, _TAKEN)
    partial: Path | None = None
    try:
        home.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{version}.", suffix=".partial", dir=home))
        digests: dict[str, str] = {}
        for file, source in files.items():
            shutil.copyfile(source, partial / file)
            digests[file] = sha256_of(partial / file)
        sealed = manifest.model_copy(update={"files": digests, "digest": digest_of(digests)})
        (partial / MANIFEST_FILE).write_text(sealed.model_dump_json(indent=2) + "\n", encoding="utf-8")
        for written in partial.iterdir():
            written.chmod(0o644)
            _sync(written)
        partial.chmod(0o755)
        _sync(partial)
        partial.rename(place)
        _sync(home)
    except OSError as fault:
        raise BundleInvalid(name, version, f"could not be written: {fault.strerror}") from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        _remove_if_empty(home)
    return Bundle(place, sealed)


def digest_of(files: Mapping[str, str]) -> str:
    """The digest of a bundle: sha256 over the sorted lines "name sha256", each ended by a newline."""
    lines = "".join(f"{name} {sha256}\n" for name, sha256 in sorted(files.items()))
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folders(path: Path) -> list[Path]:
    """Folders and links in a folder; nothing where there is no such folder."""
    try:
        return [entry for entry in path.iterdir() if entry.is_symlink() or entry.is_dir()]
    except OSError:
        return []


def _regular_size(path: Path) -> int:
    """The size of a regular file, in bytes. Raises ValueError, naming the file alone, if it is not one."""
    try:
        status = path.lstat()
    except OSError as fault:
        raise ValueError(f"{path.name}: {fault.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "no regular file"
        raise ValueError(f"{path.name} is {kind}")
    return status.st_size


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk, so that the rename cannot come before its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_if_empty(path: Path) -> None:
    """Take back the model's folder where the write that made it failed."""
    try:
        path.rmdir()
    except OSError:
        return
