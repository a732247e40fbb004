"""Holds the files of a bundle by their digests, so that nothing that changes on the disk reaches an answer.

The runtime maps external weights from their file for as long as a session lives, and reads the others at its start.
`held` copies the files while it hashes the copy, and the runtime reads the copy. It is removed once everything is
loaded; what the runtime has mapped stays in memory once, for all sessions that map it. A bundle that is not as its
manifest states raises BundleInvalid.

`KeptFiles` keeps the files of a bundle open, so that another process can load it later, after others took its place.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Final

from attnserve_server.model.repository import (
    MANIFEST_FILE,
    MODEL_FILE,
    TOKENIZER_FILE,
    Bundle,
    BundleInvalid,
    digest_of,
)

_GOLDEN: Final = "golden.npz"
_CHUNK: Final = 2**20


def verify(bundle: Bundle) -> None:
    """Check that every file of a bundle is present, regular and unchanged, and that there are no others.

    An unlisted file is refused because the graph could read it as external data, unchecked. So is a file with another
    hard link, because a change through that link changes the bundle without a trace in its folder.

    Raises:
        BundleInvalid: for the first file that is wrong.
    """
    _check_list(bundle)
    for name in bundle.manifest.files:
        _read(bundle, name, len)


class KeptFiles:
    """The files of a bundle, kept open. A rename or a removal leaves them as they are.

    What is written into them in place does not reach an answer: loading them compares their digests.
    """

    def __init__(self, bundle: Bundle) -> None:
        """Open all files. Raises BundleInvalid if one is missing, is not regular, or has other hard links."""
        _check_list(bundle)
        descriptors: dict[str, int] = {}
        try:
            for name in bundle.manifest.files:
                with _opened(bundle, name) as file:
                    descriptors[name] = os.dup(file.fileno())
        except BaseException:
            _close(descriptors)
            raise
        self.bundle = replace(bundle, descriptors=descriptors)
        """The bundle, read from these files."""

    def close(self) -> None:
        """Close all files, once."""
        descriptors, self.bundle = self.bundle.descriptors, replace(self.bundle, descriptors={})
        _close(descriptors)


def _close(descriptors: Mapping[str, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


@contextmanager
def held(bundle: Bundle) -> Iterator[Bundle]:
    """Yield the bundle with a private copy of its files, which exists until the block ends.

    Without room for a copy, a bundle whose weights are all in its graphs is read in place, and verified before and
    after: the runtime keeps none of its files open.

    Raises:
        BundleInvalid: as `verify`; or there is no room to copy a bundle with weights in other files.
    """
    _check_list(bundle)
    refused: OSError
    try:
        folder = tempfile.TemporaryDirectory(prefix="attnserve-bundle-")
    except OSError as error:
        refused = error
    else:
        with folder:
            failed = _copy(bundle, Path(folder.name))
            if failed is None:
                yield replace(bundle, path=Path(folder.name), descriptors={})
                return
            refused = failed
    if _has_other_data(bundle):
        bytes_needed = bundle.files_bytes()
        raise _fault(
            bundle,
            f"its files cannot be copied to the temporary folder: {refused.strerror}; give it {bytes_needed} bytes, or "
            "set TMPDIR to another folder",
        )
    verify(bundle)
    yield bundle
    verify(bundle)


def content_of(bundle: Bundle, name: str) -> bytes:
    """Return the content of a file of the bundle. Raises BundleInvalid if it is not that of the manifest."""
    chunks: list[bytes] = []
    _read(bundle, name, chunks.append)
    return b"".join(chunks)


def _check_list(bundle: Bundle) -> None:
    """Check what the manifest lists against the folder. Raises BundleInvalid."""
    manifest, files = bundle.manifest, bundle.manifest.files
    if bundle.descriptors:
        return  # it was checked when they were opened
    graphs = (MODEL_FILE,) if manifest.past is None else (MODEL_FILE, manifest.past.file)
    absent = next((graph for graph in graphs if graph not in files), None)
    if absent is not None:
        raise _fault(bundle, f"{absent} is not listed in {MANIFEST_FILE}")
    try:
        unknown = sorted({entry.name for entry in bundle.path.iterdir()} - {*files, MANIFEST_FILE})
    except OSError as why:
        raise _fault(bundle, f"its folder cannot be read: {why.strerror}") from None
    if unknown:
        raise _fault(bundle, f"{unknown[0]!r} is not listed in {MANIFEST_FILE}")
    if digest_of(files) != manifest.digest:
        raise _fault(bundle, f"digest {manifest.digest} is not that of its files, {digest_of(files)}")


def _copy(bundle: Bundle, folder: Path) -> OSError | None:
    """Copy the files. Return the error if the folder cannot be written. Raises BundleInvalid for a wrong file."""
    for name in bundle.manifest.files:
        try:
            with (folder / name).open("wb") as target:
                _read(bundle, name, target.write)
        except OSError as error:
            return error
    return None


def _read(bundle: Bundle, name: str, write: Callable[[bytes], object]) -> None:
    """Read a file once, pass it to `write`, and compare its sha256 with the manifest.

    Raises:
        BundleInvalid: the file is missing, is not regular, or is not the one that was listed.
        OSError: of `write`.
    """
    expected, found, at = bundle.manifest.files[name], hashlib.sha256(), 0
    with _opened(bundle, name) as file:
        while chunk := _chunk(bundle, name, file, at):
            found.update(chunk)
            write(chunk)
            at += len(chunk)
    if found.hexdigest() != expected:
        raise _fault(bundle, f"{name}: sha256 {found.hexdigest()} is not the {expected} of {MANIFEST_FILE}")


def _opened(bundle: Bundle, name: str) -> FileIO:
    """Open a file of the bundle. Raises BundleInvalid if it is not regular, or has other hard links."""
    if name in bundle.descriptors:
        return FileIO(os.dup(bundle.descriptors[name]))
    path = bundle.path / name
    try:
        # Neither follow a link, nor wait for the writer of a pipe.
        file = FileIO(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK))
    except OSError as why:
        raise _fault(bundle, f"{name} is a symbolic link" if path.is_symlink() else f"{name}: {why.strerror}") from None
    facts = os.fstat(file.fileno())
    if stat.S_ISREG(facts.st_mode) and facts.st_nlink <= 1:
        return file
    file.close()
    if not stat.S_ISREG(facts.st_mode):
        raise _fault(bundle, f"{name} is no regular file")
    others = f"{name} has {facts.st_nlink} hard links, through which others may change it"
    raise _fault(bundle, f"{others}; copy the file, or write the bundle again")


def _chunk(bundle: Bundle, name: str, file: FileIO, at: int) -> bytes:
    try:
        return os.pread(file.fileno(), _CHUNK, at)  # other processes that have this descriptor share its position
    except OSError as why:
        raise _fault(bundle, f"{name}: {why.strerror}") from None


def _has_other_data(bundle: Bundle) -> bool:
    """Return whether a graph may read further files: external weights, which the runtime maps."""
    manifest = bundle.manifest
    graphs = {MODEL_FILE} if manifest.past is None else {MODEL_FILE, manifest.past.file}
    return not set(manifest.files) <= {*graphs, TOKENIZER_FILE, _GOLDEN}


def _fault(bundle: Bundle, why: str) -> BundleInvalid:
    return BundleInvalid(bundle.manifest.name, bundle.manifest.version, why)
