"""Generates the Python stubs of the `.proto` files in this folder, beside their sources.

Needs grpcio-tools and mypy-protobuf. Exit code 1 if protoc fails or, with --check, if a stub is out of date.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parent
PRIVATE = "attnserve/oip"
"""Folder of protos of a public protocol. Other packages ship protos with the same names of messages, which would
collide with these in the pool that all generated code shares. So these have a separate pool: `DESCRIPTOR.pool`."""
STUB_SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


def generate(destination: Path) -> None:
    """Write the stubs of every source under `destination`, in the folder of the source."""
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.proto"))
    well_known = resources.files("grpc_tools") / "_proto"
    arguments = [
        "protoc",
        f"--proto_path={ROOT}",
        f"--proto_path={well_known}",
        f"--python_out={destination}",
        f"--grpc_python_out={destination}",
        f"--mypy_out=quiet:{destination}",
        f"--mypy_grpc_out=quiet:{destination}",
        *sources,
    ]
    if protoc.main(arguments) != 0:
        sys.exit("protoc failed")
    for path in (destination / PRIVATE).glob("*_pb2.py"):
        text = path.read_text(encoding="utf-8")
        text = text.replace(".Default().AddSerializedFile", ".DescriptorPool().AddSerializedFile")
        path.write_text(text, encoding="utf-8")
    for path in (destination / PRIVATE).glob("*_pb2_grpc.py*"):
        path.unlink()  # its clients are other packages


def stubs(folder: Path) -> dict[Path, bytes]:
    """Return the content of the generated files in `folder`, by relative path."""
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*.py*")
        if path.name.endswith(STUB_SUFFIXES)
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a stub differs from its source")
    if not parser.parse_args().check:
        generate(ROOT)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh, committed = stubs(Path(folder)), stubs(ROOT)
    stale = sorted(str(path) for path in fresh.keys() | committed.keys() if fresh.get(path) != committed.get(path))
    if stale:
        sys.exit(f"stubs differ from their sources, run `make proto`: {', '.join(stale)}")


if __name__ == "__main__":
    main()
